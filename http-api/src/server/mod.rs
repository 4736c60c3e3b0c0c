//! Connections: HTTP/1.1 with limits, one task each, over TCP, TLS or a Unix socket.
//!
//! ```text
//!   accepted ─▶ opened (handshake, with a deadline) ─▶ a place among the connections ─▶ requests
//! ```

mod peer;
mod tls;

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::serve::Listener;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tower_service::Service;

use crate::problem::ApiError;
use crate::router::refused;

pub use peer::{Channel, Peer};
pub use tls::TlsListener;

/// What one connection may cost.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// How long a request's head may take, from the end of the one before: who sends a byte now
    /// and then, or nothing at all, is let go.
    pub head_time: Duration,
    /// The longest head of a request, in bytes.
    pub head_bytes: usize,
    /// The most header fields.
    pub header_fields: usize,
    /// Connections of one listener at the same time; further ones wait.
    pub connections: usize,
    /// How long a handshake may take.
    pub handshake_time: Duration,
    /// Connections of one listener that shake hands, or wait for a place, at the same time; further
    /// ones wait to be accepted.
    pub handshakes: usize,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            head_time: Duration::from_secs(60),
            head_bytes: 64 << 10,
            header_fields: 100,
            connections: 8192,
            handshake_time: Duration::from_secs(10),
            handshakes: 1024,
        }
    }
}

/// A connection that was accepted, and whose first bytes may be no HTTP.
pub trait Arriving: Send + 'static {
    /// What HTTP is spoken over.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    /// Does what has to be done before HTTP, and says who is there.
    fn open(self) -> impl Future<Output = io::Result<(Self::Stream, Peer)>> + Send;
}

impl Arriving for TcpStream {
    type Stream = Self;
    async fn open(self) -> io::Result<(Self, Peer)> {
        let channel = Channel::Plain;
        let ip = remote(&self)?;
        Ok((self, Peer::Tcp { ip, channel }))
    }
}

impl Arriving for UnixStream {
    type Stream = Self;
    async fn open(self) -> io::Result<(Self, Peer)> {
        let uid = self.peer_cred()?.uid();
        Ok((self, Peer::Unix { uid }))
    }
}

/// Who is at the other end; small messages go out at once from here on.
fn remote(stream: &TcpStream) -> io::Result<IpAddr> {
    stream.set_nodelay(true)?;
    Ok(stream.peer_addr()?.ip().to_canonical())
}

/// Where connections come from. Failures to accept are waited out.
pub trait Accept: Send + 'static {
    /// One connection.
    type Arriving: Arriving;
    /// The next one.
    fn next(&mut self) -> impl Future<Output = Self::Arriving> + Send;
}

impl Accept for TcpListener {
    type Arriving = TcpStream;
    async fn next(&mut self) -> TcpStream {
        Listener::accept(self).await.0
    }
}

impl Accept for UnixListener {
    type Arriving = UnixStream;
    async fn next(&mut self) -> UnixStream {
        Listener::accept(self).await.0
    }
}

/// Serves a listener until `stopped`, then ends connections as their requests are done. Whoever
/// drops the future cuts what is left.
pub async fn serve(
    mut listener: impl Accept,
    router: Router,
    limits: ConnectionLimits,
    stopped: impl Future<Output = ()> + Send,
) {
    let mut stopped = pin!(stopped);
    let (stop, stopping) = tokio::sync::watch::channel(false);
    let places = Arc::new(Semaphore::new(limits.connections));
    let doors = Arc::new(Semaphore::new(limits.handshakes));
    let mut connections = JoinSet::new();
    loop {
        let accepted = async {
            let door = doors.clone().acquire_owned().await;
            (listener.next().await, door)
        };
        tokio::select! {
            () = &mut stopped => break,
            (arriving, door) = accepted => {
                let (router, mut stopping) = (router.clone(), stopping.clone());
                let places = places.clone();
                connections.spawn(async move {
                    let opened = async {
                        let opened = timeout(limits.handshake_time, arriving.open()).await.ok()?.ok()?;
                        Some((opened, places.acquire_owned().await))
                    };
                    // What is not open yet is not waited for.
                    let ((stream, peer), place) = tokio::select! {
                        opened = opened => match opened {
                            Some(opened) => opened,
                            None => return,
                        },
                        _ = stopping.wait_for(|stop| *stop) => return,
                    };
                    drop(door);
                    let until = async { let _ = stopping.wait_for(|stop| *stop).await; };
                    connection(stream, peer, router, limits, until).await;
                    drop(place);
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
    drop(listener);
    stop.send_replace(true);
    while connections.join_next().await.is_some() {}
}

/// One connection, to its end.
async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: Peer,
    router: Router,
    limits: ConnectionLimits,
    stopped: impl Future<Output = ()>,
) {
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let long = head_bytes(&request) > limits.head_bytes;
        let mut request: Request = request.map(Body::new);
        request.extensions_mut().insert(peer);
        let mut router = router.clone();
        async move {
            if long {
                return Ok(refused(
                    request.uri().path(),
                    head_too_large(limits.head_bytes),
                ));
            }
            Service::call(&mut router, request).await
        }
    });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_time)
        // Twice of it, so that a head that is a little too long gets an answer with words.
        .max_buf_size((2 * limits.head_bytes).max(8192))
        .max_headers(limits.header_fields);
    let serving = builder.serve_connection(TokioIo::new(stream), service);
    let mut serving = pin!(serving.with_upgrades());
    let mut stopped = pin!(stopped);
    // A client that goes away, or sends what is no HTTP, is an everyday end.
    tokio::select! {
        _ = serving.as_mut() => return,
        () = &mut stopped => serving.as_mut().graceful_shutdown(),
    }
    let _ = serving.await;
}

/// About what a request's head had on the way.
fn head_bytes(request: &hyper::Request<Incoming>) -> usize {
    let path = request.uri().path_and_query();
    let line = path.map_or(0, |path| path.as_str().len()) + 16;
    let fields = request.headers().iter();
    let fields = fields.map(|(name, value)| name.as_str().len() + value.len() + 4);
    line + fields.sum::<usize>()
}

fn head_too_large(most: usize) -> ApiError {
    ApiError::HeadTooLarge {
        detail: format!("The request's head has more than {most} bytes, which is the most"),
    }
}
