//! What a VMM and its guest printed: the last of it, kept in memory, and a way to wait for
//! a line.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::watch;

/// How much is kept.
const KEPT_BYTES: usize = 64 << 10;

#[derive(Debug, Default)]
struct Kept {
    bytes: VecDeque<u8>,
}

/// A bounded record of a console, shared by who fills it and who reads it.
#[derive(Clone, Debug)]
pub struct Console {
    kept: Arc<Mutex<Kept>>,
    written: watch::Receiver<u64>,
}

impl Console {
    /// Starts recording a stream until its end.
    pub fn record(mut stream: impl AsyncRead + Send + Unpin + 'static) -> Self {
        let kept = Arc::new(Mutex::new(Kept::default()));
        let (progress, written) = watch::channel(0u64);
        let target = kept.clone();
        tokio::spawn(async move {
            let mut buffer = [0u8; 4096];
            while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                {
                    let bytes = &mut target.lock().bytes;
                    bytes.extend(&buffer[..n]);
                    let over = bytes.len().saturating_sub(KEPT_BYTES);
                    bytes.drain(..over);
                }
                progress.send_modify(|total| *total += n as u64);
            }
        });
        Self { kept, written }
    }

    /// All that is kept, as text.
    #[must_use]
    pub fn text(&self) -> String {
        let kept = self.kept.lock();
        let bytes: Vec<u8> = kept.bytes.iter().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The last lines, for an error.
    #[must_use]
    pub fn tail(&self) -> String {
        let text = self.text();
        let lines: Vec<&str> = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .collect();
        let last = lines[lines.len().saturating_sub(4)..].join(" | ");
        if last.is_empty() {
            "it printed nothing".to_owned()
        } else {
            last
        }
    }

    /// Waits until `marker` was printed; `false` when the stream ends without it.
    pub async fn wait_for(&self, marker: &str) -> bool {
        let mut written = self.written.clone();
        loop {
            if self.text().contains(marker) {
                return true;
            }
            if written.changed().await.is_err() {
                return self.text().contains(marker);
            }
        }
    }
}
