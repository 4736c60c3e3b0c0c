//! What an engine is asked to do for a session besides answering its faults, and that it stops
//! before the guest is written to disk.

use uffd_engine::Tracking;
use uffd_engine::control::{Report, Request};
use uffd_engine::recording::MAX_RECORDED_PAGES;
use uffd_engine::region::ClaimedRegion;

use super::will::Will;
use super::working_sets::Order;
use super::{Attachment, EngineError, refusal};
use crate::config::EngineConfig;

/// What to do for one session.
#[derive(Clone, Copy, Debug)]
pub struct Ahead {
    /// Who notices the guest's writes.
    pub tracking: Tracking,
    /// What to do about the build's working set.
    pub working_set: Order,
    /// How long to record.
    pub record_ms: u64,
    /// How fast to load all memory; `None` is not at all.
    pub load_bytes_per_second: Option<u64>,
}

impl Ahead {
    /// What the configuration says, for a session with this order whose VMM's writes can be
    /// tracked like this.
    #[must_use]
    pub fn new(config: &EngineConfig, tracking: Tracking, working_set: Order) -> Self {
        let rate = config.load_mib_per_s.saturating_mul(1 << 20);
        Self {
            tracking: if config.track_writes {
                tracking
            } else {
                Tracking::Off
            },
            working_set,
            record_ms: config.record_ms,
            load_bytes_per_second: (rate > 0).then_some(rate),
        }
    }
}

impl Attachment {
    /// Begins all of it, at best before the guest runs. None of it is needed for the guest to be
    /// right, so what is refused is logged. Says whether the guest's writes are tracked.
    pub async fn begin(&self, ahead: &Ahead) -> Tracking {
        let mut tracked = Tracking::Off;
        if ahead.tracking != Tracking::Off {
            let tracking = ahead.tracking;
            // Before the answer: a successor that protects for nothing does no harm.
            self.link
                .note(&self.session, |kept| kept.tracking = tracking);
            let track = |request, session| Request::Track {
                request,
                session,
                tracking,
            };
            if self.order("Tracking writes", track).await {
                tracked = tracking;
            }
        }
        match ahead.working_set {
            Order::Record => {
                let (window_ms, max_pages) = (ahead.record_ms, MAX_RECORDED_PAGES);
                let record = |request, session| Request::Record {
                    request,
                    session,
                    window_ms,
                    max_pages,
                };
                self.order("Recording a working set", record).await;
            }
            Order::Replay => {
                self.link.note(&self.session, |kept| kept.replays = true);
                let replay = |request, session| Request::Replay { request, session };
                self.order("Replaying a working set", replay).await;
            }
            Order::Neither => {}
        }
        self.load(ahead).await;
        tracked
    }

    /// Loads all memory in the background, if it is to be.
    pub async fn load(&self, ahead: &Ahead) {
        if let Some(bytes_per_second) = ahead.load_bytes_per_second {
            let rate = Some(bytes_per_second);
            self.link
                .note(&self.session, |kept| kept.load_bytes_per_second = rate);
            let load = |request, session| Request::Load {
                request,
                session,
                bytes_per_second,
            };
            self.order("Loading memory", load).await;
        }
    }

    /// Ends all of it but the tracking: what was recorded is kept, and nothing is read ahead
    /// any more.
    pub async fn settle(&self) {
        self.link.note(&self.session, |kept| {
            kept.replays = false;
            kept.load_bytes_per_second = None;
        });
        let end = |request, session| Request::EndRecording { request, session };
        self.order("Ending a recording", end).await;
        let halt = |request, session| Request::Halt { request, session };
        self.order("Ending what goes on ahead of faults", halt)
            .await;
    }

    /// What the next daemon needs to know if nobody has it any more, and who notices the guest's
    /// writes.
    #[must_use]
    pub fn will(&self, tracking: Tracking) -> Option<Will> {
        self.link.will(&self.session, tracking)
    }

    /// The guest's memory as its VMM mapped it.
    #[must_use]
    pub fn regions(&self) -> Option<Vec<ClaimedRegion>> {
        self.link.regions(&self.session)
    }

    /// Whether it was done.
    async fn order(&self, what: &str, make: impl FnOnce(u64, String) -> Request) -> bool {
        let session = self.session.clone();
        let answer = match self.ask(|request| make(request, session)).await {
            Ok(Report::Stats { .. }) => return true,
            Ok(report) => refusal(report),
            Err(error) => error,
        };
        match answer {
            // Its successor was told what matters.
            EngineError::Lost => tracing::debug!(session = self.session, what, "Lost"),
            error => tracing::warn!(session = self.session, what, %error, "Going on without"),
        }
        false
    }
}
