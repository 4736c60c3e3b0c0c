//! Copying pieces of one file to another through io_uring: several blocks are under way at a
//! time, each read into a buffer of its own and written from there.
#![expect(unsafe_code, reason = "submissions name memory and descriptors")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, squeue, types};

/// Bytes of one block: long enough that a completion costs little beside it.
const BLOCK_BYTES: usize = 512 << 10;
/// Blocks under way.
const BLOCKS: usize = 8;

/// A run of bytes, and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Offset in the source.
    pub from: u64,
    /// Offset in the target.
    pub to: u64,
    /// How many.
    pub bytes: u64,
}

/// A block on its way: first it is read, then written.
struct Block {
    buffer: Vec<u8>,
    piece: Piece,
    /// How much of it is done, of reading or of writing.
    done: usize,
    is_read: bool,
}

impl Block {
    fn entry(&mut self, source: &File, target: &File) -> squeue::Entry {
        let length = (self.piece.bytes as usize - self.done) as u32;
        let at = self.buffer[self.done..].as_mut_ptr();
        if self.is_read {
            opcode::Write::new(types::Fd(target.as_raw_fd()), at, length)
                .offset(self.piece.to + self.done as u64)
                .build()
        } else {
            opcode::Read::new(types::Fd(source.as_raw_fd()), at, length)
                .offset(self.piece.from + self.done as u64)
                .build()
        }
    }

    /// Takes a result; says whether the block is where it belongs.
    fn advance(&mut self, result: i32) -> io::Result<bool> {
        match result {
            0 => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!(
                    "no more data at byte {}",
                    self.piece.from + self.done as u64
                ),
            )),
            // Interrupted before it began.
            errno if errno == -libc::EINTR || errno == -libc::EAGAIN => Ok(false),
            errno if errno < 0 => Err(io::Error::from_raw_os_error(-errno)),
            count => {
                self.done += count as usize;
                if self.done < self.piece.bytes as usize {
                    return Ok(false);
                }
                self.done = 0;
                Ok(std::mem::replace(&mut self.is_read, true))
            }
        }
    }
}

/// Copies pieces; `progress` hears of every block's bytes once they are written (not yet durable).
/// Gives the bytes that were copied.
///
/// # Errors
/// The first failure of a read or a write, `UnexpectedEof` if the source ends before a piece does;
/// some pieces may be copied then. There is no io_uring.
pub fn copy(
    source: &File,
    target: &File,
    pieces: impl IntoIterator<Item = Piece>,
    progress: &mut dyn FnMut(u64),
) -> io::Result<u64> {
    let mut pieces = pieces.into_iter().flat_map(blocks);
    let mut ring = IoUring::new(BLOCKS as u32)?;
    let mut under_way: Vec<Option<Block>> = Vec::new();
    let (mut copied, mut failure, mut flying) = (0, None, 0);
    let mut ready: Vec<usize> = Vec::new();
    loop {
        while failure.is_none() && flying + ready.len() < BLOCKS {
            let Some(piece) = pieces.next() else { break };
            ready.push(place(&mut under_way, piece));
        }
        for index in ready.drain(..) {
            let Some(block) = under_way[index].as_mut() else {
                continue;
            };
            let entry = block.entry(source, target).user_data(index as u64);
            // SAFETY: the buffer stays where it is (a `Vec`'s heap memory, whose block is only
            // dropped when nothing of it is in flight), and so do both files: this function
            // leaves only when `flying` is zero.
            match unsafe { ring.submission().push(&entry) } {
                Ok(()) => flying += 1,
                Err(_) => failure = Some(io::Error::other("the ring has no room for a block")),
            }
        }
        if flying == 0 {
            return failure.map_or(Ok(copied), Err);
        }
        match ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
            // Nothing can be known of what is in flight: its memory must stay.
            Err(error) => {
                std::mem::forget((ring, under_way));
                return Err(error);
            }
        }
        let completions: Vec<(usize, i32)> = ring
            .completion()
            .map(|entry| (entry.user_data() as usize, entry.result()))
            .collect();
        for (index, result) in completions {
            flying -= 1;
            let Some(block) = under_way[index].as_mut() else {
                continue;
            };
            let bytes = block.piece.bytes;
            match block.advance(result) {
                Ok(true) => {
                    copied += bytes;
                    progress(bytes);
                    block.piece.bytes = 0;
                }
                Ok(false) if failure.is_none() => ready.push(index),
                Ok(false) => block.piece.bytes = 0,
                Err(error) => {
                    block.piece.bytes = 0;
                    failure.get_or_insert(error);
                }
            }
        }
        if failure.is_some() {
            ready.clear();
        }
    }
}

