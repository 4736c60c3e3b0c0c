//! One preload: from its beginning to its end, and what is told of it meanwhile.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde::Serialize;

use super::kcore;
use crate::refusal::{Refusal, json};
use crate::routes::Guest;

const SOURCE: &str = "/proc/kcore";
/// More than the headers of any machine need.
const HEADERS: u64 = 64 * 1024;
/// Bytes read at once; whether to go on is looked at in between.
const CHUNK: usize = 256 * 1024;
const PAGE: u64 = 4096;
/// The lowest priority there is.
const NICE: i32 = 19;

/// The last preload, if there was one.
#[derive(Debug, Default)]
pub(crate) struct Preload(Mutex<Arc<Run>>);

#[derive(Debug, Default)]
struct Run {
    /// Memory there is, and what of it was read, in bytes.
    total: AtomicU64,
    read: AtomicU64,
    cancelled: AtomicBool,
    state: Mutex<Phase>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    Running,
    Done,
    Cancelled,
    Failed(String),
}

/// What is told.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Status {
    state: &'static str,
    pages: u64,
    bytes: u64,
    total_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// `POST`: begins, if none is running; 202 with the status either way.
pub(crate) async fn begin(State(guest): State<Arc<Guest>>) -> Result<Response, Refusal> {
    guest
        .preload
        .begin(Path::new(SOURCE))
        .map_err(|e| Refusal::failed("Starting a thread to preload memory", &e))?;
    Ok(json(StatusCode::ACCEPTED, &guest.preload.status()))
}

/// `GET`: the status.
pub(crate) async fn status(State(guest): State<Arc<Guest>>) -> Response {
    json(StatusCode::OK, &guest.preload.status())
}

/// `DELETE`: ends it within a chunk; again is fine.
pub(crate) async fn cancel(State(guest): State<Arc<Guest>>) -> StatusCode {
    lock(&guest.preload.0)
        .cancelled
        .store(true, Ordering::Relaxed);
    StatusCode::NO_CONTENT
}

impl Preload {
    fn begin(&self, source: &Path) -> io::Result<()> {
        let mut current = lock(&self.0);
        if *lock(&current.state) == Phase::Running {
            return Ok(());
        }
        let run = Arc::new(Run::default());
        *lock(&run.state) = Phase::Running;
        let (mine, source) = (Arc::clone(&run), source.to_path_buf());
        let thread = std::thread::Builder::new().name("preload".to_owned());
        thread.spawn(move || {
            // It may keep our priority if it can't have a lower one.
            let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE);
            let ended = mine.read_all(&source);
            *lock(&mine.state) = match ended {
                Ok(()) if mine.cancelled.load(Ordering::Relaxed) => Phase::Cancelled,
                Ok(()) => Phase::Done,
                Err(error) => Phase::Failed(format!("Reading {}: {error}", source.display())),
            };
        })?;
        *current = run;
        Ok(())
    }

    fn status(&self) -> Status {
        let run = Arc::clone(&lock(&self.0));
        let bytes = run.read.load(Ordering::Relaxed);
        let (state, error) = match lock(&run.state).clone() {
            Phase::Idle => ("idle", None),
            Phase::Running => ("running", None),
            Phase::Done => ("done", None),
            Phase::Cancelled => ("cancelled", None),
            Phase::Failed(error) => ("failed", Some(error)),
        };
        Status {
            state,
            pages: bytes / PAGE,
            bytes,
            total_bytes: run.total.load(Ordering::Relaxed),
            error,
        }
    }
}

impl Run {
    fn read_all(&self, source: &Path) -> io::Result<()> {
        let file = File::open(source)?;
        let mut start = Vec::new();
        (&file).take(HEADERS).read_to_end(&mut start)?;
        let runs = kcore::runs(&start).map_err(io::Error::other)?;
        drop(start);
        let total = runs.iter().map(|run| run.end - run.start).sum();
        self.total.store(total, Ordering::Relaxed);
        let mut buffer = vec![0; CHUNK];
        for run in runs {
            let mut at = run.start;
            while at < run.end && !self.cancelled.load(Ordering::Relaxed) {
                let left = usize::try_from(run.end - at).unwrap_or(CHUNK).min(CHUNK);
                // A page that can't be read is one that nobody will wait for.
                let read = match file.read_at(&mut buffer[..left], at) {
                    Ok(0) | Err(_) => left.min(4096) as u64,
                    Ok(read) => read as u64,
                };
                at += read;
                self.read.fetch_add(read, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::kcore::tests::core;
    use super::*;

    fn wait(preload: &Preload) -> Status {
        let give_up = Instant::now() + Duration::from_secs(20);
        loop {
            let status = preload.status();
            if status.state != "running" || Instant::now() > give_up {
                return status;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn all_memory_is_read_and_counted() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut content = core(&[(1, 4096, 0, 600_000), (1, 0, u64::MAX, 1 << 40)]);
        content.resize(4096 + 600_000, 7);
        io::Write::write_all(&mut file, &content).unwrap();
        let preload = Preload::default();
        assert_eq!(preload.status().state, "idle");
        preload.begin(file.path()).unwrap();
        let status = wait(&preload);
        assert_eq!(
            (status.state, status.bytes, status.total_bytes),
            ("done", 600_000, 600_000)
        );
        assert_eq!(status.pages, 146);
    }

    #[test]
    fn missing_or_wrong_source_is_a_named_failure() {
        for source in ["/no/such/kcore", "/proc/self/status"] {
            let preload = Preload::default();
            preload.begin(Path::new(source)).unwrap();
            let status = wait(&preload);
            assert_eq!(status.state, "failed");
            assert!(status.error.unwrap().contains(source));
        }
    }

    #[test]
    fn cancelled_preload_ends_early_and_another_may_begin() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let header = core(&[(1, 4096, 0, 1 << 40)]);
        io::Write::write_all(&mut file.as_file(), &header).unwrap();
        file.as_file().set_len(1 << 40).unwrap();
        let preload = Preload::default();
        preload.begin(file.path()).unwrap();
        while preload.status().bytes == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        preload.begin(file.path()).unwrap();
        lock(&preload.0).cancelled.store(true, Ordering::Relaxed);
        let status = wait(&preload);
        assert_eq!(status.state, "cancelled");
        assert!(status.bytes < status.total_bytes);
    }
}
