//! JSON shapes of `process.Process`: what to start, and what is heard of it.
//!
//! Proto3's JSON mapping leaves out fields with their default value, hence `#[serde(default)]`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessConfig {
    /// Program: a path, or a name looked up in PATH.
    pub cmd: String,
    /// Its arguments, without the program's own name.
    pub args: Vec<String>,
    /// Environment, over that of `/init` and the defaults.
    pub envs: BTreeMap<String, String>,
    /// Working directory; `~` and relative paths start at the user's home.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
}

/// Request of Start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StartRequest {
    /// What to run.
    pub process: ProcessConfig,
    /// A name of the caller's own; must not belong to a running process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// Whether standard input is a pipe; absent means yes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stdin: Option<bool>,
}

/// Which process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ProcessSelector {
    /// By its pid in the guest.
    Pid(u32),
    /// By the tag its starter gave it.
    Tag(String),
}

/// Request of SendSignal; the signal goes to the process group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendSignalRequest {
    /// Which process.
    pub process: ProcessSelector,
    /// `SIGNAL_SIGTERM`, `SIGNAL_SIGKILL` and so on.
    pub signal: String,
}

/// One message of a Start or Connect stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamMessage {
    /// What happened.
    pub event: ProcessEvent,
}

/// What happened to a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ProcessEvent {
    /// It runs; always the first.
    Start(StartEvent),
    /// It wrote.
    Data(Output),
    /// It ended; nothing follows.
    End(EndEvent),
    /// Nothing happened for the interval that the client asked for.
    Keepalive(KeepAlive),
}

/// The process runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartEvent {
    /// Its pid in the guest, which is also its process group.
    pub pid: u32,
}

/// Bytes that the process wrote; base64 on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Output {
    /// To its standard output.
    Stdout(#[serde(with = "base64_bytes")] Vec<u8>),
    /// To its standard error.
    Stderr(#[serde(with = "base64_bytes")] Vec<u8>),
}

/// How the process ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndEvent {
    /// Exit code, or -1 when a signal ended it.
    pub exit_code: i32,
    /// Whether it ended by itself rather than by a signal.
    pub exited: bool,
    /// `exit status 3` or `signal: killed`.
    pub status: String,
    /// Set when the exit code isn't 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A sign of life.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepAlive {}

/// Bytes as standard base64, padded.
mod base64_bytes {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        STANDARD
            .decode(String::deserialize(from)?)
            .map_err(D::Error::custom)
    }
}

/// The same where the field may be absent.
pub(super) mod optional_base64 {
    use serde::{Deserialize, Deserializer, Serializer};

    #[derive(Deserialize)]
    struct Base64(#[serde(with = "super::base64_bytes")] Vec<u8>);

    #[expect(clippy::ref_option, reason = "the signature that serde's `with` calls")]
    pub(in crate::protocol) fn serialize<S: Serializer>(
        bytes: &Option<Vec<u8>>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        match bytes {
            Some(bytes) => super::base64_bytes::serialize(bytes, to),
            None => to.serialize_none(),
        }
    }

    pub(in crate::protocol) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<Vec<u8>>, D::Error> {
        Ok(Option::<Base64>::deserialize(from)?.map(|Base64(bytes)| bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_have_the_wire_form_of_proto3_json() {
        for (json, event) in [
            (
                r#"{"event":{"start":{"pid":7}}}"#,
                ProcessEvent::Start(StartEvent { pid: 7 }),
            ),
            (
                r#"{"event":{"data":{"stdout":"aGk="}}}"#,
                ProcessEvent::Data(Output::Stdout(b"hi".to_vec())),
            ),
            (
                r#"{"event":{"keepalive":{}}}"#,
                ProcessEvent::Keepalive(KeepAlive {}),
            ),
        ] {
            assert_eq!(
                serde_json::from_str::<StreamMessage>(json).unwrap().event,
                event,
                "{json}"
            );
            assert_eq!(
                serde_json::to_string(&StreamMessage { event }).unwrap(),
                json
            );
        }
    }

    #[test]
    fn end_event_without_its_default_fields_is_exit_code_zero() {
        let json = r#"{"event":{"end":{"exited":true,"status":"exit status 0"}}}"#;
        let ProcessEvent::End(end) = serde_json::from_str::<StreamMessage>(json).unwrap().event
        else {
            panic!("not an end event");
        };
        assert_eq!((end.exit_code, end.exited, end.error), (0, true, None));
    }

    #[test]
    fn selectors_are_named_by_their_kind() {
        let request = SendSignalRequest {
            process: ProcessSelector::Tag("web".to_owned()),
            signal: "SIGNAL_SIGTERM".to_owned(),
        };
        assert_eq!(
            serde_json::to_string(&request).unwrap(),
            r#"{"process":{"tag":"web"},"signal":"SIGNAL_SIGTERM"}"#
        );
    }
}
