//! What travels, with the names that these clients use.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::clock::rfc3339;
use crate::wire::process::{FileEntry, ProcessInfo};
use crate::wire::{Sandbox, SandboxState, Snapshot, SnapshotKind};

/// Keeps the time limit that a capsule was made with; a label, so that it lives as long as it does.
pub(super) const LIMIT_LABEL: &str = "wrenn.timeout_sec";

/// `POST /v1/capsules`.
#[derive(Debug, Deserialize)]
pub(super) struct NewCapsule {
    pub(super) template: Option<String>,
    pub(super) vcpus: Option<u32>,
    pub(super) memory_mb: Option<u32>,
    /// Seconds of inactivity before it is paused; 0 is never.
    pub(super) timeout_sec: Option<u64>,
    pub(super) metadata: Option<BTreeMap<String, String>>,
}

/// One capsule.
#[derive(Debug, Serialize)]
pub(super) struct Capsule {
    id: String,
    status: &'static str,
    template: String,
    vcpus: u32,
    memory_mb: u32,
    timeout_sec: u64,
    created_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    started_at: Option<String>,
    metadata: BTreeMap<String, String>,
    disk_size_mb: u64,
}

impl From<Sandbox> for Capsule {
    fn from(sandbox: Sandbox) -> Self {
        let timeout_sec = limit(&sandbox).unwrap_or(0);
        let mut metadata = sandbox.labels;
        metadata.remove(LIMIT_LABEL);
        Self {
            id: sandbox.id.to_string(),
            status: status(sandbox.state),
            template: sandbox.template.to_string(),
            vcpus: sandbox.vcpus,
            memory_mb: sandbox.memory_mb,
            timeout_sec,
            created_at: rfc3339(sandbox.created_at_ms),
            started_at: (sandbox.started_at_ms > 0).then(|| rfc3339(sandbox.started_at_ms)),
            metadata,
            disk_size_mb: sandbox.disk_mb,
        }
    }
}

/// Seconds of inactivity that a capsule has, if it was made with a limit.
pub(super) fn limit(sandbox: &Sandbox) -> Option<u64> {
    sandbox.labels.get(LIMIT_LABEL)?.parse().ok()
}

const fn status(state: SandboxState) -> &'static str {
    match state {
        SandboxState::Creating => "starting",
        SandboxState::Running => "running",
        SandboxState::Pausing => "pausing",
        SandboxState::Paused => "paused",
        SandboxState::Resuming => "resuming",
        SandboxState::Snapshotting => "snapshotting",
        SandboxState::Failed => "error",
        SandboxState::Destroying => "stopping",
    }
}

/// `GET /v1/capsules/stats`: what there is now. No history is kept.
#[derive(Debug, Serialize)]
pub(super) struct Stats {
    pub(super) current: Current,
}

#[derive(Debug, Default, Serialize)]
pub(super) struct Current {
    pub(super) running_count: u64,
    pub(super) vcpus_reserved: u64,
    pub(super) memory_mb_reserved: u64,
}

/// `GET /v1/capsules/{id}/metrics`.
#[derive(Debug, Serialize)]
pub(super) struct Metrics {
    pub(super) sandbox_id: String,
    pub(super) points: Vec<Point>,
}

/// One sample.
#[derive(Debug, Serialize)]
pub(super) struct Point {
    pub(super) timestamp_unix: u64,
    pub(super) cpu_pct: f64,
    pub(super) mem_bytes: u64,
    pub(super) disk_bytes: u64,
}

/// `POST /v1/capsules/{id}/exec`.
#[derive(Debug, Deserialize)]
pub(super) struct Exec {
    pub(super) cmd: String,
    #[serde(default)]
    pub(super) args: Vec<String>,
    pub(super) timeout_sec: Option<u64>,
    #[serde(default)]
    pub(super) background: bool,
    pub(super) tag: Option<String>,
    pub(super) envs: Option<BTreeMap<String, String>>,
    pub(super) cwd: Option<String>,
}

