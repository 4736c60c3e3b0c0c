//! The host's huge pages, and who has been promised how many.
//!
//! Guests touch their memory little by little, and a VMM whose guest touches a huge page that the
//! host has not got is ended by the kernel (`SIGBUS`). So each guest's pages are promised to it as
//! a whole before it starts, and one that can't have them is refused.
//!
//! Source: `Documentation/admin-guide/mm/hugetlbpage.rst` of the kernel.

use std::path::Path;
use std::sync::Arc;
use std::{fs, io};

use parking_lot::Mutex;
use snapshot_format::PageSize;
use thiserror::Error;

const COUNTERS: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// There are not as many as a guest needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "The guest needs {wanted} huge pages of 2 MiB; the host has {total}, of which {promised} are \
     promised to other guests and {available} can be had now: give it more \
     (`sysctl vm.nr_hugepages`), or end a sandbox that has some"
)]
pub struct TooFew {
    /// What the guest needs.
    pub wanted: u64,
    /// All that there are, and those that the kernel may still make.
    pub total: u64,
    /// Those of running guests.
    pub promised: u64,
    /// Those that nobody uses.
    pub available: u64,
}

/// The kernel's counters, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counters {
    /// All that exist, those beyond the pool (`surplus`) among them.
    total: u64,
    free: u64,
    /// Free ones that somebody has a right to.
    reserved: u64,
    surplus: u64,
    /// How many the kernel may make beyond the pool.
    overcommit: u64,
}

impl Counters {
    fn read(dir: &Path) -> io::Result<Self> {
        let number = |name: &str| {
            let text = fs::read_to_string(dir.join(name))?;
            text.trim().parse().map_err(io::Error::other)
        };
        Ok(Self {
            total: number("nr_hugepages")?,
            free: number("free_hugepages")?,
            reserved: number("resv_hugepages")?,
            surplus: number("surplus_hugepages")?,
            overcommit: number("nr_overcommit_hugepages")?,
        })
    }

    /// Whether so many more can be promised.
    fn check(self, promised: u64, wanted: u64) -> Result<(), TooFew> {
        let to_come = self.overcommit.saturating_sub(self.surplus);
        let total = self.total + to_come;
        let available = self.free.saturating_sub(self.reserved) + to_come;
        if promised + wanted <= total && wanted <= available {
            return Ok(());
        }
        Err(TooFew {
            wanted,
            total,
            promised,
            available,
        })
    }
}

/// Who has been promised how many; clones are the same.
#[derive(Clone, Debug, Default)]
pub struct HugePages {
    promised: Arc<Mutex<u64>>,
}

/// Pages promised to one guest until this is dropped.
#[derive(Debug)]
pub struct Promise {
    promised: Arc<Mutex<u64>>,
    pages: u64,
}

impl HugePages {
    /// Promises a guest so much memory.
    ///
    /// # Errors
    /// The host has not got it.
    pub fn promise(&self, bytes: u64) -> Result<Promise, TooFew> {
        // A kernel without any has no counters.
        let counters = Counters::read(Path::new(COUNTERS)).unwrap_or_default();
        self.promise_of(counters, bytes)
    }

    /// Writes down what was promised to a guest that runs already.
    #[must_use]
    pub fn promised_before(&self, bytes: u64) -> Promise {
        self.hand_out(&mut self.promised.lock(), pages_of(bytes))
    }

    fn promise_of(&self, counters: Counters, bytes: u64) -> Result<Promise, TooFew> {
        let pages = pages_of(bytes);
        let mut promised = self.promised.lock();
        counters.check(*promised, pages)?;
        Ok(self.hand_out(&mut promised, pages))
    }

    fn hand_out(&self, promised: &mut u64, pages: u64) -> Promise {
        *promised += pages;
        Promise {
            promised: self.promised.clone(),
            pages,
        }
    }
}

fn pages_of(bytes: u64) -> u64 {
    bytes.div_ceil(PageSize::Size2M.bytes())
}

impl Drop for Promise {
    fn drop(&mut self) {
        *self.promised.lock() -= self.pages;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn pool(total: u64) -> Counters {
        Counters {
            total,
            free: total,
            ..Counters::default()
        }
    }

    #[test]
    fn what_was_promised_is_not_promised_again_until_it_is_given_back() {
        let pages = HugePages::default();
        let first = pages.promise_of(pool(10), 12 * MIB).unwrap();
        // The first guest has touched nothing yet: all ten are free still.
        let refused = pages.promise_of(pool(10), 10 * MIB).unwrap_err();
        assert_eq!(
            (refused.wanted, refused.promised, refused.available),
            (5, 6, 10)
        );
        assert!(refused.to_string().contains("vm.nr_hugepages"), "{refused}");
        let second = pages.promise_of(pool(10), 8 * MIB).unwrap();
        drop(first);
        pages.promise_of(pool(10), 12 * MIB).unwrap();
        drop(second);
        assert_eq!(*pages.promised.lock(), 0);
    }

    #[test]
    fn what_others_use_or_have_a_right_to_is_not_promised() {
        let used = Counters {
            free: 4,
            reserved: 1,
            ..pool(10)
        };
        assert_eq!(used.check(0, 4).unwrap_err().available, 3);
        assert_eq!(used.check(0, 3), Ok(()));
    }

    #[test]
    fn what_the_kernel_may_still_make_counts() {
        let overcommitted = Counters {
            overcommit: 5,
            total: 2,
            surplus: 2,
            ..Counters::default()
        };
        assert_eq!(overcommitted.check(0, 3), Ok(()));
        assert_eq!(overcommitted.check(3, 3).unwrap_err().total, 5);
        assert!(Counters::default().check(0, 1).is_err());
    }
}
