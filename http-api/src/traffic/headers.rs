//! Which headers go on to the guest, and which back to the client.
//!
//! Source: RFC 9110, section 7.6.1 (hop-by-hop fields), and X-Forwarded-* as every proxy sends it.

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};

use super::target::{PORT_HEADER, SANDBOX_HEADER};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// What a request wants its connection to become, if anything.
pub(super) fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let wanted = tokens(headers).any(|token| token.eq_ignore_ascii_case("upgrade"));
    headers.get(header::UPGRADE).filter(|_| wanted).cloned()
}

/// Takes out what concerns one connection only; an upgrade is put back if there is one.
pub(super) fn strip(headers: &mut HeaderMap, upgrade: Option<HeaderValue>) {
    let named: Vec<HeaderName> = tokens(headers)
        .filter_map(|token| token.parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in [
        header::CONNECTION,
        KEEP_ALIVE,
        PROXY_CONNECTION,
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
    ] {
        headers.remove(name);
    }
    if let Some(protocol) = upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, protocol);
    }
}

/// Makes a client's headers those of the proxy's request.
pub(super) fn forward(headers: &mut HeaderMap, client: Option<IpAddr>, scheme: &'static str) {
    // The body is asked for by reading it, so the client was told to go on by then.
    headers.remove(header::EXPECT);
    headers.remove(SANDBOX_HEADER);
    headers.remove(PORT_HEADER);
    if let Some(host) = headers.get(header::HOST).cloned() {
        headers.entry(FORWARDED_HOST).or_insert(host);
    }
    let proto = HeaderValue::from_static(scheme);
    headers.entry(FORWARDED_PROTO).or_insert(proto);
    let Some(client) = client else { return };
    let before = headers.get(&FORWARDED_FOR);
    let before = before.and_then(|value| value.to_str().ok());
    let all = match before {
        Some(before) => format!("{before}, {client}"),
        None => client.to_string(),
    };
    if let Ok(value) = all.parse() {
        headers.insert(FORWARDED_FOR, value);
    }
}

/// The members of all `Connection` headers.
fn tokens(headers: &HeaderMap) -> impl Iterator<Item = String> {
    let lines: Vec<String> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok().map(str::to_owned))
        .collect();
    lines.into_iter().flat_map(|line| {
        line.split(',')
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty())
            .collect::<Vec<_>>()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pairs = pairs.iter();
        let typed = pairs.map(|(name, value)| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_str(value).unwrap(),
            )
        });
        typed.collect()
    }

    #[test]
    fn what_one_connection_says_stays_there() {
        let mut headers = map(&[
            ("connection", "close, X-Mine"),
            ("x-mine", "1"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("accept", "*/*"),
        ]);
        assert_eq!(upgrade(&headers), None);
        strip(&mut headers, None);
        assert_eq!(headers, map(&[("accept", "*/*")]));
    }

    #[test]
    fn an_upgrade_is_asked_for_again() {
        let mut headers = map(&[
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
        ]);
        let protocol = upgrade(&headers);
        assert!(protocol.is_some());
        strip(&mut headers, protocol);
        let expected = map(&[("connection", "upgrade"), ("upgrade", "websocket")]);
        assert_eq!(headers, expected);
        assert_eq!(upgrade(&map(&[("upgrade", "websocket")])), None);
    }

    #[test]
    fn the_guest_learns_who_asked() {
        let mut headers = map(&[
            ("host", "80-a.thaw.test"),
            ("e2b-sandbox-id", "a"),
            ("expect", "100-continue"),
            ("x-forwarded-for", "192.0.2.1"),
        ]);
        forward(&mut headers, Some([192, 0, 2, 2].into()), "http");
        assert_eq!(headers["x-forwarded-for"], "192.0.2.1, 192.0.2.2");
        assert_eq!(headers["x-forwarded-host"], "80-a.thaw.test");
        assert_eq!(headers["host"], "80-a.thaw.test");
        assert!(!headers.contains_key("expect") && !headers.contains_key("e2b-sandbox-id"));
    }
}
