//! Guest memory as the VMM mapped it: regions, and the way from a host address to a
//! page and back.
//!
//! A [`RegionTable`] exists only for geometry that was checked: aligned, disjoint on
//! both sides, covering the guest's memory exactly. Nothing later checks again.

use serde::{Deserialize, Serialize};
use snapshot_format::{PageCount, PageIndex};
use thiserror::Error;

use crate::address::HostAddr;

/// The most regions one guest may have. Firecracker uses 2, hot-plugged memory adds
/// one each; a peer that claims more is not a VMM.
pub const MAX_REGIONS: usize = 1024;

/// Guest memory that is contiguous in guest and host addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where the VMM mapped it.
    pub base: HostAddr,
    /// Its first page in the snapshot's memory.
    pub first_page: PageIndex,
    /// How many pages.
    pub pages: PageCount,
}

/// Why a VMM's regions can't be served.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RegionError {
    /// The message holds no region.
    #[error("The hand-off names no memory region")]
    Empty,
    /// More regions than [`MAX_REGIONS`].
    #[error("The hand-off names {count} memory regions; at most {MAX_REGIONS} are served")]
    TooMany {
        /// How many there were.
        count: usize,
    },
    /// A field of one region is unusable.
    #[error("Region {index}: {field} is {value:#x}, {reason}")]
    Field {
        /// Which region, from 0.
        index: usize,
        /// The message's field.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// Why that can't be.
        reason: &'static str,
    },
    /// Two regions overlap, or leave a hole in the snapshot's memory.
    #[error("Regions {first} and {second} {what}")]
    Conflict {
        /// One region's index.
        first: usize,
        /// The other's.
        second: usize,
        /// How they conflict.
        what: &'static str,
    },
    /// The regions together aren't as large as the memory of the build.
    #[error("The regions hold {found} pages, the build {expected}")]
    WrongSize {
        /// Pages in the hand-off.
        found: u64,
        /// Pages of the build.
        expected: u64,
    },
}

/// One region as a VMM describes it, unchecked; all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimedRegion {
    /// Host virtual address.
    pub base: u64,
    /// Length.
    pub size: u64,
    /// Offset in the snapshot's memory.
    pub offset: u64,
    /// Page size of the mapping.
    pub page_size: u64,
}

/// All regions of one guest, sorted by host address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionTable {
    page_bytes: u64,
    by_addr: Vec<Region>,
    by_page: Vec<Region>,
}

impl RegionTable {
    /// Checks a VMM's claims against the memory that is to be served.
    ///
    /// # Errors
    /// The first claim that can't be true or can't be served.
    pub fn new(
        claims: &[ClaimedRegion],
        page_bytes: u64,
        memory: PageCount,
    ) -> Result<Self, RegionError> {
        if claims.is_empty() {
            return Err(RegionError::Empty);
        }
        if claims.len() > MAX_REGIONS {
            return Err(RegionError::TooMany {
                count: claims.len(),
            });
        }
        let mut indexed = Vec::with_capacity(claims.len());
        for (index, claim) in claims.iter().enumerate() {
            indexed.push((index, check_one(index, claim, page_bytes)?));
        }
        let found = indexed
            .iter()
            .fold(0u64, |sum, (_, r)| sum.saturating_add(r.pages.get()));
        if found != memory.get() {
            return Err(RegionError::WrongSize {
                found,
                expected: memory.get(),
            });
        }

        let conflict = |a: &(usize, Region), b: &(usize, Region), what| RegionError::Conflict {
            first: a.0,
            second: b.0,
            what,
        };
        indexed.sort_by_key(|(_, region)| region.first_page);
        let mut next = 0;
        for (at, current) in indexed.iter().enumerate() {
            if current.1.first_page.get() != next {
                let previous = &indexed[at.saturating_sub(1)];
                return Err(conflict(
                    previous,
                    current,
                    "overlap or leave a hole in the snapshot",
                ));
            }
            next += current.1.pages.get();
        }
        let by_page = indexed.iter().map(|(_, region)| *region).collect();

        indexed.sort_by_key(|(_, region)| region.base);
        for pair in indexed.windows(2) {
            let end = pair[0].1.base.get() + pair[0].1.pages.get() * page_bytes;
            if end > pair[1].1.base.get() {
                return Err(conflict(&pair[0], &pair[1], "overlap in host addresses"));
            }
        }
        let by_addr = indexed.iter().map(|(_, region)| *region).collect();
        Ok(Self {
            page_bytes,
            by_addr,
            by_page,
        })
    }

