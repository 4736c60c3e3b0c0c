//! The listening socket: accepts, serves HTTP/1.1, and lets go before a snapshot.
//!
//! At most [`MAX_CONNECTIONS`] are open; further ones wait in the kernel's backlog. No connection
//! has an idle timer: a guest at rest must not wake up. Kernel keep-alive probes find the dead
//! peers of streams that were open when the guest was frozen.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

/// Connections served at once.
const MAX_CONNECTIONS: usize = 256;
/// Seconds of silence after which the kernel probes a peer, and between its probes.
const PROBE_SECONDS: u32 = 60;
/// Pause after an accept that failed for want of memory or descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Tells open connections to close when they are idle.
#[derive(Debug)]
pub(crate) struct Connections(watch::Sender<u64>);

impl Connections {
    /// None open yet.
    pub(crate) fn new() -> Connections {
        Connections(watch::Sender::new(0))
    }

    /// Every connection open now finishes the response it is in and closes.
    pub(crate) fn let_go(&self) {
        self.0.send_modify(|epoch| *epoch += 1);
    }

    /// Serves for ever.
    pub(crate) async fn serve(&self, listener: TcpListener, router: Router) {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            // Never closed, so there is always a permit in the end.
            let permit = Arc::clone(&room).acquire_owned().await;
            match listener.accept().await {
                Ok((stream, _peer)) => {
                    let _ = configure(&stream);
                    let connection = serve_one(stream, router.clone(), self.0.subscribe());
                    tokio::spawn(async move {
                        connection.await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    eprintln!("envd: Accepting a connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

fn configure(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &PROBE_SECONDS)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &PROBE_SECONDS)?;
    Ok(())
}

/// One connection, until either side closes. Its errors are the peer's business, not ours.
async fn serve_one(stream: TcpStream, router: Router, mut epoch: watch::Receiver<u64>) {
    let connection = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = epoch.changed() => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}
