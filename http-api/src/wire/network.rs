//! What one sandbox may reach.

use ipnet::Ipv4Net;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problem::ApiError;

/// The most networks in each list: every packet that begins a connection is compared with them.
pub const MAX_NETWORKS: usize = 256;

/// The lowest and the highest limit of bandwidth that is taken, in kbit/s: below the one a guest
/// hardly answers its host, the other no link reaches.
pub const RATES_KBIT_S: std::ops::RangeInclusive<u64> = 64..=100_000_000;
/// `192.0.2.0/24`, as a pattern for readers of the API's document.
const IPV4_NETWORK: &str = "^([0-9]{1,3}\\.){3}[0-9]{1,3}/[0-9]{1,2}$";

/// `PUT /v1/sandboxes/{id}/network`, and `network` of a new sandbox.
///
/// Lists hold IPv4 networks as `192.0.2.0/24`; a single address is a `/32`. The first of these
/// that holds decides: closed by the host, in `allow`, in `deny`, `allow_internet_access`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkPolicy {
    /// Whether it may begin connections to whatever the lists don't name, and look up names.
    pub allow_internet_access: bool,
    /// Networks it may reach even without internet access, or inside of a denied one. What the
    /// host has closed for all stays closed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<String>", inner(pattern(IPV4_NETWORK)), length(max = 256))]
    pub allow: Vec<Ipv4Net>,
    /// Networks it may not reach.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<String>", inner(pattern(IPV4_NETWORK)), length(max = 256))]
    pub deny: Vec<Ipv4Net>,
    /// What it may send, to whomever, in units of 1,000 bits per second; without a bound when
    /// absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress_kbit_s: Option<u64>,
    /// What it may be sent, the same way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingress_kbit_s: Option<u64>,
}

impl Default for NetworkPolicy {
    fn default() -> Self {
        Self {
            allow_internet_access: true,
            allow: Vec::new(),
            deny: Vec::new(),
            egress_kbit_s: None,
            ingress_kbit_s: None,
        }
    }
}

impl NetworkPolicy {
    /// Refuses lists that are too long and rates that make no sense; `prefix` is where in the body the policy is.
    pub(crate) fn check(&self, prefix: &str) -> Result<(), ApiError> {
        for (name, list) in [("allow", &self.allow), ("deny", &self.deny)] {
            if list.len() > MAX_NETWORKS {
                let found = list.len();
                return Err(ApiError::BadRequest {
                    field: format!("{prefix}{name}"),
                    detail: format!("has {found} networks; at most {MAX_NETWORKS} are taken"),
                });
            }
        }
        for (name, rate) in [
            ("egress_kbit_s", self.egress_kbit_s),
            ("ingress_kbit_s", self.ingress_kbit_s),
        ] {
            if let Some(rate) = rate
                && !RATES_KBIT_S.contains(&rate)
            {
                let (least, most) = (RATES_KBIT_S.start(), RATES_KBIT_S.end());
                return Err(ApiError::BadRequest {
                    field: format!("{prefix}{name}"),
                    detail: format!("is {rate}; {least} to {most} are possible"),
                });
            }
        }
        Ok(())
    }
}
