//! The process whose memory is served: it hands memory over as a VMM does, touches each page
//! once, and says how long every touch took.
//!
//! ```text
//!   driver                          faulter
//!     │ Prepare {socket, …} ──────▶   │  maps, registers, hands off to the subject
//!     │ ◀───────────── HandedOver     │
//!     │ Go ───────────────────────▶   │  touches: closed loop, one outstanding fault
//!     │ ◀──────────────── Touched     │  every latency, in the order of the touches
//!     │ Release ──────────────────▶   │  unmaps
//! ```
//!
//! Each round has memory of its own: a page given back would have to come back as zero, not as
//! the build's. But the host's pages are recycled: as many are written and freed just before,
//! so that no round pays for pages that the hypervisor has to find first.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use uffd_engine::sys::process::die_with_parent;
use uffd_engine::sys::uffd::{FEATURE_EVENT_REMOVE, Uffd};
use uffd_engine::vmm_side::{self, GuestMemory};

use crate::args::{FaulterArgs, Order};
use crate::config::PAGE_BYTES;
use crate::source::Words;
use crate::{child, order, placement};

/// What the driver tells the faulter.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Task {
    /// Hand new memory over, beside what was handed over before.
    Prepare {
        /// Where the subject listens.
        socket: PathBuf,
        pages: u64,
        /// Of the order of touches.
        seed: u64,
        order: Order,
        /// How many pages are touched: the first of the order.
        touches: u64,
        words: Words,
    },
    /// Touch what is to be touched, one page of each memory after the other.
    Go,
    /// Let go of all memory.
    Release,
}

/// What the faulter answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    HandedOver,
    Touched(Pass),
    Released,
}

/// One pass over the memory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Pass {
    /// From before the first touch to after the last.
    pub(crate) total_ns: u64,
    /// Of each touch, in their order.
    pub(crate) touch_ns: Vec<u32>,
}

/// Memory that somebody serves. Fields in the order in which they have to go.
struct Guest {
    memory: GuestMemory,
    _uffd: Uffd,
    _connection: UnixStream,
    order: Vec<u64>,
    words: Words,
}

/// Why there is no userfaultfd, in words that say what to do.
pub(crate) const NO_UFFD: &str = "Opening a userfaultfd: this bench needs one. Run as root, or give \
     this user /dev/userfaultfd, or set the sysctl vm.unprivileged_userfaultfd to 1; in a \
     container, its seccomp profile must allow the call";

/// The hidden `faulter` subcommand.
pub(crate) fn run(args: &FaulterArgs) -> Result<()> {
    die_with_parent()?;
    placement::pin(args.cpu)?;
    let mut guests = Vec::new();
    while let Some(task) = child::hear()? {
        let answer = match task {
            Task::Prepare {
                socket,
                pages,
                seed,
                order,
                touches,
                words,
            } => {
                recycle(touches)?;
                let mut order = order::ordered(order, pages, seed);
                order.truncate(usize::try_from(touches)?);
                guests.push(prepare(&socket, pages, order, words)?);
                Answer::HandedOver
            }
            Task::Go => Answer::Touched(touch_all(&guests)?),
            Task::Release => {
                guests.clear();
                Answer::Released
            }
        };
        child::say(&answer)?;
    }
    Ok(())
}

/// Leaves as many pages as will be needed at the top of the kernel's free lists.
pub(crate) fn recycle(pages: u64) -> Result<()> {
    let memory = GuestMemory::anonymous(pages * PAGE_BYTES).context("Mapping memory")?;
    for page in 0..pages {
        memory.write(page * PAGE_BYTES, 1);
    }
    Ok(())
}

fn prepare(socket: &Path, pages: u64, order: Vec<u64>, words: Words) -> Result<Guest> {
    let memory = GuestMemory::anonymous(pages * PAGE_BYTES).context("Mapping memory")?;
    let uffd = Uffd::create(FEATURE_EVENT_REMOVE).context(NO_UFFD)?;
    memory.register(&uffd).context("Registering memory")?;
    let connection =
        vmm_side::hand_off(socket, &uffd, &[memory.as_region()]).context("Handing memory over")?;
    Ok(Guest {
        memory,
        _uffd: uffd,
        _connection: connection,
        order,
        words,
    })
}

/// The measurement: nothing but clock readings around one load of a word.
fn touch_all(guests: &[Guest]) -> Result<Pass> {
    let most = guests.iter().map(|guest| guest.order.len()).max();
    let most = most.context("There is no memory to touch")?;
    let touches = |turn: usize| {
        let pages = guests.iter().map(move |guest| guest.order.get(turn));
        guests.iter().zip(pages)
    };
    // Written, not just zeroed: its pages must be there before the first touch is timed.
    let total = guests.iter().map(|guest| guest.order.len()).sum();
    let mut touch_ns = vec![u32::MAX; total];
    let begun = Instant::now();
    let all = (0..most).flat_map(touches);
    let all = all.filter_map(|(guest, page)| Some((guest, page?)));
    for ((guest, page), ns) in all.zip(&mut touch_ns) {
        let before = Instant::now();
        let word = guest.memory.read(page * PAGE_BYTES);
        let took = before.elapsed();
        *ns = u32::try_from(took.as_nanos()).unwrap_or(u32::MAX);
        if word != guest.words.of(*page) {
            bail!(
                "Wrong content: page {page} begins with {word:#x}, expected {:#x}",
                guest.words.of(*page)
            );
        }
    }
    let total_ns = u64::try_from(begun.elapsed().as_nanos())?;
    ensure!(touch_ns.iter().all(|ns| *ns > 0), "The clock stands still");
    Ok(Pass { total_ns, touch_ns })
}