/// Puts a piece into a block that is free; gives the block's index.
fn place(under_way: &mut Vec<Option<Block>>, piece: Piece) -> usize {
    let is_free = |block: &Option<Block>| block.as_ref().is_none_or(|block| block.piece.bytes == 0);
    let index = match under_way.iter().position(is_free) {
        Some(index) => index,
        None => {
            under_way.push(None);
            under_way.len() - 1
        }
    };
    let mut buffer = under_way[index]
        .take()
        .map_or_else(Vec::new, |old| old.buffer);
    buffer.resize(BLOCK_BYTES, 0);
    under_way[index] = Some(Block {
        buffer,
        piece,
        done: 0,
        is_read: false,
    });
    index
}

fn blocks(piece: Piece) -> impl Iterator<Item = Piece> {
    let starts = (0..piece.bytes).step_by(BLOCK_BYTES);
    starts.map(move |start| Piece {
        from: piece.from + start,
        to: piece.to + start,
        bytes: (piece.bytes - start).min(BLOCK_BYTES as u64),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn pieces_arrive_where_they_should_and_nothing_else_changes() {
        let (source, target) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let content: Vec<u8> = (0..5_000_000_u32).map(|n| (n / 11) as u8).collect();
        source.write_all_at(&content, 0).unwrap();
        target.write_all_at(&vec![0xee; content.len()], 0).unwrap();
        let pieces = [
            Piece {
                from: 4_000_001,
                to: 17,
                bytes: 900_000,
            },
            Piece {
                from: 0,
                to: 1_000_000,
                bytes: 3_333_333,
            },
            Piece {
                from: 5,
                to: 4_999_999,
                bytes: 1,
            },
        ];
        let mut expected = vec![0xee; content.len()];
        for piece in pieces {
            let [from, to, bytes] = [piece.from, piece.to, piece.bytes].map(|n| n as usize);
            expected[to..to + bytes].copy_from_slice(&content[from..from + bytes]);
        }
        let mut heard = 0;
        let copied = copy(&source, &target, pieces, &mut |bytes| heard += bytes).unwrap();
        assert_eq!((copied, heard), (4_233_334, 4_233_334));
        let mut found = vec![0; content.len()];
        target.read_exact_at(&mut found, 0).unwrap();
        assert!(found == expected);
    }

    #[test]
    fn an_end_that_comes_too_early_is_an_error() {
        let (source, target) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        source.write_all_at(&[1; 5000], 0).unwrap();
        let pieces = [Piece {
            from: 0,
            to: 0,
            bytes: 6000,
        }];
        let error = copy(&source, &target, pieces, &mut |_| {}).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(error.to_string().contains("5000"), "{error}");
    }

    #[test]
    fn a_target_that_is_full_is_an_error() {
        let Ok(full) = File::options().write(true).open("/dev/full") else {
            return println!("skipped: a_target_that_is_full_is_an_error: no /dev/full");
        };
        let source = tempfile::tempfile().unwrap();
        source.set_len(10 << 20).unwrap();
        let pieces = [Piece {
            from: 0,
            to: 0,
            bytes: 10 << 20,
        }];
        let error = copy(&source, &full, pieces, &mut |_| {}).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
