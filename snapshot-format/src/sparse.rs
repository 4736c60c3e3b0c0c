//! Files with holes: where their data is, and checksums that don't read the holes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::checksum::{append_zeros, crc32c_append};
use crate::error::FormatError;

/// How much is read at a time.
pub(crate) const READ_BYTES: usize = 1 << 20;

/// The first run of data at or behind `from`, in a file of `len` bytes.
///
/// A file system without holes reports the whole file as data.
pub(crate) fn next_data(file: &File, from: u64, len: u64) -> io::Result<Option<Range<u64>>> {
    let Some(start) = seek(file, from, Whence::SeekData)?.filter(|&start| start < len) else {
        return Ok(None);
    };
    let end = seek(file, start, Whence::SeekHole)?.unwrap_or(len).min(len);
    Ok(Some(start..end))
}

fn seek(file: &File, from: u64, whence: Whence) -> io::Result<Option<u64>> {
    let from = i64::try_from(from).map_err(|_| io::Error::from(Errno::EOVERFLOW))?;
    match lseek(file, from, whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        // No data behind this offset.
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// The length of a file and the CRC-32C of its logical content, in which holes are zeros.
pub(crate) fn file_checksum(path: &Path) -> Result<(u64, u32), FormatError> {
    let file = File::open(path).map_err(FormatError::io("Opening", path))?;
    let metadata = file
        .metadata()
        .map_err(FormatError::io("Reading the size of", path))?;
    let crc = range_checksum(&file, 0..metadata.len());
    Ok((
        metadata.len(),
        crc.map_err(FormatError::io("Reading", path))?,
    ))
}

/// The CRC-32C of a part of a file.
pub(crate) fn range_checksum(file: &File, range: Range<u64>) -> io::Result<u32> {
    let (mut crc, mut at) = (0, range.start);
    let mut buffer = Vec::new();
    while at < range.end {
        let data = next_data(file, at, range.end)?.unwrap_or(range.end..range.end);
        crc = append_zeros(crc, data.start - at);
        at = data.start;
        while at < data.end {
            let bytes = (data.end - at).min(READ_BYTES as u64);
            buffer.resize(usize::try_from(bytes).expect("a read is small"), 0);
            file.read_exact_at(&mut buffer, at)?;
            crc = crc32c_append(crc, &buffer);
            at += bytes;
        }
    }
    Ok(crc)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::crc32c;

    #[test]
    fn checksum_of_a_file_with_holes_is_that_of_its_logical_content() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut content = vec![0; 3_000_000];
        for (at, byte) in [(0, 1), (1_500_000, 2), (2_000_000, 3)] {
            content[at..at + 5000].fill(byte);
            file.as_file()
                .write_all_at(&content[at..at + 5000], at as u64)
                .unwrap();
        }
        file.as_file().set_len(3_000_000).unwrap();
        let sum = file_checksum(file.path()).unwrap();
        assert_eq!(sum, (3_000_000, crc32c(&content)));
        let part = range_checksum(file.as_file(), 1_000_000..1_600_000).unwrap();
        assert_eq!(part, crc32c(&content[1_000_000..1_600_000]));
    }

    #[test]
    fn file_of_one_hole_has_no_data() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 30).unwrap();
        assert_eq!(next_data(file.as_file(), 0, 1 << 30).unwrap(), None);
    }
}
