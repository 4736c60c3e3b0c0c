//! Connections: HTTP/1.1 with limits, one task each, over TCP or a Unix socket.

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
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tower_service::Service;

/// Who is at the other end of a connection; an extension of every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Over TCP.
    Tcp {
        /// Its address.
        ip: IpAddr,
        /// Whether the connection is encrypted.
        tls: bool,
    },
    /// Over the Unix socket.
    Unix {
        /// Its user, as the kernel says.
        uid: u32,
    },
}

impl Peer {
    pub(crate) fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp { ip, .. } => Some(*ip),
            Self::Unix { .. } => None,
        }
    }

    pub(crate) fn scheme(&self) -> &'static str {
        match self {
            Self::Tcp { tls: true, .. } => "https",
            _ => "http",
        }
    }
}

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
    /// Connections of one listener at the same time; further ones wait to be accepted.
    pub connections: usize,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            head_time: Duration::from_secs(60),
            head_bytes: 64 << 10,
            header_fields: 100,
            connections: 8192,
        }
    }
}

/// A connection's stream that knows who is there.
pub trait Connection:
    tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static
{
    /// Who is there.
    ///
    /// # Errors
    /// It is gone already.
    fn peer(&self) -> io::Result<Peer>;
}

impl Connection for TcpStream {
    fn peer(&self) -> io::Result<Peer> {
        self.set_nodelay(true)?;
        let ip = self.peer_addr()?.ip().to_canonical();
        Ok(Peer::Tcp { ip, tls: false })
    }
}

impl Connection for UnixStream {
    fn peer(&self) -> io::Result<Peer> {
        let uid = self.peer_cred()?.uid();
        Ok(Peer::Unix { uid })
    }
}

/// Where connections come from. Failures to accept are waited out.
pub trait Accept: Send + 'static {
    /// One connection.
    type Stream: Connection;
    /// The next one.
    fn next(&mut self) -> impl Future<Output = Self::Stream> + Send;
}

impl Accept for TcpListener {
    type Stream = TcpStream;
    async fn next(&mut self) -> TcpStream {
        Listener::accept(self).await.0
    }
}

impl Accept for UnixListener {
    type Stream = UnixStream;
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
    let mut connections = JoinSet::new();
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await;
            (listener.next().await, place)
        };
        tokio::select! {
            () = &mut stopped => break,
            (stream, place) = accepted => {
                let (router, mut stopping) = (router.clone(), stopping.clone());
                connections.spawn(async move {
                    let until = async { let _ = stopping.wait_for(|stop| *stop).await; };
                    connection(stream, router, limits, until).await;
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
    stream: impl Connection,
    router: Router,
    limits: ConnectionLimits,
    stopped: impl Future<Output = ()>,
) {
    let Ok(peer) = stream.peer() else { return };
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let mut request: Request = request.map(Body::new);
        request.extensions_mut().insert(peer);
        let mut router = router.clone();
        async move { Service::call(&mut router, request).await }
    });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_time)
        .max_buf_size(limits.head_bytes.max(8192))
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
