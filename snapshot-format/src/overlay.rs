//! A diff laid over its parent: the complete map of the new generation.
//!
//! Pure functions over extents. While a diff is being written, its own pages carry the origin
//! [`own_origin`], one past the parent's table; [`keep_referenced`] then makes the new table and
//! renumbers.

use std::ops::Range;

use crate::extent::{Extent, Origin, push_merged};
use crate::map_header::{BuildEntry, MAX_BUILDS};
use crate::memory_map::MemoryMap;
use crate::units::{PageCount, PageIndex};

/// The origin of the new build's own pages over a parent with `parent_builds` table entries.
pub(crate) fn own_origin(parent_builds: usize) -> Origin {
    Origin::Build(u16::try_from(parent_builds).expect("a table has at most 65,535 entries"))
}

/// What lies under a diff: the parent's extents, or zeros if there is no parent.
pub(crate) fn inherited(
    parent: Option<&MemoryMap>,
    range: Range<PageIndex>,
) -> impl Iterator<Item = Extent> + '_ {
    let zeros = (parent.is_none() && range.start < range.end).then(|| Extent::zero(range.clone()));
    parent
        .map(|map| map.extents(range))
        .into_iter()
        .flatten()
        .chain(zeros)
}

/// The complete extents of a memory: the changes where there are some, what lies under them
/// elsewhere.
///
/// Changes are sorted, don't overlap and lie in the memory.
pub(crate) fn overlay(
    parent: Option<&MemoryMap>,
    changes: &[Extent],
    memory_pages: PageCount,
) -> Vec<Extent> {
    // A change cuts an extent of the parent in two at most.
    let inherited_extents = parent.map_or(1, MemoryMap::extent_count);
    let mut extents = Vec::with_capacity(inherited_extents + 2 * changes.len());
    let mut next = PageIndex::new(0);
    for change in changes {
        inherited(parent, next..change.start).for_each(|e| push_merged(&mut extents, e));
        push_merged(&mut extents, *change);
        next = change.end();
    }
    let end = PageIndex::new(0) + memory_pages;
    inherited(parent, next..end).for_each(|e| push_merged(&mut extents, e));
    extents
}

