//! After a crash: what the catalogue says against what the host has.
//!
//! [`plan`] is pure: rows and findings in, decisions out. What is applied then never
//! guesses: a process is ours if it sits in one of our slots' network namespaces, and it is
//! killed by pidfd after that was looked at again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use http_api::ids::SandboxId;
use http_api::wire::SandboxState;
use nix::poll::{PollFd, PollFlags, poll};
use snapshot_format::{BuildId, BuildStore, Generation};
use uffd_engine::sys::process::{pidfd_open, pidfd_signal};

use crate::catalogue::SandboxRow;
use crate::network::namespace;
use crate::sandbox::snapshot::{LABEL_PURPOSE, LABEL_SANDBOX, Purpose};
use crate::vmm::process::Survivor;

/// A build that was published but not recorded before the daemon ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unrecorded {
    /// Its id.
    pub id: BuildId,
    /// How many diffs lie under it.
    pub generation: Generation,
    /// Pages it stores.
    pub stored_pages: u64,
}

/// What becomes of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is as its row says.
    Keep,
    /// It runs, and its VMM is there: it is taken over.
    TakeOver,
    /// Its pause had published its build: it is paused.
    Paused(Unrecorded),
    /// Its resume had not ended: its build is untouched and it is paused still.
    StillPaused,
    /// Nobody was told that it exists, or it was being deleted: its row goes.
    Forget,
    /// It ran, and can't be taken over.
    Fail(&'static str),
}

/// Decides about every sandbox. `unrecorded` are builds made by a pause, by sandbox; `alive` are those
/// whose VMM has outlived its daemon.
#[must_use]
pub fn plan(
    rows: &[SandboxRow],
    unrecorded: &BTreeMap<SandboxId, Unrecorded>,
    alive: &BTreeSet<SandboxId>,
) -> Vec<(SandboxId, Decision)> {
    rows.iter()
        .map(|row| {
            let decision = decide(row, unrecorded.get(&row.id), alive.contains(&row.id));
            (row.id.clone(), decision)
        })
        .collect()
}

fn decide(row: &SandboxRow, unrecorded: Option<&Unrecorded>, is_alive: bool) -> Decision {
    match (row.state, unrecorded) {
        (SandboxState::Paused | SandboxState::Failed, _) => Decision::Keep,
        (SandboxState::Creating | SandboxState::Destroying, _) => Decision::Forget,
        (SandboxState::Resuming, _) if row.build.is_some() => Decision::StillPaused,
        // The row may say `running`: states on the way are written when they settle.
        (SandboxState::Pausing | SandboxState::Running, Some(build)) => {
            Decision::Paused(build.clone())
        }
        // What was under way with it is taken back: it had not got anywhere.
        (SandboxState::Pausing | SandboxState::Running | SandboxState::Snapshotting, _)
            if is_alive =>
        {
            Decision::TakeOver
        }
        (SandboxState::Pausing | SandboxState::Resuming, _) => {
            Decision::Fail("The daemon ended while it was on its way to disk or back")
        }
        (SandboxState::Running | SandboxState::Snapshotting, _) => {
            Decision::Fail("The daemon ended while it was running, and so did its VMM")
        }
    }
}

/// The builds in the store that a pause published and nobody recorded.
///
/// # Errors
/// The store can't be listed; a build that can't be opened is none.
pub fn find_unrecorded(
    store: &BuildStore,
    recorded: impl Fn(BuildId) -> bool,
) -> Result<BTreeMap<SandboxId, Unrecorded>, snapshot_format::FormatError> {
    let mut found = BTreeMap::new();
    for id in store.list()? {
        if recorded(id) {
            continue;
        }
        let Ok(build) = store.open(&id) else { continue };
        let labels = &build.manifest().labels;
        let of_pause = labels.get(LABEL_PURPOSE).map(String::as_str) == Some(Purpose::Pause.name());
        let sandbox = labels
            .get(LABEL_SANDBOX)
            .and_then(|id| id.parse::<SandboxId>().ok());
        if let (true, Some(sandbox)) = (of_pause, sandbox) {
            let generation = build.map().generation();
            let stored_pages = build.map().own_build().data_pages.get();
            found.insert(
                sandbox,
                Unrecorded {
                    id,
                    generation,
                    stored_pages,
                },
            );
        }
    }
    Ok(found)
}

/// What was looked at while the daemon runs, in this order: a sandbox has its row before it has
/// anything else, and is claimed from before it has that until a shard knows it.
#[derive(Debug, Default)]
pub struct Seen {
    /// Directories of sandboxes, by id.
    pub directories: BTreeSet<String>,
    /// Rows in the catalogue, after that.
    pub rows: BTreeSet<String>,
    /// Ids that are being made, after that.
    pub starting: BTreeSet<String>,
    /// Sandboxes that shards know, after that.
    pub known: BTreeSet<String>,
    /// Rows that are still there in the end.
    pub rows_after: BTreeSet<String>,
}

/// Rows that no shard knows, and directories of no row. Whatever is made or removed while one looks
/// is in neither.
#[must_use]
pub fn left_over(seen: &Seen) -> (Vec<String>, Vec<String>) {
    let rows = seen.rows.intersection(&seen.rows_after);
    let rows = rows.filter(|id| !seen.starting.contains(*id) && !seen.known.contains(*id));
    let directories = seen.directories.difference(&seen.rows);
    (rows.cloned().collect(), directories.cloned().collect())
}

/// A process that sits in a network namespace of this name.
#[must_use]
pub fn process_in(name: &str, pid: i32) -> Option<Survivor> {
    let target = identity(&namespace::path(name))?;
    // Opened first: the number may have changed hands before, and can't any more.
    let pidfd = pidfd_open(pid).ok()?;
    (namespace_of(pid) == Some(target)).then_some(Survivor { pid, pidfd })
}

