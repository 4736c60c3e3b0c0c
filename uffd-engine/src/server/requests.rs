//! What a daemon's requests come to: sessions that begin, once their build is open, and orders
//! for those that there are.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use snapshot_format::PageSize;

use super::opening::{Answer, Ask};
use super::{Engine, OfBuild, Owner};
use crate::control::{Report, Request};
use crate::counters::SessionStats;
use crate::expecting::Expecting;
use crate::fault_source::Guest;
use crate::page_state::PageStates;
use crate::postcopy::Postcopy;
use crate::region::{ClaimedRegion, RegionTable};
use crate::session::SessionParts;
use crate::source::PageSource;
use crate::sys::uffd::Uffd;
use crate::tracking::Tracking;
use crate::worker::{AheadOrder, Command};

/// A session that waits for its build to be opened.
pub(super) struct Opening {
    /// The opener's number.
    number: u64,
    request: u64,
    pub(super) begin: Begin,
    pub(super) fds: Vec<OwnedFd>,
    pub(super) of: Option<OfBuild>,
    /// Orders for the session that came meanwhile.
    pub(super) then: Vec<Request>,
}

/// How a session begins.
#[derive(Clone, Debug)]
pub(super) enum Begin {
    /// With a VMM's hand-off, until this.
    Expect(Instant),
    /// With what a dead engine left.
    Adopt {
        regions: Vec<ClaimedRegion>,
        tracking: Tracking,
    },
    /// With a VMM that asks for pages.
    Postcopy {
        regions: Vec<ClaimedRegion>,
        surrendered: bool,
    },
}

