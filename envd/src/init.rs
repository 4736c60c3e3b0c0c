//! `POST /init`: the host tells a guest who it is now, after every boot, resume and fork.
//!
//! The body is judged as a whole before anything is applied. Entropy, clock and name come before
//! the reply, so whoever hears 204 talks to a guest that has diverged from its siblings.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::machine::Machine;
use crate::protocol::InitRequest;
use crate::refusal::Refusal;
use crate::routes::Guest;
use crate::settings::Settings;
use crate::sys::entropy::MAX_ENTROPY;

/// Longest host name that Linux takes. Source: `__NEW_UTS_LEN`.
const MAX_HOSTNAME: usize = 64;

/// The route.
pub(crate) async fn init(
    State(guest): State<Arc<Guest>>,
    body: Bytes,
) -> Result<StatusCode, Refusal> {
    let request = parse(&body)?;
    apply(request, guest.machine, &guest.settings)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Reads the body field by field, so that an error names its field. Unknown fields are ignored.
fn parse(body: &[u8]) -> Result<InitRequest, Refusal> {
    let map: Map<String, Value> = match body {
        [] => Map::new(),
        body => serde_json::from_slice(body)
            .map_err(|e| Refusal::bad_request(format!("The body is not a JSON object: {e}")))?,
    };
    // One field in an object of its own, so that each goes through the same serde type.
    let field = |name: &str| -> Result<InitRequest, Refusal> {
        let value = map.get(name).cloned().unwrap_or(Value::Null);
        one_field(name, value)
    };
    let request = InitRequest {
        env_vars: field("envVars")?.env_vars,
        access_token: field("accessToken")?.access_token,
        timestamp: field("timestamp")?.timestamp,
        hostname: field("hostname")?.hostname,
        entropy: field("entropy")?.entropy,
        default_user: field("defaultUser")?.default_user,
        default_workdir: field("defaultWorkdir")?.default_workdir,
    };
    match complaint(&request) {
        Some((name, reason)) => Err(Refusal::bad_request(format!("Field {name}: {reason}"))),
        None => Ok(request),
    }
}

fn one_field<T: DeserializeOwned>(name: &str, value: Value) -> Result<T, Refusal> {
    let object = Value::Object(Map::from_iter([(name.to_owned(), value)]));
    serde_json::from_value(object).map_err(|e| Refusal::bad_request(format!("Field {name}: {e}")))
}

/// The first field whose value can't be used, and why.
fn complaint(request: &InitRequest) -> Option<(&'static str, &'static str)> {
    let bad_name = |name: &String| name.is_empty() || name.contains(['=', '\0']);
    let bad_variables = |map: &BTreeMap<String, String>| {
        map.iter()
            .any(|(name, value)| bad_name(name) || value.contains('\0'))
    };
    if request.env_vars.as_ref().is_some_and(bad_variables) {
        return Some((
            "envVars",
            "a name is empty or has '=', or something has a NUL",
        ));
    }
    if request.access_token.as_deref() == Some("") {
        return Some(("accessToken", "must not be empty"));
    }
    let bad_hostname = |name: &String| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
        name.is_empty() || name.len() > MAX_HOSTNAME || !name.chars().all(allowed)
    };
    if request.hostname.as_ref().is_some_and(bad_hostname) {
        return Some(("hostname", "must be 1 to 64 letters, digits, '-' or '.'"));
    }
    if request
        .entropy
        .as_ref()
        .is_some_and(|e| e.is_empty() || e.len() > MAX_ENTROPY)
    {
        return Some(("entropy", "must be 1 to 512 bytes"));
    }
    if request.default_user.as_deref() == Some("") {
        return Some(("defaultUser", "must not be empty"));
    }
    if request
        .default_workdir
        .as_ref()
        .is_some_and(|d| d.is_empty() || d.contains('\0'))
    {
        return Some(("defaultWorkdir", "must not be empty or have a NUL"));
    }
    None
}

/// Entropy first: even a failed step after it has made the clone differ.
fn apply(request: InitRequest, machine: Machine, settings: &Settings) -> Result<(), Refusal> {
    if let Some(bytes) = &request.entropy {
        machine
            .add_entropy(bytes)
            .map_err(|e| Refusal::failed("Adding entropy", &e))?;
    }
    if let Some(time) = request.timestamp {
        machine
            .step_clock(time)
            .map_err(|e| Refusal::failed("Stepping the clock", &e))?;
    }
    if let Some(name) = &request.hostname {
        machine
            .set_hostname(name)
            .map_err(|e| Refusal::failed("Setting the host name", &e))?;
    }

    let mut values = settings.lock();
    if let Some(environment) = request.env_vars {
        values.environment = environment;
    }
    values.access_token = request.access_token.or(values.access_token.take());
    values.default_user = request.default_user.or(values.default_user.take());
    values.default_workdir = request.default_workdir.or(values.default_workdir.take());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(body: &str) -> String {
        parse(body.as_bytes()).unwrap_err().message
    }

    #[test]
    fn complete_body_is_understood() {
        let request = parse(
            br#"{"envVars":{"A":"b"},"accessToken":"t","timestamp":"2025-01-31T12:00:00Z",
                "hostname":"box-1","entropy":"AAEC","defaultUser":"user",
                "defaultWorkdir":"/work","lifecycleID":"ignored"}"#,
        )
        .unwrap();
        assert_eq!(request.entropy, Some(vec![0, 1, 2]));
        assert_eq!(request.hostname.as_deref(), Some("box-1"));
        assert_eq!(parse(b"").unwrap(), InitRequest::default());
        assert_eq!(
            parse(br#"{"hostname":null}"#).unwrap(),
            InitRequest::default()
        );
    }

    #[test]
    fn wrong_field_is_named() {
        for (body, field) in [
            (r#"{"envVars":["A"]}"#, "envVars"),
            (r#"{"envVars":{"A=B":"c"}}"#, "envVars"),
            (r#"{"accessToken":7}"#, "accessToken"),
            (r#"{"accessToken":""}"#, "accessToken"),
            (r#"{"timestamp":"yesterday"}"#, "timestamp"),
            (r#"{"hostname":"a b"}"#, "hostname"),
            (r#"{"entropy":"not base64!"}"#, "entropy"),
            (r#"{"entropy":""}"#, "entropy"),
            (r#"{"defaultUser":""}"#, "defaultUser"),
            (r#"{"defaultWorkdir":5}"#, "defaultWorkdir"),
        ] {
            assert!(
                message(body).contains(&format!("Field {field}:")),
                "{body}: {}",
                message(body)
            );
        }
        assert!(message("[]").contains("not a JSON object"));
    }

    #[test]
    fn second_init_changes_only_what_it_names() {
        let settings = Settings::default();
        let apply = |body: &[u8]| apply(parse(body).unwrap(), Machine::Borrowed, &settings);
        apply(br#"{"envVars":{"A":"1"},"accessToken":"t","defaultUser":"user"}"#).unwrap();
        apply(br#"{"envVars":{"B":"2"}}"#).unwrap();
        let values = settings.lock();
        assert_eq!(
            values.environment,
            [("B".to_owned(), "2".to_owned())].into()
        );
        assert_eq!(values.access_token.as_deref(), Some("t"));
        assert_eq!(values.default_user.as_deref(), Some("user"));
    }
}
