//! A worker's io_uring: polls, timeouts, and page reads into buffers it owns.
//!
//! Ownership: [`ReadBuffers`] live inside the ring, so a buffer lent to the kernel
//! can't be freed before the ring is; dropping the ring waits for nothing because
//! the kernel cancels and holds its own references to registered memory, and for
//! unregistered memory the fields drop in order: ring first.
#![expect(unsafe_code, reason = "a submission may name memory and descriptors")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::mapping::{HUGE_PAGE, ReadBuffers};
use super::uffd::SourceAddr;

/// How many files a ring keeps at most; the first that the kernel agrees to.
const FILE_PLACES: [u32; 3] = [4096, 1024, 256];

/// What a completion belongs to; packed into its 64 bits of user data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// What kind of operation it was.
    pub kind: u8,
    /// Which session, or which read slot.
    pub index: u32,
    /// Tells a reused index from its predecessor.
    pub stamp: u32,
}

impl Token {
    fn pack(self) -> u64 {
        debug_assert!(
            self.index < 1 << 24,
            "session index {} over 24 bits",
            self.index
        );
        u64::from(self.kind) << 56 | u64::from(self.index) << 32 | u64::from(self.stamp)
    }

    fn unpack(data: u64) -> Self {
        Self {
            kind: (data >> 56) as u8,
            index: (data >> 32) as u32 & 0x00FF_FFFF,
            stamp: data as u32,
        }
    }
}

/// One finished (or, for a multishot poll, repeated) operation.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// As given at submission.
    pub token: Token,
    /// Result as the system call would have returned it, errno negative.
    pub result: i32,
    /// A multishot poll will report again; without it, it has to be armed again.
    pub more: bool,
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel lets go of a ring some time after it is closed; of its files now.
        let _ = self.ring.submitter().unregister_files();
    }
}

fn huge_buffers(buffers: &mut Option<ReadBuffers>, slots: usize) -> io::Result<&mut ReadBuffers> {
    let made = match buffers.take() {
        Some(made) => made,
        None => ReadBuffers::untouched(slots, HUGE_PAGE as usize)?,
    };
    Ok(buffers.insert(made))
}

/// A read into a slot of the buffers.
#[derive(Clone, Copy, Debug)]
pub struct SlotRead {
    /// Where in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
    /// Where to.
    pub slot: usize,
    /// Whether the file system may keep who asks waiting: a thread of the kernel's asks then.
    pub may_block: bool,
}

/// A file that a ring keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSlot(u32);

/// The file that is read.
#[derive(Clone, Copy, Debug)]
pub enum ReadFile<'fd> {
    /// By its descriptor.
    Plain(BorrowedFd<'fd>),
    /// As the ring keeps it.
    Registered(FileSlot),
}

/// The ring of one worker thread.
pub struct Ring {
    ring: IoUring,
    buffers: ReadBuffers,
    registered: bool,
    /// For huge pages; behind the others in number. Made when the first is read.
    huge: Option<ReadBuffers>,
    huge_slots: usize,
    /// Places for files that are free.
    free_files: Vec<u32>,
}

