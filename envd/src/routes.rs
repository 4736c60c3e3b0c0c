//! Every route there is, in one table, and the router made from it.
//!
//! The table is what the test walks that asks each route for an answer without a token.

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::response::Response;
use axum::routing::{MethodRouter, delete, get, post};

use crate::connections::Connections;
use crate::filesystem::{self, Collectors};
use crate::freezer::Freezer;
use crate::machine::Machine;
use crate::process::{self, Processes};
use crate::protocol::{
    COMPAT_VERSION, COMPOSE_PATH, ENVIRONMENT_PATH, FILES_PATH, FREEZE_PATH, HEALTH_PATH, Health,
    INIT_PATH, METRICS_PATH, PORT_EVENTS_PATH, PORTS_PATH, PRELOAD_PATH, PREPARE_PATH, THAW_PATH,
};
use crate::refusal::{Refusal, json};
use crate::settings::Settings;
use crate::{auth, files, freeze, init, memory, metrics, ports, prepare};

/// What the routes share.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) machine: Machine,
    pub(crate) settings: Settings,
    pub(crate) processes: Processes,
    pub(crate) freezer: Freezer,
    pub(crate) turns: freeze::Turns,
    pub(crate) preload: memory::Preload,
    pub(crate) cpu: metrics::Cpu,
    pub(crate) watchers: Collectors,
    pub(crate) connections: Connections,
    /// Where we listen.
    pub(crate) port: u16,
}

/// The plain HTTP routes: method, path, and what answers.
fn plain_routes() -> Vec<(&'static str, &'static str, MethodRouter<Arc<Guest>>)> {
    vec![
        ("GET", HEALTH_PATH, get(health)),
        ("POST", INIT_PATH, post(init::init)),
        ("POST", PREPARE_PATH, post(prepare::prepare)),
        ("POST", FREEZE_PATH, post(freeze::freeze)),
        ("POST", THAW_PATH, post(freeze::thaw)),
        ("POST", PRELOAD_PATH, post(memory::begin)),
        ("GET", PRELOAD_PATH, get(memory::status)),
        ("DELETE", PRELOAD_PATH, delete(memory::cancel)),
        ("GET", PORTS_PATH, get(ports::ports)),
        ("GET", PORT_EVENTS_PATH, get(ports::events)),
        ("GET", FILES_PATH, get(files::download)),
        // A file may have any size.
        (
            "POST",
            FILES_PATH,
            post(files::upload).layer(DefaultBodyLimit::disable()),
        ),
        ("POST", COMPOSE_PATH, post(files::compose)),
        ("GET", METRICS_PATH, get(metrics::metrics)),
        ("GET", ENVIRONMENT_PATH, get(metrics::environment)),
    ]
}

/// All routes behind the token.
pub(crate) fn router(guest: Arc<Guest>) -> Router {
    let mut router = Router::new();
    for (_method, path, answer) in plain_routes() {
        router = router.route(path, answer);
    }
    for (path, service) in services(&guest) {
        router = router.route_service(path, service.into_axum_service());
    }
    router
        .fallback(not_found)
        .layer(from_fn_with_state(Arc::clone(&guest), auth::require_token))
        .with_state(guest)
}

/// The Connect services, and the paths of their methods.
fn services(guest: &Arc<Guest>) -> [(&'static str, connectrpc::Router); 2] {
    [
        (
            "/process.Process/{method}",
            process::service::router(Arc::clone(guest)),
        ),
        (
            "/filesystem.Filesystem/{method}",
            filesystem::service::router(Arc::clone(guest)),
        ),
    ]
}

/// Whether a path belongs to the Connect protocol: `/package.Service/Method`.
pub(crate) fn is_rpc(path: &str) -> bool {
    path.split('/')
        .nth(1)
        .is_some_and(|service| service.contains('.'))
}

async fn health() -> Response {
    let health = Health {
        version: COMPAT_VERSION.to_owned(),
        envd: env!("CARGO_PKG_VERSION").to_owned(),
    };
    json(StatusCode::OK, &health)
}

async fn not_found() -> Refusal {
    Refusal {
        status: StatusCode::NOT_FOUND,
        message: "No such route".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::Request;
    use tower::ServiceExt as _;

    use super::*;

    async fn status(guest: &Arc<Guest>, method: &str, path: &str, token: Option<&str>) -> u16 {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(token) = token {
            request = request.header(crate::protocol::ACCESS_TOKEN_HEADER, token);
        }
        let request = request.body(Body::empty()).unwrap();
        router(Arc::clone(guest))
            .oneshot(request)
            .await
            .unwrap()
            .status()
            .as_u16()
    }

    #[tokio::test]
    async fn no_route_but_health_answers_without_the_token() {
        let guest = Arc::new(Guest::new(Machine::Borrowed, Freezer::default(), 0));
        assert_eq!(
            status(&guest, "POST", INIT_PATH, None).await,
            204,
            "before a token is set"
        );
        guest.settings.lock().access_token = Some("secret".to_owned());

        let mut routes: Vec<(String, String)> = plain_routes()
            .iter()
            .map(|(method, path, _)| ((*method).to_owned(), (*path).to_owned()))
            .collect();
        for (_, service) in services(&guest) {
            let path = |method: &str| format!("/{}", method.trim_start_matches('/'));
            routes.extend(service.methods().map(|m| ("POST".to_owned(), path(m))));
        }
        routes.push(("GET".to_owned(), "/no/such/route".to_owned()));
        assert!(routes.len() >= 33, "{routes:?}");

        for (method, path) in routes {
            let open = path == HEALTH_PATH;
            for token in [None, Some("wrong"), Some("")] {
                let answered = status(&guest, &method, &path, token).await;
                assert_eq!(
                    answered,
                    if open { 200 } else { 401 },
                    "{method} {path} {token:?}"
                );
            }
            if path == PORT_EVENTS_PATH || method == "POST" && path == PRELOAD_PATH {
                // Would look, or read, for as long as the test runs.
                continue;
            }
            let admitted = status(&guest, &method, &path, Some("secret")).await;
            assert_ne!(admitted, 401, "{method} {path}");
        }
    }
}
