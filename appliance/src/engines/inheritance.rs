//! What a daemon inherits: the sessions of engines whose daemon has died.
//!
//! ```text
//!   its engine ──Surrendered…──▶ [`take_over`] ──kept──▶ Link ──Adopt…──▶ this daemon's engine
//!                                                          │
//!                                    claimed by whoever knows the sandbox, or let go
//! ```
//!
//! An engine that doesn't surrender, because it is of another version or stuck, is told to end,
//! and its sessions are lost.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use snapshot_format::{BuildId, PageCount};
use tokio::sync::mpsc;
use uffd_engine::control::{self, Report, Request, Succession};
use uffd_engine::region::ClaimedRegion;
use uffd_engine::{PageStates, Tracking};

use super::kept::{Kept, KeptMemory, KeptVmm};
use super::topology::Node;
use super::{Attachment, SessionEvent, control_socket, new_socket};

/// How long an engine may say nothing.
const PATIENCE: TimeVal = TimeVal::new(5, 0);
/// Events of a session that nobody has claimed yet.
pub(super) const MAX_EVENTS: usize = 8;

/// A session that has outlived its daemon, for whoever goes on with its sandbox.
#[derive(Debug)]
pub struct Inherited {
    /// The session itself.
    pub attachment: Attachment,
    /// What is said about it from its adoption on.
    pub events: mpsc::Receiver<SessionEvent>,
    /// What has happened to each page.
    pub states: Arc<PageStates>,
    /// The build whose memory is served.
    pub build: BuildId,
    /// Who notices the guest's writes.
    pub tracking: Tracking,
}

/// A session that was surrendered.
#[derive(Debug)]
pub(super) struct Heirloom {
    pub(super) session: String,
    pub(super) kept: Kept,
    pub(super) events: mpsc::Receiver<SessionEvent>,
}

/// Sockets of engines beyond those of these nodes: the host had more.
pub(super) fn strays(run_dir: &Path, nodes: &[Node]) -> Vec<PathBuf> {
    let own: Vec<_> = nodes
        .iter()
        .flat_map(|node| [control_socket, new_socket].map(|path| path(run_dir, node.number)))
        .collect();
    let is_engine = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with("engine-") && name.ends_with(".sock"))
    };
    let entries = std::fs::read_dir(run_dir).into_iter().flatten().flatten();
    let mut strays: Vec<_> = entries
        .map(|entry| entry.path())
        .filter(|path| is_engine(path) && !own.contains(path))
        .collect();
    strays.sort();
    strays
}

/// Takes all sessions of the engine at this socket, which ends, and the socket with it.
pub(super) fn take_over(path: &Path) -> Vec<Heirloom> {
    let mut taken = Vec::new();
    let Ok(engine) = connect_to(path) else {
        // Nobody listens there any more, if there is such a socket at all.
        let _ = std::fs::remove_file(path);
        return taken;
    };
    let outcome = surrender(&engine, &mut taken);
    drop(engine);
    let sessions = taken.len();
    match outcome {
        Ok(()) => {
            tracing::info!(path = %path.display(), sessions, "Took an engine's sessions over");
        }
        Err(error) => {
            tracing::warn!(
                path = %path.display(),
                sessions,
                %error,
                "An engine did not surrender all of its sessions; others are lost"
            );
            for Heirloom { kept, .. } in &mut taken {
                // Whether it went on with some of them isn't known.
                kept.note_surrendered(false);
            }
            shut_down(path);
        }
    }
    let _ = std::fs::remove_file(path);
    taken
}

fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let engine = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    // Bounds the connecting as well.
    setsockopt(&engine, sockopt::SendTimeout, &PATIENCE)?;
    setsockopt(&engine, sockopt::ReceiveTimeout, &PATIENCE)?;
    connect(engine.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(engine)
}

