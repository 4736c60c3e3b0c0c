//! `/health` and `/init`: who answers, and what the host tells it after every boot and resume.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Timestamp;

/// Answer of `GET /health`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// [`COMPAT_VERSION`](super::COMPAT_VERSION).
    pub version: String,
    /// The daemon's own version.
    pub envd: String,
}

/// Body of `POST /init`. What is absent stays as it is, so a second call changes nothing twice.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InitRequest {
    /// Environment of processes started from now on; replaces what an earlier call set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env_vars: Option<BTreeMap<String, String>>,
    /// From now on every call but `/health` must carry it. Not empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// The host's time; the guest's clock is stepped when it is off by more than 50 ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<Timestamp>,
    /// New host name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Fresh random bytes (base64), so that clones of one snapshot diverge before the reply.
    #[serde(
        skip_serializing_if = "Option::is_none",
        with = "super::process::optional_base64"
    )]
    pub entropy: Option<Vec<u8>>,
    /// User of processes whose request names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_user: Option<String>,
    /// Working directory of processes whose request names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_workdir: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_request_has_the_wire_names() {
        let request = InitRequest {
            env_vars: Some([("A".to_owned(), "1".to_owned())].into()),
            access_token: Some("t".to_owned()),
            entropy: Some(vec![1, 2, 3]),
            default_user: Some("user".to_owned()),
            ..InitRequest::default()
        };
        let json = serde_json::to_string(&request).unwrap();
        assert_eq!(
            json,
            r#"{"envVars":{"A":"1"},"accessToken":"t","entropy":"AQID","defaultUser":"user"}"#
        );
        assert_eq!(serde_json::from_str::<InitRequest>(&json).unwrap(), request);
    }
}
