//! Compares a whole `memory.data` with its sums, and goes on behind a faulty chunk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::chunk_table::check_stored;
use crate::encoding::Encoding;
use crate::error::{Fault, FormatError};
use crate::sparse::range_checksum;
use crate::stored_chunk::StoredChunk;
use crate::sums::DataSums;
use crate::verify::VerifyProgress;

/// Compares every chunk of a data file with its sum.
pub(crate) fn check_data(
    path: &Path,
    sums: &DataSums,
    fault: &mut dyn FnMut(Fault),
    progress: &mut dyn FnMut(VerifyProgress<'_>),
) -> Result<(), FormatError> {
    let file = File::open(path).map_err(FormatError::io("Opening", path))?;
    let metadata = file
        .metadata()
        .map_err(FormatError::io("Reading the size of", path))?;
    let (total, found) = (sums.stored_bytes(), metadata.len());
    if found != total {
        fault(Fault::new(
            path,
            found.min(total),
            "data length",
            total,
            found,
        ));
    }
    let mut at = 0;
    for (chunk, &expected) in sums.sums().iter().enumerate() {
        let stored = sums.stored().get(chunk);
        let end = at + stored.map_or(sums.chunk_len(chunk), |stored| stored.bytes.into());
        let checked = match stored {
            None => range_checksum(&file, at..end).map(|found| {
                let whole = found == expected;
                (!whole).then(|| Fault::checksum(path, at, "data chunk", expected, found))
            }),
            Some(stored) => {
                let length = usize::try_from(sums.chunk_len(chunk)).expect("a chunk fits memory");
                check_encoded(&file, path, at, stored, sums.header().encoding, length)
            }
        };
        match checked {
            Ok(found) => found.into_iter().for_each(&mut *fault),
            // One unreadable sector must not hide what is wrong behind it.
            Err(error) => fault(Fault::new(path, at, "data chunk", "readable bytes", error)),
        }
        at = end;
        progress(VerifyProgress {
            file: path,
            done: at,
            total,
        });
    }
    Ok(())
}

/// Decodes a chunk that begins at `at`.
fn check_encoded(
    file: &File,
    path: &Path,
    at: u64,
    entry: &StoredChunk,
    encoding: Encoding,
    length: usize,
) -> io::Result<Option<Fault>> {
    let (mut stored, mut content) = (vec![0; entry.bytes as usize], vec![0; length]);
    file.read_exact_at(&mut stored, at)?;
    Ok(check_stored(path, at, entry, encoding, &stored, &mut content).err())
}
