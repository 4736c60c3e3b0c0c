//! Watching a directory, and all below it if asked to.
//!
//! ```text
//! kernel (inotify) ─notices─▶ tree (pure) ─actions─▶ here: tell, watch, unwatch
//!                                                     │ changes, bounded
//!                                        ┌────────────┴───────────┐
//!                                 WatchDir's stream     collector, asked now and then
//! ```
//!
//! While a client is slow, notices stay in the kernel's queue. When that is full, the watch ends
//! with an error: a client hears of every change, or that it has not.

mod collector;
mod kernel;
mod tree;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, fstat, statat};
use rustix::io::Errno;
use tokio::sync::mpsc;

pub(crate) use self::collector::Collectors;
use self::kernel::{Notices, Said};
use self::tree::{Action, Tree};
use super::entry;
use super::error::FileError;
use super::listing::{names_in, open_below};
use super::mount;
use super::path::GuestPath;
use super::place::{DIRECTORY, Place, is_directory, open_directory, open_to_read};
use crate::accounts::Names;
use crate::proto::filesystem::FilesystemEvent;

/// Changes that wait for the client before notices are left to the kernel.
const QUEUE: usize = 64;
/// Notices taken at once.
const BATCH: usize = 256;
/// Most directories of one watch.
const MAX_DIRECTORIES: usize = 65_536;
/// How long after the first notice of a rename the second may come.
const RENAME_GAP: Duration = Duration::from_millis(100);

/// What to watch.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) path: GuestPath,
    pub(super) recursive: bool,
    /// Whether to describe what each change is about.
    pub(super) entries: bool,
    pub(super) network: bool,
    pub(super) names: Names,
}

/// Changes, or why there are no more.
pub(super) type Changes = mpsc::Receiver<Result<FilesystemEvent, FileError>>;

/// A watch that has been set.
#[derive(Debug)]
struct Watch {
    wanted: Wanted,
    /// Device and inode of the root. It isn't held open: the kernel tells of a directory's end
    /// only when nobody has it open any more.
    root: (u64, u64),
    root_watch: i32,
    notices: Notices,
    tree: Tree,
}

/// The kernel's number of a watched directory; what is in it, and whether that is a directory.
type Entered = (i32, Vec<(String, bool)>);

/// Sets a watch; from then on nothing is missed. It ends when nobody receives.
///
/// # Errors
/// A missing path, a file, a network mount that wasn't allowed, too many directories.
pub(super) async fn start(wanted: Wanted) -> Result<Changes, FileError> {
    let path = wanted.path.to_string();
    let notices = Notices::new().map_err(|e| FileError::io("Watching", &path, &e))?;
    let watch = off_the_loop(&path, move || Watch::set(wanted, notices)).await??;
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        if let Err(error) = watch.run(&sender).await {
            // Nobody listens any more, which is why it ended, or hears why it did.
            let _ = sender.send(Err(error)).await;
        }
    });
    Ok(receiver)
}

/// Runs what touches the disk on a thread of its own.
async fn off_the_loop<T: Send + 'static>(
    path: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, FileError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| FileError::io("Watching", path, &io::Error::other(e)))
}

impl Watch {
    fn set(wanted: Wanted, notices: Notices) -> Result<Watch, FileError> {
        let path = wanted.path.as_str();
        let failed = |e| FileError::new("Watching", path, e);
        let root = open_to_read(&wanted.path)?;
        if !wanted.network && mount::is_network(&root).map_err(failed)? {
            return Err(FileError::Unsuitable {
                path: path.to_owned(),
                reason: "watching a network mount misses what other machines change",
            });
        }
        let root_watch = notices
            .watch(root.as_fd())
            .map_err(|e| out_of_watches(path, e))?;
        let root = identity(&root).map_err(failed)?;
        let mut watch = Watch {
            tree: Tree::new(root_watch, wanted.recursive),
            wanted,
            root,
            root_watch,
            notices,
        };
        if watch.wanted.recursive {
            watch.descend()?;
        }
        Ok(watch)
    }

    /// Watches all that is below the root at first, without telling of it.
    fn descend(&mut self) -> Result<(), FileError> {
        let mut pending = vec![String::new()];
        while let Some(path) = pending.pop() {
            for (name, is_directory) in self.enter(&path)?.map_or_else(Vec::new, |(_, names)| names)
            {
                if is_directory {
                    pending.push(if path.is_empty() {
                        name
                    } else {
                        format!("{path}/{name}")
                    });
                }
            }
        }
        Ok(())
    }

    /// Opens a directory below the root, if that is still what it was.
    fn open(&self, path: &str) -> Result<OwnedFd, Errno> {
        let root = open_directory(CWD, self.wanted.path.as_str(), DIRECTORY)?;
        if identity(&root)? != self.root {
            return Err(Errno::NOENT);
        }
        open_below(&root, path)
    }

