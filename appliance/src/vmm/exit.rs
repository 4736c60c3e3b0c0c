//! Why a VMM's process ended, as far as that can be told from its status and its last words.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// Firecracker's own exit status when its filter caught a system call.
/// Source: `FcExitCode` of Firecracker 1.16, as the next.
const FIRECRACKER_BAD_SYSCALL: i32 = 148;
/// Its exit statuses after signals that it handles.
const FIRECRACKER_SIGNALS: [(i32, i32); 7] = [
    (149, libc::SIGBUS),
    (150, libc::SIGSEGV),
    (151, libc::SIGXFSZ),
    (154, libc::SIGXCPU),
    (155, libc::SIGPIPE),
    (156, libc::SIGHUP),
    (157, libc::SIGILL),
];
/// What Linux prints when it gives up.
const PANIC: &str = "Kernel panic - not syncing";
/// What it prints when it switches itself off, and when it starts again. Source: `kernel/reboot.c`.
const OFF: [&str; 2] = ["reboot: Power down", "reboot: System halted"];
const RESTART: &str = "reboot: Restarting system";

/// How a VMM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest switched itself off.
    Shutdown,
    /// It started again, which ends a VMM as well.
    Restart,
    /// Its processor was reset, or it was switched off, without a word.
    Reset,
    /// The guest's kernel panicked.
    Panic(String),
    /// The control group had no memory left.
    OutOfMemory,
    /// A system call that its filter doesn't allow.
    Seccomp,
    /// SIGKILL that we did not send: the kernel when the host's memory runs out, or a person.
    Killed,
    /// Another signal.
    Signal(i32),
    /// It could not bring in a page that its guest needs.
    Memory(String),
    /// It gave up by itself.
    Status(i32),
}

impl Exit {
    /// Judges a status, what was printed before it, and whether the kernel ended a process of its
    /// control group for want of memory.
    #[must_use]
    pub fn of(status: ExitStatus, console: &str, out_of_memory: bool) -> Self {
        match (status.code(), status.signal()) {
            (_, Some(libc::SIGSYS)) | (Some(FIRECRACKER_BAD_SYSCALL), _) => Self::Seccomp,
            (_, Some(libc::SIGKILL)) if out_of_memory => Self::OutOfMemory,
            (_, Some(libc::SIGKILL)) => Self::Killed,
            (_, Some(signal)) => Self::Signal(signal),
            (code, None) => Self::by_itself(code.unwrap_or(-1), console),
        }
    }

    fn by_itself(code: i32, console: &str) -> Self {
        let last = |words: &str| console.lines().rev().find(|line| line.contains(words));
        if let Some(line) = last(PANIC) {
            return Self::Panic(line.trim().to_owned());
        }
        let signal = FIRECRACKER_SIGNALS
            .iter()
            .find(|(status, _)| *status == code);
        match (code, signal) {
            (_, Some((_, signal))) => Self::Signal(*signal),
            (0, None) if OFF.iter().any(|words| last(words).is_some()) => Self::Shutdown,
            (0, None) if last(RESTART).is_some() => Self::Restart,
            (0, None) => Self::Reset,
            (code, None) => Self::Status(code),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => f.write_str("the guest switched itself off"),
            Self::Restart => f.write_str("the guest restarted, which is the end of its VMM"),
            Self::Reset => f.write_str("the guest was reset, or switched off without a word"),
            Self::Panic(line) => write!(f, "the guest's kernel panicked: {line}"),
            Self::OutOfMemory => f.write_str(
                "killed by the kernel: it took more memory than its control group may have",
            ),
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
        Exit::of(ExitStatus::from_raw(raw), console, false)
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
        assert_eq!(exit(150 << 8, ""), Exit::Signal(libc::SIGSEGV));
        assert_eq!(exit(2 << 8, ""), Exit::Status(2));
        assert_eq!(exit(0, "[9.1] reboot: Restarting system"), Exit::Restart);
        assert_eq!(exit(0, "ok"), Exit::Reset);
    }

    #[test]
    fn a_process_that_was_killed_had_too_little_memory_if_its_group_says_so() {
        let exit = |raw| Exit::of(ExitStatus::from_raw(raw), "", true);
        assert_eq!(exit(libc::SIGKILL), Exit::OutOfMemory);
        // It was another of the group.
        assert_eq!(exit(libc::SIGSEGV), Exit::Signal(libc::SIGSEGV));
    }
}