/// The build table of a new map: the parent's builds that are still referenced, then its own.
/// Renumbers the extents accordingly.
///
/// `Err` is the number of builds, if it is more than a map can name.
pub(crate) fn keep_referenced(
    extents: &mut [Extent],
    parent_builds: &[BuildEntry],
    own: BuildEntry,
) -> Result<Vec<BuildEntry>, usize> {
    let mut referenced = vec![false; parent_builds.len() + 1];
    for extent in extents.iter() {
        if let Origin::Build(index) = extent.origin {
            referenced[usize::from(index)] = true;
        }
    }
    referenced[parent_builds.len()] = true;

    let mut table = Vec::new();
    let mut renumbered = vec![0; referenced.len()];
    for (index, build) in parent_builds.iter().chain([&own]).enumerate() {
        if referenced[index] {
            renumbered[index] = u16::try_from(table.len()).unwrap_or(u16::MAX);
            table.push(*build);
        }
    }
    if table.len() > MAX_BUILDS {
        return Err(table.len());
    }
    for extent in extents.iter_mut() {
        if let Origin::Build(index) = &mut extent.origin {
            *index = renumbered[usize::from(*index)];
        }
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::build_id::BuildId;
    use crate::map_encode::{MapContent, encode_map};
    use crate::units::{Generation, PageSize};

    fn extent(start: u64, pages: u64, origin: Origin, storage: u64) -> Extent {
        Extent {
            start: PageIndex::new(start),
            pages: PageCount::new(pages),
            origin,
            storage: PageIndex::new(storage),
        }
    }

    fn build(number: u8, generation: u32) -> BuildEntry {
        BuildEntry {
            id: BuildId::from_bytes([number; 16]),
            generation: Generation::new(generation),
            data_pages: PageCount::new(100),
            sums_crc: 0,
        }
    }

    fn map(builds: &[BuildEntry], extents: &[Extent]) -> MemoryMap {
        let pages = extents.iter().map(|extent| extent.pages).sum();
        let parent = (builds[builds.len() - 1].generation > Generation::BASE)
            .then(|| BuildId::from_bytes([99; 16]));
        let bytes = encode_map(&MapContent {
            page_size: PageSize::Size4K,
            memory_pages: pages,
            parent,
            builds,
            extents,
        });
        MemoryMap::from_bytes(bytes, Path::new("map")).unwrap()
    }

    #[test]
    fn mistake_1_neighbours_with_scattered_storage_are_not_merged() {
        let base = Origin::Build(0);
        // Pages 0 to 3 are neighbours of one build, stored at 5, 6, then 3, then 4.
        let scattered = [
            extent(0, 2, base, 5),
            extent(2, 1, base, 3),
            extent(3, 5, base, 4),
        ];
        let parent = map(&[build(1, 0)], &scattered);
        let own = own_origin(1);
        let result = overlay(Some(&parent), &[extent(4, 1, own, 0)], PageCount::new(8));
        // 2 and 3 are one run in storage too; 0 and 2 are not.
        let expected = [
            extent(0, 2, base, 5),
            extent(2, 2, base, 3),
            extent(4, 1, own, 0),
            extent(5, 3, base, 6),
        ];
        assert_eq!(result, expected);
    }

    #[test]
    fn change_over_the_whole_memory_leaves_nothing_of_the_parent() {
        let parent = map(&[build(1, 0)], &[extent(0, 8, Origin::Build(0), 0)]);
        let own = own_origin(1);
        let mut extents = overlay(Some(&parent), &[extent(0, 8, own, 0)], PageCount::new(8));
        let table = keep_referenced(&mut extents, parent.builds(), build(2, 1)).unwrap();
        assert_eq!(table, [build(2, 1)]);
        assert_eq!(extents, [extent(0, 8, Origin::Build(0), 0)]);
    }

    #[test]
    fn builds_that_are_still_referenced_keep_their_order_and_the_own_one_is_last() {
        let (first, third) = (Origin::Build(0), Origin::Build(2));
        let builds = [build(1, 0), build(2, 1), build(3, 2)];
        let parent = [extent(0, 1, first, 0), extent(1, 1, Origin::Build(1), 0)];
        let parent = map(
            &builds,
            &[parent.as_slice(), &[extent(2, 1, third, 0)]].concat(),
        );
        let change = extent(1, 1, own_origin(3), 0);
        let mut extents = overlay(Some(&parent), &[change], PageCount::new(3));
        let table = keep_referenced(&mut extents, parent.builds(), build(4, 3)).unwrap();
        assert_eq!(table, [build(1, 0), build(3, 2), build(4, 3)]);
        let origins: Vec<_> = extents.iter().map(|extent| extent.origin).collect();
        assert_eq!(
            origins,
            [Origin::Build(0), Origin::Build(2), Origin::Build(1)]
        );
    }

    #[test]
    fn more_builds_than_a_map_can_name_are_refused() {
        let entry = |number: u32| {
            let mut id = [1; 16];
            id[..4].copy_from_slice(&number.to_le_bytes());
            BuildEntry {
                id: BuildId::from_bytes(id),
                ..build(1, number)
            }
        };
        let builds: Vec<_> = (0..65_535).map(entry).collect();
        let extents: Vec<_> = (0..65_535)
            .map(|index| extent(u64::from(index), 1, Origin::Build(index), 0))
            .collect();
        let full = map(&builds, &extents);
        assert_eq!(full.builds().len(), MAX_BUILDS);
        let mut extents: Vec<_> = full.all_extents().collect();
        let own = entry(65_535);
        assert_eq!(
            keep_referenced(&mut extents, full.builds(), own),
            Err(65_536)
        );
        // Replacing the last page of one of them makes room for the new one.
        let change = extent(7, 1, own_origin(MAX_BUILDS), 0);
        let mut extents = overlay(Some(&full), &[change], PageCount::new(65_535));
        let table = keep_referenced(&mut extents, full.builds(), own).unwrap();
        assert_eq!(table.len(), MAX_BUILDS);
    }

    #[test]
    fn memory_of_sixteen_tebibytes_is_one_zero_run_in_two_records() {
        let pages = PageSize::Size4K.max_memory_pages();
        let extents = overlay(None, &[], pages);
        assert_eq!(extents.len(), 1);
        let map = map(&[build(1, 0)], &extents);
        assert_eq!(map.extent_count(), 2);
        let last = PageIndex::new(pages.get() - 1);
        assert_eq!(map.lookup(last).unwrap().origin, Origin::Zero);
    }
}
