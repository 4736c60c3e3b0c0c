//! One file of a build in an export stream: received with its holes, or skipped.

use std::io::Read;
use std::ops::Range;
use std::path::Path;

use crate::build_id::BuildId;
use crate::checksum::{append_zeros, crc32c_append};
use crate::error::{Fault, FormatError};
use crate::manifest::FileEntry;
use crate::sparse::READ_BYTES;
use crate::storage::Storage;
use crate::stream_layout::{MAX_RUNS, RUN_BYTES, entry_name, runs_name, unexpected};
use crate::stream_reader::{StreamEntry, StreamReader};

/// Writes the next file of the stream to `path`, and compares it with its checksum if the
/// manifest has one.
pub(crate) fn receive_file<R: Read>(
    stream: &mut StreamReader<'_, R>,
    storage: &dyn Storage,
    id: &BuildId,
    (name, entry): (&str, &FileEntry),
    path: &Path,
) -> Result<(), FormatError> {
    let (runs, mut content) = open_file(stream, id, name, entry)?;
    let file = storage
        .create_file(path)
        .map_err(FormatError::io("Creating", path))?;
    file.set_len(entry.bytes)
        .map_err(FormatError::io("Growing", path))?;
    let (mut crc, mut at) = (0, 0);
    let mut buffer = Vec::new();
    for run in runs {
        crc = append_zeros(crc, run.start - at);
        at = run.start;
        while at < run.end {
            let bytes = (run.end - at).min(READ_BYTES as u64);
            buffer.resize(usize::try_from(bytes).expect("a part is small"), 0);
            content.fill(&mut buffer)?;
            crc = crc32c_append(crc, &buffer);
            storage
                .write_at(&file, path, at, &buffer)
                .map_err(FormatError::io("Writing", path))?;
            at += bytes;
        }
    }
    crc = append_zeros(crc, entry.bytes - at);
    match entry.crc32c {
        Some(expected) if expected != crc => {
            let name = entry_name(id, name);
            Err(Fault::checksum(Path::new(&name), 0, "file checksum", expected, crc).into())
        }
        _ => Ok(()),
    }
}

/// Reads over the next file of the stream.
pub(crate) fn skip_file<R: Read>(
    stream: &mut StreamReader<'_, R>,
    id: &BuildId,
    name: &str,
    entry: &FileEntry,
) -> Result<(), FormatError> {
    open_file(stream, id, name, entry)?.1.skip()
}

/// The next file: where its content belongs, and its content.
fn open_file<'a, R: Read>(
    stream: &mut StreamReader<'a, R>,
    id: &BuildId,
    name: &str,
    entry: &FileEntry,
) -> Result<(Vec<Range<u64>>, StreamEntry<'a, R>), FormatError> {
    let runs_name = runs_name(id, name);
    let runs = if stream.peek()? == Some(runs_name.as_str()) {
        let most = entry.bytes.min(MAX_RUNS as u64) * RUN_BYTES;
        parse_runs(&stream.take_bytes(&runs_name, most)?, entry.bytes)
            .ok_or_else(|| unexpected(&runs_name, "ascending runs inside the file", "others"))?
    } else {
        std::iter::once(0..entry.bytes)
            .filter(|run| !run.is_empty())
            .collect()
    };
    let length: u64 = runs.iter().map(|run| run.end - run.start).sum();
    let content = stream.take(&entry_name(id, name), length)?;
    if content.bytes != length {
        let expected = format!("{length} bytes");
        return Err(unexpected(&content.name, expected, content.bytes));
    }
    Ok((runs, content))
}

/// The runs of a list, if they are ascending, not empty, apart, and inside a file.
fn parse_runs(list: &[u8], file_bytes: u64) -> Option<Vec<Range<u64>>> {
    let (records, rest) = list.as_chunks::<16>();
    let mut runs = Vec::with_capacity(records.len());
    let mut free = 0;
    for record in records {
        let (start, length) = record.split_at(8);
        let number = |bytes: &[u8]| bytes.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
        let (start, length) = (number(start)?, number(length)?);
        let end = start.checked_add(length)?;
        if start < free || length == 0 || end > file_bytes {
            return None;
        }
        free = end + 1;
        runs.push(start..end);
    }
    rest.is_empty().then_some(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(runs: &[(u64, u64)]) -> Vec<u8> {
        let numbers = runs.iter().flat_map(|&(start, length)| [start, length]);
        numbers.flat_map(u64::to_le_bytes).collect()
    }

    #[test]
    fn runs_that_overlap_touch_are_empty_or_outside_are_refused() {
        let good = list(&[(0, 10), (11, 5), (99, 1)]);
        assert_eq!(parse_runs(&good, 100), Some(vec![0..10, 11..16, 99..100]));
        assert_eq!(parse_runs(&[], 100), Some(vec![]));
        for bad in [
            list(&[(0, 10), (9, 5)]),
            list(&[(0, 10), (10, 5)]),
            list(&[(5, 1), (0, 1)]),
            list(&[(5, 0)]),
            list(&[(99, 2)]),
            list(&[(u64::MAX, 2)]),
            good[..20].to_vec(),
        ] {
            assert_eq!(parse_runs(&bad, 100), None, "{bad:?}");
        }
    }
}