    /// Watches one directory and says what is in it; `None` when it isn't there any more.
    fn enter(&mut self, path: &str) -> Result<Option<Entered>, FileError> {
        let failed = |e| out_of_watches(self.wanted.path.as_str(), e);
        let directory = match self.open(if path.is_empty() { "." } else { path }) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => return Ok(None),
            opened => opened.map_err(failed)?,
        };
        let watch = self.notices.watch(directory.as_fd()).map_err(failed)?;
        self.tree.watched(watch, path);
        if self.tree.len() > MAX_DIRECTORIES {
            return Err(FileError::TooMany {
                path: self.wanted.path.to_string(),
                limit: MAX_DIRECTORIES,
                what: "directories below it",
            });
        }
        let names = names_in(&directory).map_err(failed)?;
        let kind = |name: String| {
            let stat = statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
            Some((name, is_directory(&stat)))
        };
        Ok(Some((watch, names.into_iter().filter_map(kind).collect())))
    }

    async fn run(
        mut self,
        to: &mpsc::Sender<Result<FilesystemEvent, FileError>>,
    ) -> Result<(), FileError> {
        let path = self.wanted.path.to_string();
        loop {
            let notices = async {
                let next = self.notices.next(BATCH);
                if self.tree.is_unsettled() {
                    // The other half of a rename is there at once, or never comes.
                    match tokio::time::timeout(RENAME_GAP, next).await {
                        Ok(next) => next.map(Some),
                        Err(_) => Ok(None),
                    }
                } else {
                    next.await.map(Some)
                }
            };
            let said = tokio::select! {
                () = to.closed() => return Ok(()),
                said = notices => said.map_err(|e| FileError::io("Watching", &path, &e))?,
            };
            let (watch, told) = off_the_loop(&path, move || {
                let told = self.take(said);
                (self, told)
            })
            .await?;
            self = watch;
            for change in told {
                if to.send(change).await.is_err() {
                    return Ok(());
                }
            }
        }
    }

    /// Does what a batch of notices calls for, or, without one, settles. After an error, nothing
    /// more is told.
    fn take(&mut self, said: Option<(Vec<Said>, bool)>) -> Vec<Result<FilesystemEvent, FileError>> {
        let mut told = Vec::new();
        let ended = match said {
            None => {
                let actions = self.tree.settle();
                self.act(actions, &mut told)
            }
            Some((said, all)) => {
                let done = said
                    .into_iter()
                    .try_for_each(|said| self.hear(said, &mut told));
                if all {
                    self.tree.caught_up();
                }
                done
            }
        };
        let mut told: Vec<_> = told.into_iter().map(Ok).collect();
        told.extend(ended.err().map(Err));
        told
    }

    fn hear(&mut self, said: Said, told: &mut Vec<FilesystemEvent>) -> Result<(), FileError> {
        match said {
            Said::Notice(notice) => {
                let actions = self.tree.notice(&notice);
                self.act(actions, told)
            }
            Said::Overflow => Err(FileError::Lost(self.wanted.path.to_string())),
            Said::Gone(watch) if watch == self.root_watch => {
                Err(FileError::NotFound(self.wanted.path.to_string()))
            }
            // Its parent tells of it.
            Said::Gone(_) => Ok(()),
            Said::Ended(watch) => {
                self.tree.ended(watch);
                Ok(())
            }
        }
    }

    fn act(
        &mut self,
        actions: Vec<Action>,
        told: &mut Vec<FilesystemEvent>,
    ) -> Result<(), FileError> {
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            match action {
                Action::Tell(event, path) => told.push(FilesystemEvent {
                    r#type: event.into(),
                    entry: self.entry(&path).into(),
                    name: path,
                    ..FilesystemEvent::default()
                }),
                Action::Unwatch(watch) => self.notices.unwatch(watch),
                Action::Watch(path) => {
                    if let Some((watch, names)) = self.enter(&path)? {
                        for (name, is_directory) in names {
                            actions.extend(self.tree.found(watch, &name, is_directory));
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// What a change is about, if that is wanted and it is still there.
    fn entry(&self, path: &str) -> Option<crate::proto::filesystem::EntryInfo> {
        if !self.wanted.entries {
            return None;
        }
        let (above, name) = path.rsplit_once('/').unwrap_or((".", path));
        let place = Place {
            directory: self.open(above).ok()?,
            name: name.to_owned(),
        };
        entry::describe(&place, &self.wanted.path.below(path), &self.wanted.names).ok()
    }
}

fn identity(directory: &OwnedFd) -> Result<(u64, u64), Errno> {
    let stat = fstat(directory)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// For inotify, no space means no watches.
fn out_of_watches(path: &str, errno: Errno) -> FileError {
    match errno {
        Errno::NOSPC => FileError::TooMany {
            path: path.to_owned(),
            limit: MAX_DIRECTORIES,
            what: "watches, or than fs.inotify.max_user_watches allows",
        },
        errno => FileError::new("Watching", path, errno),
    }
}
