//! How far the data of each origin goes, as a table that needs no branch to be asked.

use crate::extent::EXTENT_BYTES;
use crate::le::u32_at;
use crate::map_header::BuildEntry;

pub(crate) type Record = [u8; EXTENT_BYTES];

/// The last storage page of each origin. Zero memory has no data to stay inside of; its storage
/// field is judged by itself.
#[derive(Debug)]
pub(crate) enum Limits {
    /// Origins up to 255, which is every chain that a policy leaves alone.
    Few(Box<[u32; 256]>, u32),
    /// All that 16 bits can name.
    Many(Box<[u32; 65_536]>, u32),
    /// A build other than the last has no page at all, so that there is no last one to compare
    /// with. No writer of this crate makes such a table.
    Odd,
}

impl Limits {
    pub(crate) fn of(builds: &[BuildEntry]) -> Self {
        // A diff that stores nothing is the one build without pages that is usual: nothing may
        // name it.
        let own = builds.last().is_some_and(|own| !own.data_pages.is_zero());
        let named = if own {
            builds
        } else {
            &builds[..builds.len() - 1]
        };
        let last = |build: &BuildEntry| {
            let pages = build.data_pages.get().checked_sub(1)?;
            Some(u32::try_from(pages).expect("a parsed table has at most 2^32 pages"))
        };
        let Some(limits) = named.iter().map(last).collect::<Option<Vec<u32>>>() else {
            return Self::Odd;
        };
        let most = u32::try_from(limits.len()).expect("a table has at most 65,535 entries");
        if limits.len() < 256 {
            Self::Few(table(&limits), most)
        } else {
            Self::Many(table(&limits), most)
        }
    }
}

fn table<const N: usize>(limits: &[u32]) -> Box<[u32; N]> {
    let mut table = vec![0; N];
    table[0] = u32::MAX;
    table[1..=limits.len()].copy_from_slice(limits);
    table.try_into().expect("the table has N entries")
}

/// Whether every record of a block is good, and each begins where the one before ends. Where the
/// first begins and the last ends is for the caller to compare.
///
/// In 32 bits throughout, so that sixteen records fit a vector. A sum that wraps shows in what
/// is smaller than its part.
#[inline(always)]
pub(crate) fn block_is_good<const N: usize>(block: &[Record], last: &[u32; N], most: u32) -> bool {
    let mut bad = 0;
    for (record, next) in block.iter().zip(&block[1..]) {
        let (start, pages) = (u32_at(record, 0), u32_at(record, 4));
        let next = u32_at(next, 0);
        bad |= start.wrapping_add(pages) ^ next;
        bad |= u32::from(next <= start);
        bad |= storage_is_bad(record, last, most);
    }
    // Alone, it may end at page 2^32.
    let end = &block[block.len() - 1];
    bad |= u32::from(u32_at(end, 4) == 0) | storage_is_bad(end, last, most);
    bad == 0
}

/// Not 0 if the record names what isn't there.
#[inline(always)]
fn storage_is_bad<const N: usize>(record: &Record, last: &[u32; N], most: u32) -> u32 {
    let (pages, storage) = (u32_at(record, 4), u32_at(record, 8));
    // With the reserved bits above it, which make it larger than any.
    let origin = u32_at(record, 12);
    let end = storage.wrapping_add(pages.wrapping_sub(1));
    let zero_memory = if origin == 0 { storage } else { 0 };
    zero_memory
        | u32::from(origin > most)
        | u32::from(end < storage)
        | u32::from(end > last[origin as usize % N])
}
