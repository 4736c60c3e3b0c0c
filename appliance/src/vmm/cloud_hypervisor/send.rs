//! Giving a guest: the sender's half of a local migration, with memory that is empty and served.
//!
//! ```text
//!   here                                      VMM                      engine
//!    │ Start, MemoryFd × n (one empty memfd) ──▶ │                        │
//!    │ Config ───────────────────────────────▶  │ maps the memory         │
//!    │ a second connection, "page requests" ──▶ │                         │
//!    │ its other end, and the memfd ────────────┼──────────────────────▶  │
//!    │ State ────────────────────────────────▶  │ asks for pages ───────▶ │
//!    │ Complete, or CompletePaused ──────────▶  │ ... and goes on asking  │
//! ```
//!
//! The VMM reads the guest's memory while it takes the state, so somebody has to answer by then.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use tokio::net::UnixStream;

use super::channel::Channel;
use super::layout::Layout;
use super::protocol::Command;
use crate::vmm::api::ApiFault;

/// What is given.
pub(super) struct Given<'a> {
    pub(super) layout: &'a Layout,
    /// The file that all slots are in.
    pub(super) memory: &'a File,
    pub(super) config: &'a [u8],
    pub(super) state: &'a [u8],
    /// Whether the guest runs afterwards.
    pub(super) run: bool,
}

/// Gives a guest to a VMM that listens at `socket`, and to which `stream` is connected.
/// `serve` is called with where the VMM asks for pages.
pub(super) async fn send(
    stream: UnixStream,
    socket: &Path,
    given: &Given<'_>,
    serve: impl FnOnce(OwnedFd) -> Result<(), ApiFault>,
) -> Result<(), ApiFault> {
    let mut channel = Channel::from(stream);
    accepted("Start", channel.say(Command::Start, &[]).await?)?;
    for mapping in given.layout.mappings() {
        let said = channel.say_slot(mapping.slot, given.memory.as_fd()).await?;
        accepted("MemoryFd", said)?;
    }
    let said = channel.say(Command::Config, given.config).await?;
    accepted("Config", said)?;
    serve(Channel::for_faults(UnixStream::connect(socket).await?).await?)?;
    accepted("State", channel.say(Command::State, given.state).await?)?;
    let last = if given.run {
        Command::Complete
    } else {
        Command::CompletePaused
    };
    accepted("Complete", channel.say(last, &[]).await?)
}

fn accepted(what: &str, is_ok: bool) -> Result<(), ApiFault> {
    if is_ok {
        return Ok(());
    }
    Err(ApiFault::Refused(format!("it did not accept {what}")))
}
