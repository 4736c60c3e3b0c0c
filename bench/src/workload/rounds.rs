//! Ways to do one thing, taken in turns.

use anyhow::Result;

/// A way to do it, that returns one sample.
pub(crate) type Way<'a> = (String, Box<dyn FnMut() -> Result<f64> + 'a>);

/// One sample of each way per round, after a round that doesn't count. Every round has another
/// order, so that none always comes after the one that leaves most pages to be used again.
pub(crate) fn interleaved(rounds: u32, mut ways: Vec<Way<'_>>) -> Result<Vec<(String, Vec<f64>)>> {
    let mut samples: Vec<Vec<f64>> = ways.iter().map(|_| Vec::new()).collect();
    let count = ways.len();
    for round in 0..=rounds as usize {
        for way in order(round, count) {
            let sample = ways[way].1()?;
            if round > 0 {
                samples[way].push(sample);
            }
        }
    }
    let names = ways.into_iter().map(|(name, _)| name);
    Ok(names.zip(samples).collect())
}

/// An order of the first `count` numbers; all of them come, one after the other.
fn order(number: usize, count: usize) -> Vec<usize> {
    let mut rest: Vec<usize> = (0..count).collect();
    let mut number = number;
    let mut order = Vec::with_capacity(count);
    while !rest.is_empty() {
        let choice = number % rest.len();
        number /= rest.len();
        order.push(rest.remove(choice));
    }
    order
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn every_round_has_every_way_once_and_the_first_does_not_count() {
        let order = RefCell::new(String::new());
        let order = &order;
        let way = |name: char, sample: f64| -> Way<'_> {
            let call = move || {
                order.borrow_mut().push(name);
                Ok(sample)
            };
            (name.to_string(), Box::new(call))
        };
        let samples = interleaved(2, vec![way('a', 1.0), way('b', 2.0)]).unwrap();
        assert_eq!(*order.borrow(), "abbaab");
        assert_eq!(samples[1], ("b".to_owned(), vec![2.0, 2.0]));
    }

    #[test]
    fn every_way_comes_after_every_other_equally_often() {
        let mut followed = std::collections::BTreeMap::new();
        for number in 0..6 {
            for pair in order(number, 3).windows(2) {
                *followed.entry((pair[0], pair[1])).or_insert(0) += 1;
            }
        }
        assert_eq!(followed.len(), 6);
        assert!(followed.values().all(|times| *times == 2), "{followed:?}");
        assert_eq!(order(6, 3), order(0, 3));
    }
}
