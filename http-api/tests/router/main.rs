//! Every route over a control plane that only plays: what a request becomes, what its answer
//! looks like, and what leaves when it is refused.

mod document;
mod refusals;
#[path = "../support/mod.rs"]
mod support;

use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use http_api::auth::Access;
use http_api::router;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use support::Fake;
use tower::ServiceExt;

struct Answer {
    status: StatusCode,
    content_type: String,
    retry_after: Option<String>,
    text: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text)
            .unwrap_or_else(|error| panic!("{:?} is no JSON: {error}", self.text))
    }

    /// The document of a refusal, after checking what every refusal has.
    fn problem(&self) -> Value {
        assert_eq!(self.content_type, "application/problem+json");
        let problem = self.json();
        assert_eq!(problem["status"], self.status.as_u16(), "{problem}");
        for key in ["title", "detail", "code", "request_id"] {
            let text = problem[key].as_str();
            assert!(
                text.is_some_and(|text| !text.is_empty()),
                "{key}: {problem}"
            );
        }
        let again = matches!(self.status.as_u16(), 429 | 503);
        assert_eq!(problem["retryable"], again, "{problem}");
        assert_eq!(self.retry_after.is_some(), again, "{problem}");
        problem
    }
}

async fn send(fake: Fake, method: &str, path: &str, body: impl Into<Body>) -> Answer {
    let request = Request::builder()
        .method(Method::from_bytes(method.as_bytes()).unwrap())
        .uri(path)
        .body(body.into())
        .unwrap();
    let response = router(fake, Access::open()).oneshot(request).await.unwrap();
    let text_of = |name| {
        let value = response.headers().get(name)?;
        Some(value.to_str().unwrap().to_owned())
    };
    let content_type = text_of(header::CONTENT_TYPE).unwrap_or_default();
    let retry_after = text_of(header::RETRY_AFTER);
    let status = response.status();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    Answer {
        status,
        content_type,
        retry_after,
        text: String::from_utf8(bytes.to_vec()).unwrap(),
    }
}

