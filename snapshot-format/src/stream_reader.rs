//! An export stream as a sequence of entries, each of which has to be the expected one.
//!
//! The stream is hostile. Names are compared, never used as paths; nothing but regular files is
//! taken, so there are no links to follow and no extension headers of any length to keep in
//! memory; and no size is believed that the manifest or a limit doesn't allow.

use std::io::Read;
use std::path::Path;

use crate::error::FormatError;
use crate::stream_layout::unexpected;

/// The entries of a stream, from first to last.
pub(crate) struct StreamReader<'a, R: Read> {
    entries: tar::Entries<'a, R>,
    /// An entry that was looked at and not taken.
    next: Option<StreamEntry<'a, R>>,
}

/// One entry.
pub(crate) struct StreamEntry<'a, R: Read> {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    entry: tar::Entry<'a, R>,
    /// Bytes that were not read yet.
    left: u64,
}

impl<'a, R: Read> StreamReader<'a, R> {
    pub(crate) fn new(archive: &'a mut tar::Archive<R>) -> Result<Self, FormatError> {
        let entries = archive.entries().map_err(reading("the stream"))?;
        Ok(Self {
            entries: entries.raw(true),
            next: None,
        })
    }

    /// The name of the next entry; `None` at the end of the stream.
    pub(crate) fn peek(&mut self) -> Result<Option<&str>, FormatError> {
        if self.next.is_none() {
            self.next = self.read_header()?;
        }
        Ok(self.next.as_ref().map(|entry| entry.name.as_str()))
    }

    /// The next entry, which has to have this name and at most so many bytes.
    pub(crate) fn take(
        &mut self,
        name: &str,
        most: u64,
    ) -> Result<StreamEntry<'a, R>, FormatError> {
        self.peek()?;
        let Some(entry) = self.next.take() else {
            let entry = name.to_owned();
            return Err(FormatError::StreamTruncated { entry });
        };
        if entry.name != name {
            return Err(unexpected(name, "this entry", format!("{:?}", entry.name)));
        }
        if entry.bytes > most {
            return Err(FormatError::StreamTooLarge {
                entry: entry.name,
                bytes: entry.bytes,
                limit: most,
            });
        }
        Ok(entry)
    }

    /// The content of the next entry, which has to have this name and at most so many bytes.
    pub(crate) fn take_bytes(&mut self, name: &str, most: u64) -> Result<Vec<u8>, FormatError> {
        let mut entry = self.take(name, most)?;
        let mut bytes = Vec::new();
        while entry.left > 0 {
            let at = bytes.len();
            let part = entry.left.min(1 << 20);
            bytes.resize(at + usize::try_from(part).expect("1 MiB fits memory"), 0);
            entry.fill(&mut bytes[at..])?;
        }
        Ok(bytes)
    }

    /// Refuses whatever is behind the last entry.
    pub(crate) fn end(&mut self) -> Result<(), FormatError> {
        match self.peek()? {
            None => Ok(()),
            Some(name) => Err(unexpected(name, "the end of the stream", "an entry")),
        }
    }

    fn read_header(&mut self) -> Result<Option<StreamEntry<'a, R>>, FormatError> {
        let Some(entry) = self.entries.next() else {
            return Ok(None);
        };
        let entry = entry.map_err(reading("the header of an entry"))?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let kind = entry.header().entry_type();
        if kind != tar::EntryType::Regular {
            let found = format!("an entry of type {kind:?}");
            return Err(unexpected(&name, "a regular file", found));
        }
        let bytes = entry.header().entry_size().map_err(reading(&name))?;
        Ok(Some(StreamEntry {
            name,
            bytes,
            entry,
            left: bytes,
        }))
    }
}

impl<R: Read> StreamEntry<'_, R> {
    /// Fills a buffer with what comes next.
    pub(crate) fn fill(&mut self, mut buffer: &mut [u8]) -> Result<(), FormatError> {
        while !buffer.is_empty() {
            let read = self.entry.read(buffer).map_err(reading(&self.name))?;
            if read == 0 {
                let entry = self.name.clone();
                return Err(FormatError::StreamTruncated { entry });
            }
            self.left = self.left.saturating_sub(read as u64);
            buffer = &mut buffer[read..];
        }
        Ok(())
    }

    /// Reads the rest and forgets it.
    pub(crate) fn skip(mut self) -> Result<(), FormatError> {
        let mut buffer = vec![0; 64 << 10];
        while self.left > 0 {
            let part = usize::try_from(self.left).map_or(buffer.len(), |l| l.min(buffer.len()));
            self.fill(&mut buffer[..part])?;
        }
        Ok(())
    }
}

fn reading(name: &str) -> impl FnOnce(std::io::Error) -> FormatError {
    FormatError::io("Reading from the stream", Path::new(name))
}
