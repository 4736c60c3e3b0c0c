//! A slot's addresses and names: pure arithmetic on its index.
//!
//! Every slot takes two addresses of the host's pool, a /31: the even one is the host's
//! end of the veth pair, the odd one is the sandbox's. Inside, all slots look the same:
//! the guest and its gateway have the same addresses and MACs everywhere, so a clone
//! finds its network as it left it.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Deserializer};
use thiserror::Error;

/// The guest's address in every slot.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 100, 2);
/// Its gateway: the tap device.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 100, 1);
/// Prefix length of the guest's network.
pub const GUEST_PREFIX: u8 = 30;
/// The guest's MAC in every slot.
pub const GUEST_MAC: &str = "06:00:a9:fe:64:02";
/// The tap's MAC in every slot: guests keep it in their ARP cache across a pause.
pub const GATEWAY_MAC: [u8; 6] = [0x06, 0x00, 0xa9, 0xfe, 0x64, 0x01];
/// The tap's name in every slot.
pub const TAP: &str = "tap0";
/// The veth's name inside every slot.
pub const INNER_LINK: &str = "veth0";

/// Which slot; stable for a sandbox's whole life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotIndex(pub u32);

impl fmt::Display for SlotIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The host's range of addresses for slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    base: Ipv4Addr,
    prefix: u8,
}

/// Why a text is no pool.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PoolError {
    /// Not `a.b.c.d/n`.
    #[error("{text:?} is not an IPv4 network like 10.213.0.0/16")]
    Syntax {
        /// As given.
        text: String,
    },
    /// Bits are set after the prefix.
    #[error("{text:?} has address bits after its prefix; {network} would do")]
    HostBits {
        /// As given.
        text: String,
        /// The network it lies in.
        network: String,
    },
    /// Too small or too large.
    #[error("{text:?} must have a prefix length from 8 to 30")]
    Prefix {
        /// As given.
        text: String,
    },
}

impl FromStr for Pool {
    type Err = PoolError;

    fn from_str(text: &str) -> Result<Self, PoolError> {
        let syntax = || PoolError::Syntax {
            text: text.to_owned(),
        };
        let (base, prefix) = text.split_once('/').ok_or_else(syntax)?;
        let base: Ipv4Addr = base.parse().map_err(|_| syntax())?;
        let prefix: u8 = prefix.parse().map_err(|_| syntax())?;
        if !(8..=30).contains(&prefix) {
            return Err(PoolError::Prefix {
                text: text.to_owned(),
            });
        }
        let network = Ipv4Addr::from(u32::from(base) & (u32::MAX << (32 - prefix)));
        if network != base {
            let network = format!("{network}/{prefix}");
            return Err(PoolError::HostBits {
                text: text.to_owned(),
                network,
            });
        }
        Ok(Self { base, prefix })
    }
}

impl<'de> Deserialize<'de> for Pool {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

impl Pool {
    /// All of its addresses.
    #[must_use]
    pub fn network(self) -> Ipv4Net {
        Ipv4Net::new_assert(self.base, self.prefix)
    }

    /// How many slots the pool has room for.
    #[must_use]
    pub const fn slots(self) -> u32 {
        1 << (31 - self.prefix)
    }

    /// The host's end of a slot's link.
    #[must_use]
    pub fn host_end(self, slot: SlotIndex) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.base) + 2 * slot.0)
    }

    /// The sandbox's address as the host sees it.
    #[must_use]
    pub fn sandbox_end(self, slot: SlotIndex) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.base) + 2 * slot.0 + 1)
    }
}

/// The namespace of a slot, as `ip netns` shows it.
#[must_use]
pub fn namespace(instance: &str, slot: SlotIndex) -> String {
    format!("{instance}-{slot}")
}

/// The host's end of a slot's link; at most 15 characters for instances of up to 8.
#[must_use]
pub fn outer_link(instance: &str, slot: SlotIndex) -> String {
    format!("{instance}{slot}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_of_a_pool_has_its_own_pair() {
        let pool: Pool = "10.213.0.0/16".parse().unwrap();
        assert_eq!(pool.slots(), 32768);
        let mut next = u32::from(Ipv4Addr::new(10, 213, 0, 0));
        for slot in 0..pool.slots() {
            assert_eq!(u32::from(pool.host_end(SlotIndex(slot))), next);
            assert_eq!(u32::from(pool.sandbox_end(SlotIndex(slot))), next + 1);
            next += 2;
        }
        assert_eq!(next, u32::from(Ipv4Addr::new(10, 214, 0, 0)));
    }

    #[test]
    fn names_fit_the_kernels_limit() {
        assert!(outer_link("abcdefgh", SlotIndex((1 << 23) - 1)).len() <= 15);
    }

    #[test]
    fn a_bad_pool_says_what_would_do() {
        assert!(matches!(
            "10.0.0.0".parse::<Pool>(),
            Err(PoolError::Syntax { .. })
        ));
        assert!(matches!(
            "10.0.0.0/31".parse::<Pool>(),
            Err(PoolError::Prefix { .. })
        ));
        let error = "10.0.0.9/24".parse::<Pool>().unwrap_err();
        assert!(error.to_string().contains("10.0.0.0/24"), "{error}");
    }
}
