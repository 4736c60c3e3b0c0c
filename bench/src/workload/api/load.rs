//! Requests at fixed times, over connections that are kept open: no HTTP library in what is measured.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::report::latency::Latencies;

/// How long an answer may take before it counts as an error.
const PATIENCE: Duration = Duration::from_secs(5);
/// Before the first request is due: every connection is there by then.
const START: Duration = Duration::from_millis(50);

/// How requests come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) address: SocketAddr,
    pub(super) path: &'static str,
    pub(super) per_s: u64,
    pub(super) connections: usize,
    pub(super) duration: Duration,
}

/// What became of them.
pub(super) struct Outcome {
    pub(super) answered: u64,
    /// Those without an answer, and those with another than 200.
    pub(super) errors: u64,
    /// Until the last answer.
    pub(super) took: Duration,
    pub(super) latencies: Latencies,
}

impl Load {
    /// Runs it. Each connection has every n-th request, and a thread that does nothing else.
    pub(super) fn run(&self) -> Result<Outcome> {
        let count = self.connections as u64;
        let total = self.per_s * self.duration.as_millis() as u64 / 1000;
        let began = Instant::now() + START;
        let due = |number: u64| began + Duration::from_nanos(number * 1_000_000_000 / self.per_s);
        let done: Vec<Result<(Vec<u32>, u64, Instant)>> = thread::scope(|scope| {
            let threads: Vec<_> = (0..count)
                .map(|first| {
                    let numbers = (first..total).step_by(self.connections);
                    scope.spawn(move || self.connection(numbers.map(due)))
                })
                .collect();
            let joined = threads.into_iter().map(|thread| {
                let ended = thread.join();
                ended.unwrap_or_else(|_| panic!("a connection's thread panicked"))
            });
            joined.collect()
        });
        let mut outcome = Outcome {
            answered: 0,
            errors: 0,
            took: Duration::ZERO,
            latencies: Latencies::new(),
        };
        for done in done {
            let (latencies_ns, errors, last) = done?;
            outcome.answered += latencies_ns.len() as u64;
            outcome.errors += errors;
            outcome.took = outcome.took.max(last.saturating_duration_since(began));
            outcome.latencies.add(&Latencies::of(&latencies_ns))?;
        }
        Ok(outcome)
    }

    /// Requests that are due at these times; their latencies, in nanoseconds, and how many failed.
    fn connection(&self, due: impl Iterator<Item = Instant>) -> Result<(Vec<u32>, u64, Instant)> {
        let mut stream = TcpStream::connect(self.address).context("Connecting to the daemon")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let request = format!("GET {} HTTP/1.1\r\nhost: localhost\r\n\r\n", self.path);
        let (mut latencies, mut errors) = (Vec::new(), 0);
        let mut buffer = vec![0; 64 << 10];
        let mut free = Instant::now();
        for due in due {
            let early = due.saturating_duration_since(Instant::now());
            if !early.is_zero() {
                thread::sleep(early);
            }
            // A request that had to wait for the one before counts from when it was due; how late a
            // sleeper is woken is the machine's.
            let since = if free > due { due } else { Instant::now() };
            match exchange(&mut stream, request.as_bytes(), &mut buffer) {
                Ok(200) => {
                    let ns = since.elapsed().as_nanos();
                    latencies.push(u32::try_from(ns).unwrap_or(u32::MAX));
                }
                Ok(_) => errors += 1,
                Err(_) => {
                    errors += 1;
                    stream = TcpStream::connect(self.address).context("Connecting again")?;
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(PATIENCE))?;
                }
            }
            free = Instant::now();
        }
        Ok((latencies, errors, free))
    }
}

/// One request and its whole answer; the status.
fn exchange(stream: &mut TcpStream, request: &[u8], buffer: &mut [u8]) -> io::Result<u16> {
    stream.write_all(request)?;
    let mut read = 0;
    loop {
        let more = stream.read(&mut buffer[read..])?;
        if more == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        read += more;
        if let Some(status) = whole(&buffer[..read])? {
            return Ok(status);
        }
    }
}

/// The status of an answer that is all there.
fn whole(bytes: &[u8]) -> io::Result<Option<u16>> {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
        return Ok(None);
    };
    let wrong = || io::Error::from(io::ErrorKind::InvalidData);
    let head = std::str::from_utf8(&bytes[..end]).map_err(|_| wrong())?;
    let mut lines = head.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.split(' ').nth(1)?.parse().ok());
    let length = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        let is_it = name.eq_ignore_ascii_case("content-length");
        is_it.then(|| value.trim().parse::<usize>().ok())?
    });
    let (status, length) = (status.ok_or_else(wrong)?, length.ok_or_else(wrong)?);
    Ok((bytes.len() >= end + 4 + length).then_some(status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_when_its_body_is() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]";
        for end in 0..answer.len() {
            assert_eq!(whole(&answer[..end]).unwrap(), None, "{end}");
        }
        assert_eq!(whole(answer).unwrap(), Some(200));
        assert!(whole(b"nonsense\r\n\r\n").is_err());
    }

    #[test]
    fn every_request_is_sent_once_and_failures_are_counted() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        // Answers every third request with something else.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || {
                    let mut bytes = [0; 1024];
                    for number in 0.. {
                        if stream.read(&mut bytes).unwrap_or(0) == 0 {
                            return;
                        }
                        let status = if number % 3 == 2 { "503 No" } else { "200 OK" };
                        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
                        stream.write_all(answer.as_bytes()).unwrap();
                    }
                });
            }
        });
        let load = Load {
            address,
            path: "/",
            per_s: 300,
            connections: 2,
            duration: Duration::from_millis(200),
        };
        let outcome = load.run().unwrap();
        assert_eq!((outcome.answered, outcome.errors), (40, 20));
        assert_eq!(outcome.latencies.percentiles().count, 40);
    }
}
