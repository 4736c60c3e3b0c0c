//! Sessions that begin, once their build is open.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use super::opening::{Answer, Ask};
use super::parts::{adopt, expect, serve_pages};
use super::{Engine, OfBuild, Owner};
use crate::control::Request;
use crate::region::ClaimedRegion;
use crate::source::PageSource;
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
    /// Begins a session as soon as its build is open.
    pub(super) fn begin(
        &mut self,
        request: u64,
        session: String,
        begin: Begin,
        ask: Ask,
        fds: Vec<OwnedFd>,
    ) {
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
}
