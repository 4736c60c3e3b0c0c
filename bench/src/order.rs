//! The order in which pages are touched: a permutation that a seed repeats, or one that a guest
//! made.

use crate::args::Order;

/// What a guest touched; its head says how it was recorded.
const RECORDED: &str = include_str!("../traces/linux-resume.txt");

/// All pages below `pages`, in this order.
pub(crate) fn ordered(order: Order, pages: u64, seed: u64) -> Vec<u64> {
    const RUN: u64 = 8;
    match order {
        Order::Random => shuffled(pages, seed),
        Order::Sequential => (0..pages).collect(),
        Order::Runs => {
            let runs = shuffled(pages.div_ceil(RUN), seed);
            let of = |run: u64| run * RUN..(run * RUN + RUN).min(pages);
            runs.into_iter().flat_map(of).collect()
        }
        Order::Recorded => {
            let mut order: Vec<u64> = recorded().filter(|page| *page < pages).collect();
            let mut touched = vec![false; pages as usize];
            order.iter().for_each(|page| touched[*page as usize] = true);
            order.extend((0..pages).filter(|page| !touched[*page as usize]));
            order
        }
    }
}

/// How many pages the memory of a recorded order has.
pub(crate) fn recorded_memory() -> u64 {
    let head = RECORDED
        .lines()
        .find_map(|line| line.strip_prefix("memory "));
    let pages = head.and_then(|pages| pages.parse().ok());
    pages.expect("a recorded order begins with the size of its memory")
}

/// How many touches of an order count: a guest didn't touch what comes after what it touched.
pub(crate) fn counted(order: Order, pages: u64) -> u64 {
    match order {
        Order::Recorded => recorded().count() as u64,
        Order::Random | Order::Sequential | Order::Runs => pages,
    }
}

/// The pages that a guest touched, as it did.
fn recorded() -> impl Iterator<Item = u64> {
    let runs = RECORDED.lines().filter_map(|line| {
        let (first, pages) = line.split_once(' ')?;
        Some((first.parse::<u64>().ok()?, pages.parse::<u64>().ok()?))
    });
    runs.flat_map(|(first, pages)| first..first + pages)
}

/// All pages below `pages`, shuffled.
fn shuffled(pages: u64, seed: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..pages).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut order);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_order_has_every_page_once() {
        for order in [
            Order::Random,
            Order::Sequential,
            Order::Runs,
            Order::Recorded,
        ] {
            let mut pages = ordered(order, 1001, 3);
            pages.sort_unstable();
            assert!(pages.into_iter().eq(0..1001), "{order:?}");
        }
    }

    #[test]
    fn a_recorded_order_begins_as_the_guest_did() {
        let pages = recorded_memory();
        let order = ordered(Order::Recorded, pages, 1);
        assert_eq!(order[..5], [32, 33, 34, 1312, 1304]);
        let counted = counted(Order::Recorded, pages);
        assert_eq!(counted, 2213);
        assert!(recorded().all(|page| page < pages));
    }

    #[test]
    fn a_seed_repeats_its_order_and_every_page_is_in_it() {
        let order = shuffled(1000, 7);
        assert_eq!(order, shuffled(1000, 7));
        assert_ne!(order, shuffled(1000, 8));
        let mut sorted = order;
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..1000));
    }
}
