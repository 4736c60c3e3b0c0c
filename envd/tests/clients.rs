//! E2B's own client packages against envd alone, without a VM.
//!
//! The packages are installed below the target directory, from the registries that pip and npm are
//! set up for; the newest ones are looked for each time. Where that can't be done, and nothing is
//! installed from before, the test is skipped by name. What a client has to be able to do is in
//! the script beside it.

mod packages;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use packages::{Client, javascript, python};

/// The script's exit by itself comes long before.
const MAX_SECONDS: &str = "600";
const MIB: u64 = 1 << 20;

#[test]
fn python_client_newest() {
    let python = python("newest", "e2b");
    run("python_client_newest", python, "sync_client.py", 1024 * MIB);
}

#[test]
fn python_client_asynchronous() {
    let python = python("newest", "e2b");
    run(
        "python_client_asynchronous",
        python,
        "async_client.py",
        256 * MIB,
    );
}

#[test]
fn python_client_2_50() {
    let python = python("2.50", "e2b==2.50.0");
    run("python_client_2_50", python, "sync_client.py", 256 * MIB);
}

#[test]
fn javascript_client_newest() {
    let client = javascript(&["e2b@latest"], "e2b");
    run("javascript_client_newest", client, "client.mjs", 256 * MIB);
}

/// Runs a script with an envd of its own; skips when there is no client.
fn run(test: &str, client: Result<Client, String>, script: &str, big_bytes: u64) {
    let client = match client {
        Ok(client) => client,
        Err(reason) => return println!("skipped: {test}: {}", reason.replace('\n', " ")),
    };
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/clients")
        .join(script);
    let script = client.script(&source);
    let work = tempfile::Builder::new()
        .prefix("client-")
        .tempdir_in(env!("CARGO_TARGET_TMPDIR"));
    let work = work.expect("a directory to work in");
    // Commands run as other users, too.
    fs::set_permissions(
        work.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let (envd, address) = envd();
    let output = Command::new("timeout")
        .arg(MAX_SECONDS)
        .arg(&client.program)
        .arg(script)
        .arg(work.path())
        .args([envd.0.id().to_string(), big_bytes.to_string()])
        .env("E2B_DEBUG", "true")
        .env(
            "E2B_API_KEY",
            "e2b_0000000000000000000000000000000000000000",
        )
        .env("E2B_SANDBOX_URL", format!("http://{address}"))
        .output()
        .expect("timeout(1) runs");
    client.passed("e2b", &output);
}

/// Killed when dropped.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn envd() -> (Daemon, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_envd"));
    command.args(["--listen", "127.0.0.1:0", "--borrowed-machine"]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("envd starts");
    let mut line = String::new();
    let stdout = child.stdout.take().expect("a pipe");
    BufReader::new(stdout)
        .read_line(&mut line)
        .expect("its first line");
    let address = line
        .trim()
        .rsplit(' ')
        .next()
        .expect("an address")
        .to_owned();
    (Daemon(child), address)
}