/// Ends every process that sits in a network namespace of this name; returns how many.
///
/// # Errors
/// `/proc` can't be read, or a process can't be signalled.
pub fn end_processes_in(name: &str) -> io::Result<usize> {
    let Some(target) = identity(&namespace::path(name)) else {
        return Ok(0);
    };
    let is_inside = |pid: i32| namespace_of(pid) == Some(target);
    let mut ended = 0;
    for pid in process_ids()? {
        if pid == std::process::id() as i32 || !is_inside(pid) {
            continue;
        }
        let Ok(pidfd) = pidfd_open(pid) else { continue };
        // The number may have changed hands between the look and the open.
        if is_inside(pid) && pidfd_signal(pidfd.as_fd(), libc::SIGKILL)? {
            ended += 1;
            let _ = poll(
                &mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)],
                5000u16,
            );
        }
    }
    Ok(ended)
}

/// Which network namespace a process is in.
fn namespace_of(pid: i32) -> Option<(u64, u64)> {
    identity(Path::new(&format!("/proc/{pid}/ns/net")))
}

/// The same for all names of a file, and of a namespace.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

fn process_ids() -> io::Result<Vec<i32>> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")? {
        if let Some(pid) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        {
            pids.push(pid);
        }
    }
    Ok(pids)
}

/// Empties a directory, making it if need be; what is `kept` stays.
///
/// # Errors
/// It can't be made or written.
pub fn empty_dir(dir: &Path, kept: &BTreeSet<String>) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_str().is_some_and(|name| kept.contains(name)) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: &str, state: SandboxState, build: bool) -> SandboxRow {
        SandboxRow {
            build: build.then(|| BuildId::from_bytes([1; 16])),
            ..SandboxRow::example(id, state)
        }
    }

    fn decision(state: SandboxState, build: bool, unrecorded: bool) -> Decision {
        decision_of(state, build, unrecorded, false)
    }

    fn decision_of(state: SandboxState, build: bool, unrecorded: bool, is_alive: bool) -> Decision {
        let published = Unrecorded {
            id: BuildId::from_bytes([2; 16]),
            generation: Generation::new(1),
            stored_pages: 5,
        };
        let found = if unrecorded {
            BTreeMap::from([("a".parse().unwrap(), published)])
        } else {
            BTreeMap::new()
        };
        let alive = is_alive.then(|| "a".parse().unwrap()).into_iter().collect();
        plan(&[row("a", state, build)], &found, &alive).remove(0).1
    }

    #[test]
    fn what_runs_and_is_there_is_taken_over_unless_its_pause_has_ended() {
        use SandboxState::{
            Creating, Destroying, Failed, Paused, Pausing, Resuming, Running, Snapshotting,
        };
        for state in [Running, Pausing, Snapshotting] {
            assert_eq!(decision_of(state, true, false, true), Decision::TakeOver);
        }
        for state in [Running, Pausing] {
            let ended = decision_of(state, true, true, true);
            assert!(matches!(ended, Decision::Paused(_)), "{state}");
        }
        for state in [Creating, Destroying, Failed, Paused, Resuming] {
            let other = decision_of(state, true, false, true);
            assert_ne!(other, Decision::TakeOver, "{state}");
        }
    }

    #[test]
    fn what_is_kept_stays_when_a_directory_is_emptied() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["one/below", "two/below"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("file"), "").unwrap();
        empty_dir(dir.path(), &set(&["two"])).unwrap();
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().flatten().collect();
        assert_eq!(left.len(), 1);
        assert!(dir.path().join("two/below").is_dir());
        empty_dir(&dir.path().join("new"), &set(&[])).unwrap();
        assert!(dir.path().join("new").is_dir());
    }

    #[test]
    fn a_paused_sandbox_needs_no_process() {
        assert_eq!(decision(SandboxState::Paused, true, false), Decision::Keep);
    }

    #[test]
    fn a_pause_that_published_its_build_counts() {
        for state in [SandboxState::Pausing, SandboxState::Running] {
            assert!(
                matches!(decision(state, true, true), Decision::Paused(_)),
                "{state}"
            );
        }
    }

    #[test]
    fn an_older_build_is_never_taken_for_what_ran() {
        for state in [
            SandboxState::Running,
            SandboxState::Pausing,
            SandboxState::Snapshotting,
        ] {
            assert!(
                matches!(decision(state, true, false), Decision::Fail(_)),
                "{state}"
            );
        }
    }

    #[test]
    fn a_resume_that_did_not_end_leaves_it_paused() {
        assert_eq!(
            decision(SandboxState::Resuming, true, false),
            Decision::StillPaused
        );
    }

    #[test]
    fn what_nobody_was_told_of_goes() {
        assert_eq!(
            decision(SandboxState::Creating, false, false),
            Decision::Forget
        );
        assert_eq!(
            decision(SandboxState::Destroying, true, false),
            Decision::Forget
        );
    }

    fn set(ids: &[&str]) -> BTreeSet<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    #[test]
    fn what_is_made_or_removed_meanwhile_is_not_left_over() {
        let seen = Seen {
            directories: set(&["made", "lost", "going"]),
            rows: set(&["made", "starting", "orphan", "going", "gone"]),
            starting: set(&["starting"]),
            known: set(&["made", "going"]),
            rows_after: set(&["made", "starting", "orphan", "new"]),
        };
        let (rows, directories) = left_over(&seen);
        assert_eq!(rows, ["orphan"]);
        assert_eq!(directories, ["lost"]);
        assert_eq!(left_over(&Seen::default()), (vec![], vec![]));
    }
}
