//! The order in which pages are touched: a permutation that a seed repeats.

use crate::args::Order;

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
    }
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
        for order in [Order::Random, Order::Sequential, Order::Runs] {
            let mut pages = ordered(order, 1001, 3);
            pages.sort_unstable();
            assert!(pages.into_iter().eq(0..1001), "{order:?}");
        }
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
