//! Every route over a control plane that only plays: what a request becomes, what its answer
//! looks like, and what leaves when it is refused.

mod support;

use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use http_api::auth::Access;
use http_api::options::Limits;
use http_api::wire::SandboxState;
use http_api::{ApiError, router};
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
async fn what_is_no_route_is_named_in_a_404() {
    for (method, path, named) in [
        ("GET", "/", "/"),
        ("GET", "/v0/sandboxes", "/v0/sandboxes"),
        ("GET", "/v1/sandboxes/a/b/c", "/v1/sandboxes/a/b/c"),
        ("PUT", "/v1/sandboxes", "PUT /v1/sandboxes"),
        ("GET", "/v1/sandboxes/a/pause", "GET /v1/sandboxes/a/pause"),
        ("DELETE", "/readyz", "DELETE /readyz"),
    ] {
        let answer = send(Fake::default(), method, path, "").await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{method} {path}");
        let problem = answer.problem();
        assert_eq!(problem["code"], "not_found");
        assert!(
            problem["detail"].as_str().unwrap().contains(named),
            "{problem}"
        );
    }
}

#[tokio::test]
async fn a_bad_body_is_a_400_that_names_the_field() {
    for (path, body, field) in [
        ("/v1/sandboxes", "{", "body"),
        ("/v1/sandboxes", "7", "body"),
        ("/v1/sandboxes", r#" ["base"]"#, "body"),
        ("/v1/sandboxes", "\u{0}", "body"),
        ("/v1/sandboxes", "", "template"),
        ("/v1/sandboxes", r#"{"template":7}"#, "template"),
        ("/v1/sandboxes", r#"{"template":"../x"}"#, "template"),
        ("/v1/sandboxes", r#"{"template":"t","cpus":1}"#, "cpus"),
        ("/v1/sandboxes", r#"{"template":"t","id":"A"}"#, "id"),
        ("/v1/sandboxes", r#"{"template":"t","id":""}"#, "id"),
        ("/v1/sandboxes", r#"{"template":"t","vcpus":-1}"#, "vcpus"),
        (
            "/v1/sandboxes",
            r#"{"template":"t","memory_mb":4294967296}"#,
            "memory_mb",
        ),
        (
            "/v1/sandboxes",
            r#"{"template":"t","labels":{"a":[]}}"#,
            "labels.a",
        ),
        (
            "/v1/sandboxes",
            r#"{"template":"t","network":{"allow":["192.0.2.0"]}}"#,
            "network.allow[0]",
        ),
        (
            "/v1/sandboxes",
            r#"{"template":"t","network":{"internet":true}}"#,
            "network.internet",
        ),
        ("/v1/sandboxes/a/exec", "", "cmd"),
        ("/v1/sandboxes/a/exec", r#"{"cmd":""}"#, "cmd"),
        (
            "/v1/sandboxes/a/exec",
            r#"{"cmd":"a","args":["b",1]}"#,
            "args[1]",
        ),
        (
            "/v1/sandboxes/a/exec",
            r#"{"cmd":"a","timeout":1}"#,
            "timeout",
        ),
        (
            "/v1/sandboxes",
            r#"{"template":"t","timeout_s":99999999}"#,
            "timeout_s",
        ),
        (
            "/v1/sandboxes",
            r#"{"template":"t","on_timeout":"stop"}"#,
            "on_timeout",
        ),
        ("/v1/sandboxes/a/timeout", r#"{"timeout":9}"#, "timeout"),
        ("/v1/sandboxes/a/fork", r#"{"count":21}"#, "count"),
        ("/v1/snapshots", r#"{"name":"t"}"#, "sandbox"),
        (
            "/v1/snapshots",
            r#"{"sandbox":"a-b","name":"t"}"#,
            "sandbox",
        ),
        ("/v1/snapshots", r#"{"sandbox":"a","name":"-"}"#, "name"),
    ] {
        let answer = send(Fake::default(), "POST", path, body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{path} {body}");
        let problem = answer.problem();
        assert_eq!(problem["code"], "bad_request");
        assert_eq!(problem["field"], field, "{path} {body}: {problem}");
    }
}

#[tokio::test]
async fn a_bad_name_in_the_path_is_a_400_that_names_it() {
    for (method, path, body, field) in [
        ("GET", "/v1/sandboxes/A", "", "id"),
        ("GET", "/v1/sandboxes/..%2Fetc", "", "id"),
        ("DELETE", "/v1/sandboxes/a-b", "", "id"),
        ("POST", "/v1/sandboxes/9/pause", "", "id"),
        ("POST", "/v1/sandboxes/9/resume", "", "id"),
        ("POST", "/v1/sandboxes/9/exec", r#"{"cmd":"a"}"#, "id"),
        ("GET", "/v1/sandboxes/9/memory", "", "id"),
        ("GET", "/v1/sandboxes/9/disk", "", "id"),
        ("GET", "/v1/snapshots/%2E%2E", "", "name"),
        ("DELETE", "/v1/snapshots/A", "", "name"),
        // Bytes that are no text never reach a handler.
        ("GET", "/v1/sandboxes/%ff", "", "path"),
        ("DELETE", "/v1/snapshots/%ff", "", "path"),
    ] {
        let answer = send(Fake::default(), method, path, body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{method} {path}");
        assert_eq!(answer.problem()["field"], field, "{method} {path}");
    }
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_and_one_at_it_is_not() {
    let most = Limits::default().body_bytes;
    let body = |bytes: usize| {
        let frame = r#"{"template":""}"#.len();
        format!(r#"{{"template":"{}"}}"#, "a".repeat(bytes - frame))
    };
    let at = send(Fake::default(), "POST", "/v1/sandboxes", body(most)).await;
    assert_eq!(at.problem()["field"], "template", "it was read and judged");
    let over = send(Fake::default(), "POST", "/v1/sandboxes", body(most + 1)).await;
    assert_eq!(over.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(over.problem()["code"], "body_too_large");
}

#[tokio::test]
async fn every_refusal_reaches_every_route_with_its_status() {
    let refusals = [
        (
            ApiError::BadRequest {
                field: "vcpus".into(),
                detail: "is 3".into(),
            },
            400,
            "bad_request",
        ),
        (
            ApiError::Unauthorized {
                detail: "A token is needed".into(),
            },
            401,
            "unauthorized",
        ),
        (
            ApiError::Forbidden {
                detail: "Not with this token".into(),
            },
            403,
            "forbidden",
        ),
        (
            ApiError::NotFound {
                what: "sandbox",
                name: "a".into(),
            },
            404,
            "not_found",
        ),
        (
            ApiError::Denied {
                state: SandboxState::Paused,
                detail: "The sandbox is paused".into(),
            },
            409,
            "wrong_state",
        ),
        (
            ApiError::Exists {
                what: "sandbox",
                name: "a".into(),
            },
            409,
            "exists",
        ),
        (
            ApiError::Corrupt {
                detail: "memory.map at offset 8".into(),
            },
            422,
            "corrupt",
        ),
        (
            ApiError::Busy {
                detail: "Too many".into(),
            },
            429,
            "busy",
        ),
        (
            ApiError::Failed {
                code: "vmm_failed",
                detail: "It ended".into(),
            },
            500,
            "vmm_failed",
        ),
        (
            ApiError::Unavailable {
                detail: "Draining".into(),
            },
            503,
            "unavailable",
        ),
        (
            ApiError::Full {
                detail: "No room".into(),
            },
            507,
            "capacity_exhausted",
        ),
    ];
    for (error, status, code) in refusals {
        for (method, path, body) in ROUTES {
            let answer = send(Fake::refusing(error.clone()), method, path, body).await;
            assert_eq!(answer.status.as_u16(), status, "{method} {path}");
            let problem = answer.problem();
            assert_eq!(problem["code"], code, "{method} {path}");
            assert_eq!(problem["detail"], error.to_string());
            assert_eq!(problem.get("field").is_some(), status == 400, "{problem}");
            assert_eq!(
                problem.get("state").is_some(),
                code == "wrong_state",
                "{problem}"
            );
        }
    }
}

#[tokio::test]
async fn a_409_names_the_state_as_it_is_on_the_wire() {
    let denied = ApiError::Denied {
        state: SandboxState::Snapshotting,
        detail: "The sandbox is snapshotting".into(),
    };
    let answer = send(Fake::refusing(denied), "POST", "/v1/sandboxes/a/pause", "").await;
    assert_eq!(answer.problem()["state"], "snapshotting");
}

#[tokio::test]
async fn request_ids_differ() {
    let one = send(Fake::default(), "GET", "/x", "").await.problem();
    let two = send(Fake::default(), "GET", "/x", "").await.problem();
    assert_ne!(one["request_id"], two["request_id"]);
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

#[test]
fn the_document_has_the_native_routes_and_no_others() {
    let document = http_api::openapi();
    let mut documented = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        let methods = methods.as_object().unwrap().keys();
        documented.extend(methods.map(|method| (method.to_uppercase(), path.clone())));
    }
    let native = |path: &str| {
        path.starts_with("/v1/") && !path.starts_with("/v1/capsules")
            || ["/livez", "/readyz", "/metrics", "/openapi.json", "/docs"].contains(&path)
    };
    let routes = http_api::routes::<Fake>().into_iter();
    let mut routed: Vec<_> = routes
        .filter(|(_, path)| native(path))
        .map(|(method, path)| (method.to_owned(), path.to_owned()))
        .collect();
    documented.sort();
    routed.sort();
    assert_eq!(documented, routed);
}

#[test]
fn the_committed_document_is_the_one_that_is_served() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
    let committed = std::fs::read_to_string(path).unwrap();
    let made = serde_json::to_string_pretty(&http_api::openapi()).unwrap() + "\n";
    assert!(
        committed == made,
        "openapi.json is stale: cargo run -p appliance -- openapi > http-api/openapi.json"
    );
}

#[tokio::test]
async fn the_document_is_there_to_be_read() {
    let page = send(Fake::default(), "GET", "/docs", "").await;
    assert_eq!(
        (page.status, &*page.content_type),
        (StatusCode::OK, "text/html; charset=utf-8")
    );
    assert!(
        page.text.contains("/v1/sandboxes/{id}/fork"),
        "{}",
        page.text
    );
    let document = send(Fake::default(), "GET", "/openapi.json", "").await;
    assert_eq!(document.json(), http_api::openapi());
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_arrive_is_given_up() {
    let begun = futures_util::stream::once(async { Ok::<_, std::io::Error>("{") });
    let body = futures_util::StreamExt::chain(begun, futures_util::stream::pending());
    for path in ["/v1/sandboxes", "/v2/sandboxes"] {
        let body =
            Body::from_stream(futures_util::stream::pending::<Result<&str, std::io::Error>>());
        let late = send(Fake::default(), "POST", path, body).await;
        assert_eq!(late.status, StatusCode::REQUEST_TIMEOUT, "{path}");
    }
    let late = send(
        Fake::default(),
        "POST",
        "/v1/sandboxes",
        Body::from_stream(body),
    )
    .await;
    assert_eq!(late.problem()["code"], "request_timeout");
}

#[tokio::test]
async fn what_is_meant_for_another_run_is_refused_with_the_newest() {
    for (method, path, body) in [
        ("POST", "/v1/sandboxes/a/pause", ""),
        ("POST", "/v1/sandboxes/a/resume", ""),
        ("POST", "/v1/sandboxes/a/timeout", r#"{"timeout_s":9}"#),
        ("POST", "/v1/sandboxes/a/fork", ""),
        ("DELETE", "/v1/sandboxes/a", ""),
    ] {
        let at = |run: &str| format!("{path}?execution_id={run}");
        let met = send(Fake::default(), method, &at(support::RUN), body).await;
        assert!(met.status.is_success(), "{method} {path}: {}", met.text);
        let other = send(Fake::default(), method, &at("exec-6"), body).await;
        assert_eq!(
            other.status,
            StatusCode::PRECONDITION_FAILED,
            "{method} {path}"
        );
        let problem = other.problem();
        assert_eq!(problem["code"], "other_run", "{problem}");
        assert_eq!(problem["execution_id"], support::RUN, "{problem}");
        let typo = format!("{path}?executionid=exec-7");
        let typo = send(Fake::default(), method, &typo, body).await;
        assert_eq!(typo.status, StatusCode::BAD_REQUEST, "{method} {path}");
    }
    for (run, status) in [(support::RUN, 201), ("exec-6", 412)] {
        let body = format!(r#"{{"sandbox":"a","execution_id":"{run}"}}"#);
        let answer = send(Fake::default(), "POST", "/v1/snapshots", body).await;
        assert_eq!(answer.status.as_u16(), status, "{}", answer.text);
    }
}