/// How a command ended, or that it runs.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Executed {
    Ended {
        sandbox_id: String,
        cmd: String,
        stdout: String,
        stderr: String,
        exit_code: i32,
        duration_ms: u64,
        encoding: &'static str,
    },
    Runs {
        sandbox_id: String,
        cmd: String,
        pid: u32,
        tag: String,
    },
}

/// `GET /v1/capsules/{id}/processes`.
#[derive(Debug, Serialize)]
pub(super) struct Processes {
    pub(super) processes: Vec<Process>,
}

#[derive(Debug, Serialize)]
pub(super) struct Process {
    pid: u32,
    tag: Option<String>,
    cmd: String,
    args: Vec<String>,
}

impl From<ProcessInfo> for Process {
    fn from(info: ProcessInfo) -> Self {
        Self {
            pid: info.pid,
            tag: info.tag,
            cmd: info.cmd,
            args: info.args,
        }
    }
}

/// Bodies that say where.
#[derive(Debug, Deserialize)]
pub(super) struct At {
    pub(super) path: String,
    pub(super) depth: Option<u32>,
}

/// `POST …/files/list`.
#[derive(Debug, Serialize)]
pub(super) struct Entries {
    pub(super) entries: Vec<Entry>,
}

/// `POST …/files/mkdir`.
#[derive(Debug, Serialize)]
pub(super) struct Made {
    pub(super) entry: Entry,
}

/// One entry of a directory.
#[derive(Debug, Serialize)]
pub(super) struct Entry {
    name: String,
    path: String,
    /// There is no word for what is none of these.
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    size: u64,
    mode: u32,
    owner: String,
    group: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    modified_at: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    symlink_target: Option<String>,
}

impl From<FileEntry> for Entry {
    fn from(entry: FileEntry) -> Self {
        let kind = match (&entry.symlink_target, entry.kind.as_str()) {
            (Some(_), _) => Some("symlink"),
            (None, "file") => Some("file"),
            (None, "directory") => Some("directory"),
            (None, _) => None,
        };
        let modified = entry.modified.and_then(|text| text.parse().ok());
        Self {
            name: entry.name,
            path: entry.path,
            r#type: kind,
            size: entry.size,
            mode: entry.mode,
            owner: entry.owner,
            group: entry.group,
            modified_at: modified.map(|time: jiff::Timestamp| time.as_second()),
            symlink_target: entry.symlink_target,
        }
    }
}

/// `POST /v1/snapshots`.
#[derive(Debug, Deserialize)]
pub(super) struct NewSnapshot {
    pub(super) sandbox_id: String,
    pub(super) name: Option<String>,
}

/// One template.
#[derive(Debug, Serialize)]
pub(super) struct Template {
    pub(super) name: String,
    pub(super) r#type: &'static str,
    vcpus: u32,
    memory_mb: u32,
    created_at: String,
}

impl From<Snapshot> for Template {
    fn from(snapshot: Snapshot) -> Self {
        Self {
            name: snapshot.name.to_string(),
            r#type: match snapshot.kind {
                SnapshotKind::Disk => "base",
                SnapshotKind::Memory => "snapshot",
            },
            vcpus: snapshot.vcpus,
            memory_mb: snapshot.memory_mb,
            created_at: rfc3339(snapshot.created_at_ms),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_says_only_what_its_client_has_a_word_for() {
        let entry = |kind: &str, target: Option<&str>| FileEntry {
            name: "a".into(),
            path: "/a".into(),
            kind: kind.into(),
            size: 1,
            mode: 0o644,
            owner: "root".into(),
            group: "root".into(),
            modified: Some("1970-01-01T00:00:07.9Z".into()),
            symlink_target: target.map(str::to_owned),
        };
        let shown = |entry: FileEntry| serde_json::to_value(Entry::from(entry)).unwrap();
        assert_eq!(shown(entry("file", None))["type"], "file");
        assert_eq!(shown(entry("file", None))["modified_at"], 7);
        assert_eq!(shown(entry("directory", Some("b")))["type"], "symlink");
        assert!(shown(entry("other", None)).get("type").is_none());
    }
}
