//! `[network]`: slots, and what guests may reach.

use std::fs;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::Deserialize;

use super::Wrong;
use crate::network::{Egress, Pool};

/// `[network]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkConfig {
    /// The host's addresses for sandboxes, two each.
    pub pool: Pool,
    /// Free slots that wait, built, for new sandboxes; as many that paused ones gave back are kept
    /// for them.
    pub ready_slots: usize,
    /// Whether guests may reach anything outside of their host.
    pub internet: bool,
    /// Networks that guests may never reach. The pool, the host itself and link-local addresses
    /// are closed in any case.
    pub closed: Vec<Ipv4Net>,
    /// How long a pause waits for commands and other requests that are under way to the guest,
    /// before it closes their connections.
    pub drain_ms: u64,
    /// Who answers the guests' name lookups; by default the host's first resolver that is not
    /// the host itself.
    pub resolver: Option<Ipv4Addr>,
}

impl NetworkConfig {
    pub(super) fn check(&self) -> Result<(), Wrong> {
        // A pause's other waits are as short.
        if self.drain_ms > 60_000 {
            let problem = format!("is {}; at most 60000 is possible", self.drain_ms);
            return Err(("network.drain_ms".into(), problem));
        }
        Ok(())
    }

    /// What guests may reach.
    #[must_use]
    pub fn egress(&self) -> Egress {
        let link_local = "169.254.0.0/16".parse().expect("a network");
        let host_resolvers = || {
            let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
            resolver_in(&text)
        };
        Egress {
            internet: self.internet,
            closed: [link_local]
                .into_iter()
                .chain(self.closed.iter().copied())
                .collect(),
            resolver: self.resolver.or_else(host_resolvers),
        }
    }
}

/// The first IPv4 name server of a `resolv.conf` that another host could ask.
fn resolver_in(text: &str) -> Option<Ipv4Addr> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|address| address.trim().parse::<Ipv4Addr>().ok())
        .find(|address| !address.is_loopback() && !address.is_unspecified())
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            pool: "10.213.0.0/16".parse().expect("the default pool is valid"),
            ready_slots: 8,
            internet: true,
            drain_ms: 500,
            // Private networks: a host's management, storage and neighbours are there.
            closed: [
                "10.0.0.0/8",
                "100.64.0.0/10",
                "172.16.0.0/12",
                "192.168.0.0/16",
            ]
            .map(|net| net.parse().expect("a network"))
            .to_vec(),
            resolver: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolver_on_the_host_itself_is_of_no_use_to_guests() {
        let text = "# ours\nnameserver 127.0.0.53\nnameserver ::1\nnameserver 192.0.2.7 \n";
        assert_eq!(resolver_in(text), Some(Ipv4Addr::new(192, 0, 2, 7)));
        assert_eq!(resolver_in("search example\n"), None);
    }
}
