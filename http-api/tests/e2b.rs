//! The routes of E2B's clients over a control plane that only plays: what they send becomes, and
//! what they read comes back. The clients themselves are let loose on a daemon in `appliance`.

mod support;

use axum::body::Body;
use axum::http::{HeaderMap, Request};
use http_api::auth::Access;
use http_api::options::Options;
use http_api::router;
use http_api::{ApiError, wire::SandboxState};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use support::Fake;
use tower::ServiceExt;

async fn ask(fake: Fake, method: &str, path: &str, body: &Value) -> (u16, HeaderMap, Value) {
    let body = if body.is_null() {
        String::new()
    } else {
        body.to_string()
    };
    let request = Request::builder().method(method).uri(path);
    let request = request.body(Body::from(body)).unwrap();
    let response = router(fake, Access::open()).oneshot(request).await.unwrap();
    let (head, body) = response.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    (head.status.as_u16(), head.headers, body)
}

async fn call(method: &str, path: &str, body: Value) -> (u16, Value) {
    let (status, _, body) = ask(Fake::default(), method, path, &body).await;
    (status, body)
}

#[tokio::test]
async fn a_sandbox_is_created_as_both_versions_ask() {
    for path in ["/sandboxes", "/v2/sandboxes"] {
        let body = json!({
            "templateID": "base:default", "timeout": 30, "metadata": { "a": "b" },
            "envVars": { "C": "d" }, "autoPause": true, "autoResume": { "enabled": true },
            "allow_internet_access": false, "secure": true, "mcp": null, "later": [1],
        });
        let (status, made) = call("POST", path, body).await;
        assert_eq!(status, 201, "{made}");
        let expected = json!({
            "templateID": "base", "sandboxID": "chosen", "clientID": "thaw", "envdVersion": "0.6.4",
        });
        assert_eq!(made, expected);
    }
}

#[tokio::test]
async fn what_cannot_be_had_is_refused_by_name() {
    for (part, field) in [
        (json!({ "mcp": { "a": {} } }), "mcp"),
        (json!({ "iam": { "tokens": {} } }), "iam"),
        (
            json!({ "volumeMounts": [{ "name": "v", "path": "/v" }] }),
            "volumeMounts",
        ),
        (json!({ "autoPauseMemory": false }), "autoPauseMemory"),
        (
            json!({ "network": { "rules": { "a.b": [] } } }),
            "network.rules",
        ),
        (json!({ "timeout": 99_999_999 }), "timeout"),
        (json!({ "metadata": { "a": 1 } }), "metadata.a"),
        (json!({ "templateID": "Not/Ours" }), "templateID"),
    ] {
        let mut body = json!({ "templateID": "base" });
        body.as_object_mut()
            .unwrap()
            .extend(part.as_object().unwrap().clone());
        let (status, refused) = call("POST", "/v2/sandboxes", body).await;
        assert_eq!(
            (status, &refused["code"]),
            (400, &json!(400)),
            "{field}: {refused}"
        );
        let message = refused["message"].as_str().unwrap();
        assert!(
            message.starts_with(&format!("{field}: ")),
            "{field}: {message}"
        );
    }
}

#[tokio::test]
async fn a_key_makes_the_same_sandbox_again() {
    let made = |key: &'static str| async move {
        let request = Request::builder().method("POST").uri("/v2/sandboxes");
        let request = request.header("idempotency-key", key);
        let request = request
            .body(Body::from(r#"{"templateID":"base"}"#))
            .unwrap();
        let response = router(Fake::default(), Access::open())
            .oneshot(request)
            .await
            .unwrap();
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&bytes).unwrap();
        (status, body["sandboxID"].as_str().map(str::to_owned))
    };
    let (status, first) = made("0f-1").await;
    assert_eq!(status, 201);
    assert!(first.is_some());
    assert_eq!(made("0f-1").await.1, first);
    assert_ne!(made("0f-2").await.1, first);
    assert_eq!(made("Not ours").await.0, 400);
}