    /// Bytes of one page.
    #[must_use]
    pub fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// The regions in host-address order.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.by_addr
    }

    /// The page that a host address lies in.
    #[must_use]
    pub fn page_at(&self, addr: HostAddr) -> Option<PageIndex> {
        let after = self.by_addr.partition_point(|region| region.base <= addr);
        let region = self.by_addr.get(after.checked_sub(1)?)?;
        let page = (addr.get() - region.base.get()) / self.page_bytes;
        (page < region.pages.get()).then(|| PageIndex::new(region.first_page.get() + page))
    }

    /// Where a page is mapped, and how many pages follow it in the same region
    /// (itself included): a copy must not run past them.
    ///
    /// # Panics
    /// The page is outside the memory.
    #[must_use]
    pub fn addr_of(&self, page: PageIndex) -> (HostAddr, PageCount) {
        let after = self
            .by_page
            .partition_point(|region| region.first_page <= page);
        let region = &self.by_page[after.checked_sub(1).expect("regions start at page 0")];
        let into = page.get() - region.first_page.get();
        assert!(
            into < region.pages.get(),
            "page {page} is outside the guest's memory"
        );
        let addr = HostAddr::new(region.base.get() + into * self.page_bytes);
        (addr, PageCount::new(region.pages.get() - into))
    }

    /// The pages of every region that a host range touches, clipped to it; for
    /// `REMOVE`, whose range may span regions.
    pub fn pages_in(
        &self,
        start: HostAddr,
        end: HostAddr,
    ) -> impl Iterator<Item = (PageIndex, PageCount)> + '_ {
        self.by_addr.iter().filter_map(move |region| {
            let base = region.base.get();
            let first = start.get().saturating_sub(base) / self.page_bytes;
            let last = end.get().saturating_sub(base).div_ceil(self.page_bytes);
            let last = last.min(region.pages.get());
            (first < last).then(|| {
                (
                    PageIndex::new(region.first_page.get() + first),
                    PageCount::new(last - first),
                )
            })
        })
    }
}

