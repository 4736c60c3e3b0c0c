//! The host's conversation with `envd` in a guest: HTTP over the sandbox's address.
//!
//! Every request has its own connection. A pooled one might lead to whoever got the
//! address next.

mod error;
mod exec;
mod files;
mod process;

pub use error::GuestError;
pub use process::Left;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use envd::protocol::{self, InitRequest};
use http_api::context;
use http_api::wire::GuestMetrics;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1;
use hyper::http::request::Builder;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use error::{broken, silent};

/// How long one call may take.
const CALL: Duration = Duration::from_secs(60);
/// How long one connection attempt may take: a guest that was just resumed may lose the
/// first packet, and the kernel would repeat it only after a second.
const ATTEMPT: Duration = Duration::from_millis(250);

/// The daemon in one guest. It has no `Debug`: its token is a secret.
#[derive(Clone)]
pub struct Guest {
    address: SocketAddr,
    token: Option<String>,
}

impl Guest {
    /// The daemon behind a sandbox's address.
    #[must_use]
    pub fn at(address: Ipv4Addr) -> Self {
        Self {
            address: SocketAddr::from((address, protocol::PORT)),
            token: None,
        }
    }

    /// The same one, which asks callers for this.
    #[must_use]
    pub fn with_token(mut self, token: Option<String>) -> Self {
        self.token = token;
        self
    }

    /// Waits until it answers `/health`.
    ///
    /// # Errors
    /// It did not within `patience`.
    pub async fn wait_until_up(&self, patience: Duration) -> Result<(), GuestError> {
        let deadline = Instant::now() + patience;
        loop {
            let asked = self.call(
                Method::GET,
                protocol::HEALTH_PATH,
                Bytes::new(),
                Duration::from_secs(5),
            );
            match asked.await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() >= deadline => return Err(error),
                // Refused at once while the guest is up and its daemon isn't: don't spin.
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Tells it who and when it is. The answer comes after its random numbers were
    /// reseeded and its clock was set.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn init(&self, request: &InitRequest, patience: Duration) -> Result<(), GuestError> {
        let body = serde_json::to_vec(request).unwrap_or_default();
        self.call(Method::POST, protocol::INIT_PATH, body.into(), patience)
            .await
            .map(|_| ())
    }

    /// Has it write back and let go of what a snapshot need not hold.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn prepare(&self, patience: Duration) -> Result<(), GuestError> {
        let path = format!(
            "{}?timeout_ms={}",
            protocol::PREPARE_PATH,
            patience.as_millis()
        );
        let grace = patience + Duration::from_secs(1);
        self.call(Method::POST, &path, Bytes::new(), grace)
            .await
            .map(|_| ())
    }