#[tokio::test]
async fn lists_and_details_have_the_mandatory_fields() {
    let listed = [
        "templateID",
        "sandboxID",
        "clientID",
        "startedAt",
        "endAt",
        "cpuCount",
        "memoryMB",
        "diskSizeMB",
        "state",
        "envdVersion",
        "metadata",
    ];
    let (status, headers, list) = ask(Fake::default(), "GET", "/v2/sandboxes", &Value::Null).await;
    assert_eq!(status, 200);
    assert!(!headers.contains_key("x-next-token"), "one page is all");
    for field in listed {
        assert!(!list[0][field].is_null(), "{field}: {list}");
    }
    assert_eq!(list[0]["state"], "paused");
    assert_eq!(list[0]["startedAt"], "1970-01-01T00:00:00.005Z");
    assert!(list[0].get("envdAccessToken").is_none(), "{list}");
    let (_, running) = call("GET", "/sandboxes", Value::Null).await;
    assert_eq!(running, json!([]), "the old list shows what runs");
    let (_, detail) = call("GET", "/sandboxes/a", Value::Null).await;
    for field in listed {
        assert!(!detail[field].is_null(), "{field}: {detail}");
    }
    assert_eq!(detail["envdAccessToken"], "secret");
    assert_eq!(
        detail["lifecycle"],
        json!({ "autoResume": false, "onTimeout": "kill" })
    );
}

#[tokio::test]
async fn a_sandbox_is_brought_back_or_kept_longer() {
    // This one runs.
    let (status, there) = call("POST", "/v2/sandboxes/a/connect", json!({ "timeout": 5 })).await;
    assert_eq!((status, &there["sandboxID"]), (200, &json!("a")), "{there}");
    for (path, body) in [
        ("/sandboxes/a/timeout", json!({ "timeout": 5 })),
        ("/sandboxes/a/refreshes", json!({ "duration": 5 })),
        ("/sandboxes/a/refreshes", Value::Null),
        ("/sandboxes/a/pause", json!({})),
        ("/sandboxes/a/pause", Value::Null),
    ] {
        assert_eq!(call("POST", path, body).await, (204, Value::Null), "{path}");
    }
    assert_eq!(call("POST", "/sandboxes/a/resume", json!({})).await.0, 201);
    assert_eq!(call("POST", "/sandboxes/a/timeout", json!({})).await.0, 400);
    assert_eq!(
        call("POST", "/sandboxes/a/pause", json!({ "memory": false }))
            .await
            .0,
        400
    );
    assert_eq!(call("DELETE", "/sandboxes/a", Value::Null).await.0, 204);
    let network = json!({ "denyOut": ["0.0.0.0/0"] });
    assert_eq!(call("PUT", "/sandboxes/a/network", network).await.0, 204);
}

#[tokio::test]
async fn logs_are_the_consoles_lines_from_a_time_on_or_back() {
    let lines = async |path: &str| {
        let (status, body) = call("GET", path, Value::Null).await;
        assert_eq!(status, 200, "{path}: {body}");
        let lines = body["logs"].as_array().unwrap().iter();
        let text = lines.map(|l| {
            l["line"]
                .as_str()
                .or(l["message"].as_str())
                .unwrap()
                .to_owned()
        });
        text.collect::<Vec<_>>().join(" ")
    };
    assert_eq!(lines("/sandboxes/a/logs").await, "first second third");
    assert_eq!(
        lines("/sandboxes/a/logs?start=1500&limit=1").await,
        "second"
    );
    assert_eq!(
        lines("/v2/sandboxes/a/logs?cursor=2000").await,
        "second third"
    );
    let back = "/v2/sandboxes/a/logs?cursor=1500&direction=backward";
    assert_eq!(lines(back).await, "first");
    let (_, body) = call("GET", "/sandboxes/a/logs", Value::Null).await;
    let entry = &body["logEntries"][0];
    assert_eq!(entry["timestamp"], "1970-01-01T00:00:01Z", "{entry}");
    assert_eq!(
        (&entry["level"], &entry["fields"]),
        (&json!("info"), &json!({}))
    );
    for wrong in ["limit=1001", "direction=up", "start=soon"] {
        let path = format!("/v2/sandboxes/a/logs?{wrong}");
        assert_eq!(call("GET", &path, Value::Null).await.0, 400, "{wrong}");
    }
}

