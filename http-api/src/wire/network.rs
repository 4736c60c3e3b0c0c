//! What one sandbox may reach.

use ipnet::Ipv4Net;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problem::ApiError;

/// The most networks in each list: every packet that begins a connection is compared with them.
pub const MAX_NETWORKS: usize = 256;

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
}

impl Default for NetworkPolicy {
    fn default() -> Self {
        Self {
            allow_internet_access: true,
            allow: Vec::new(),
            deny: Vec::new(),
        }
    }
}

impl NetworkPolicy {
    /// Refuses lists that are too long; `prefix` is where in the body the policy is.
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
        Ok(())
    }
}
