//! A pseudo-terminal: the daemon's side, and the side that a process gets as its three streams.

use std::io;
use std::os::fd::OwnedFd;

use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::proto::process::PTY;

/// Columns and rows in characters; neither is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    cols: u16,
    rows: u16,
}

/// Both sides of a new terminal; closed on exec.
#[derive(Debug)]
pub(super) struct Terminal {
    /// Ours: what is written here is typed, what is read here was printed. Doesn't block.
    pub(super) ours: OwnedFd,
    /// The process's.
    pub(super) theirs: OwnedFd,
}

impl Size {
    /// The size that a request asks for; 80 × 24 when it says none, `None` when it is out of range.
    pub(super) fn of(pty: &PTY) -> Option<Size> {
        let Some(size) = pty.size.as_option() else {
            return Some(Size { cols: 80, rows: 24 });
        };
        let side = |count: u32| u16::try_from(count).ok().filter(|count| *count > 0);
        Some(Size {
            cols: side(size.cols)?,
            rows: side(size.rows)?,
        })
    }

    /// Gives a terminal this size; its foreground processes get SIGWINCH.
    pub(super) fn apply(self, terminal: &OwnedFd) -> io::Result<()> {
        let size = Winsize {
            ws_col: self.cols,
            ws_row: self.rows,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(tcsetwinsize(terminal, size)?)
    }
}

impl Terminal {
    /// A new terminal of that size, which belongs to `owner` if that is somebody else.
    pub(super) fn open(size: Size, owner: Option<u32>) -> io::Result<Terminal> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = openpt(flags)?;
        unlockpt(&ours)?;
        // Not by name: the path may lead elsewhere in another mount namespace.
        let theirs = ioctl_tiocgptpeer(&ours, flags)?;
        if let Some(uid) = owner {
            std::os::unix::fs::fchown(&theirs, Some(uid), None)?;
        }
        size.apply(&ours)?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        Ok(Terminal { ours, theirs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::process::pty;

    fn pty(cols: u32, rows: u32) -> PTY {
        let size = pty::Size {
            cols,
            rows,
            ..pty::Size::default()
        };
        PTY {
            size: Some(size).into(),
            ..PTY::default()
        }
    }

    #[test]
    fn size_is_bounded_and_has_a_default() {
        assert_eq!(
            Size::of(&pty(100, 30)),
            Some(Size {
                cols: 100,
                rows: 30
            })
        );
        assert_eq!(Size::of(&PTY::default()), Some(Size { cols: 80, rows: 24 }));
        for (cols, rows) in [(0, 24), (80, 0), (65_536, 24)] {
            assert_eq!(Size::of(&pty(cols, rows)), None);
        }
    }

    #[test]
    fn terminal_has_the_size_and_both_sides_are_close_on_exec() {
        let size = Size { cols: 91, rows: 17 };
        let terminal = Terminal::open(size, None).unwrap();
        let seen = rustix::termios::tcgetwinsize(&terminal.theirs).unwrap();
        assert_eq!((seen.ws_col, seen.ws_row), (91, 17));
        for side in [&terminal.ours, &terminal.theirs] {
            let flags = rustix::io::fcntl_getfd(side).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        }
    }
}
