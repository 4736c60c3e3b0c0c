//! What a VMM and its guest printed: the last of it, kept in memory, and a way to wait for
//! a line.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use http_api::wire::ConsoleLine;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::watch;

/// How much is kept.
const KEPT_BYTES: usize = 64 << 10;

#[derive(Debug, Default)]
struct Kept {
    bytes: VecDeque<u8>,
    /// When what comes after a place of the stream was printed: an ascending list of places and
    /// Unix milliseconds.
    times: VecDeque<(u64, u64)>,
    /// Place of the first byte that is kept.
    from: u64,
}

impl Kept {
    fn put(&mut self, bytes: &[u8], now_ms: u64) {
        let end = self.from + self.bytes.len() as u64;
        if self.times.back().is_none_or(|(_, at)| *at != now_ms) {
            self.times.push_back((end, now_ms));
        }
        self.bytes.extend(bytes);
        let over = self.bytes.len().saturating_sub(KEPT_BYTES);
        self.bytes.drain(..over);
        self.from += over as u64;
        // The last one before what is kept tells when that was printed.
        while self
            .times
            .get(1)
            .is_some_and(|(place, _)| *place <= self.from)
        {
            self.times.pop_front();
        }
    }

    fn lines(&self) -> Vec<ConsoleLine> {
        let bytes: Vec<u8> = self.bytes.iter().copied().collect();
        let (mut place, mut lines) = (self.from, Vec::new());
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            let began = self.times.partition_point(|(start, _)| *start <= place);
            let at_ms = began.checked_sub(1).map_or(0, |n| self.times[n].1);
            place += line.len() as u64;
            let text = String::from_utf8_lossy(line);
            let text = text.trim_end_matches(['\r', '\n']);
            if !text.is_empty() {
                let line = text.to_owned();
                lines.push(ConsoleLine { at_ms, line });
            }
        }
        lines
    }
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
                target.lock().put(&buffer[..n], crate::clock::now_ms());
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

    /// The lines that are kept, and when each began to be printed.
    #[must_use]
    pub fn lines(&self) -> Vec<ConsoleLine> {
        self.kept.lock().lines()
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

    /// Waits until nobody can print any more, which is right after the process's end unless it had
    /// children; for so long at most.
    pub async fn ended(&self, patience: Duration) {
        let mut written = self.written.clone();
        let until_closed = async { while written.changed().await.is_ok() {} };
        let _ = tokio::time::timeout(patience, until_closed).await;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_time_at_which_it_began() {
        let mut kept = Kept::default();
        kept.put(b"one\r\ntw", 5);
        kept.put(b"o\n\nthree", 7);
        let line = |at_ms, line: &str| ConsoleLine {
            at_ms,
            line: line.to_owned(),
        };
        assert_eq!(
            kept.lines(),
            [line(5, "one"), line(5, "two"), line(7, "three")]
        );
        // What is pushed out takes its times along, and no others.
        kept.put(&[b'x'; KEPT_BYTES - 3], 8);
        kept.put(b"\nlast", 9);
        let lines = kept.lines();
        assert_eq!(lines.len(), 2);
        assert_eq!((lines[0].at_ms, lines[1].at_ms), (8, 9));
        assert!(kept.times.len() <= 3, "{:?}", kept.times);
    }
}
