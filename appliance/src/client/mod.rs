//! The API as seen from the command line: one request, one connection, over the daemon's
//! Unix socket or to another host.

mod way;

use std::path::Path;

use bytes::Bytes;
use http_api::problem::Problem;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::HeaderValue;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{WebSocketStream, client_async, tungstenite};

pub use way::{Credentials, Stream, Way, WayError};

/// Why a request was not met.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("No daemon answers on {way}; is it running? --socket or --url name another one")]
    Connect {
        /// Where.
        way: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The daemon refused.
    #[error("{} ({}, {})", .0.detail, .0.status, .0.code)]
    Refused(Box<Problem>),
    /// The connection broke.
    #[error("The daemon's connection broke at {path}")]
    Broken {
        /// What was asked.
        path: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The way to one daemon.
#[derive(Clone, Debug)]
pub struct Client {
    way: Way,
}

impl Client {
    /// The daemon that listens on this socket.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self::over(Way::socket(socket))
    }

    /// The daemon that this way leads to.
    #[must_use]
    pub const fn over(way: Way) -> Self {
        Self { way }
    }

    /// `GET`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    /// `POST`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| broken(path, error))?;
        self.call(Method::POST, path, body.into()).await
    }

    /// `DELETE`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.call(Method::DELETE, path, Bytes::new()).await
    }

    /// Whether the daemon takes requests.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn ready(&self) -> Result<(), ClientError> {
        self.exchange(Method::GET, "/readyz", Bytes::new())
            .await
            .map(|_| ())
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let answer = self.exchange(method, path, body).await?;
        let answer: &[u8] = if answer.is_empty() { b"null" } else { &answer };
        serde_json::from_slice(answer).map_err(|error| broken(path, error))
    }

    /// A WebSocket on one of the API's routes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn socket(&self, path: &str) -> Result<WebSocketStream<Stream>, ClientError> {
        let stream = self.connect().await?;
        let url = format!("ws://{}{path}", self.way.authority());
        let mut request = url
            .into_client_request()
            .map_err(|error| broken(path, error))?;
        if let Some(token) = &self.way.token {
            let value = format!("Bearer {token}");
            let value = HeaderValue::try_from(value).map_err(|error| broken(path, error))?;
            request.headers_mut().insert("authorization", value);
        }
        match client_async(request, stream).await {
            Ok((socket, _)) => Ok(socket),
            Err(tungstenite::Error::Http(response)) => {
                let body = response.into_body().unwrap_or_default();
                Err(refused(path, &body))
            }
            Err(error) => Err(broken(path, error)),
        }
    }

    /// `GET` of an answer that does not end.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn stream(&self, path: &str) -> Result<Response<Incoming>, ClientError> {
        let response = self.send(Method::GET, path, Bytes::new()).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        let collected = response.into_body().collect().await;
        let bytes = collected.map_err(|error| broken(path, error))?.to_bytes();
        Err(refused(path, &bytes))
    }

    async fn connect(&self) -> Result<Stream, ClientError> {
        let stream = self.way.connect().await;
        stream.map_err(|source| ClientError::Connect {
            way: self.way.to_string(),
            source,
        })
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Bytes, ClientError> {
        let response = self.send(method, path, body).await?;
        let status = response.status();
        let collected = response.into_body().collect().await;
        let bytes = collected.map_err(|error| broken(path, error))?.to_bytes();
        if status.is_success() {
            return Ok(bytes);
        }
        Err(refused(path, &bytes))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = self.connect().await?;
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| broken(path, error))?;
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", self.way.authority())
            .header("content-type", "application/json");
        if let Some(token) = &self.way.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request
            .body(Full::new(body))
            .map_err(|error| broken(path, error))?;
        sender
            .send_request(request)
            .await
            .map_err(|error| broken(path, error))
    }
}

/// The daemon's own words, if they are.
fn refused(path: &str, body: &[u8]) -> ClientError {
    match serde_json::from_slice(body) {
        Ok(problem) => ClientError::Refused(Box::new(problem)),
        Err(error) => broken(path, error),
    }
}

fn broken(path: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
    ClientError::Broken {
        path: path.to_owned(),
        source: source.into(),
    }
}
