//! Who may ask for what.
//!
//! | listener | who is let in |
//! |---|---|
//! | Unix socket | users that the listener names, by what the kernel says; a token for others |
//! | TCP | a token; on loopback without one where the listener allows that |
//! | TLS | a token, or a certificate of a client where the listener knows an authority for those |
//!
//! `/livez` and `/readyz` answer everybody. A token comes as `Authorization: Bearer` or as
//! `X-API-Key`, and only its hash is ever compared or stored. Where no token is asked for, what a
//! browser sends on behalf of some page is refused: that page would be as good as the host's users,
//! or as whoever has put a certificate into that browser.

use std::fmt;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::control_plane::ControlPlane;
use crate::problem::ApiError;
use crate::router::refused;
use crate::server::{Channel, Peer};

/// Header of E2B's clients.
const API_KEY: &str = "x-api-key";

/// SHA-256 of a token. Tokens are random and long, so a plain hash is enough.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TokenHash([u8; 32]);

impl TokenHash {
    /// The hash of a token.
    #[must_use]
    pub fn of(token: &str) -> Self {
        Self(Sha256::digest(token.as_bytes()).into())
    }

    /// A stored one.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// As it is stored.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Whether it is this one, in a time that doesn't tell how much of it is.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenHash(…)")
    }
}

/// What a token allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Everything.
    Full,
    /// `GET /metrics` only.
    Metrics,
}

/// What a listener asks of who connects.
#[derive(Clone, Debug)]
pub struct Access {
    /// Whether TCP needs a token.
    pub require_token: bool,
    /// Users who need none on the Unix socket.
    pub users: Arc<[u32]>,
}

impl Access {
    /// Everybody may do everything: for tests, and for whoever has checked already.
    #[must_use]
    pub fn open() -> Self {
        Self {
            require_token: false,
            users: Arc::from([]),
        }
    }
}

/// Before every route: lets a request pass, or answers it.
pub(crate) async fn guard<C: ControlPlane>(
    State((control, access)): State<(C, Access)>,
    request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path();
    if matches!(path, "/livez" | "/readyz") {
        return next.run(request).await;
    }
    let path = path.to_owned();
    let admitted = match need(&access, &request) {
        Need::Nothing => Ok(()),
        Need::Refusal(error) => Err(error),
        Need::Scope(token, metrics) => judge(control.scope(token).await, metrics),
    };
    match admitted {
        Ok(()) => next.run(request).await,
        Err(error) => refused(&path, error),
    }
}

/// What has to be known before a request is let in.
enum Need {
    Nothing,
    Refusal(ApiError),
    /// What this token allows; and whether the request is for metrics.
    Scope(TokenHash, bool),
}

fn need(access: &Access, request: &Request) -> Need {
    let peer = request.extensions().get::<Peer>();
    let judged = match peer {
        Some(Peer::Unix { uid }) if access.users.contains(uid) => Some(Ok(())),
        Some(Peer::Tcp {
            channel: Channel::Certified,
            ..
        }) => Some(refuse_pages(request.headers())),
        Some(Peer::Unix { .. }) => None,
        Some(Peer::Tcp { .. }) | None => {
            let headers = request.headers();
            let local = || refuse_pages(headers).and_then(|()| refuse_names(headers));
            (!access.require_token).then(local)
        }
    };
    if let Some(judged) = judged {
        return judged.map_or_else(Need::Refusal, |()| Need::Nothing);
    }
    match token(request.headers()) {
        Some(token) => Need::Scope(TokenHash::of(token), request.uri().path() == "/metrics"),
        None => Need::Refusal(ApiError::Unauthorized {
            detail: "A token is needed, as `Authorization: Bearer` or `X-API-Key`; `thaw token \
                     create` on the host makes one"
                .into(),
        }),
    }
}

fn judge(scope: Result<Option<Scope>, ApiError>, metrics: bool) -> Result<(), ApiError> {
    match scope? {
        Some(Scope::Full) => Ok(()),
        Some(Scope::Metrics) if metrics => Ok(()),
        Some(Scope::Metrics) => Err(ApiError::Forbidden {
            detail: "This token is for /metrics only".into(),
        }),
        None => Err(ApiError::Unauthorized {
            detail: "There is no such token; `thaw token list` on the host shows those there are"
                .into(),
        }),
    }
}

fn token(headers: &HeaderMap) -> Option<&str> {
    let bearer = || {
        let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
        let (scheme, token) = value.split_once(' ')?;
        scheme
            .eq_ignore_ascii_case("bearer")
            .then(|| token.trim_start())
    };
    let key = headers.get(API_KEY).and_then(|value| value.to_str().ok());
    key.or_else(bearer)
}

/// Source: the Fetch standard (Origin), Fetch Metadata (Sec-Fetch-Site).
fn refuse_pages(headers: &HeaderMap) -> Result<(), ApiError> {
    let site = text(headers, "sec-fetch-site");
    let from_a_page = site.is_some_and(|site| !matches!(site, "none" | "same-origin"));
    let host = text(headers, "host").unwrap_or("localhost");
    let origin = text(headers, "origin");
    let other_origin =
        origin.is_some_and(|origin| origin.split_once("://").is_none_or(|(_, at)| at != host));
    if from_a_page || other_origin {
        return Err(programs_only());
    }
    Ok(())
}

/// A page whose name was made to lead here is told by that name.
fn refuse_names(headers: &HeaderMap) -> Result<(), ApiError> {
    if is_local_name(text(headers, "host").unwrap_or("localhost")) {
        return Ok(());
    }
    Err(programs_only())
}

fn programs_only() -> ApiError {
    let detail = "Without a token, only programs are answered, on this host under an address or \
                  the name localhost; set `api.require_token` and send one";
    ApiError::Forbidden {
        detail: detail.into(),
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn is_local_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    // A single label is no name that a resolver of the outside answers.
    !name.contains('.') || name.parse::<std::net::IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.insert(*name, value.parse().unwrap());
        }
        map
    }

    #[test]
    fn pages_are_told_from_programs() {
        let refused = |pairs| {
            let headers = headers(pairs);
            refuse_pages(&headers).is_err() || refuse_names(&headers).is_err()
        };
        assert!(!refused(&[]));
        assert!(!refused(&[("host", "127.0.0.1:3000")]));
        assert!(!refused(&[("host", "[::1]:3000")]));
        assert!(!refused(&[
            ("host", "localhost:3000"),
            ("origin", "http://localhost:3000")
        ]));
        assert!(!refused(&[("sec-fetch-site", "none")]));
        assert!(refused(&[("sec-fetch-site", "cross-site")]));
        assert!(refused(&[
            ("host", "localhost:3000"),
            ("origin", "https://example.com")
        ]));
        assert!(refused(&[("host", "localhost:3000"), ("origin", "null")]));
        assert!(refused(&[("host", "rebound.example.com:3000")]));
    }

    #[test]
    fn a_token_comes_in_either_header() {
        assert_eq!(
            token(&headers(&[("authorization", "bearer  abc")])),
            Some("abc")
        );
        assert_eq!(token(&headers(&[("x-api-key", "abc")])), Some("abc"));
        assert_eq!(token(&headers(&[("authorization", "Basic abc")])), None);
    }

    #[test]
    fn a_hash_does_not_show_itself() {
        let hash = TokenHash::of("e2b_0");
        assert!(hash.matches(&TokenHash::of("e2b_0")) && !hash.matches(&TokenHash::of("e2b_1")));
        assert_eq!(format!("{hash:?}"), "TokenHash(…)");
    }
}
