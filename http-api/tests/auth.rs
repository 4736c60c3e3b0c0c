//! Who is let in where: every route, every kind of caller.

mod support;

use std::net::IpAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::http::Request;
use http_api::auth::Access;
use http_api::router;
use http_api::server::{Channel, Peer};
use http_body_util::BodyExt;
use support::{FULL, Fake, METRICS};
use tower::ServiceExt;

/// Every route there is.
fn routes() -> Vec<(&'static str, String)> {
    http_api::routes::<Fake>()
        .iter()
        .map(|(method, path)| {
            (
                *method,
                path.replace("{id}", "a")
                    .replace("{name}", "t")
                    .replace("{pid}", "7"),
            )
        })
        .collect()
}

const LOCAL: Peer = Peer::Tcp {
    ip: IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
    channel: Channel::Plain,
};

fn access(require_token: bool) -> Access {
    Access {
        require_token,
        users: Arc::from([0, 7]),
    }
}

async fn status(access: Access, peer: Peer, route: (&str, &str), header: (&str, &str)) -> u16 {
    let (method, path) = route;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header.0, header.1);
    let mut request = request.body(Body::empty()).unwrap();
    request.extensions_mut().insert(peer);
    let response = router(Fake::default(), access)
        .oneshot(request)
        .await
        .unwrap();
    let status = response.status().as_u16();
    let kind = response.headers().get("content-type").cloned();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    if matches!(status, 401 | 403) {
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let others = ["/metrics", "/openapi.json", "/docs"];
        let wrenn = path.starts_with("/api/") || path.starts_with("/v1/capsules");
        let native = !wrenn && path.starts_with("/v1/") || others.contains(&path);
        // Each kind of client is told in its own words.
        assert_eq!(
            kind.unwrap() == "application/problem+json",
            native,
            "{path}: {body}"
        );
        let message = match (native, wrenn) {
            (true, _) => &body["detail"],
            (_, true) => &body["error"]["message"],
            _ => &body["message"],
        };
        assert!(
            message.as_str().is_some_and(|m| !m.is_empty()),
            "{path}: {body}"
        );
    }
    status
}

fn refused(status: u16) -> bool {
    matches!(status, 401 | 403)
}

#[tokio::test]
async fn every_route_asks_for_a_token() {
    let routes = routes();
    assert!(routes.len() >= 38, "{routes:?}");
    for (method, path) in &routes {
        let open = matches!(path.as_str(), "/livez" | "/readyz");
        let ask = |header: (&'static str, String)| async move {
            status(access(true), LOCAL, (method, path), (header.0, &header.1)).await
        };
        for header in [
            ("x-none", String::new()),
            ("authorization", "Bearer e2b_wrong".to_owned()),
            ("authorization", format!("Basic {FULL}")),
            ("x-api-key", String::new()),
        ] {
            let status = ask(header).await;
            assert_eq!(status == 401, !open, "{method} {path}: {status}");
        }
        for header in [
            ("authorization", format!("Bearer {FULL}")),
            ("x-api-key", FULL.to_owned()),
        ] {
            let status = ask(header).await;
            assert!(!refused(status), "{method} {path}: {status}");
        }
        // A token for metrics opens nothing else.
        let status = ask(("x-api-key", METRICS.to_owned())).await;
        let allowed = open || path == "/metrics";
        assert_eq!(status == 403, !allowed, "{method} {path}: {status}");
    }
}

#[tokio::test]
async fn the_unix_socket_is_for_the_users_it_names() {
    for (method, path) in routes() {
        let open = matches!(path.as_str(), "/livez" | "/readyz");
        for (uid, known) in [(0, true), (7, true), (1000, false)] {
            let peer = Peer::Unix { uid };
            let status = status(access(true), peer, (method, &path), ("x-none", "")).await;
            assert_eq!(status == 401, !known && !open, "{method} {path}: {status}");
        }
        let peer = Peer::Unix { uid: 1000 };
        let status = status(access(true), peer, (method, &path), ("x-api-key", FULL)).await;
        assert!(!refused(status), "{method} {path}: {status}");
    }
}

#[tokio::test]
async fn loopback_without_tokens_is_not_for_web_pages() {
    for (method, path) in routes() {
        let open = matches!(path.as_str(), "/livez" | "/readyz");
        for (header, allowed) in [
            (("x-none", ""), true),
            (("x-api-key", "anything"), true),
            (("host", "localhost:3000"), true),
            (("origin", "https://example.com"), false),
            (("sec-fetch-site", "cross-site"), false),
            (("host", "rebound.example.com"), false),
        ] {
            let status = status(access(false), LOCAL, (method, &path), header).await;
            assert_eq!(
                refused(status),
                !allowed && !open,
                "{method} {path} {header:?}: {status}"
            );
        }
    }
}

#[tokio::test]
async fn a_clients_certificate_is_as_good_as_a_token_but_not_for_web_pages() {
    let peer = |channel| Peer::Tcp {
        ip: IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)),
        channel,
    };
    for (method, path) in routes() {
        let open = matches!(path.as_str(), "/livez" | "/readyz");
        for (channel, header, allowed) in [
            (Channel::Encrypted, ("x-none", ""), false),
            (Channel::Certified, ("x-none", ""), true),
            (Channel::Certified, ("host", "thaw.example.com"), true),
            (Channel::Certified, ("origin", "https://example.com"), false),
            (Channel::Encrypted, ("x-api-key", FULL), true),
        ] {
            let route = (method, path.as_str());
            let status = status(access(true), peer(channel), route, header).await;
            assert_eq!(
                refused(status),
                !allowed && !open,
                "{method} {path} {channel:?} {header:?}: {status}"
            );
        }
    }
}
