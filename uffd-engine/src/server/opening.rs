//! Opening builds and files away from the control thread: a file system that doesn't answer keeps
//! one session waiting, and nobody else.
//!
//! ```text
//!   control thread ──ask──▶ ┌ opener ┐ ──bell──▶ control thread
//!                           │ opener │   as many as wait at the same time, up to a bound
//!                           └   …    ┘
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use nix::sys::eventfd::{EfdFlags, EventFd};
use snapshot_format::{BuildId, BuildStore, PageRun, PageSize, WorkingSetFile};

use crate::source::{PageSource, SourceError};

/// Threads at most: so many sessions may wait for file systems that don't answer.
const MAX_OPENERS: usize = 16;

/// Something to be read.
pub(super) enum Ask {
    /// A build.
    Build { store: PathBuf, build: BuildId },
    /// A plain memory file.
    File { path: PathBuf, page_size: PageSize },
    /// What is to be replayed of a build.
    WorkingSet(Arc<PageSource>),
}

/// What came of it, or why nothing did.
pub(super) enum Answer {
    Source(Result<Arc<PageSource>, String>),
    WorkingSet(Vec<PageRun>),
}

impl Ask {
    /// Does it, however long that takes.
    pub(super) fn carry_out(self) -> Answer {
        match self {
            Self::Build { store, build } => {
                let source = open_build(&store, build);
                Answer::Source(source.map_err(|error| crate::chain(&error)))
            }
            Self::File { path, page_size } => {
                let source = PageSource::open_plain(&path, page_size);
                Answer::Source(source.map_err(|error| crate::chain(&error)))
            }
            Self::WorkingSet(source) => Answer::WorkingSet(working_set_of(&source)),
        }
    }
}

fn open_build(store: &std::path::Path, id: BuildId) -> Result<Arc<PageSource>, SourceError> {
    let store =
        BuildStore::open_or_create(store).map_err(|source| SourceError::Build { id, source })?;
    PageSource::open(&store, id)
}

/// What there is to replay; a working set that is of no use is none.
fn working_set_of(source: &PageSource) -> Vec<PageRun> {
    let Some(build) = source.build() else {
        return Vec::new();
    };
    match build.working_set() {
        WorkingSetFile::Present(set) => set.runs().to_vec(),
        WorkingSetFile::Missing => Vec::new(),
        WorkingSetFile::Ignored(reason) => {
            tracing::warn!(build_id = %build.id(), %reason, "Ignoring a working set");
            Vec::new()
        }
    }
}

/// Both ends of a channel for numbered things.
type Numbered<T> = (Sender<(u64, T)>, Receiver<(u64, T)>);

/// The threads that open.
pub(super) struct Openers {
    jobs: Numbered<Ask>,
    answers: Numbered<Answer>,
    bell: Arc<EventFd>,
    threads: usize,
    busy: usize,
    last: u64,
}

impl Openers {
    pub(super) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            jobs: crossbeam_channel::bounded(MAX_OPENERS),
            answers: crossbeam_channel::bounded(MAX_OPENERS),
            bell: Arc::new(EventFd::from_flags(flags)?),
            threads: 0,
            busy: 0,
            last: 0,
        })
    }

    /// Has something read; its number, which the answer has, too.
    ///
    /// # Errors
    /// Everybody waits for a file system, or the host has no thread to give.
    pub(super) fn ask(&mut self, ask: Ask) -> Result<u64, String> {
        if self.busy == MAX_OPENERS {
            return Err(format!(
                "{MAX_OPENERS} builds are being opened already, on file systems that don't answer"
            ));
        }
        if self.busy == self.threads {
            self.start_thread()
                .map_err(|error| format!("Starting a thread to open builds: {error}"))?;
        }
        self.busy += 1;
        self.last += 1;
        let sent = self.jobs.0.try_send((self.last, ask));
        sent.expect("there is room for as many as may be busy");
        Ok(self.last)
    }

    fn start_thread(&mut self) -> io::Result<()> {
        let (jobs, answers, bell) = (
            self.jobs.1.clone(),
            self.answers.0.clone(),
            self.bell.clone(),
        );
        let name = format!("opener-{}", self.threads);
        std::thread::Builder::new().name(name).spawn(move || {
            for (number, ask) in jobs {
                if answers.send((number, ask.carry_out())).is_err() {
                    return;
                }
                let _ = bell.write(1);
            }
        })?;
        self.threads += 1;
        Ok(())
    }

    /// Readable when there is an answer.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// All answers there are.
    pub(super) fn answers(&mut self) -> Vec<(u64, Answer)> {
        // Before looking: what comes in between rings again.
        let _ = self.bell.read();
        let answers: Vec<_> = self.answers.1.try_iter().collect();
        self.busy -= answers.len();
        answers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_asked_as_there_may_be_and_the_next_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        // Opening a pipe for reading waits for a writer.
        let pipe = dir.path().join("stuck");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let file = |path: &PathBuf| Ask::File {
            path: path.clone(),
            page_size: PageSize::Size4K,
        };
        let mut openers = Openers::new().unwrap();
        for number in 1..=MAX_OPENERS as u64 {
            assert_eq!(openers.ask(file(&pipe)), Ok(number));
        }
        assert!(openers.ask(file(&pipe)).is_err());
        assert!(openers.answers().is_empty());
        // Kept open: a thread may not have come to its opening yet.
        let _writer = std::fs::File::options().write(true).open(&pipe).unwrap();
        let mut answered = 0;
        while answered < MAX_OPENERS {
            answered += openers.answers().len();
            std::thread::yield_now();
        }
        let memory = dir.path().join("memory");
        std::fs::write(&memory, [1; 4096]).unwrap();
        openers.ask(file(&memory)).unwrap();
        let answer = loop {
            match openers.answers().pop() {
                Some((_, answer)) => break answer,
                None => std::thread::yield_now(),
            }
        };
        assert!(matches!(answer, Answer::Source(Ok(_))));
    }
}
