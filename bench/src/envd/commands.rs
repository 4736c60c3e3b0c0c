//! One command after the other: through the daemon, and by fork, exec and wait.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ::envd::protocol::envelope::encode_message;
use ::envd::protocol::{ProcessConfig, START_PATH, STREAM_CONTENT_TYPE, StartRequest};
use anyhow::{Context as _, Result, ensure};

use super::Pair;
use super::client::{Connection, Daemon};
use crate::report::latency::Latencies;

/// Not counted.
const WARM_UP: usize = 20;

/// `true` by itself, and as E2B's `commands.run("true")` has it.
const KINDS: [&[&str]; 2] = [&["/bin/true"], &["/bin/bash", "-l", "-c", "true"]];

pub(super) fn measure(daemon: &Daemon, count: usize) -> Result<Vec<Pair>> {
    let mut connection = daemon.connect()?;
    let kinds = KINDS.iter();
    kinds
        .map(|words| pair(&mut connection, words, count))
        .collect()
}

fn pair(connection: &mut Connection, words: &[&str], count: usize) -> Result<Pair> {
    let request = request(words)?;
    let (mut bare, mut through) = (Vec::new(), Vec::new());
    for turn in 0..WARM_UP + count {
        let one = fork_exec_wait(words)?;
        let other = start(connection, &request)?;
        if turn >= WARM_UP {
            bare.push(nanos(one));
            through.push(nanos(other));
        }
    }
    let (bare_us, envd_us) = (
        Latencies::of(&bare).percentiles(),
        Latencies::of(&through).percentiles(),
    );
    Ok(Pair {
        command: words.join(" "),
        bare_us,
        envd_us,
        ratio: envd_us.p50 / bare_us.p50,
    })
}

fn nanos(duration: Duration) -> u32 {
    u32::try_from(duration.as_nanos()).unwrap_or(u32::MAX)
}

/// The same environment for both: no login script but the system's.
fn environment() -> [(String, String); 2] {
    [
        ("HOME", "/nonexistent"),
        ("PATH", "/usr/local/bin:/usr/bin:/bin"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
}

fn fork_exec_wait(words: &[&str]) -> Result<Duration> {
    let mut command = Command::new(words[0]);
    command
        .args(&words[1..])
        .env_clear()
        .envs(environment())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let started = Instant::now();
    let status = command
        .status()
        .with_context(|| format!("Starting {}", words[0]))?;
    let took = started.elapsed();
    ensure!(status.success(), "{} ended with {status}", words[0]);
    Ok(took)
}

fn request(words: &[&str]) -> Result<Vec<u8>> {
    let request = StartRequest {
        process: ProcessConfig {
            cmd: words[0].to_owned(),
            args: words[1..].iter().map(|word| (*word).to_owned()).collect(),
            envs: environment().into(),
            cwd: Some("/".to_owned()),
        },
        tag: None,
        stdin: Some(false),
    };
    Ok(encode_message(&serde_json::to_vec(&request)?)?)
}

fn start(connection: &mut Connection, request: &[u8]) -> Result<Duration> {
    let headers = format!(
        "content-type: {STREAM_CONTENT_TYPE}\r\nconnect-protocol-version: 1\r\n\
         authorization: Basic cm9vdDo=\r\n"
    );
    let mut answer = Vec::new();
    let started = Instant::now();
    let line = format!("POST {START_PATH}");
    connection.send(&line, &headers, &mut &*request, request.len() as u64)?;
    connection.receive(&mut answer)?;
    let took = started.elapsed();
    let text = String::from_utf8_lossy(&answer);
    ensure!(text.contains("exit status 0"), "envd said {text}");
    Ok(took)
}
