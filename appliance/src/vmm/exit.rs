//! Why a VMM's process ended, as far as that can be told from its status and its last words.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// Firecracker's own exit status when its filter caught a system call.
/// Source: `FcExitCode` of Firecracker 1.16.
const FIRECRACKER_BAD_SYSCALL: i32 = 148;
/// What Linux prints when it gives up.
const PANIC: &str = "Kernel panic - not syncing";

/// How a VMM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest switched itself off, or restarted.
    Shutdown,
    /// The guest's kernel panicked.
    Panic(String),
    /// A system call that its filter doesn't allow.
    Seccomp,
    /// SIGKILL that we did not send: the kernel when memory runs out, or a person.
    Killed,
    /// Another signal.
    Signal(i32),
    /// It could not bring in a page that its guest needs.
    Memory(String),
    /// It gave up by itself.
    Status(i32),
}

impl Exit {
    /// Judges a status and what was printed before it.
    #[must_use]
    pub fn of(status: ExitStatus, console: &str) -> Self {
        match (status.code(), status.signal()) {
            (_, Some(libc::SIGSYS)) | (Some(FIRECRACKER_BAD_SYSCALL), _) => Self::Seccomp,
            (_, Some(libc::SIGKILL)) => Self::Killed,
            (_, Some(signal)) => Self::Signal(signal),
            (code, None) => {
                let panic = console.lines().rev().find(|line| line.contains(PANIC));
                match (panic, code) {
                    (Some(line), _) => Self::Panic(line.trim().to_owned()),
                    (None, Some(0)) => Self::Shutdown,
                    (None, code) => Self::Status(code.unwrap_or(-1)),
                }
            }
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => f.write_str("the guest switched itself off"),
            Self::Panic(line) => write!(f, "the guest's kernel panicked: {line}"),
            Self::Seccomp => f.write_str("its system call filter stopped it"),
            Self::Killed => {
                f.write_str("killed by SIGKILL, as the kernel does when memory runs out")
            }
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Memory(line) => write!(f, "its memory can't be brought in: {line}"),
            Self::Status(code) => write!(f, "exit status {code}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(raw: i32, console: &str) -> Exit {
        Exit::of(ExitStatus::from_raw(raw), console)
    }

    #[test]
    fn ends_are_told_apart() {
        assert_eq!(exit(0, "reboot: Power down"), Exit::Shutdown);
        let panic = "[1.0] Kernel panic - not syncing: VFS\nReboot failed\n";
        let said = Exit::Panic("[1.0] Kernel panic - not syncing: VFS".into());
        assert_eq!(exit(0, panic), said);
        assert_eq!(exit(1 << 8, panic), said);
        assert_eq!(exit(libc::SIGSYS, ""), Exit::Seccomp);
        assert_eq!(exit(148 << 8, ""), Exit::Seccomp);
        assert_eq!(exit(libc::SIGKILL, panic), Exit::Killed);
        assert_eq!(exit(libc::SIGSEGV, ""), Exit::Signal(libc::SIGSEGV));
        assert_eq!(exit(2 << 8, ""), Exit::Status(2));
    }
}
