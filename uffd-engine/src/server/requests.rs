//! What a daemon's requests come to: sessions that begin, and orders for those that there are.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use snapshot_format::PageSize;

use super::beginning::Begin;
use super::opening::{Answer, Ask};
use super::{Engine, Owner};
use crate::control::{Report, Request};
use crate::counters::SessionStats;
use crate::worker::{AheadOrder, Command};

impl Engine {
    pub(super) fn obey(&mut self, request: Request, fds: Vec<OwnedFd>) {
        match request {
            Request::Expect {
                request,
                session,
                store,
                build,
                deadline_ms,
            } => {
                let begin = Begin::Expect(Instant::now() + Duration::from_millis(deadline_ms));
                self.begin(request, session, begin, Ask::Build { store, build }, fds);
            }
            Request::ExpectFile {
                request,
                session,
                file: path,
                page_bytes,
                deadline_ms,
            } => {
                let Some(page_size) = PageSize::from_bytes(page_bytes) else {
                    let reason = format!("no guest has pages of {page_bytes} bytes");
                    return self.refuse(request, reason);
                };
                let begin = Begin::Expect(Instant::now() + Duration::from_millis(deadline_ms));
                self.begin(request, session, begin, Ask::File { path, page_size }, fds);
            }
            Request::Adopt {
                request,
                session,
                store,
                build,
                regions,
                tracking,
            } => {
                let begin = Begin::Adopt { regions, tracking };
                self.begin(request, session, begin, Ask::Build { store, build }, fds);
            }
            Request::ServePages {
                request,
                session,
                store,
                build,
                regions,
                surrendered,
            } => {
                let begin = Begin::Postcopy {
                    regions,
                    surrendered,
                };
                self.begin(request, session, begin, Ask::Build { store, build }, fds);
            }
            Request::Detach { request, session } => self.detach(request, session),
            Request::Surrender { .. } | Request::Shutdown => {}
            order => match order.session().and_then(|name| self.opening.get_mut(name)) {
                Some(opening) => opening.then.push(order),
                None => self.order(order),
            },
        }
    }

    fn detach(&mut self, request: u64, session: String) {
        if self.opening.remove(&session).is_some() {
            let stats = SessionStats::default();
            return self.outbox.send(&Report::Detached { request, stats }, &[]);
        }
        let Some(Owner { worker, source, .. }) = self.owners.remove(&session) else {
            return self.unknown(request, &session);
        };
        if let Some(source) = source.upgrade()
            && source.build().is_some()
        {
            self.sources.linger(source, Instant::now());
        }
        self.workers.disengage(worker);
        self.workers
            .tell(worker, Command::Detach { request, session });
        self.even_out();
    }

    /// What is asked of a session that there is.
    pub(super) fn order(&mut self, order: Request) {
        match order {
            Request::Stats { request, session } => match self.owners.get(&session) {
                Some(owner) => {
                    let worker = owner.worker;
                    self.workers
                        .tell(worker, Command::Stats { request, session });
                }
                None => self.unknown(request, &session),
            },
            Request::Record {
                request,
                session,
                window_ms,
                max_pages,
            } => {
                let window = Duration::from_millis(window_ms);
                let order = AheadOrder::Record { window, max_pages };
                self.ahead(request, session, order);
            }
            Request::Track {
                request,
                session,
                tracking,
            } => self.ahead(request, session, AheadOrder::Track(tracking)),
            Request::EndRecording { request, session } => {
                self.ahead(request, session, AheadOrder::EndRecording);
            }
            Request::Replay { request, session } => self.replay(request, session),
            Request::Load {
                request,
                session,
                bytes_per_second,
            } => self.ahead(request, session, AheadOrder::Load { bytes_per_second }),
            Request::Halt { request, session } => {
                self.ahead(request, session, AheadOrder::Halt);
            }
            Request::Expect { .. }
            | Request::ExpectFile { .. }
            | Request::Adopt { .. }
            | Request::ServePages { .. }
            | Request::Detach { .. }
            | Request::Surrender { .. }
            | Request::Shutdown => unreachable!("a session begins or ends elsewhere"),
        }
    }

    pub(super) fn ahead(&self, request: u64, session: String, order: AheadOrder) {
        match self.owners.get(&session) {
            Some(owner) => self.workers.tell(
                owner.worker,
                Command::Ahead {
                    request,
                    session,
                    order,
                },
            ),
            None => self.unknown(request, &session),
        }
    }

    /// The working set lies beside the build, on the same file system.
    fn replay(&mut self, request: u64, session: String) {
        let source = self
            .owners
            .get(&session)
            .map(|owner| owner.source.upgrade());
        match source {
            None => self.unknown(request, &session),
            Some(None) => self.ahead(request, session, AheadOrder::Replay { runs: Vec::new() }),
            Some(Some(source)) if source.never_blocks() => {
                if let Answer::WorkingSet(runs) = Ask::WorkingSet(source).carry_out() {
                    self.ahead(request, session, AheadOrder::Replay { runs });
                }
            }
            Some(Some(source)) => match self.openers.ask(Ask::WorkingSet(source)) {
                Ok(number) => {
                    self.reading_sets.insert(number, (request, session));
                }
                Err(reason) => self.refuse(request, reason),
            },
        }
    }

    pub(super) fn unknown(&self, request: u64, session: &str) {
        self.refuse(request, format!("This engine has no session {session:?}"));
    }
}
