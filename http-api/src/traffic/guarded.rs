//! A guest's answer on its way to the client: ends with the guest, and ends the connection to it.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinHandle;

/// A task that ends when nobody wants it any more.
pub(super) struct Running(JoinHandle<()>);

impl Running {
    pub(super) fn start(task: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(task))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The body of a guest's answer.
pub(super) struct Guarded {
    body: Incoming,
    left: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// Drives the connection that the body comes from.
    _connection: Running,
    /// One of those that may be under way.
    _place: OwnedSemaphorePermit,
}

impl Guarded {
    pub(super) fn new(
        body: Incoming,
        left: Pin<Box<dyn Future<Output = ()> + Send>>,
        connection: Running,
        place: OwnedSemaphorePermit,
    ) -> Self {
        Self {
            body,
            left,
            _connection: connection,
            _place: place,
        }
    }
}

impl Body for Guarded {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        // What has arrived is passed on first, however the guest is now.
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        // A guest that is gone can't close its connections.
        if self.left.as_mut().poll(context).is_ready() {
            let gone = io::Error::new(io::ErrorKind::ConnectionReset, "the sandbox has left");
            return Poll::Ready(Some(Err(gone.into())));
        }
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