fn check_one(index: usize, claim: &ClaimedRegion, page_bytes: u64) -> Result<Region, RegionError> {
    let bad = |field, value, reason| {
        Err(RegionError::Field {
            index,
            field,
            value,
            reason,
        })
    };
    if claim.page_size != page_bytes {
        return bad(
            "page_size",
            claim.page_size,
            "but its snapshot has pages of another size",
        );
    }
    if claim.size == 0 {
        return bad("size", 0, "which is no memory");
    }
    for (field, value) in [
        ("base_host_virt_addr", claim.base),
        ("size", claim.size),
        ("offset", claim.offset),
    ] {
        if value % page_bytes != 0 {
            return bad(field, value, "which is not a multiple of the page size");
        }
    }
    // User addresses end below 2^56 on every machine this runs on; staying there keeps
    // all later arithmetic exact.
    const END: u64 = 1 << 56;
    for (field, value) in [
        ("base_host_virt_addr", claim.base),
        ("offset", claim.offset),
    ] {
        if value.checked_add(claim.size).is_none_or(|end| end > END) {
            return bad(field, value, "which with the size leaves the address space");
        }
    }
    Ok(Region {
        base: HostAddr::new(claim.base),
        first_page: PageIndex::new(claim.offset / page_bytes),
        pages: PageCount::new(claim.size / page_bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: u64 = 4096;

    fn claim(base: u64, pages: u64, first: u64) -> ClaimedRegion {
        ClaimedRegion {
            base: base * P,
            size: pages * P,
            offset: first * P,
            page_size: P,
        }
    }

    fn table(claims: &[ClaimedRegion], pages: u64) -> Result<RegionTable, RegionError> {
        RegionTable::new(claims, P, PageCount::new(pages))
    }

    #[test]
    fn addresses_and_pages_agree_across_regions() {
        // The second region of the snapshot is mapped below the first.
        let table = table(&[claim(100, 4, 0), claim(50, 2, 4)], 6).unwrap();
        assert_eq!(
            table.page_at(HostAddr::new(100 * P + 5)),
            Some(PageIndex::new(0))
        );
        assert_eq!(
            table.page_at(HostAddr::new(51 * P)),
            Some(PageIndex::new(5))
        );
        assert_eq!(table.page_at(HostAddr::new(52 * P)), None);
        assert_eq!(table.page_at(HostAddr::new(49 * P)), None);
        assert_eq!(table.page_at(HostAddr::new(104 * P)), None);
        for page in 0..6 {
            let (addr, left) = table.addr_of(PageIndex::new(page));
            assert_eq!(table.page_at(addr), Some(PageIndex::new(page)));
            assert_eq!(left.get(), if page < 4 { 4 - page } else { 6 - page });
        }
    }

    #[test]
    fn a_remove_across_two_regions_touches_both() {
        let table = table(&[claim(100, 4, 0), claim(104, 2, 4)], 6).unwrap();
        let runs: Vec<_> = table
            .pages_in(HostAddr::new(103 * P), HostAddr::new(105 * P))
            .map(|(page, count)| (page.get(), count.get()))
            .collect();
        assert_eq!(runs, [(3, 1), (4, 1)]);
    }

    #[test]
    fn hostile_regions_are_refused_by_name() {
        let field = |claims: &[ClaimedRegion]| match table(claims, 4) {
            Err(RegionError::Field { field, .. }) => field,
            other => panic!("expected a field error, got {other:?}"),
        };
        assert_eq!(
            field(&[ClaimedRegion {
                page_size: 2 << 20,
                ..claim(1, 4, 0)
            }]),
            "page_size"
        );
        assert_eq!(
            field(&[ClaimedRegion {
                size: 0,
                ..claim(1, 4, 0)
            }]),
            "size"
        );
        assert_eq!(
            field(&[ClaimedRegion {
                offset: 1,
                ..claim(1, 4, 0)
            }]),
            "offset"
        );
        assert_eq!(
            field(&[ClaimedRegion {
                base: 7,
                ..claim(1, 4, 0)
            }]),
            "base_host_virt_addr"
        );
        let wrap = ClaimedRegion {
            base: u64::MAX - P + 1,
            ..claim(1, 4, 0)
        };
        assert_eq!(field(&[wrap]), "base_host_virt_addr");
        assert_eq!(table(&[], 4), Err(RegionError::Empty));
        let many = vec![claim(1, 1, 0); MAX_REGIONS + 1];
        assert!(matches!(table(&many, 4), Err(RegionError::TooMany { .. })));
    }

    #[test]
    fn overlaps_holes_and_wrong_sizes_are_refused() {
        assert!(matches!(
            table(&[claim(1, 3, 0)], 4),
            Err(RegionError::WrongSize { .. })
        ));
        let overlap_in_snapshot = [claim(1, 2, 0), claim(10, 2, 1)];
        assert!(matches!(
            table(&overlap_in_snapshot, 4),
            Err(RegionError::Conflict { .. })
        ));
        let hole = [claim(1, 2, 0), claim(10, 2, 3)];
        assert!(matches!(table(&hole, 4), Err(RegionError::Conflict { .. })));
        let overlap_in_host = [claim(1, 2, 0), claim(2, 2, 2)];
        assert!(matches!(
            table(&overlap_in_host, 4),
            Err(RegionError::Conflict { .. })
        ));
    }
}
