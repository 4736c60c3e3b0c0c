//! Building one slot and taking it down: links, addresses, routes, rules.
//!
//! ```text
//!   host namespace              │ slot's namespace (the same inside every slot)
//!   thaw7  10.213.0.14/31 ──────│── veth0 10.213.0.15/31
//!                               │     │ dnat 169.254.100.2
//!                               │   tap0 169.254.100.1/30 ── guest 169.254.100.2
//! ```
//!
//! Must run on a thread that may change its namespace: see [`super::slots`].

use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd;

use futures_util::TryStreamExt;
use http_api::wire::NetworkPolicy;
use rtnetlink::packet_route::link::{InfoData, InfoVeth};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};
use thiserror::Error;

use super::address::{self, GATEWAY, GATEWAY_MAC, GUEST_PREFIX, INNER_LINK, Pool, SlotIndex, TAP};
use super::nftables::{self, Batch};
use super::{namespace, shaping};
use crate::sys::tap;

/// Why a slot could not be built or taken down.
#[derive(Debug, Error)]
#[error("Network slot {slot}: {operation}")]
pub struct SlotError {
    /// Which slot.
    pub slot: SlotIndex,
    /// What was tried.
    pub operation: &'static str,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

/// What a built slot is to the rest of the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Its index.
    pub index: SlotIndex,
    /// The namespace a VMM is put into.
    pub namespace: std::path::PathBuf,
    /// Where the host reaches the guest.
    pub address: Ipv4Addr,
}

/// Builds a slot.
///
/// # Errors
/// Which step failed; nothing of the slot is left.
pub(super) fn build(
    runtime: &tokio::runtime::Runtime,
    instance: &str,
    pool: Pool,
    index: SlotIndex,
    policy: &NetworkPolicy,
    rules: impl FnOnce() -> Batch,
) -> Result<Slot, SlotError> {
    let failed = |operation| {
        move |source| SlotError {
            slot: index,
            operation,
            source,
        }
    };
    let name = address::namespace(instance, index);
    let outer = address::outer_link(instance, index);
    let home = File::open("/proc/thread-self/ns/net").map_err(failed("finding our namespace"))?;
    namespace::create(&name, || {
        tap::create_persistent(TAP)?;
        fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
        fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            let driver = tokio::spawn(connection);
            let result = links(&handle, &outer, &home, pool, index).await;
            driver.abort();
            result
        })?;
        shaping::apply(&NetworkPolicy::default(), policy)?;
        nftables::apply(rules())
    })
    .map_err(failed("building its namespace"))?;
    let outside = runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let driver = tokio::spawn(connection);
        let link = find(&handle, &outer).await?;
        let result = bring_up(&handle, link, Some((pool.host_end(index), 31)), None).await;
        driver.abort();
        result
    });
    if let Err(source) = outside {
        let _ = take_down(runtime, instance, index);
        return Err(SlotError {
            slot: index,
            operation: "configuring the host's end",
            source,
        });
    }
    Ok(describe(instance, pool, index))
}

/// What a slot of this index is called.
pub(super) fn describe(instance: &str, pool: Pool, index: SlotIndex) -> Slot {
    Slot {
        index,
        namespace: namespace::path(&address::namespace(instance, index)),
        address: pool.sandbox_end(index),
    }
}

/// Forgets every connection through a slot, on both of its sides: were it only inside, packets of
/// the last guest's connections would find their way to the next one.
///
/// # Errors
/// Which step failed; of kind `NotFound` if there is no such slot.
pub(super) fn forget_connections(
    instance: &str,
    pool: Pool,
    index: SlotIndex,
) -> Result<(), SlotError> {
    let name = address::namespace(instance, index);
    namespace::within(&name, nftables::forget_connections)
        .and_then(|()| nftables::forget_connections_of(pool.sandbox_end(index)))
        .map_err(|source| SlotError {
            slot: index,
            operation: "forgetting its connections",
            source,
        })
}