/// All routes behind the control plane, each with a body that is good.
const ROUTES: [(&str, &str, &str); 29] = [
    ("GET", "/v1/host", ""),
    ("POST", "/v1/host/drain", ""),
    ("DELETE", "/v1/host/drain", ""),
    ("POST", "/v1/host/reconcile", ""),
    ("GET", "/v1/sandboxes", ""),
    ("POST", "/v1/sandboxes", r#"{"template":"base"}"#),
    ("GET", "/v1/sandboxes/a", ""),
    ("DELETE", "/v1/sandboxes/a", ""),
    ("POST", "/v1/sandboxes/a/pause", ""),
    ("POST", "/v1/sandboxes/a/resume", ""),
    ("GET", "/v1/sandboxes/a/wait", ""),
    ("POST", "/v1/sandboxes/a/timeout", r#"{"timeout_s":9}"#),
    ("POST", "/v1/sandboxes/a/fork", ""),
    ("GET", "/v1/sandboxes/a/metrics", ""),
    ("POST", "/v1/sandboxes/a/exec", r#"{"cmd":"true"}"#),
    ("GET", "/v1/sandboxes/a/processes", ""),
    (
        "POST",
        "/v1/sandboxes/a/processes/7/signal",
        r#"{"signal":"SIGTERM"}"#,
    ),
    ("GET", "/v1/sandboxes/a/files?path=%2Fx", ""),
    ("PUT", "/v1/sandboxes/a/files?path=%2Fx", "content"),
    ("GET", "/v1/sandboxes/a/files/list?path=%2F", ""),
    ("GET", "/v1/sandboxes/a/memory", ""),
    ("GET", "/v1/sandboxes/a/disk", ""),
    ("GET", "/v1/sandboxes/a/console", ""),
    ("PUT", "/v1/sandboxes/a/network", "{}"),
    ("PUT", "/v1/sandboxes/a/disk", "{}"),
    ("GET", "/v1/snapshots", ""),
    ("POST", "/v1/snapshots", r#"{"sandbox":"a","name":"t"}"#),
    ("GET", "/v1/snapshots/t", ""),
    ("DELETE", "/v1/snapshots/t", ""),
];

#[tokio::test]
async fn every_route_answers_with_its_status_and_json() {
    for (method, path, body) in ROUTES {
        let answer = send(Fake::default(), method, path, body).await;
        let expected = match (method, path) {
            ("DELETE", _) | (_, "/v1/sandboxes/a/processes/7/signal") => 204,
            ("POST", "/v1/sandboxes" | "/v1/snapshots" | "/v1/sandboxes/a/fork") => 201,
            _ => 200,
        };
        assert_eq!(answer.status.as_u16(), expected, "{method} {path}");
        if expected == 204 {
            assert_eq!(answer.text, "", "{method} {path}");
        } else if path == "/v1/sandboxes/a/files?path=%2Fx" && method == "GET" {
            assert_eq!(answer.content_type, "application/octet-stream");
            assert_eq!(answer.text, "/x");
        } else {
            assert_eq!(answer.content_type, "application/json", "{method} {path}");
            answer.json();
        }
    }
}

#[tokio::test]
async fn a_created_sandbox_is_what_was_asked_for() {
    let body = json!({
        "template": "py-3.12", "id": "a1", "vcpus": 2, "memory_mb": 512,
        "env": { "A": "1" }, "labels": { "owner": "me" },
        "network": { "deny": ["192.0.2.0/24"] },
        "timeout_s": 60, "on_timeout": "pause", "auto_resume": true,
    });
    let made = send(Fake::default(), "POST", "/v1/sandboxes", body.to_string())
        .await
        .json();
    let expected = json!({
        "id": "a1", "state": "running", "template": "py-3.12", "vcpus": 2, "memory_mb": 512,
        "address": "10.0.0.1", "created_at_ms": 5, "labels": { "owner": "me" },
        "huge_pages": false, "disk_mb": 128, "started_at_ms": 5, "time_left_ms": 60_000, "on_timeout": "pause",
        "auto_resume": true,
        "network": { "allow_internet_access": true, "deny": ["192.0.2.0/24"] },
    });
    assert_eq!(made, expected, "absent fields are left out, not null");
}

#[tokio::test]
async fn network_lists_and_rates_have_limits() {
    let list = |length: usize| json!({ "deny": vec!["192.0.2.0/24"; length] }).to_string();
    let put = |body| send(Fake::default(), "PUT", "/v1/sandboxes/a/network", body);
    assert_eq!(put(list(256)).await.status, 200);
    let refused = put(list(257)).await;
    assert_eq!(refused.status, 400);
    assert_eq!(refused.problem()["field"], "deny");
    let rate = |kbit_s: u64| json!({ "ingress_kbit_s": kbit_s }).to_string();
    assert_eq!(put(rate(64)).await.status, 200);
    for kbit_s in [0, 63, 100_000_001] {
        let refused = put(rate(kbit_s)).await;
        assert_eq!(refused.status, 400, "{kbit_s}");
        assert_eq!(refused.problem()["field"], "ingress_kbit_s");
    }
}

#[tokio::test]
async fn limits_of_a_disk_have_limits() {
    let put = |body| send(Fake::default(), "PUT", "/v1/sandboxes/a/disk", body);
    let limited = put(r#"{"mib_per_s":8}"#).await.json();
    assert_eq!(limited["disk_limits"], json!({ "mib_per_s": 8 }));
    for body in [r#"{"ops_per_s":0}"#, r#"{"ops_per_s":1073741825}"#] {
        let refused = put(body).await;
        assert_eq!(refused.status, 400, "{body}");
        assert_eq!(refused.problem()["field"], "ops_per_s");
    }
    let body = r#"{"template":"t","disk_limits":{"mib_per_s":0}}"#;
    let refused = send(Fake::default(), "POST", "/v1/sandboxes", body).await;
    assert_eq!(refused.problem()["field"], "disk_limits.mib_per_s");
}

#[tokio::test]
async fn a_command_has_defaults_and_its_result_comes_back() {
    let body = r#"{"cmd":"echo","args":["a b"]}"#;
    let ran = send(Fake::default(), "POST", "/v1/sandboxes/a/exec", body)
        .await
        .json();
    assert_eq!(ran["exit_code"], 3);
    assert_eq!(ran["stdout"], r#"a: echo ["a b"]"#);
    assert_eq!(ran["stderr"], "60000 ms");
}

#[tokio::test]
async fn lists_and_snapshots_and_numbers_have_their_shape() {
    let get = |path: &'static str| send(Fake::default(), "GET", path, "");
    assert_eq!(get("/v1/sandboxes").await.json()[0]["state"], "paused");
    let snapshot = get("/v1/snapshots/t").await.json();
    assert_eq!(snapshot["kind"], "memory");
    assert_eq!(snapshot["generation"], 2);
    assert_eq!(get("/v1/snapshots").await.json(), json!([snapshot]));
    let memory = get("/v1/sandboxes/a/memory").await.json();
    assert_eq!(memory["guest_pages"], 65_536);
    assert_eq!(memory["fault_us_p99"], 12.5);
    assert!(memory.get("diff_pages").is_none(), "{memory}");
    let disk = get("/v1/sandboxes/a/disk").await.json();
    assert_eq!(disk["size_bytes"], 1 << 30);
    assert_eq!(disk["full"], false);
    assert!(disk.get("limit_bytes").is_none(), "{disk}");
    assert_eq!(get("/v1/host").await.json()["vmm"]["accelerator"], "none");
}

#[tokio::test]
async fn a_live_daemon_that_is_not_ready_says_why() {
    let draining = Fake {
        not_ready: Some("The host is draining"),
        ..Fake::default()
    };
    for fake in [Fake::default(), draining.clone()] {
        let live = send(fake, "GET", "/livez", "").await;
        assert_eq!((live.status, &*live.text), (StatusCode::OK, "ok"));
    }
    let ready = send(Fake::default(), "GET", "/readyz", "").await;
    assert_eq!((ready.status, &*ready.text), (StatusCode::OK, "ok"));
    let not = send(draining, "GET", "/readyz", "").await;
    assert_eq!(not.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(not.problem()["detail"], "The host is draining");
}

#[tokio::test]
async fn the_same_request_again_is_no_creation() {
    let body = r#"{"template":"base","id":"there"}"#;
    let again = send(Fake::default(), "POST", "/v1/sandboxes", body).await;
    assert_eq!(again.status, StatusCode::OK);
}

#[tokio::test]
async fn a_wait_names_its_states() {
    let at = |query: &str| format!("/v1/sandboxes/a/wait?{query}");
    let answer = send(Fake::default(), "GET", &at("state=paused,failed"), "").await;
    assert_eq!(answer.json()["state"], "paused");
    for bad in ["state=asleep", "timeout_ms=-1", "states=paused"] {
        let answer = send(Fake::default(), "GET", &at(bad), "").await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{bad}");
        answer.problem();
    }
}

#[tokio::test]
async fn forks_fail_one_by_one() {
    let path = "/v1/sandboxes/a/fork";
    let forks = send(Fake::default(), "POST", path, r#"{"count":3}"#)
        .await
        .json();
    assert_eq!(forks["sandboxes"].as_array().unwrap().len(), 2, "{forks}");
    assert_eq!(forks["errors"][0]["code"], "capacity_exhausted", "{forks}");
}

#[tokio::test]
async fn events_go_on_from_the_last_one_seen() {
    let stream = |path: &'static str, last: Option<&'static str>| async move {
        let mut request = Request::builder().uri(path);
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let request = request.body(Body::empty()).unwrap();
        let router = router(Fake::default(), Access::open());
        let response = router.oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let kind = response.headers()["content-type"].clone();
        let text = response.into_body().collect().await.unwrap().to_bytes();
        (status, kind, String::from_utf8(text.to_vec()).unwrap())
    };
    let (status, kind, text) = stream("/v1/events", Some("7")).await;
    assert_eq!(
        (status, &kind),
        (200, &header::HeaderValue::from_static("text/event-stream"))
    );
    let first = text.split("\n\n").next().unwrap();
    let (head, data) = first.split_once("data: ").unwrap();
    assert_eq!(head, "id: 8\nevent: state\n");
    let data: Value = serde_json::from_str(data).unwrap();
    let expected = json!({
        "id": 8, "at_ms": 5, "kind": "state", "sandbox": "two", "state": "paused",
    });
    assert_eq!(data, expected);
    let (_, _, text) = stream("/v1/events?after=7&sandbox=one", None).await;
    let ids: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("id: "))
        .collect();
    assert_eq!(ids, ["9"], "{text}");
    assert_eq!(stream("/v1/events", Some("x")).await.0, 400);
    assert_eq!(stream("/v1/events?since=1", None).await.0, 400);
}

#[tokio::test]
async fn a_list_takes_filters_it_knows() {
    let get = |path: &'static str| send(Fake::default(), "GET", path, "");
    assert_eq!(get("/v1/sandboxes?state=running").await.json(), json!([]));
    assert_eq!(
        get("/v1/sandboxes?state=paused&limit=1").await.json()[0]["id"],
        "a"
    );
    let refused = get("/v1/sandboxes?stat=running").await;
    assert_eq!(refused.status, StatusCode::BAD_REQUEST);
    assert_eq!(refused.problem()["field"], "stat");
}