#[tokio::test]
async fn rules_for_the_network_leave_its_rates_alone() {
    let fake = Fake::default();
    let rules = json!({ "denyOut": ["192.0.2.0/24"] });
    let answer = ask(fake.clone(), "PUT", "/sandboxes/a/network", &rules).await;
    assert_eq!(answer.0, 204);
    let policy = fake.policy.borrow();
    assert_eq!(policy.deny.len(), 1);
    assert_eq!(policy.egress_kbit_s, Some(5000), "as it was before");
}

#[tokio::test]
async fn a_host_with_a_domain_says_so_and_another_does_not() {
    for domain in [None, Some("thaw.test:8443")] {
        let options = Options {
            domain: domain.map(Into::into),
            ..Access::open().into()
        };
        for (method, path) in [
            ("POST", "/sandboxes/a/connect"),
            ("POST", "/sandboxes/a/resume"),
            ("GET", "/sandboxes/a"),
        ] {
            let request = Request::builder().method(method).uri(path);
            let request = request.body(Body::from("{}")).unwrap();
            let answer = router(Fake::default(), options.clone()).oneshot(request);
            let body = answer.await.unwrap().into_body().collect().await.unwrap();
            let body: Value = serde_json::from_slice(&body.to_bytes()).unwrap();
            assert_eq!(
                body.get("domain").and_then(Value::as_str),
                domain,
                "{path}: {body}"
            );
        }
    }
}

#[tokio::test]
async fn forks_and_snapshots_and_metrics_have_their_shape() {
    let (status, forks) = call("POST", "/sandboxes/a/fork", json!({ "count": 2 })).await;
    assert_eq!(status, 201);
    assert_eq!(forks[0]["sandbox"]["sandboxID"], "f1", "{forks}");
    assert_eq!(forks[1]["error"]["code"], 507, "{forks}");
    assert_eq!(
        call("POST", "/sandboxes/a/fork", json!({ "count": 0 }))
            .await
            .0,
        400
    );
    let (status, made) = call("POST", "/sandboxes/a/snapshots", json!({ "name": "s" })).await;
    assert_eq!(
        (status, made),
        (201, json!({ "snapshotID": "s", "names": ["s"] }))
    );
    let (_, list) = call("GET", "/snapshots", Value::Null).await;
    assert_eq!(list, json!([{ "snapshotID": "t", "names": ["t"] }]));
    assert_eq!(
        call("GET", "/snapshots?sandboxID=z", Value::Null).await.1,
        json!([])
    );
    assert_eq!(
        call("DELETE", "/templates/t:default", Value::Null).await.0,
        204
    );
    let (_, templates) = call("GET", "/templates", Value::Null).await;
    assert_eq!(templates[0]["templateID"], "t", "{templates}");
    let (_, alias) = call("GET", "/templates/aliases/t", Value::Null).await;
    assert_eq!(alias["templateID"], "t");
    let (_, metrics) = call("GET", "/sandboxes/a/metrics", Value::Null).await;
    assert_eq!(metrics[0]["timestampUnix"], 1_700_000_000, "{metrics}");
    assert_eq!(metrics[0]["memTotal"], 1 << 28, "{metrics}");
    let (_, later) = call("GET", "/sandboxes/a/metrics?start=1700000001", Value::Null).await;
    assert_eq!(later, json!([]));
}

#[tokio::test]
async fn refusals_are_in_their_words() {
    let denied = Fake::refusing(ApiError::Denied {
        state: SandboxState::Paused,
        detail: "The sandbox is paused already".into(),
    });
    let (status, _, body) = ask(denied, "POST", "/sandboxes/a/pause", &Value::Null).await;
    assert_eq!(status, 409);
    let expected = json!({
        "code": 409, "message": "The sandbox is paused already", "error_code": "wrong_state",
    });
    assert_eq!(body, expected);
    let busy = Fake::refusing(ApiError::Busy {
        detail: "Wait".into(),
    });
    let (status, headers, _) = ask(busy, "GET", "/sandboxes/a", &Value::Null).await;
    assert_eq!(
        (status, headers["retry-after"].as_bytes()),
        (429, &b"1"[..])
    );
    // A name that none can have is not found, and neither is a route.
    for path in ["/sandboxes/Not-Ours", "/v3/templates", "/sandboxes/a/b/c"] {
        let (status, body) = call("GET", path, Value::Null).await;
        assert_eq!(
            (status, &body["code"]),
            (404, &json!(404)),
            "{path}: {body}"
        );
    }
}
