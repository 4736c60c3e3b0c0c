//! TLS under HTTP: a listener whose connections begin with a handshake.
//!
//! The handshake is a part of opening a connection, not of accepting it: whoever never finishes one
//! holds up nobody, and has no place among the connections. Keys and certificates are the
//! business of whoever makes the [`ServerConfig`].

use std::io;
use std::sync::Arc;

use axum::serve::Listener;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::server::TlsStream;

use super::peer::{Channel, Peer};
use super::{Accept, Arriving, remote};

/// A TCP listener that speaks TLS.
pub struct TlsListener {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl TlsListener {
    /// Over this listener, with what this configuration says about keys and clients.
    #[must_use]
    pub fn new(listener: TcpListener, config: Arc<ServerConfig>) -> Self {
        let acceptor = TlsAcceptor::from(config);
        Self { listener, acceptor }
    }
}

/// A connection before its handshake.
pub struct Unshaken {
    stream: TcpStream,
    acceptor: TlsAcceptor,
}

impl Accept for TlsListener {
    type Arriving = Unshaken;
    async fn next(&mut self) -> Unshaken {
        let (stream, _) = Listener::accept(&mut self.listener).await;
        let acceptor = self.acceptor.clone();
        Unshaken { stream, acceptor }
    }
}

impl Arriving for Unshaken {
    type Stream = TlsStream<TcpStream>;

    async fn open(self) -> io::Result<(Self::Stream, Peer)> {
        let ip = remote(&self.stream)?;
        let stream = self.acceptor.accept(self.stream).await?;
        // rustls has checked it, or has not asked for one.
        let shown = stream.get_ref().1.peer_certificates();
        let channel = match shown {
            Some([_, ..]) => Channel::Certified,
            Some([]) | None => Channel::Encrypted,
        };
        Ok((stream, Peer::Tcp { ip, channel }))
    }
}
