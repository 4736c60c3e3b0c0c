//! What a Cloud Hypervisor says of itself: its event monitor, JSON objects one after the other.
//!
//! A guest that restarts is one that has ended, here as with other VMMs. Cloud Hypervisor would
//! boot it again, from what it was configured with; it is killed when it says so.
//!
//! Source: `event_monitor/src/lib.rs` and the `event!` lines of Cloud Hypervisor 53.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::watch;
use uffd_engine::sys::process::pidfd_signal;

use crate::vmm::exit::Exit;

/// An object has some hundred bytes; whatever has more is none.
const MAX_OBJECT_BYTES: usize = 16 << 10;

/// What it prints when a page that its guest waits for can't be had.
const UNSERVED: &str = "UFFD handler exited with error";

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Event {
    source: String,
    event: String,
}

/// Bytes of the monitor that are no whole object yet.
#[derive(Debug, Default)]
pub struct Decoder {
    rest: Vec<u8>,
}

impl Decoder {
    /// The events that these bytes complete; `None` when what comes can't be understood.
    pub fn feed(&mut self, bytes: &[u8]) -> Option<Vec<Event>> {
        self.rest.extend_from_slice(bytes);
        let mut events = Vec::new();
        let mut stream = serde_json::Deserializer::from_slice(&self.rest).into_iter::<Event>();
        let mut used = 0;
        loop {
            match stream.next() {
                Some(Ok(event)) => {
                    events.push(event);
                    used = stream.byte_offset();
                }
                Some(Err(error)) if error.is_eof() => break,
                Some(Err(_)) => return None,
                None => {
                    used = self.rest.len();
                    break;
                }
            }
        }
        self.rest.drain(..used);
        (self.rest.len() <= MAX_OBJECT_BYTES).then_some(events)
    }
}

/// What there is to know of what was said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Said {
    /// The guest's kernel panicked, by its own word.
    panicked: bool,
    /// The guest restarts.
    restarts: bool,
    /// How often a migration failed.
    failed_migrations: u32,
}

impl Said {
    fn hear(&mut self, event: &Event) {
        match (event.source.as_str(), event.event.as_str()) {
            ("guest", "panic") => self.panicked = true,
            ("vm", "rebooting") => self.restarts = true,
            ("vm", "migration-failed") => self.failed_migrations += 1,
            _ => {}
        }
    }

    /// How a process ended that said this.
    pub(super) fn judge(self, exit: Exit, console: &str) -> Exit {
        let exit = match exit {
            // By us, then.
            Exit::Killed if self.restarts => {
                match Exit::of(ExitStatus::from_raw(0), console, false) {
                    Exit::Reset | Exit::Shutdown => Exit::Restart,
                    exit => exit,
                }
            }
            exit => exit,
        };
        let unserved = console.lines().rev().find(|line| line.contains(UNSERVED));
        match (exit, unserved) {
            (Exit::Shutdown | Exit::Restart | Exit::Reset, _) if self.panicked => {
                Exit::Panic("it told the VMM so".into())
            }
            // Its status is as if its guest had ended.
            (Exit::Shutdown | Exit::Reset, Some(line)) => Exit::Memory(line.trim().to_owned()),
            (exit, _) => exit,
        }
    }
}

/// What a VMM has said until now.
#[derive(Clone, Debug)]
pub(super) struct Events {
    said: watch::Receiver<Said>,
}

impl Events {
    /// Listens to a monitor until its end; `process` is the VMM's.
    pub(super) fn listen(
        mut monitor: impl AsyncRead + Send + Unpin + 'static,
        process: OwnedFd,
        name: String,
    ) -> Self {
        let (saying, said) = watch::channel(Said::default());
        tokio::spawn(async move {
            let (mut decoder, mut buffer) = (Decoder::default(), [0; 4096]);
            while let Ok(n @ 1..) = monitor.read(&mut buffer).await {
                let Some(events) = decoder.feed(&buffer[..n]) else {
                    tracing::warn!(sandbox_id = name, "Its VMM's events can't be understood");
                    // The pipe is drained, or the VMM would drop what it has to say to nobody.
                    decoder = Decoder::default();
                    continue;
                };
                for event in events {
                    tracing::debug!(sandbox_id = name, ?event, "Its VMM says");
                    saying.send_modify(|said| said.hear(&event));
                }
                if saying.borrow().restarts {
                    let _ = pidfd_signal(process.as_fd(), libc::SIGKILL);
                }
            }
        });
        Self { said }
    }

    /// What it has said.
    pub(super) fn said(&self) -> Said {
        *self.said.borrow()
    }

    /// Waits until another migration has failed than at `then`.
    pub(super) async fn migration_fails(&self, then: Said) {
        let mut said = self.said.clone();
        let failed = said.wait_for(|said| said.failed_migrations > then.failed_migrations);
        if failed.await.is_err() {
            // It has ended, which others notice.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(source: &str, event: &str) -> String {
        format!(
            "{{\n  \"timestamp\": {{\"secs\": 0, \"nanos\": 7}},\n  \"source\": \"{source}\",\n  \
             \"event\": \"{event}\",\n  \"properties\": null\n}}\n\n"
        )
    }

    #[test]
    fn events_are_understood_however_they_are_cut() {
        let text = [event("vmm", "starting"), event("vm", "booted")].concat();
        for piece in 1..text.len() {
            let mut decoder = Decoder::default();
            let mut heard = Vec::new();
            for part in text.as_bytes().chunks(piece) {
                heard.extend(decoder.feed(part).unwrap());
            }
            let names: Vec<_> = heard.iter().map(|event| event.event.as_str()).collect();
            assert_eq!(names, ["starting", "booted"], "in pieces of {piece}");
        }
    }

    #[test]
    fn what_is_no_event_is_not_kept_for_ever() {
        assert_eq!(Decoder::default().feed(b"[1]"), None);
        assert_eq!(Decoder::default().feed(b"no"), None);
        let mut decoder = Decoder::default();
        let endless = format!("{{\"source\": \"{}", "x".repeat(MAX_OBJECT_BYTES));
        assert_eq!(decoder.feed(endless.as_bytes()), None);
    }

    #[test]
    fn a_restart_is_an_end_and_a_panic_if_there_was_one() {
        let hear = |said: &mut Said, source: &str, event: &str| {
            said.hear(&Event {
                source: source.into(),
                event: event.into(),
            });
        };
        let panic = "[1.0] Kernel panic - not syncing: VFS";
        let mut said = Said::default();
        assert_eq!(said.judge(Exit::Killed, panic), Exit::Killed);
        hear(&mut said, "vm", "rebooting");
        assert_eq!(
            said.judge(Exit::Killed, "reboot: Restarting"),
            Exit::Restart
        );
        assert_eq!(said.judge(Exit::Killed, panic), Exit::Panic(panic.into()));
        assert_eq!(said.judge(Exit::Seccomp, panic), Exit::Seccomp);
        let unserved = "cloud-hypervisor: UFFD handler exited with error: end of file";
        assert_eq!(
            said.judge(Exit::Shutdown, unserved),
            Exit::Memory(unserved.into())
        );
        hear(&mut said, "guest", "panic");
        assert!(matches!(said.judge(Exit::Killed, ""), Exit::Panic(_)));
    }
}
