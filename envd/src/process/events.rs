//! A client's stream: the start, what the audience hears, keep-alives, and the end.

use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use connectrpc::ConnectError;
use nix::sys::signal::Signal;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::audience::{Ending, Event};
use crate::caller::{reached, too_late};
use crate::proto::process::ProcessEvent;
use crate::proto::process::process_event::data_event::Output;
use crate::proto::process::process_event::{
    DataEvent, EndEvent, Event as Oneof, KeepAlive, StartEvent,
};

/// What one client is sent, in order.
#[derive(Debug)]
pub(super) struct Events {
    /// Told first.
    pub(super) pid: Option<u32>,
    pub(super) heard: mpsc::Receiver<Event>,
    /// Silence after which a keep-alive is sent.
    pub(super) keep_alive: Option<Duration>,
    /// When the stream is cut, whatever the process does.
    pub(super) cut_at: Option<Instant>,
    /// Set once the last item has been given.
    pub(super) state: State,
}

/// How far a stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// More may come.
    Open,
    /// Only the error of a deadline is left to say.
    TimedOut,
    /// Nothing more.
    Over,
}

type Item = Result<ProcessEvent, ConnectError>;

impl Events {
    /// The next item; `None` at the end.
    pub(super) async fn next(&mut self) -> Option<Item> {
        match self.state {
            State::Over => return None,
            State::TimedOut => return Some(self.cut()),
            State::Open => {}
        }
        if let Some(pid) = self.pid.take() {
            return Some(Ok(message(StartEvent {
                pid,
                ..StartEvent::default()
            })));
        }
        let silence = self.keep_alive.map(|interval| Instant::now() + interval);
        tokio::select! {
            biased;
            // First, or a process that always has something to say would never be cut.
            () = reached(self.cut_at) => Some(self.cut()),
            event = self.heard.recv() => Some(self.said(event)),
            () = reached(silence) => Some(Ok(message(KeepAlive::default()))),
        }
    }

    fn said(&mut self, event: Option<Event>) -> Item {
        let output = match event {
            Some(Event::Stdout(bytes)) => Output::Stdout(bytes.to_vec()),
            Some(Event::Stderr(bytes)) => Output::Stderr(bytes.to_vec()),
            Some(Event::Terminal(bytes)) => Output::Pty(bytes.to_vec()),
            Some(Event::End(ending)) => {
                self.state = if ending.timed_out {
                    State::TimedOut
                } else {
                    State::Over
                };
                return Ok(message(end_event(ending)));
            }
            None => {
                self.state = State::Over;
                return Err(ConnectError::internal("The process's supervisor went away"));
            }
        };
        Ok(message(DataEvent {
            output: Some(output),
            ..DataEvent::default()
        }))
    }

    fn cut(&mut self) -> Item {
        self.state = State::Over;
        Err(too_late())
    }
}

fn message(event: impl Into<Oneof>) -> ProcessEvent {
    ProcessEvent {
        event: Some(event.into()),
        ..ProcessEvent::default()
    }
}

/// In the words of Go's `os.ProcessState`, which is what clients of this protocol know.
fn end_event(Ending { status, .. }: Ending) -> EndEvent {
    let text = match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => {
            let dumped = if status.core_dumped() {
                " (core dumped)"
            } else {
                ""
            };
            format!("signal: {}{dumped}", signal_name(signal))
        }
        (None, None) => "unknown".to_owned(),
    };
    EndEvent {
        exit_code: status.code().unwrap_or(-1),
        exited: status.code().is_some(),
        error: (!status.success()).then(|| text.clone()),
        status: text,
        ..EndEvent::default()
    }
}

fn signal_name(number: i32) -> String {
    match Signal::try_from(number) {
        Ok(Signal::SIGHUP) => "hangup".to_owned(),
        Ok(Signal::SIGINT) => "interrupt".to_owned(),
        Ok(Signal::SIGQUIT) => "quit".to_owned(),
        Ok(Signal::SIGABRT) => "aborted".to_owned(),
        Ok(Signal::SIGKILL) => "killed".to_owned(),
        Ok(Signal::SIGSEGV) => "segmentation fault".to_owned(),
        Ok(Signal::SIGPIPE) => "broken pipe".to_owned(),
        Ok(Signal::SIGTERM) => "terminated".to_owned(),
        Ok(signal) => signal.as_str().to_lowercase(),
        Err(_) => format!("signal {number}"),
    }
}

#[cfg(test)]
mod tests {
    use std::process::ExitStatus;

    use super::*;

    fn end(raw: i32) -> EndEvent {
        end_event(Ending {
            status: ExitStatus::from_raw(raw),
            timed_out: false,
        })
    }

    #[test]
    fn ends_are_told_in_the_clients_words() {
        let ended = end(0);
        assert_eq!(
            (ended.exit_code, ended.exited, ended.error),
            (0, true, None)
        );
        let failed = end(3 << 8);
        assert_eq!((failed.exit_code, failed.exited), (3, true));
        assert_eq!(
            (failed.status.as_str(), failed.error.as_deref()),
            ("exit status 3", Some("exit status 3"))
        );
        let killed = end(9);
        assert_eq!((killed.exit_code, killed.exited), (-1, false));
        assert_eq!(killed.status, "signal: killed");
        assert_eq!(end(35).status, "signal: signal 35", "a real-time signal");
    }

    #[tokio::test]
    async fn stream_is_cut_in_the_middle_of_output() {
        let audience = super::super::audience::Audience::default();
        let heard = audience.join().unwrap();
        audience
            .tell(Event::Stdout(bytes::Bytes::from_static(b"x")))
            .await;
        let cut_at = Instant::now().checked_sub(Duration::from_millis(10));
        let mut events = Events {
            pid: None,
            heard,
            keep_alive: None,
            cut_at,
            state: State::Open,
        };
        assert!(events.next().await.is_some_and(|item| item.is_err()));
        assert!(events.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn silence_brings_keep_alives_and_the_cut_ends_the_stream() {
        let audience = super::super::audience::Audience::default();
        let mut events = Events {
            pid: Some(7),
            heard: audience.join().unwrap(),
            keep_alive: Some(Duration::from_secs(2)),
            cut_at: Some(Instant::now() + Duration::from_secs(5)),
            state: State::Open,
        };
        let mut kinds = Vec::new();
        while let Some(item) = events.next().await {
            kinds.push(match item {
                Ok(ProcessEvent {
                    event: Some(Oneof::Start(_)),
                    ..
                }) => "start",
                Ok(ProcessEvent {
                    event: Some(Oneof::Keepalive(_)),
                    ..
                }) => "keepalive",
                Ok(_) => "other",
                Err(_) => "error",
            });
        }
        assert_eq!(kinds, ["start", "keepalive", "keepalive", "error"]);
    }
}