impl Ring {
    /// A ring with room for `entries` submissions, and buffers for page reads; behind
    /// those, `huge_slots` for one huge page each. Must be made on the thread that uses it.
    ///
    /// # Errors
    /// The kernel has no io_uring (5.x before 6.1, or switched off by sysctl).
    pub fn new(entries: u32, mut buffers: ReadBuffers, huge_slots: usize) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(entries * 4)
            .build(entries)?;
        // Reads that may block are made by threads of the kernel: one for each slot, so that those
        // that wait for ever leave some for the others.
        let slots = u32::try_from(buffers.slots() + huge_slots).unwrap_or(u32::MAX);
        ring.submitter()
            .register_iowq_max_workers(&mut [slots, 0])?;
        let iovec = buffers.as_iovec();
        // SAFETY: the memory belongs to `buffers`, which this struct keeps until after
        // the ring is dropped (field order).
        let registered = unsafe { ring.submitter().register_buffers(&[iovec]) }.is_ok();
        // As many as the limit of open files allows, which also bounds these.
        let files = FILE_PLACES
            .into_iter()
            .find(|places| ring.submitter().register_files_sparse(*places).is_ok());
        Ok(Self {
            ring,
            buffers,
            registered,
            huge: None,
            huge_slots,
            free_files: (0..files.unwrap_or(0)).rev().collect(),
        })
    }

    /// Watches a descriptor; reports each time it becomes readable, until it is
    /// cancelled or closed.
    ///
    /// # Errors
    /// Submitting what was queued before failed.
    pub fn poll_readable(&mut self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        self.poll(fd, token, true)
    }

    /// Watches a descriptor until it is readable, which it may be already; reports that once.
    ///
    /// # Errors
    /// As [`Self::poll_readable`].
    pub fn poll_readable_once(&mut self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        self.poll(fd, token, false)
    }

    fn poll(&mut self, fd: BorrowedFd<'_>, token: Token, again: bool) -> io::Result<()> {
        let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), libc::POLLIN as u32)
            .multi(again)
            .build()
            .user_data(token.pack());
        self.push(&entry)
    }

    /// Has the kernel keep a file, so that a read of it needn't look the descriptor up and hold
    /// it. `None` when there is no room: the descriptor does as well. What is kept stays open
    /// until [`Self::forget_file`].
    pub fn register_file(&mut self, fd: BorrowedFd<'_>) -> Option<FileSlot> {
        let place = self.free_files.pop()?;
        let update = [fd.as_raw_fd()];
        match self.ring.submitter().register_files_update(place, &update) {
            Ok(1) => Some(FileSlot(place)),
            _ => {
                self.free_files.push(place);
                None
            }
        }
    }

    /// Lets go of a file; reads under way end first.
    pub fn forget_file(&mut self, slot: FileSlot) {
        let update = [-1];
        if self
            .ring
            .submitter()
            .register_files_update(slot.0, &update)
            .is_ok()
        {
            self.free_files.push(slot.0);
        }
    }

    /// Stops a poll started with the same token.
    ///
    /// # Errors
    /// As [`Self::poll_readable`].
    pub fn cancel_poll(&mut self, token: Token, done: Token) -> io::Result<()> {
        let entry = opcode::PollRemove::new(token.pack())
            .build()
            .user_data(done.pack());
        self.push(&entry)
    }

    /// Starts a read.
    ///
    /// # Errors
    /// As [`Self::poll_readable`].
    ///
    /// # Panics
    /// `len` doesn't fit a slot.
    pub fn read_into_slot(
        &mut self,
        file: ReadFile<'_>,
        read: SlotRead,
        token: Token,
    ) -> io::Result<()> {
        let SlotRead {
            offset,
            len,
            slot,
            may_block,
        } = read;
        let huge = slot.checked_sub(self.buffers.slots());
        let (buffers, slot) = match huge {
            None => (&mut self.buffers, slot),
            Some(slot) => (huge_buffers(&mut self.huge, self.huge_slots)?, slot),
        };
        assert!(
            len as usize <= buffers.slot_bytes(),
            "a read of {len} overflows its slot"
        );
        let target = buffers.pointer(slot);
        let fixed = self.registered && huge.is_none();
        let entry = match (file, fixed) {
            (ReadFile::Registered(FileSlot(place)), true) => {
                let read = opcode::ReadFixed::new(types::Fixed(place), target, len, 0);
                read.offset(offset).build()
            }
            (ReadFile::Registered(FileSlot(place)), false) => {
                let read = opcode::Read::new(types::Fixed(place), target, len);
                read.offset(offset).build()
            }
            (ReadFile::Plain(fd), true) => {
                let read = opcode::ReadFixed::new(types::Fd(fd.as_raw_fd()), target, len, 0);
                read.offset(offset).build()
            }
            (ReadFile::Plain(fd), false) => {
                let read = opcode::Read::new(types::Fd(fd.as_raw_fd()), target, len);
                read.offset(offset).build()
            }
        };
        let flags = if may_block {
            squeue::Flags::ASYNC
        } else {
            squeue::Flags::empty()
        };
        self.push(&entry.flags(flags).user_data(token.pack()))
    }

    /// What a finished read left in its slot, as the source of a copy.
    #[must_use]
    ///
    /// # Panics
    /// Nothing was ever read into it.
    pub fn slot_source(&self, slot: usize) -> SourceAddr {
        match slot.checked_sub(self.buffers.slots()) {
            None => self.buffers.source(slot),
            Some(slot) => {
                let huge = self.huge.as_ref();
                huge.expect("a huge slot that was read into").source(slot)
            }
        }
    }

    /// Bytes of a slot that is not for a huge page.
    #[must_use]
    pub fn slot_bytes(&self) -> u64 {
        self.buffers.slot_bytes() as u64
    }

    /// Submits what is queued and waits until something completes or `timeout` passes.
    ///
    /// # Errors
    /// As `io_uring_enter(2)`, except timeouts and interruptions.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let result = match timeout {
            None => self.ring.submit_and_wait(1),
            // A wait that may not last would set a timer all the same, which on a virtual
            // machine costs as much as a fault. The kernel says if it has something for us.
            Some(Duration::ZERO) => {
                let queue = self.ring.submission();
                if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
                    return Ok(());
                }
                drop(queue);
                self.ring.submit_and_wait(0)
            }
            Some(timeout) => {
                let spec = types::Timespec::from(timeout);
                let args = types::SubmitArgs::new().timespec(&spec);
                self.ring.submitter().submit_with_args(1, &args)
            }
        };
        match result.map_err(|error| (error.raw_os_error(), error)) {
            Ok(_) | Err((Some(libc::ETIME | libc::EINTR | libc::EBUSY), _)) => Ok(()),
            Err((_, error)) => Err(error),
        }
    }

    /// Takes one completion, if there is one.
    pub fn next_completion(&mut self) -> Option<Completion> {
        let entry = self.ring.completion().next()?;
        Some(Completion {
            token: Token::unpack(entry.user_data()),
            result: entry.result(),
            more: cqueue::more(entry.flags()),
        })
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: polls name a descriptor only (a closed one completes with EBADF or
            // is held by the kernel); reads target a slot inside `buffers`, see above.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.ring.submit()?;
        }
    }
}