impl Opening {
    /// When it is given up.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.begin {
            Begin::Expect(deadline) => Some(deadline),
            // Its guest waits, however long.
            Begin::Adopt { .. } | Begin::Postcopy { .. } => None,
        }
    }
}

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

    /// Begins a session as soon as its build is open.
    fn begin(&mut self, request: u64, session: String, begin: Begin, ask: Ask, fds: Vec<OwnedFd>) {
        if self.owners.contains_key(&session) || self.opening.contains_key(&session) {
            let reason = format!("This engine has a session {session:?} already");
            return self.refuse(request, reason);
        }
        let of = match &ask {
            Ask::Build { store, build } => Some(OfBuild {
                store: store.clone(),
                build: *build,
            }),
            Ask::File { .. } | Ask::WorkingSet(_) => None,
        };
        let open = of
            .as_ref()
            .and_then(|of| self.sources.get(&of.store, of.build));
        if let Some(source) = open {
            return self.start(request, session, begin, (of, source), fds);
        }
        if of
            .as_ref()
            .is_some_and(|of| self.prompt_stores.contains(&of.store))
        {
            return match ask.carry_out() {
                Answer::Source(Ok(source)) => {
                    self.note_open(of.as_ref(), &source);
                    self.start(request, session, begin, (of, source), fds);
                }
                Answer::Source(Err(reason)) => self.refuse(request, reason),
                Answer::WorkingSet(_) => unreachable!("a build was asked for"),
            };
        }
        match self.openers.ask(ask) {
            Ok(number) => {
                let opening = Opening {
                    number,
                    request,
                    begin,
                    fds,
                    of,
                    then: Vec::new(),
                };
                self.opening.insert(session, opening);
            }
            Err(reason) => self.refuse(request, reason),
        }
    }

    /// Goes on with what openers have opened.
    pub(super) fn go_on_opened(&mut self) {
        for (number, answer) in self.openers.answers() {
            match answer {
                Answer::Source(opened) => self.opened(number, opened),
                Answer::WorkingSet(runs) => {
                    if let Some((request, session)) = self.reading_sets.remove(&number) {
                        self.ahead(request, session, AheadOrder::Replay { runs });
                    }
                }
            }
        }
    }

    fn opened(&mut self, number: u64, opened: Result<Arc<PageSource>, String>) {
        let is_it = |(_, opening): &(&String, &Opening)| opening.number == number;
        let Some(session) = self
            .opening
            .iter()
            .find(is_it)
            .map(|(name, _)| name.clone())
        else {
            // It was detached, or given up.
            return;
        };
        let Some(opening) = self.opening.remove(&session) else {
            return;
        };
        let Opening {
            request,
            begin,
            fds,
            of,
            then,
            ..
        } = opening;
        match opened {
            Ok(source) => {
                self.note_open(of.as_ref(), &source);
                self.start(request, session, begin, (of, source), fds);
            }
            Err(reason) => self.refuse(request, reason),
        }
        for order in then {
            self.order(order);
        }
    }

    /// Another session may be served from this source; and its store answers, if this did.
    fn note_open(&mut self, of: Option<&OfBuild>, source: &Arc<PageSource>) {
        let Some(OfBuild { store, build }) = of else {
            return;
        };
        if source.never_blocks() && !self.prompt_stores.contains(store) {
            self.prompt_stores.insert(store.clone());
        }
        self.sources.insert(store.clone(), *build, source);
    }

    /// Refuses what should have been open by now.
    pub(super) fn give_up_opening(&mut self, now: Instant) {
        let overdue = |_: &String, opening: &mut Opening| {
            opening.deadline().is_some_and(|deadline| deadline <= now)
        };
        let overdue: Vec<_> = self.opening.extract_if(overdue).collect();
        for (session, opening) in overdue {
            let reason = format!("The build of session {session:?} could not be opened in time");
            self.refuse(opening.request, reason);
            for order in opening.then {
                self.order(order);
            }
        }
    }

    /// Gives a session to a worker.
    fn start(
        &mut self,
        request: u64,
        session: String,
        begin: Begin,
        (of, source): (Option<OfBuild>, Arc<PageSource>),
        fds: Vec<OwnedFd>,
    ) {
        let weak = Arc::downgrade(&source);
        let made = match begin {
            Begin::Expect(deadline) => {
                expect(source, deadline, fds).map(|expecting| Command::Expect {
                    request,
                    session: session.clone(),
                    expecting: Box::new(expecting),
                })
            }
            Begin::Adopt { regions, tracking } => {
                adopt(source, &regions, tracking, fds).map(|parts| Command::Adopt {
                    request,
                    session: session.clone(),
                    parts: Box::new(parts),
                })
            }
            Begin::Postcopy {
                regions,
                surrendered,
            } => serve_pages(source, &regions, surrendered, fds).map(|parts| Command::Adopt {
                request,
                session: session.clone(),
                parts: Box::new(parts),
            }),
        };
        match made {
            Ok(command) => {
                let worker = self.workers.engage();
                let owner = Owner {
                    worker,
                    source: weak,
                    of,
                };
                self.owners.insert(session, owner);
                self.workers.tell(worker, command);
            }
            Err(reason) => self.refuse(request, reason),
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
    fn order(&mut self, order: Request) {
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

    fn ahead(&self, request: u64, session: String, order: AheadOrder) {
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

    fn unknown(&self, request: u64, session: &str) {
        self.refuse(request, format!("This engine has no session {session:?}"));
    }
}

fn expect(
    source: Arc<PageSource>,
    deadline: Instant,
    fds: Vec<OwnedFd>,
) -> Result<Expecting, String> {
    let [listener, states] = take_fds(fds)?;
    let states = PageStates::from_fd(states, source.memory_pages()).map_err(text)?;
    Ok(Expecting::new(listener, states, source, deadline))
}

fn adopt(
    source: Arc<PageSource>,
    claims: &[ClaimedRegion],
    tracking: Tracking,
    fds: Vec<OwnedFd>,
) -> Result<SessionParts, String> {
    let [uffd, pidfd, states] = take_fds(fds)?;
    let (regions, states) = memory_of(&source, claims, states)?;
    let uffd = Uffd::from_handed_over(uffd).map_err(text)?;
    Ok(SessionParts {
        guest: Guest::Userfaultfd(uffd),
        pidfd,
        handoff: None,
        regions,
        states,
        source,
        tracking,
    })
}

fn serve_pages(
    source: Arc<PageSource>,
    claims: &[ClaimedRegion],
    surrendered: bool,
    fds: Vec<OwnedFd>,
) -> Result<SessionParts, String> {
    let [connection, memory, pidfd, states] = take_fds(fds)?;
    let (regions, states) = memory_of(&source, claims, states)?;
    let memory = File::from(memory);
    let mut postcopy = Postcopy::new(connection, memory, regions.clone(), &states).map_err(text)?;
    if surrendered {
        postcopy.trust_predecessor();
    }
    Ok(SessionParts {
        guest: Guest::Postcopy(Box::new(postcopy)),
        pidfd,
        handoff: None,
        regions,
        states,
        source,
        tracking: Tracking::Off,
    })
}

/// The geometry of a guest's memory and its page states, as somebody else left them.
fn memory_of(
    source: &PageSource,
    claims: &[ClaimedRegion],
    states: OwnedFd,
) -> Result<(RegionTable, PageStates), String> {
    let (page_size, pages) = (source.page_size(), source.memory_pages());
    let regions = RegionTable::new(claims, page_size.bytes(), pages).map_err(text)?;
    let states = PageStates::from_fd(states, pages).map_err(text)?;
    states.forget_reads();
    Ok((regions, states))
}

fn text(error: impl std::error::Error) -> String {
    crate::chain(&error)
}

fn take_fds<const N: usize>(fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], String> {
    let count = fds.len();
    fds.try_into()
        .map_err(|_| format!("The request needs {N} descriptors and came with {count}"))
}
