//! What an engine does beside single faults: load, replay, many sessions.

mod death;
pub(crate) mod populate;
pub(crate) mod replay;
pub(crate) mod sessions;
mod shared;

use std::fmt::{self, Display, Formatter};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::args::Order;
use crate::child::Child;
use crate::config::{Ahead, PAGE_BYTES};
use crate::faulter::{Answer, Pass, Task};
use crate::host::Host;
use crate::placement::Cpus;
use crate::report;
use crate::report::parts::{Part, PartsReport};
use crate::source::Source;
use crate::subject::{PATIENCE, Subject};

/// What was the same for all parts.
#[derive(Clone, Debug, Serialize)]
struct Setup {
    rounds: u32,
    seed: u64,
    memory_bytes: u64,
    cpus: Cpus,
}

/// Prints a report, and writes it if that was asked for.
fn publish(bench: &'static str, config: &Ahead, source: &Source, parts: Vec<Part>) -> Result<()> {
    let report = PartsReport {
        bench,
        host: Host::describe(source.data())?,
        setup: Setup {
            rounds: config.rounds,
            seed: config.seed,
            memory_bytes: config.pages * PAGE_BYTES,
            cpus: config.cpus,
        },
        parts,
    };
    report::publish(&report, config.json.as_deref())
}

impl Display for Setup {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "setup    {} MiB, warm; seed {}; medians of {} rounds after one not counted, then the \
             range; faulter CPU {}, worker CPU {}",
            self.memory_bytes >> 20,
            self.seed,
            self.rounds,
            self.cpus.faulter,
            self.cpus.worker
        )
    }
}

/// The process that touches memory.
pub(crate) struct Faulter(Child);

impl Faulter {
    fn start(config: &Ahead) -> Result<Self> {
        Self::on(config.cpus.faulter)
    }

    pub(crate) fn on(cpu: usize) -> Result<Self> {
        let cpu = cpu.to_string();
        let child = Child::spawn("faulter", ["faulter", "--cpu", &cpu])?;
        Ok(Self(child))
    }

    /// Hands memory of `pages` pages over to a subject, the first `touches` of which in this
    /// order will be touched.
    pub(crate) fn attach(
        &mut self,
        subject: &mut dyn Subject,
        pages: u64,
        order: Order,
        touches: u64,
        seed: u64,
    ) -> Result<()> {
        self.0.send(&Task::Prepare {
            socket: subject.expect()?,
            pages,
            seed,
            order,
            touches,
            words: subject.words(),
        })?;
        match self.0.receive(PATIENCE)? {
            Answer::HandedOver => subject.attached(),
            other => bail!("The faulter said {other:?} instead of handing over"),
        }
    }

    pub(crate) fn touch(&mut self) -> Result<Pass> {
        self.0.send(&Task::Go)?;
        match self.0.receive(6 * PATIENCE)? {
            Answer::Touched(pass) => Ok(pass),
            other => bail!("The faulter said {other:?} instead of touching"),
        }
    }

    pub(crate) fn release(&mut self) -> Result<()> {
        self.0.send(&Task::Release)?;
        match self.0.receive(PATIENCE).context("Releasing memory")? {
            Answer::Released => Ok(()),
            other => bail!("The faulter said {other:?} instead of letting go"),
        }
    }
}
