//! What sessions are made of, out of descriptors that came with a request.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use crate::expecting::Expecting;
use crate::fault_source::Guest;
use crate::page_state::PageStates;
use crate::postcopy::Postcopy;
use crate::region::{ClaimedRegion, RegionTable};
use crate::session::SessionParts;
use crate::source::PageSource;
use crate::sys::uffd::Uffd;
use crate::tracking::Tracking;

/// A session whose guest is to be handed over.
pub(super) fn expect(
    source: Arc<PageSource>,
    deadline: Instant,
    fds: Vec<OwnedFd>,
) -> Result<Expecting, String> {
    let [listener, states] = take_fds(fds)?;
    let states = PageStates::from_fd(states, source.memory_pages()).map_err(text)?;
    Ok(Expecting::new(listener, states, source, deadline))
}

/// A session that a dead engine had.
pub(super) fn adopt(
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

/// A session whose VMM asks for pages.
pub(super) fn serve_pages(
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
