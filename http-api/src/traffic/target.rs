//! Which port of which sandbox a request is for: a pure function of its head.

use axum::http::{HeaderMap, HeaderName, Uri, header};

use crate::ids::SandboxId;

/// Names the sandbox.
pub(super) const SANDBOX_HEADER: HeaderName = HeaderName::from_static("e2b-sandbox-id");
/// Names the port in it.
pub(super) const PORT_HEADER: HeaderName = HeaderName::from_static("e2b-sandbox-port");

/// One port of one sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) id: SandboxId,
    pub(super) port: u16,
}

/// Why a request is for no sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NoTarget {
    /// The request names none as it should.
    Malformed(String),
    /// It names one that can't exist.
    Unknown(String),
}

/// The headers decide when there is one of them, else the host's first label `{port}-{id}`.
pub(super) fn target(headers: &HeaderMap, uri: &Uri) -> Result<Target, NoTarget> {
    let text = |name: &HeaderName| {
        let value = headers.get(name)?;
        Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let (id, port) = match (text(&SANDBOX_HEADER), text(&PORT_HEADER)) {
        (Some(id), Some(port)) => (id, port),
        (Some(_), None) => return Err(missing(&PORT_HEADER)),
        (None, Some(_)) => return Err(missing(&SANDBOX_HEADER)),
        (None, None) => {
            let host = uri
                .host()
                .map(str::to_owned)
                .or_else(|| text(&header::HOST));
            labels(&host.unwrap_or_default())?
        }
    };
    let port = port
        .parse::<u16>()
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| NoTarget::Malformed(format!("Port {port:?} is none; 1 to 65535 are")))?;
    // A name that no sandbox can have is the name of none.
    let id = id.parse().map_err(|_| NoTarget::Unknown(id))?;
    Ok(Target { id, port })
}

fn missing(header: &HeaderName) -> NoTarget {
    NoTarget::Malformed(format!("Header {header} is missing; both are needed"))
}

fn labels(host: &str) -> Result<(String, String), NoTarget> {
    let label = host.split_once('.').map(|(label, _)| label);
    let parts = label.and_then(|label| label.split_once('-'));
    let Some((port, id)) = parts else {
        return Err(NoTarget::Malformed(format!(
            "Host {host:?} names no sandbox: send headers {SANDBOX_HEADER} and {PORT_HEADER}, or a \
             host as 8080-id.example.com"
        )));
    };
    Ok((id.to_owned(), port.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(headers: &[(&'static str, &str)]) -> Result<(String, u16), NoTarget> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, value.parse().unwrap());
        }
        target(&map, &Uri::from_static("/x")).map(|t| (t.id.to_string(), t.port))
    }

    #[test]
    fn headers_come_before_the_host() {
        let found = found(&[
            ("host", "1-other.example.com"),
            ("e2b-sandbox-id", "one"),
            ("e2b-sandbox-port", "49983"),
        ]);
        assert_eq!(found, Ok(("one".into(), 49983)));
    }

    #[test]
    fn a_hosts_first_label_is_port_and_id() {
        let at = |host: &str| found(&[("host", host)]);
        assert_eq!(at("8080-one.thaw.test"), Ok(("one".into(), 8080)));
        assert_eq!(at("8080-one.thaw.test:3002"), Ok(("one".into(), 8080)));
        for bad in ["127.0.0.1:3002", "localhost", "one.thaw.test", ""] {
            assert!(matches!(at(bad), Err(NoTarget::Malformed(_))), "{bad}");
        }
        for bad in ["0-one.t.t", "65536-one.t.t", "x-one.t.t", "-one.t.t"] {
            assert!(matches!(at(bad), Err(NoTarget::Malformed(_))), "{bad}");
        }
        for bad in ["80-.t.t", "80-a-b.t.t", "80-1a.t.t"] {
            assert!(matches!(at(bad), Err(NoTarget::Unknown(_))), "{bad}");
        }
    }

    #[test]
    fn half_of_the_headers_is_not_enough() {
        for half in ["e2b-sandbox-id", "e2b-sandbox-port"] {
            let found = found(&[("host", "80-one.thaw.test"), (half, "80")]);
            assert!(matches!(found, Err(NoTarget::Malformed(_))), "{half}");
        }
    }

    #[test]
    fn the_authority_of_an_absolute_request_is_its_host() {
        let uri = Uri::from_static("http://80-one.thaw.test/path");
        assert_eq!(target(&HeaderMap::new(), &uri).unwrap().port, 80);
    }
}
