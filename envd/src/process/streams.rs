//! What a process reads and writes: pipes, or one terminal; and the daemon's ends of them.

use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use tokio::net::unix::pipe;

use super::audience::Event;
use super::output::Label;
use super::terminal::{Size, Terminal};

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Streams {
    /// Pipes for both outputs, and for the input if there is to be one.
    Pipes {
        /// Else the process reads end-of-file.
        stdin: bool,
    },
    /// One terminal for all three.
    Terminal(Size),
}

/// The daemon's ends, once the process runs.
#[derive(Debug)]
pub(super) struct Ends {
    /// `None` when the process has no input.
    pub(super) input: Option<pipe::Sender>,
    pub(super) outputs: Vec<(pipe::Receiver, Label)>,
    /// For changing its size.
    pub(super) terminal: Option<OwnedFd>,
}

impl Streams {
    /// Gives a command its three streams; the terminal's own side is kept for [`ends`](Self::ends).
    pub(super) fn attach(
        self,
        command: &mut Command,
        owner: Option<u32>,
    ) -> io::Result<Option<OwnedFd>> {
        match self {
            Streams::Pipes { stdin } => {
                command
                    .stdin(if stdin { Stdio::piped() } else { Stdio::null() })
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped());
                Ok(None)
            }
            Streams::Terminal(size) => {
                let Terminal { ours, theirs } = Terminal::open(size, owner)?;
                command
                    .stdin(theirs.try_clone()?)
                    .stdout(theirs.try_clone()?)
                    .stderr(theirs);
                Ok(Some(ours))
            }
        }
    }
}

/// The daemon's ends of a child's streams.
pub(super) fn ends(child: &mut Child, terminal: Option<OwnedFd>) -> io::Result<Ends> {
    if let Some(terminal) = terminal {
        // A terminal isn't a pipe, but is read, written and waited for like one.
        let input = pipe::Sender::from_owned_fd_unchecked(terminal.try_clone()?)?;
        let output = pipe::Receiver::from_owned_fd_unchecked(terminal.try_clone()?)?;
        return Ok(Ends {
            input: Some(input),
            outputs: vec![(output, Event::Terminal)],
            terminal: Some(terminal),
        });
    }
    let input = child.stdin.take().map(OwnedFd::from);
    let labelled: [(Option<OwnedFd>, Label); 2] = [
        (child.stdout.take().map(OwnedFd::from), Event::Stdout),
        (child.stderr.take().map(OwnedFd::from), Event::Stderr),
    ];
    let mut outputs = Vec::new();
    for (pipe, label) in labelled {
        if let Some(pipe) = pipe {
            outputs.push((pipe::Receiver::from_owned_fd(pipe)?, label));
        }
    }
    Ok(Ends {
        input: input.map(pipe::Sender::from_owned_fd).transpose()?,
        outputs,
        terminal: None,
    })
}
