//! One of a process's outputs, read to its end. A terminal's end is an error (EIO): it is taken as one.
//!
//! Everything the process wrote before it ended is delivered before its end is told. A background
//! child may keep the pipe open after that; it gets [`GRACE`] to write its last words, and from
//! then on the pipe is read only to keep such a child from being stopped or killed by it.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::{oneshot, watch};

use super::audience::{Audience, Event};

/// Largest chunk of one event.
const CHUNK: usize = 32 * 1024;
/// How long after the process's end its pipe may stay silent and open.
const GRACE: Duration = Duration::from_millis(200);
/// More than a pipe can hold, so more than the process can have left behind in it.
const MOST_LEFT_BEHIND: usize = 1 << 20;

/// Which pipe: makes an event of a chunk.
pub(super) type Label = fn(Bytes) -> Event;

/// Reads a pipe on a task of its own. The receiver resolves when everything that belongs before
/// the end has been told; `ended` turns true when the process has been reaped.
pub(super) fn follow(
    mut pipe: Receiver,
    label: Label,
    audience: Arc<Audience>,
    ended: watch::Receiver<bool>,
) -> oneshot::Receiver<()> {
    let (told, everything_told) = oneshot::channel();
    tokio::spawn(async move {
        let still_open = tell_all(&mut pipe, label, &audience, ended).await;
        drop(audience);
        let _ = told.send(());
        if still_open {
            discard(&mut pipe).await;
        }
    });
    everything_told
}

/// Tells chunks until the pipe is at its end (`false`) or the grace is over (`true`).
async fn tell_all(
    pipe: &mut Receiver,
    label: Label,
    audience: &Audience,
    mut ended: watch::Receiver<bool>,
) -> bool {
    let mut buffer = BytesMut::new();
    let mut grace_over = pin!(async move {
        // An error means that the supervisor is gone, and with it the process.
        let _ = ended.wait_for(|ended| *ended).await;
        tokio::time::sleep(GRACE).await;
    });
    loop {
        buffer.reserve(CHUNK);
        tokio::select! {
            biased;
            () = &mut grace_over => break,
            read = pipe.read_buf(&mut buffer) => match read {
                Ok(0) | Err(_) => return false,
                Ok(_) => audience.tell(label(buffer.split().freeze())).await,
            },
        }
    }
    let mut left = MOST_LEFT_BEHIND;
    while left > 0 {
        buffer.reserve(CHUNK);
        match pipe.try_read_buf(&mut buffer) {
            Ok(0) => return false,
            Ok(count) => {
                left = left.saturating_sub(count);
                audience.tell(label(buffer.split().freeze())).await;
            }
            // Empty for now: whatever comes later isn't the process's.
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
    }
    true
}

/// Reads and throws away until the last writer is gone.
async fn discard(pipe: &mut Receiver) {
    let mut buffer = vec![0; 4096];
    while pipe.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
}
