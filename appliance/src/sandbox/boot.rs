//! A sandbox from a disk: copy it, boot the kernel, wait for the guest's daemon.

use std::sync::Arc;

use envd::protocol::{InitRequest, Timestamp};
use tokio::time::Instant;

use super::OperationError;
use super::live::{Live, confine, give_back, make_place, promise_memory};
use crate::catalogue::SandboxRow;
use crate::disks::Source;
use crate::guest::Guest;
use crate::host::Host;
use crate::vmm::Machine;

/// What envd prints first.
const GUEST_IS_UP: &str = "envd listening on";

/// Boots a guest; on failure nothing of it is left.
pub(super) async fn boot(
    host: &Arc<Host>,
    row: &SandboxRow,
    disk: Source,
) -> Result<Live, OperationError> {
    let huge_pages = promise_memory(host, row)?;
    let mut machine = None;
    let result = try_boot(host, row, disk, &mut machine).await;
    let live = machine.map(|machine| Live {
        driver: host.drivers.chosen().clone(),
        machine,
        session: None,
        _huge_pages: huge_pages,
    });
    match (result, live) {
        (Ok(()), Some(live)) => Ok(live),
        (result, live) => {
            give_back(host, row, live).await;
            Err(result.err().unwrap_or(OperationError::Worker))
        }
    }
}

async fn try_boot(
    host: &Arc<Host>,
    row: &SandboxRow,
    disk: Source,
    machine: &mut Option<Box<dyn Machine>>,
) -> Result<(), OperationError> {
    let (mut place, slot) = make_place(host, row, disk).await?;
    host.ready.dismiss(row.slot);
    confine(host, row, host.drivers.chosen().as_ref(), None, &mut place)?;
    let machine = machine.insert(host.drivers.chosen().boot(&row.shape, &place).await?);
    let pid = machine.pid();
    let console = machine.console();
    let guest = Guest::at(slot.address);
    // Its daemon says on the console when it is there, which beats asking again and again;
    // a guest that prints nothing is found by asking.
    tokio::select! {
        _ = console.wait_for(GUEST_IS_UP) => {}
        _ = guest.wait_until_up(host.boot_timeout) => {}
    }
    tracing::info!(sandbox_id = %row.id, slot = row.slot.0, pid, "Booted");
    introduce(host, row, &guest, machine.as_ref()).await
}

/// Waits for the guest's daemon and tells it who and when it is. After this returns, its
/// clock is right and its random numbers are its own.
pub(super) async fn introduce(
    host: &Host,
    row: &SandboxRow,
    guest: &Guest,
    machine: &dyn Machine,
) -> Result<(), OperationError> {
    let deadline = Instant::now() + host.boot_timeout;
    let console = machine.console();
    // The memory it is made from may ask for a token that is not its own.
    let known = row.inherited_token.clone().or(row.access_token.clone());
    let guest = guest.clone().with_token(known);
    let introduced = async {
        guest.wait_until_up(host.boot_timeout).await?;
        let request = InitRequest {
            env_vars: Some(row.env.clone()),
            access_token: row.access_token.clone(),
            timestamp: Some(Timestamp::now()),
            hostname: Some(row.id.to_string()),
            entropy: Some(crate::clock::random::<64>().to_vec()),
            ..InitRequest::default()
        };
        guest
            .init(&request, deadline.saturating_duration_since(Instant::now()))
            .await
    };
    introduced.await.map_err(|source| OperationError::Boot {
        source,
        console: console.tail(),
    })
}
