//! Ways to do one thing, taken in turns.

use anyhow::Result;

/// A way to do it, that returns one sample.
pub(crate) type Way<'a> = (String, Box<dyn FnMut() -> Result<f64> + 'a>);

/// One sample of each way per round, after a round that doesn't count. Every round begins with
/// another way, so that none is always the one after the most wasteful.
pub(crate) fn interleaved(rounds: u32, mut ways: Vec<Way<'_>>) -> Result<Vec<(String, Vec<f64>)>> {
    let mut samples: Vec<Vec<f64>> = ways.iter().map(|_| Vec::new()).collect();
    let count = ways.len();
    for round in 0..=rounds as usize {
        for turn in 0..count {
            let way = (round + turn) % count;
            let sample = ways[way].1()?;
            if round > 0 {
                samples[way].push(sample);
            }
        }
    }
    let names = ways.into_iter().map(|(name, _)| name);
    Ok(names.zip(samples).collect())
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
}