/// Receives what an engine surrenders, until it has closed.
fn surrender(engine: &OwnedFd, taken: &mut Vec<Heirloom>) -> io::Result<()> {
    control::send(engine.as_fd(), &Request::Surrender { request: 1 }, &[])?;
    let mut is_all = false;
    loop {
        match control::receive::<Report>(engine.as_fd()) {
            Ok(Some((Report::SurrenderedAll { .. }, _))) => is_all = true,
            Ok(Some((report @ Report::Surrendered { .. }, fds))) => match heirloom(report, fds) {
                Ok(heirloom) => taken.push(heirloom),
                Err(error) => tracing::warn!(%error, "A surrendered session is lost"),
            },
            // What it had to tell the daemon that has died.
            Ok(Some(_)) => {}
            Ok(None) if is_all => return Ok(()),
            Ok(None) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Another version's, of something that this one can do without.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                tracing::warn!(%error, "Passing over what an engine says");
            }
            // It serves nobody any more, however its process ends.
            Err(_) if is_all => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Ends an engine whose sessions can't be had.
fn shut_down(path: &Path) {
    if let Ok(engine) = connect_to(path)
        && control::send(engine.as_fd(), &Request::Shutdown, &[]).is_ok()
    {
        while let Ok(Some(_)) = control::receive::<Report>(engine.as_fd()) {}
    }
}

fn heirloom(report: Report, fds: Vec<OwnedFd>) -> io::Result<Heirloom> {
    let invalid = |text| io::Error::new(io::ErrorKind::InvalidData, text);
    let Report::Surrendered {
        session,
        store,
        build,
        succession,
        regions,
        tracking,
        replays,
        load_bytes_per_second,
    } = report
    else {
        return Err(invalid("no session was surrendered"));
    };
    let wrong_number = |_| invalid("it came with another number of descriptors");
    let (memory, pidfd, states) = match succession {
        Succession::Adopt => {
            let [uffd, pidfd, states] = fds.try_into().map_err(wrong_number)?;
            (KeptMemory::Userfaultfd(uffd), pidfd, states)
        }
        Succession::ServePages => {
            let [connection, memory, pidfd, states] = fds.try_into().map_err(wrong_number)?;
            let memory = KeptMemory::Requests {
                connection,
                memory,
                surrendered: true,
            };
            (memory, pidfd, states)
        }
    };
    let pages = pages_of(&regions).ok_or_else(|| invalid("its regions are no memory"))?;
    let (sender, events) = mpsc::channel(MAX_EVENTS);
    let kept = Kept {
        store,
        build,
        states: Arc::new(PageStates::from_fd(states, pages)?),
        events: sender,
        attached: Some(KeptVmm {
            memory,
            pidfd,
            regions,
        }),
        tracking,
        replays,
        load_bytes_per_second,
    };
    Ok(Heirloom {
        session,
        kept,
        events,
    })
}

/// How many pages these regions are together; `None` where they can't be any memory.
pub(super) fn pages_of(regions: &[ClaimedRegion]) -> Option<PageCount> {
    let page_size = regions.first()?.page_size;
    let bytes = regions
        .iter()
        .try_fold(0u64, |sum, region| sum.checked_add(region.size))?;
    bytes.checked_div(page_size).map(PageCount::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_nodes_that_there_are_no_more_are_strays() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "engine-0.sock",
            "engine-1.sock",
            "engine-1.new.sock",
            "engine-2.sock",
            "engine-2.new.sock",
            "engine-2.log",
            "thaw.sock",
        ] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let node = |number| Node {
            number,
            cpus: vec![0],
        };
        let names = ["engine-2.new.sock", "engine-2.sock"];
        assert_eq!(
            strays(dir.path(), &[node(0), node(1)]),
            names.map(|name| dir.path().join(name))
        );
        assert!(strays(&dir.path().join("missing"), &[]).is_empty());
    }

    #[test]
    fn regions_that_are_no_memory_have_no_pages() {
        let region = |size, page_size| ClaimedRegion {
            base: 0,
            size,
            offset: 0,
            page_size,
        };
        assert_eq!(pages_of(&[]), None);
        assert_eq!(pages_of(&[region(4096, 0)]), None);
        assert_eq!(pages_of(&[region(u64::MAX, 4096), region(1, 4096)]), None);
        let two = [region(8192, 4096), region(4096, 4096)];
        assert_eq!(pages_of(&two), Some(PageCount::new(3)));
    }
}
