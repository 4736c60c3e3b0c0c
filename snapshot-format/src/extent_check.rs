//! Validation of the extents section: one pass that checksums, judges and indexes.
//!
//! The pass works on blocks that stay in the L2 cache, and judges a block without branches per
//! record; only a block that is known to be bad is walked again to name its first fault. An
//! extent is good if it begins where the last one ended, is not empty, lies inside its origin's
//! data, and has zeros where the format says so.

use std::path::Path;

use crate::checksum::mask;
use crate::error::Fault;
use crate::extent::{EXTENT_BYTES, record_start};
use crate::le::u64_at;
use crate::map_header::{BuildEntry, MapHeader};
use crate::top_index::{TopIndex, TopIndexBuilder};

type Record = [u8; EXTENT_BYTES];

/// Above every storage page, and small enough for signed differences.
const NO_LIMIT: u64 = 1 << 62;
/// 64 KiB of records.
const BLOCK_RECORDS: usize = 4096;

/// A record's numbers, wide enough that no sum of them overflows.
struct Fields {
    start: u64,
    pages: u64,
    storage: u64,
    origin: usize,
    reserved: u64,
}

fn fields(record: &Record) -> Fields {
    let (low, high) = (u64_at(record, 0), u64_at(record, 8));
    Fields {
        start: low & 0xffff_ffff,
        pages: low >> 32,
        storage: high & 0xffff_ffff,
        origin: (high >> 32 & 0xffff) as usize,
        reserved: high >> 48,
    }
}

/// Checks all extents of a map and returns the index over them.
///
/// The caller has checked that the section lies in `file_bytes` and is not empty.
pub(crate) fn check_extents(
    header: &MapHeader,
    builds: &[BuildEntry],
    file_bytes: &[u8],
    file: &Path,
) -> Result<TopIndex, Fault> {
    let section = header.extents_range();
    let records = file_bytes[section.clone()].as_chunks().0;
    // Zero memory has no data to stay inside of; its storage field is judged by itself.
    let limits: Vec<u64> = std::iter::once(NO_LIMIT)
        .chain(builds.iter().map(|build| build.data_pages.get()))
        .collect();

    let memory_pages = header.memory_pages.get();
    let mut index = TopIndexBuilder::new(header.memory_pages, records.len());
    let (mut crc, mut page) = (0, 0);
    let mut first_fault = None;
    for (number, block) in records.chunks(BLOCK_RECORDS).enumerate() {
        crc = crc32c::crc32c_append(crc, block.as_flattened());
        if first_fault.is_some() {
            continue;
        }
        let (good, end) = judge(block, page, &limits, &mut index);
        if !good || end > memory_pages {
            let at = section.start + number * BLOCK_RECORDS * EXTENT_BYTES;
            first_fault = name_fault(block, page, &limits, (file, at as u64)).or_else(|| {
                let what = "end of the extents";
                Some(Fault::new(file, at as u64, what, memory_pages, end))
            });
            continue;
        }
        page = end;
    }
    if mask(crc) != header.extents_crc {
        let (at, stored) = (section.start as u64, header.extents_crc);
        return Err(Fault::checksum(
            file,
            at,
            "extents checksum",
            stored,
            mask(crc),
        ));
    }
    if let Some(fault) = first_fault {
        return Err(fault);
    }
    if page != memory_pages {
        let at = section.end - EXTENT_BYTES;
        return Err(Fault::new(
            file,
            at as u64,
            "end of the extents",
            memory_pages,
            page,
        ));
    }
    Ok(index.finish())
}

/// Whether every record of a block that has to begin at `page` is good, and where it ends.
/// Enters them into the index on the way.
///
/// All sums stay below 2^63, so a negative difference shows in its top bit.
fn judge(
    block: &[Record],
    mut page: u64,
    limits: &[u64],
    index: &mut TopIndexBuilder,
) -> (bool, u64) {
    let (mut nonzero, mut negative) = (0, 0);
    for record in block {
        let (low, high) = (u64_at(record, 0), u64_at(record, 8));
        let (start, pages, storage) = (low & 0xffff_ffff, low >> 32, high & 0xffff_ffff);
        // An origin outside the table, or one with reserved bits above it, has a limit that no
        // extent stays under.
        let origin = (high >> 32) as usize;
        let limit = limits.get(origin).copied().unwrap_or(0);
        nonzero |= start ^ page;
        nonzero |= if origin == 0 { storage } else { 0 };
        negative |= pages.wrapping_sub(1) | limit.wrapping_sub(storage + pages);
        page += pages;
    }
    index.push_all(block.iter().map(record_start));
    (nonzero == 0 && negative >> 63 == 0, page)
}

/// The first fault of a block that [`judge`] refused; `at` is where the block begins.
fn name_fault(
    block: &[Record],
    mut page: u64,
    limits: &[u64],
    (file, at): (&Path, u64),
) -> Option<Fault> {
    for (number, record) in block.iter().enumerate() {
        let f = fields(record);
        let at = at + (number * EXTENT_BYTES) as u64;
        if f.start != page {
            return Some(Fault::new(file, at, "extent start", page, f.start));
        }
        if f.pages == 0 {
            return Some(Fault::new(file, at + 4, "extent length", "at least 1", 0));
        }
        if f.reserved != 0 {
            return Some(Fault::new(
                file,
                at + 14,
                "extent reserved field",
                0,
                f.reserved,
            ));
        }
        if f.origin == 0 && f.storage != 0 {
            return Some(Fault::new(
                file,
                at + 8,
                "storage of a zero extent",
                0,
                f.storage,
            ));
        }
        let Some(&limit) = limits.get(f.origin) else {
            let expected = format!("less than {}", limits.len());
            return Some(Fault::new(
                file,
                at + 12,
                "extent origin",
                expected,
                f.origin,
            ));
        };
        if f.storage + f.pages > limit {
            let (expected, found) = (format!("at most {limit}"), f.storage + f.pages);
            return Some(Fault::new(
                file,
                at + 8,
                "extent storage end",
                expected,
                found,
            ));
        }
        page += f.pages;
    }
    None
}
