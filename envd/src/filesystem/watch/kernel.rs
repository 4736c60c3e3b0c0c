//! The kernel's side of a watch: inotify, and its notices in our words.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::fs::inotify::{self, CreateFlags, Event, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

use super::tree::{Notice, What};
use crate::sys;

const WANTED: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR)
    .union(WatchFlags::EXCL_UNLINK);
/// Room for a hundred notices or so.
const BUFFER: usize = 8192;

/// One inotify instance.
#[derive(Debug)]
pub(super) struct Notices(AsyncFd<OwnedFd>);

/// What the kernel says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// Something happened in a watched directory.
    Notice(Notice),
    /// A watched directory was removed or moved itself.
    Gone(i32),
    /// A watch has ended; nothing more comes of it.
    Ended(i32),
    /// The kernel's queue was full: notices are lost.
    Overflow,
}

impl Notices {
    /// Watches nothing yet.
    pub(super) fn new() -> io::Result<Notices> {
        let flags = CreateFlags::CLOEXEC | CreateFlags::NONBLOCK;
        Ok(Notices(sys::readiness::readable(inotify::init(flags)?)?))
    }

    /// Watches an open directory; the same one again has the same number.
    pub(super) fn watch(&self, directory: BorrowedFd<'_>) -> Result<i32, Errno> {
        // inotify takes paths only; this one leads to the very directory that was opened.
        let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
        inotify::add_watch(self.0.get_ref(), path, WANTED)
    }

    /// Ends a watch; one that has ended already is fine.
    pub(super) fn unwatch(&self, watch: i32) {
        let _ = inotify::remove_watch(self.0.get_ref(), watch);
    }

    /// Waits for notices and takes them, about `most` at once; `true` when those were all.
    pub(super) async fn next(&self, most: usize) -> io::Result<(Vec<Said>, bool)> {
        let mut ready = self.0.readable().await?;
        let (said, all) = self.take(most)?;
        if all {
            ready.clear_ready();
        }
        Ok((said, all))
    }

    fn take(&self, most: usize) -> io::Result<(Vec<Said>, bool)> {
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut said = Vec::new();
        let mut reader = Reader::new(self.0.get_ref(), &mut buffer);
        while said.len() < most || !reader.is_buffer_empty() {
            match reader.next() {
                Ok(event) => said.extend(understand(&event)),
                Err(Errno::AGAIN) => return Ok((said, true)),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok((said, false))
    }
}

fn understand(event: &Event<'_>) -> Option<Said> {
    let flags = event.events();
    let watch = event.wd();
    if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
        return Some(Said::Overflow);
    }
    if flags.contains(ReadFlags::IGNORED) {
        return Some(Said::Ended(watch));
    }
    if flags.intersects(ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::UNMOUNT) {
        return Some(Said::Gone(watch));
    }
    let what = if flags.contains(ReadFlags::CREATE) {
        What::Created
    } else if flags.contains(ReadFlags::MODIFY) {
        What::Modified
    } else if flags.contains(ReadFlags::ATTRIB) {
        What::Attributes
    } else if flags.contains(ReadFlags::DELETE) {
        What::Deleted
    } else if flags.contains(ReadFlags::MOVED_FROM) {
        What::MovedFrom(event.cookie())
    } else if flags.contains(ReadFlags::MOVED_TO) {
        What::MovedTo(event.cookie())
    } else {
        return None;
    };
    // Without a name it is about the watched directory itself, which its parent tells of.
    let name = event.file_name()?.to_str().ok()?.to_owned();
    Some(Said::Notice(Notice {
        watch,
        what,
        name,
        is_directory: flags.contains(ReadFlags::ISDIR),
    }))
}
