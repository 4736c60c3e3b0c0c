//! Network rules in these clients' words, and which of them we can't keep.

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::refusal::bad;
use crate::problem::ApiError;
use crate::wire::NetworkPolicy;

/// `network` of a new sandbox, and `PUT /sandboxes/{id}/network`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Network {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) allow_out: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) deny_out: Option<Vec<String>>,
    #[serde(rename = "allow_internet_access", skip_serializing)]
    pub(super) allow_internet_access: Option<bool>,
    #[serde(skip_serializing)]
    allow_public_traffic: Option<bool>,
    #[serde(skip_serializing)]
    mask_request_host: Option<Value>,
    #[serde(skip_serializing)]
    https_ports: Option<Vec<Value>>,
    #[serde(skip_serializing)]
    rules: Option<serde_json::Map<String, Value>>,
    #[serde(skip_serializing)]
    egress_proxy: Option<Value>,
    #[serde(skip_serializing)]
    dns_servers: Option<Vec<Value>>,
}

impl From<&NetworkPolicy> for Network {
    fn from(policy: &NetworkPolicy) -> Self {
        let texts = |list: &[Ipv4Net]| {
            let texts = list.iter().map(ToString::to_string).collect();
            (!list.is_empty()).then_some(texts)
        };
        Self {
            allow_out: texts(&policy.allow),
            deny_out: texts(&policy.deny),
            ..Self::default()
        }
    }
}

impl Network {
    /// The policy it means. `internet` is what the request says beside it; `prefix` is where in the
    /// body it is.
    pub(super) fn policy(
        &self,
        internet: Option<bool>,
        prefix: &str,
    ) -> Result<NetworkPolicy, ApiError> {
        for (name, there) in [
            (
                "allowPublicTraffic",
                self.allow_public_traffic == Some(false),
            ),
            ("maskRequestHost", self.mask_request_host.is_some()),
            (
                "httpsPorts",
                self.https_ports.as_ref().is_some_and(|p| !p.is_empty()),
            ),
            (
                "rules",
                self.rules.as_ref().is_some_and(|rules| !rules.is_empty()),
            ),
            ("egressProxy", self.egress_proxy.is_some()),
            ("dnsServers", self.dns_servers.is_some()),
        ] {
            if there {
                return Err(unsupported(&format!("{prefix}{name}")));
            }
        }
        let allow = networks(self.allow_out.as_deref(), &format!("{prefix}allowOut"))?;
        let mut deny = networks(self.deny_out.as_deref(), &format!("{prefix}denyOut"))?;
        // Everything denied is no internet, and name lookups go with it.
        let all = deny.iter().any(|net| net.prefix_len() == 0);
        deny.retain(|net| net.prefix_len() != 0);
        let internet = internet.or(self.allow_internet_access).unwrap_or(true);
        let policy = NetworkPolicy {
            allow_internet_access: internet && !all,
            allow,
            deny,
            ..NetworkPolicy::default()
        };
        policy.check(prefix)?;
        Ok(policy)
    }
}

/// What a client asks for and can't have here.
pub(super) fn unsupported(field: &str) -> ApiError {
    bad(field, "is not supported by this host; leave it out")
}

fn networks(list: Option<&[String]>, field: &str) -> Result<Vec<Ipv4Net>, ApiError> {
    let parse = |text: &String| {
        let net = text.parse::<Ipv4Net>().ok();
        let address = || text.parse::<std::net::Ipv4Addr>().ok().map(Ipv4Net::from);
        net.or_else(address).ok_or_else(|| {
            let detail = format!(
                "has {text:?}; IPv4 networks and addresses are possible, names and IPv6 are not"
            );
            bad(field, detail)
        })
    };
    list.unwrap_or_default().iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(json: Value) -> Result<NetworkPolicy, ApiError> {
        let network: Network = serde_json::from_value(json).unwrap();
        network.policy(None, "network.")
    }

    #[test]
    fn everything_denied_is_no_internet() {
        let all = serde_json::json!({ "denyOut": ["0.0.0.0/0"], "allowOut": ["8.8.8.8"] });
        let policy = policy(all).unwrap();
        assert!(!policy.allow_internet_access && policy.deny.is_empty());
        assert_eq!(policy.allow, ["8.8.8.8/32".parse::<Ipv4Net>().unwrap()]);
    }

    #[test]
    fn rules_that_cannot_be_kept_are_refused_by_name() {
        for (json, field) in [
            (
                serde_json::json!({ "allowOut": ["example.com"] }),
                "network.allowOut",
            ),
            (
                serde_json::json!({ "denyOut": ["::/0"] }),
                "network.denyOut",
            ),
            (
                serde_json::json!({ "allowPublicTraffic": false }),
                "network.allowPublicTraffic",
            ),
            (
                serde_json::json!({ "rules": { "a.b": [] } }),
                "network.rules",
            ),
            (
                serde_json::json!({ "dnsServers": [] }),
                "network.dnsServers",
            ),
        ] {
            match policy(json) {
                Err(ApiError::BadRequest { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }
}
