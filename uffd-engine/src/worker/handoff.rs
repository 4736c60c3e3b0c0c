//! One step of a hand-off: somebody connects, bytes come in, the message is complete.

use std::io;
use std::os::fd::AsFd;

use super::{Worker, kind};
use crate::control::Report;
use crate::expecting::{Step, claims_of};
use crate::roster::{Entry, Phase};
use crate::sys::ring::Token;
use crate::sys::uffd::Uffd;

impl Worker {
    pub(super) fn handoff_step(&mut self, token: Token) -> io::Result<()> {
        let Some(entry) = self.roster.get(token.index, token.stamp) else {
            return Ok(());
        };
        let Phase::Expecting { request, expecting } = &mut entry.phase else {
            return Ok(());
        };
        let request = *request;
        let step = if token.kind == kind::LISTENER {
            expecting.accept()
        } else {
            expecting.receive()
        };
        match step {
            Ok(Step::Wait) => {}
            Ok(Step::Connected) => {
                let deadline = expecting.deadline;
                if let Some(connection) = expecting.connection() {
                    let token = Token {
                        kind: kind::CONNECTION,
                        ..token
                    };
                    self.reads.ring.poll_readable(connection, token)?;
                }
                self.note_due(Some(deadline));
            }
            Ok(Step::Complete(regions)) => {
                let claims = claims_of(&regions);
                let taken = self.remove(token.index)?;
                if let Some(Entry {
                    name,
                    phase: Phase::Expecting { expecting, .. },
                    ..
                }) = taken
                {
                    match expecting.into_parts(regions) {
                        Ok((parts, peer_pid)) => {
                            let uffd = parts.guest.userfaultfd();
                            let kept = uffd.map(Uffd::try_clone);
                            self.serve(name.clone(), parts)?;
                            let report = Report::Attached {
                                request,
                                session: name,
                                peer_pid,
                                regions: claims,
                                worker_cpu: self.cpu,
                            };
                            match &kept {
                                Some(Ok(uffd)) => self.outbox.send(&report, &[uffd.as_fd()]),
                                Some(Err(_)) | None => self.outbox.send(&report, &[]),
                            }
                        }
                        Err(error) => self.refuse(request, &error),
                    }
                }
            }
            Err(error) => {
                self.remove(token.index)?;
                self.refuse(request, &error);
            }
        }
        Ok(())
    }
}
