//! Whether the host already uses addresses of the range that slots are made of.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;

use futures_util::TryStreamExt;
use ipnet::Ipv4Net;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use thiserror::Error;

use super::address::Pool;

/// A route of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRoute {
    /// Where it leads.
    pub network: Ipv4Net,
    /// By which link.
    pub link: String,
    /// Whether by way of another host.
    pub has_gateway: bool,
}

/// Why a range can't be used.
#[derive(Debug, Error)]
pub enum RangeError {
    /// The host reaches somebody else there.
    #[error(
        "The addresses of network.pool, {pool}, are in use: this host has a route to {network} by \
         {link}; set network.pool to a range that no route leads to"
    )]
    InUse {
        /// The range.
        pool: Ipv4Net,
        /// Where the route leads.
        network: Ipv4Net,
        /// By which link.
        link: String,
    },
    /// The kernel did not say.
    #[error("Listing the host's routes")]
    Routes(#[source] io::Error),
}

/// Refuses a range that the host has a use for, in the calling thread's namespace.
///
/// # Errors
/// See [`RangeError`].
pub async fn check(pool: Pool, instance: &str) -> Result<(), RangeError> {
    let routes = routes().await.map_err(RangeError::Routes)?;
    match conflict(pool.network(), instance, &routes) {
        None => Ok(()),
        Some(route) => Err(RangeError::InUse {
            pool: pool.network(),
            network: route.network,
            link: route.link.clone(),
        }),
    }
}

/// The first route that a pool gets in the way of.
///
/// A wider one by way of a gateway is none: a pool inside of it only is more specific. One to a
/// link's own network is, because neighbours have those addresses.
fn conflict<'a>(pool: Ipv4Net, instance: &str, routes: &'a [HostRoute]) -> Option<&'a HostRoute> {
    let is_slot = |link: &str| {
        let number = link.strip_prefix(instance);
        number.is_some_and(|n| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit()))
    };
    routes.iter().find(|route| {
        let within = pool.contains(&route.network);
        let around = route.network.contains(&pool) && !route.has_gateway;
        route.network.prefix_len() > 0 && (within || around) && !is_slot(&route.link)
    })
}

async fn routes() -> io::Result<Vec<HostRoute>> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let driver = tokio::spawn(connection);
    let listed = async {
        let mut names = BTreeMap::new();
        let mut links = handle.link().get().execute();
        while let Some(link) = links.try_next().await? {
            let name = link
                .attributes
                .into_iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name),
                    _ => None,
                });
            names.insert(link.header.index, name.unwrap_or_default());
        }
        let every = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let mut found = Vec::new();
        let mut routes = handle.route().get(every).execute();
        while let Some(route) = routes.try_next().await? {
            found.extend(describe(&route, &names));
        }
        Ok::<_, rtnetlink::Error>(found)
    };
    let listed = listed.await;
    driver.abort();
    listed.map_err(io::Error::other)
}

/// `None` for what leads nowhere: such a route keeps no address from being used.
fn describe(route: &RouteMessage, names: &BTreeMap<u32, String>) -> Option<HostRoute> {
    let (mut to, mut link, mut has_gateway) = (Ipv4Addr::UNSPECIFIED, None, false);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => to = *address,
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Gateway(_) | RouteAttribute::MultiPath(_) => has_gateway = true,
            _ => {}
        }
    }
    let network = Ipv4Net::new(to, route.header.destination_prefix_length).ok()?;
    let link = link?;
    Some(HostRoute {
        network,
        link: names
            .get(&link)
            .cloned()
            .unwrap_or_else(|| format!("link {link}")),
        has_gateway,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(network: &str, link: &str, has_gateway: bool) -> bool {
        let route = HostRoute {
            network: network.parse().unwrap(),
            link: link.into(),
            has_gateway,
        };
        conflict("10.213.0.0/16".parse().unwrap(), "thaw", &[route]).is_some()
    }

    #[test]
    fn only_what_a_pool_gets_in_the_way_of_is_a_conflict() {
        assert!(found("10.213.4.0/24", "eth1", false), "a network inside");
        assert!(
            found("10.213.4.0/24", "eth1", true),
            "also behind a gateway"
        );
        assert!(found("10.213.0.0/16", "eth1", false), "the same");
        assert!(
            found("10.213.0.9/32", "lo", false),
            "the host's own address"
        );
        assert!(found("10.0.0.0/8", "eth0", false), "neighbours");
        assert!(
            !found("10.0.0.0/8", "vpn0", true),
            "wider, behind a gateway"
        );
        assert!(!found("0.0.0.0/0", "eth0", true), "the default route");
        assert!(!found("0.0.0.0/0", "ppp0", false), "also without a gateway");
        assert!(!found("10.214.0.0/16", "eth0", false), "beside it");
        assert!(!found("10.213.0.14/31", "thaw7", false), "a slot of ours");
        assert!(found("10.213.0.14/31", "thawx7", false), "a slot of others");
    }
}
