//! The bytes of a `working-set`; FORMAT.md draws them.

use std::path::Path;

use crate::build_id::BuildId;
use crate::checksum::masked;
use crate::error::Fault;
use crate::le::{bytes_at, u32_at, u64_at};
use crate::map_header::FORMAT_VERSION;
use crate::memory_map::MemoryMap;
use crate::units::{Generation, PageCount, PageIndex};
use crate::working_set::{IgnoredWorkingSet, MAX_WORKING_SET_RUNS, PageRun};

const MAGIC: [u8; 8] = *b"THAWWSET";
const HEADER_BYTES: usize = 64;
const RUN_BYTES: usize = 8;
/// The longest file that is read.
pub(crate) const MAX_FILE_BYTES: usize = HEADER_BYTES + RUN_BYTES * MAX_WORKING_SET_RUNS;

/// The file of these runs, for a build with this map.
pub(crate) fn encode(runs: &[PageRun], map: &MemoryMap) -> Vec<u8> {
    let number = |value: u64| u32::try_from(value).expect("memory has at most 2^32 pages");
    let mut body = Vec::with_capacity(runs.len() * RUN_BYTES);
    for run in runs {
        let start = run.start.get();
        // 2^32 pages are one more than a record can say; nobody misses the last one.
        let pages = run.pages.get().min(u32::MAX.into());
        body.extend_from_slice(&number(start).to_le_bytes());
        body.extend_from_slice(&number(pages).to_le_bytes());
    }
    let mut file = Vec::with_capacity(HEADER_BYTES + body.len());
    file.extend_from_slice(&MAGIC);
    file.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    file.extend_from_slice(&0u32.to_le_bytes());
    file.extend_from_slice(&number(map.page_size().bytes()).to_le_bytes());
    file.extend_from_slice(&map.generation().get().to_le_bytes());
    file.extend_from_slice(&map.memory_pages().get().to_le_bytes());
    file.extend_from_slice(map.build_id().as_bytes());
    file.extend_from_slice(&map.header_crc().to_le_bytes());
    file.extend_from_slice(&number(runs.len() as u64).to_le_bytes());
    file.extend_from_slice(&masked(&body).to_le_bytes());
    file.extend_from_slice(&masked(&file).to_le_bytes());
    file.extend_from_slice(&body);
    file
}

/// The runs of a file, if it is good and of the build with this map.
pub(crate) fn decode(
    bytes: &[u8],
    map: &MemoryMap,
    name: &Path,
) -> Result<Vec<PageRun>, IgnoredWorkingSet> {
    let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
        let expected = format!("at least {HEADER_BYTES}");
        return Err(Fault::new(name, 0, "working set length", expected, bytes.len()).into());
    };
    check_envelope(header, name)?;
    check_identity(header, map)?;
    let count = u32_at(header, 52) as usize;
    if count > MAX_WORKING_SET_RUNS {
        let expected = format!("at most {MAX_WORKING_SET_RUNS}");
        return Err(Fault::new(name, 52, "run count", expected, count).into());
    }
    let length = HEADER_BYTES + count * RUN_BYTES;
    if bytes.len() != length {
        let at = bytes.len().min(length) as u64;
        return Err(Fault::new(name, at, "working set length", length, bytes.len()).into());
    }
    let body = &bytes[HEADER_BYTES..];
    let (stored, computed) = (u32_at(header, 56), masked(body));
    if stored != computed {
        let at = HEADER_BYTES as u64;
        return Err(Fault::checksum(name, at, "runs checksum", stored, computed).into());
    }
    let runs: Vec<_> = body.as_chunks().0.iter().map(decode_run).collect();
    check_runs(&runs, map, name)?;
    Ok(runs)
}

fn decode_run(record: &[u8; RUN_BYTES]) -> PageRun {
    PageRun {
        start: PageIndex::new(u32_at(record, 0).into()),
        pages: PageCount::new(u32_at(record, 4).into()),
    }
}

/// Magic, version, checksum and flags, in that order.
fn check_envelope(header: &[u8; HEADER_BYTES], name: &Path) -> Result<(), IgnoredWorkingSet> {
    if header[..8] != MAGIC {
        let (expected, found) = (format!("{MAGIC:02x?}"), format!("{:02x?}", &header[..8]));
        return Err(Fault::new(name, 0, "magic", expected, found).into());
    }
    let version = u32_at(header, 8);
    if version != FORMAT_VERSION {
        let (what, found) = ("format version", version.into());
        return Err(IgnoredWorkingSet::Unsupported { what, found });
    }
    let (stored, computed) = (u32_at(header, 60), masked(&header[..60]));
    if stored != computed {
        return Err(Fault::checksum(name, 0, "header checksum", stored, computed).into());
    }
    let flags = u32_at(header, 12);
    if flags != 0 {
        let (what, found) = ("flags", flags.into());
        return Err(IgnoredWorkingSet::Unsupported { what, found });
    }
    Ok(())
}

/// That it is of the build with this very map.
fn check_identity(header: &[u8; HEADER_BYTES], map: &MemoryMap) -> Result<(), IgnoredWorkingSet> {
    let build_id = BuildId::from_bytes(bytes_at(header, 32));
    let generation = Generation::new(u32_at(header, 20));
    let same = build_id == map.build_id()
        && generation == map.generation()
        && u64::from(u32_at(header, 16)) == map.page_size().bytes()
        && u64_at(header, 24) == map.memory_pages().get()
        && u32_at(header, 48) == map.header_crc();
    if same {
        Ok(())
    } else {
        Err(IgnoredWorkingSet::Stale {
            build_id,
            generation,
        })
    }
}

/// That every run has pages, that they exist, and that none is in two runs.
fn check_runs(runs: &[PageRun], map: &MemoryMap, name: &Path) -> Result<(), Fault> {
    let at = |index: usize| (HEADER_BYTES + index * RUN_BYTES) as u64;
    let memory_pages = map.memory_pages().get();
    let mut sorted = Vec::with_capacity(runs.len());
    for (index, run) in runs.iter().enumerate() {
        // Both numbers have 32 bits.
        let end = run.start.get() + run.pages.get();
        if run.pages.is_zero() || end > memory_pages {
            let expected = format!("1 page or more of {memory_pages}");
            let found = format!("{} from {}", run.pages, run.start);
            return Err(Fault::new(name, at(index), "run", expected, found));
        }
        sorted.push((run.start.get(), end, index));
    }
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        None => Ok(()),
        Some(pair) => {
            let found = format!("{:#x} again", pair[1].0);
            Err(Fault::new(
                name,
                at(pair[1].2),
                "run",
                "no page twice",
                found,
            ))
        }
    }
}

impl From<Fault> for IgnoredWorkingSet {
    fn from(fault: Fault) -> Self {
        Self::Corrupt(Box::new(fault))
    }
}