    /// How busy and how full it is.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn metrics(&self, patience: Duration) -> Result<GuestMetrics, GuestError> {
        let path = protocol::METRICS_PATH;
        let body = self.call(Method::GET, path, Bytes::new(), patience).await?;
        let found: Metrics = serde_json::from_slice(&body).map_err(|error| broken(path, error))?;
        Ok(GuestMetrics {
            timestamp_s: found.ts,
            cpu_count: found.cpu_count,
            cpu_used_percent: found.cpu_used_pct,
            memory_total_bytes: found.mem_total,
            memory_used_bytes: found.mem_used,
            memory_cache_bytes: found.mem_cache,
            disk_total_bytes: found.disk_total,
            disk_used_bytes: found.disk_used,
        })
    }

    /// One plain request and its whole answer.
    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        patience: Duration,
    ) -> Result<Bytes, GuestError> {
        let exchange = async {
            let request = Request::builder()
                .method(method)
                .uri(path)
                .header("content-type", "application/json")
                .body(Full::new(body))
                .map_err(|error| broken(path, error))?;
            let response = self.send(path, request).await?;
            let body = response.into_body().collect().await;
            Ok(body.map_err(|error| broken(path, error))?.to_bytes())
        };
        timeout(patience, exchange)
            .await
            .unwrap_or_else(|_| Err(silent(path, patience)))
    }

    /// One call of the Connect protocol with one answer.
    async fn unary(
        &self,
        path: &str,
        message: &Value,
        user: Option<&str>,
    ) -> Result<Value, GuestError> {
        let exchange = async {
            let request = Request::builder()
                .method(Method::POST)
                .uri(path)
                .header("content-type", "application/json")
                .header("connect-protocol-version", "1");
            let request = Self::as_user(request, user);
            let request = request.body(Full::new(Bytes::from(message.to_string())));
            let request = request.map_err(|error| broken(path, error))?;
            let response = self.send(path, request).await?;
            let body = response.into_body().collect().await;
            let body = body.map_err(|error| broken(path, error))?.to_bytes();
            serde_json::from_slice(&body).map_err(|error| broken(path, error))
        };
        timeout(CALL, exchange)
            .await
            .unwrap_or_else(|_| Err(silent(path, CALL)))
    }

    /// As E2B's clients name a user: basic credentials without a password.
    fn as_user(request: Builder, user: Option<&str>) -> Builder {
        match user {
            Some(user) => request.header(
                "authorization",
                format!("Basic {}", STANDARD.encode(format!("{user}:"))),
            ),
            None => request,
        }
    }

    async fn send<B>(
        &self,
        path: &str,
        mut request: Request<B>,
    ) -> Result<Response<Incoming>, GuestError>
    where
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let host = self.address.to_string();
        let host = host.parse().map_err(|error| broken(path, error))?;
        request.headers_mut().insert("host", host);
        if let Some(token) = self.token.as_deref().and_then(|token| token.parse().ok()) {
            let headers = request.headers_mut();
            headers.insert(protocol::ACCESS_TOKEN_HEADER, token);
        }
        let trace = context::current().and_then(|context| context.traceparent());
        if let Some(trace) = trace {
            request.headers_mut().insert(context::TRACEPARENT, trace);
        }
        let stream = self.connect().await.map_err(|error| broken(path, error))?;
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| broken(path, error))?;
        tokio::spawn(connection);
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| broken(path, error))?;
        if !response.status().is_success() {
            let status = response.status().to_string();
            let body = response.into_body().collect().await;
            let body = body
                .map(http_body_util::Collected::to_bytes)
                .unwrap_or_default();
            let body = String::from_utf8_lossy(&body).into_owned();
            return Err(GuestError::Refused {
                path: path.to_owned(),
                status,
                body,
            });
        }
        Ok(response)
    }

    async fn connect(&self) -> std::io::Result<TcpStream> {
        loop {
            match timeout(ATTEMPT, TcpStream::connect(self.address)).await {
                Ok(Ok(stream)) => {
                    stream.set_nodelay(true)?;
                    return Ok(stream);
                }
                Ok(Err(error)) => return Err(error),
                // Lost, not refused: the next attempt's packet goes out at once.
                Err(_) => {}
            }
        }
    }
}

/// `GET /metrics` as the guest's daemon answers it; sizes in bytes.
#[derive(Debug, Deserialize)]
struct Metrics {
    ts: u64,
    cpu_count: u32,
    cpu_used_pct: f64,
    mem_total: u64,
    mem_used: u64,
    mem_cache: u64,
    disk_used: u64,
    disk_total: u64,
}

#[cfg(test)]
mod tests {
    use hyper::HeaderMap;
    use hyper::header::HeaderValue;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// The head of the request that a guest gets.
    async fn head_within(context: Option<context::Context>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let guest = Guest {
            address: listener.local_addr().unwrap(),
            token: None,
        };
        let serving = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            let answer = b"HTTP/1.1 204 No Content\r\n\r\n";
            stream.write_all(answer).await.unwrap();
            String::from_utf8(head).unwrap()
        };
        let asking = guest.wait_until_up(Duration::from_secs(60));
        let (head, asked) = tokio::join!(serving, context::within(context, asking));
        asked.unwrap();
        head
    }

    #[tokio::test]
    async fn a_guest_is_told_in_which_trace_it_is_asked() {
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        let mut headers = HeaderMap::new();
        let trace = format!("00-{id}-00f067aa0ba902b7-01");
        let trace = HeaderValue::try_from(trace).unwrap();
        headers.insert(context::TRACEPARENT, trace);
        let span = tracing::Span::none();
        let traced = context::Context::begin(&headers, span.clone());
        let head = head_within(Some(traced)).await;
        assert!(head.contains(&format!("traceparent: 00-{id}-")), "{head}");
        assert!(
            !head.contains("00f067aa0ba902b7"),
            "it is another step: {head}"
        );
        let untraced = context::Context::begin(&HeaderMap::new(), span);
        for context in [Some(untraced), None] {
            let head = head_within(context).await;
            assert!(!head.contains("traceparent"), "{head}");
        }
    }
}
