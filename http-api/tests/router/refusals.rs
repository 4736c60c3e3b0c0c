//! What leaves when a request is refused.

use axum::body::Body;
use axum::http::StatusCode;
use http_api::ApiError;
use http_api::options::Limits;
use http_api::wire::SandboxState;

use crate::support::{self, Fake};
use crate::{ROUTES, send};

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
