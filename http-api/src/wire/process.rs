//! Processes and files in a sandbox, on the wire.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Size of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TerminalSize {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// What to start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StartProcess {
    /// The program; looked up in the guest's `PATH`.
    pub cmd: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Environment, over the sandbox's own.
    pub env: BTreeMap<String, String>,
    /// Working directory.
    pub cwd: Option<String>,
    /// Who runs it; the sandbox's default user when absent.
    pub user: Option<String>,
    /// It is killed after this long; never when absent.
    pub timeout_ms: Option<u64>,
    /// On a terminal of this size; on pipes when absent.
    pub terminal: Option<TerminalSize>,
    /// A name of the caller's own, by which it is found again.
    pub tag: Option<String>,
}

/// What a process that was started, or found again, says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProcessOutput {
    /// It runs; always the first.
    Started {
        /// Its number in the guest.
        pid: u32,
    },
    /// It wrote to its standard output.
    Stdout(Vec<u8>),
    /// It wrote to its standard error.
    Stderr(Vec<u8>),
    /// It wrote to its terminal.
    Terminal(Vec<u8>),
    /// It ended; nothing follows.
    Exit {
        /// Its exit code; −1 when a signal ended it.
        exit_code: i32,
        /// How it ended in words.
        status: String,
    },
    /// Nothing more will be heard of it, and why.
    Lost(String),
}

/// Which process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// By its number in the guest.
    Pid(u32),
    /// By the name its starter gave it.
    Tag(String),
}

/// One process of `GET /v1/sandboxes/{id}/processes`: those that callers started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProcessInfo {
    /// Its number in the guest.
    pub pid: u32,
    /// The program.
    pub cmd: String,
    /// Its arguments.
    #[serde(default)]
    pub args: Vec<String>,
    /// Working directory, if it was given one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Its starter's name for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
}

/// What can be sent to a process and all of its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Signal {
    /// Its terminal is gone.
    #[serde(rename = "SIGHUP")]
    Hup,
    /// As Ctrl-C.
    #[serde(rename = "SIGINT")]
    Int,
    /// As Ctrl-\.
    #[serde(rename = "SIGQUIT")]
    Quit,
    /// It can't refuse.
    #[serde(rename = "SIGKILL")]
    Kill,
    /// Whatever it means to the program.
    #[serde(rename = "SIGUSR1")]
    Usr1,
    /// Whatever it means to the program.
    #[serde(rename = "SIGUSR2")]
    Usr2,
    /// It should end.
    #[serde(rename = "SIGTERM")]
    Term,
}

/// `POST /v1/sandboxes/{id}/processes/{pid}/signal`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SendSignal {
    /// Which.
    pub signal: Signal,
}

/// `?path=&user=` of file requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FilePlace {
    /// Where; relative to the user's home.
    pub path: String,
    /// Whose permissions count; those of the sandbox's default user when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FileEntry {
    /// Its name in the directory.
    pub name: String,
    /// Its absolute path.
    pub path: String,
    /// `file`, `directory` or `other`; of what a symbolic link leads to.
    pub kind: String,
    /// Bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Its owner's name.
    pub owner: String,
    /// Its group's name.
    pub group: String,
    /// RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modified: Option<String>,
    /// Where a symbolic link leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symlink_target: Option<String>,
}

/// `PUT /v1/sandboxes/{id}/files`: what was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WrittenFile {
    /// Its absolute path.
    pub path: String,
}
