//! A migration's socket: whole headers, payloads, and descriptors.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use uffd_engine::sys::fdpass;

use super::protocol::{self, Command, HEADER_BYTES, ProtocolError, SLOT_BYTES};

/// One connection.
#[derive(Debug)]
pub(super) struct Channel {
    stream: UnixStream,
}

impl From<UnixStream> for Channel {
    fn from(stream: UnixStream) -> Self {
        Self { stream }
    }
}

impl From<ProtocolError> for io::Error {
    fn from(error: ProtocolError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

impl Channel {
    pub(super) async fn header(&mut self) -> io::Result<[u8; HEADER_BYTES]> {
        let mut header = [0; HEADER_BYTES];
        self.stream.read_exact(&mut header).await?;
        Ok(header)
    }

    pub(super) async fn bytes(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).await?;
        Ok(bytes)
    }

    /// The number of a slot and the file that comes with it.
    pub(super) async fn slot(&mut self) -> io::Result<(u32, File)> {
        let (mut number, mut received) = ([0; SLOT_BYTES], 0);
        let mut files: Vec<OwnedFd> = Vec::new();
        while received < SLOT_BYTES {
            let part = &mut number[received..];
            let message = self
                .stream
                .async_io(Interest::READABLE, || {
                    fdpass::receive(self.stream.as_fd(), part)
                })
                .await?;
            if message.len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            received += message.len;
            files.extend(message.fds);
        }
        let [file] = <[OwnedFd; 1]>::try_from(files).map_err(|files| {
            let count = files.len();
            let text = format!("a memory slot came with {count} descriptors");
            io::Error::new(io::ErrorKind::InvalidData, text)
        })?;
        Ok((u32::from_le_bytes(number), File::from(file)))
    }

    pub(super) async fn answer(&mut self, is_ok: bool) -> io::Result<()> {
        self.stream.write_all(&protocol::response(is_ok)).await
    }

    /// Says something with what belongs to it; whether it was accepted.
    pub(super) async fn say(&mut self, command: Command, payload: &[u8]) -> io::Result<bool> {
        let header = protocol::request(command, payload.len() as u64);
        self.stream.write_all(&header).await?;
        self.stream.write_all(payload).await?;
        Ok(protocol::says_ok(self.header().await?)?)
    }

    /// Sends a slot's number and its file; whether it was accepted.
    pub(super) async fn say_slot(&mut self, slot: u32, file: BorrowedFd<'_>) -> io::Result<bool> {
        let header = protocol::request(Command::MemoryFd, SLOT_BYTES as u64);
        self.stream.write_all(&header).await?;
        let number = slot.to_le_bytes();
        self.stream
            .async_io(Interest::WRITABLE, || {
                fdpass::send(self.stream.as_fd(), &number, &[file])
            })
            .await?;
        Ok(protocol::says_ok(self.header().await?)?)
    }

    /// Opens a connection for page requests.
    pub(super) async fn for_faults(mut stream: UnixStream) -> io::Result<OwnedFd> {
        stream.write_all(&protocol::FAULTS).await?;
        stream.into_std().map(OwnedFd::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    #[tokio::test]
    async fn a_slot_arrives_with_its_file() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut ours, mut theirs) = (Channel::from(ours), Channel::from(theirs));
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"memory").unwrap();
        let saying = ours.say_slot(7, file.as_fd());
        let hearing = async {
            let header = theirs.header().await.unwrap();
            assert_eq!(header, protocol::request(Command::MemoryFd, 4));
            let heard = theirs.slot().await.unwrap();
            theirs.answer(true).await.unwrap();
            heard
        };
        let (said, (slot, heard)) = tokio::join!(saying, hearing);
        assert!(said.unwrap());
        let mut bytes = [0; 6];
        heard.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!((slot, &bytes), (7, b"memory"));
    }

    #[tokio::test]
    async fn a_slot_without_its_file_is_an_error() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&7u32.to_le_bytes()).await.unwrap();
        assert!(Channel::from(theirs).slot().await.is_err());
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        assert!(Channel::from(theirs).slot().await.is_err());
    }
}