/// Replaces a built slot's rules and limits of bandwidth.
///
/// # Errors
/// Which step failed; rules and limits are as before.
pub(super) fn set_policy(
    instance: &str,
    index: SlotIndex,
    (before, policy): (&NetworkPolicy, &NetworkPolicy),
    rules: impl FnOnce() -> Batch,
) -> Result<(), SlotError> {
    let name = address::namespace(instance, index);
    let replace = || {
        shaping::apply(before, policy)?;
        nftables::apply(rules())
    };
    let replace = || {
        replace().inspect_err(|_| {
            let _ = shaping::apply(policy, before);
        })
    };
    namespace::within(&name, replace).map_err(|source| SlotError {
        slot: index,
        operation: "replacing its rules and limits",
        source,
    })
}

/// Takes a slot down; what isn't there is no error.
///
/// # Errors
/// Which step failed.
pub(super) fn take_down(
    runtime: &tokio::runtime::Runtime,
    instance: &str,
    index: SlotIndex,
) -> Result<(), SlotError> {
    let failed = |operation| {
        move |source| SlotError {
            slot: index,
            operation,
            source,
        }
    };
    let outer = address::outer_link(instance, index);
    // The link first: the namespace's own end is asynchronous.
    runtime
        .block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            let driver = tokio::spawn(connection);
            let result = match find(&handle, &outer).await {
                Ok(link) => handle.link().del(link).execute().await.map_err(into_io),
                Err(error) => Err(error),
            };
            driver.abort();
            match result {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                result => result,
            }
        })
        .map_err(failed("removing its link"))?;
    namespace::remove(&address::namespace(instance, index))
        .map_err(failed("removing its namespace"))
}

/// Everything inside the namespace that is a link, an address or a route.
async fn links(
    handle: &Handle,
    outer: &str,
    home: &File,
    pool: Pool,
    index: SlotIndex,
) -> io::Result<()> {
    let peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(outer)
        .setns_by_fd(home.as_raw_fd())
        .build();
    let veth = LinkMessageBuilder::<LinkVeth>::new(INNER_LINK, outer)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .build();
    handle.link().add(veth).execute().await.map_err(into_io)?;

    let lo = find(handle, "lo").await?;
    bring_up(handle, lo, None, None).await?;
    let inner = find(handle, INNER_LINK).await?;
    bring_up(handle, inner, Some((pool.sandbox_end(index), 31)), None).await?;
    let tap = find(handle, TAP).await?;
    bring_up(
        handle,
        tap,
        Some((GATEWAY, GUEST_PREFIX)),
        Some(&GATEWAY_MAC),
    )
    .await?;

    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(pool.host_end(index))
        .build();
    handle.route().add(route).execute().await.map_err(into_io)
}

async fn find(handle: &Handle, name: &str) -> io::Result<u32> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    match links.try_next().await {
        Ok(Some(link)) => Ok(link.header.index),
        Ok(None) => Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("no link {name}"),
        )),
        Err(error) => Err(into_io(error)),
    }
}

async fn bring_up(
    handle: &Handle,
    link: u32,
    address: Option<(Ipv4Addr, u8)>,
    mac: Option<&[u8; 6]>,
) -> io::Result<()> {
    if let Some((address, prefix)) = address {
        let request = handle.address().add(link, IpAddr::V4(address), prefix);
        request.execute().await.map_err(into_io)?;
    }
    let mut change = LinkMessageBuilder::<LinkUnspec>::new().index(link).up();
    if let Some(mac) = mac {
        change = change.address(mac.to_vec());
    }
    handle
        .link()
        .set(change.build())
        .execute()
        .await
        .map_err(into_io)
}

fn into_io(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => {
            let error = message.to_io();
            // What the kernel says of a link that is not there, or no more.
            if error.raw_os_error() == Some(libc::ENODEV) {
                io::Error::new(io::ErrorKind::NotFound, error)
            } else {
                error
            }
        }
        other => io::Error::other(other),
    }
}
