//! The API's description of itself.

use axum::http::StatusCode;

use crate::send;
use crate::support::Fake;

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
