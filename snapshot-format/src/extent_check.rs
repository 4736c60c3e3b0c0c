//! Validation of the extents section: one pass that checksums, judges and indexes.
//!
//! The pass works on blocks that stay in the nearest cache, and judges a block without branches
//! per record ([`extent_limits`](crate::extent_limits)); only a block that is known to be bad is
//! walked again to name its first fault. An extent is good if it begins where the last one
//! ended, is not empty, lies inside its origin's data, and has zeros where the format says so.

use std::path::Path;

use crate::checksum::{crc32c_append, mask};
use crate::error::Fault;
use crate::extent::{EXTENT_BYTES, record_start};
use crate::extent_limits::{Limits, Record, block_is_good};
use crate::le::{u32_at, u64_at};
use crate::map_header::{BuildEntry, MapHeader};
use crate::sys::Cpu;
use crate::top_index::{LINE, TopIndex, skew};

/// Above every storage page, and small enough that no sum overflows.
const NO_LIMIT: u64 = 1 << 62;
/// 8 KiB of records.
const BLOCK_RECORDS: usize = 128 * LINE;

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
    let (cpu, limits) = (Cpu::detect(), Limits::of(builds));
    let memory_pages = header.memory_pages.get();
    let skew = skew(section.start);
    let mut leaders = Vec::with_capacity(records.len() / LINE + 2);
    if skew > 0 {
        leaders.push(0);
    }
    let (mut crc, mut page) = (0, 0);
    let mut first_fault = None;
    for (number, block) in records.chunks(BLOCK_RECORDS).enumerate() {
        crc = crc32c_append(crc, block.as_flattened());
        if first_fault.is_some() {
            continue;
        }
        let end = end_of(block);
        if record_start(&block[0]) != page || end > memory_pages || !judge(cpu, block, &limits) {
            let at = (section.start + number * BLOCK_RECORDS * EXTENT_BYTES) as u64;
            first_fault = name_fault(block, page, builds, (file, at)).or_else(|| {
                let what = "end of the extents";
                (end > memory_pages).then(|| Fault::new(file, at, what, memory_pages, end))
            });
        }
        let lines = block.iter().skip((LINE - skew) % LINE).step_by(LINE);
        leaders.extend(lines.map(|leader| u32_at(leader, 0)));
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
    Ok(TopIndex::new(header.memory_pages, leaders, skew))
}

/// Whether a block is known to be good; where it begins is not looked at.
fn judge(cpu: Cpu, block: &[Record], limits: &Limits) -> bool {
    match limits {
        Limits::Few(last, most) => cpu.widest(
            #[inline(always)]
            || block_is_good(block, last, *most),
        ),
        Limits::Many(last, most) => cpu.widest(
            #[inline(always)]
            || block_is_good(block, last, *most),
        ),
        Limits::Odd => false,
    }
}

fn end_of(block: &[Record]) -> u64 {
    let last = fields(&block[block.len() - 1]);
    last.start + last.pages
}

/// The first fault of a block that has to begin at `page`, by looking at each record; `at` is
/// where the block begins.
fn name_fault(
    block: &[Record],
    mut page: u64,
    builds: &[BuildEntry],
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
        let limit = match f.origin {
            0 => Some(NO_LIMIT),
            origin => builds.get(origin - 1).map(|build| build.data_pages.get()),
        };
        let Some(limit) = limit else {
            let expected = format!("at most {}", builds.len());
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
