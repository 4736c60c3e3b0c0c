//! E2B's own client packages against envd alone, without a VM.
//!
//! The packages are installed below the target directory, from the registries that pip and npm are
//! set up for; the newest ones are looked for each time. Where that can't be done, and nothing is
//! installed from before, the test is skipped by name. What a client has to be able to do is in
//! the script beside it.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

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
    let client = javascript();
    run("javascript_client_newest", client, "client.mjs", 256 * MIB);
}

/// A program, and the directory in which its script has to be, if that matters.
struct Client {
    program: PathBuf,
    scripts: Option<PathBuf>,
    version: String,
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
    let script = match &client.scripts {
        Some(directory) => {
            let copy = directory.join(script);
            fs::copy(&source, &copy).expect("the script is copied");
            copy
        }
        None => source,
    };
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
    print!(
        "e2b {}\n{}",
        client.version,
        String::from_utf8_lossy(&output.stdout)
    );
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
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

/// A Python that has the package.
fn python(name: &str, package: &str) -> Result<Client, String> {
    let (home, _lock) = place(&format!("python-{name}"));
    let program = home.join("bin/python3");
    // One without pip is what a Debian without python3-venv makes before it fails.
    if !home.join("bin/pip").exists() {
        let made = output(
            Command::new("python3")
                .args(["-m", "venv", "--clear"])
                .arg(&home),
        );
        made.map_err(|e| format!("no Python with venv (apt-get install python3-venv): {e}"))?;
    }
    let mut install = Command::new(&program);
    install.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]);
    let installed = output(install.args(["--upgrade", package]));
    let ask = "import importlib.metadata as m; print(m.version('e2b'))";
    match output(Command::new(&program).args(["-c", ask])) {
        Ok(version) => Ok(Client {
            program,
            scripts: None,
            version,
        }),
        Err(_) => Err(format!(
            "pip can't install {package}: {}",
            installed.unwrap_or_else(|e| e)
        )),
    }
}

/// A directory with the package, and node.
fn javascript() -> Result<Client, String> {
    let (home, _lock) = place("javascript");
    fs::create_dir_all(&home).map_err(|e| e.to_string())?;
    fs::write(home.join("package.json"), r#"{"private":true}"#).map_err(|e| e.to_string())?;
    let mut install = Command::new("npm");
    install.args([
        "install",
        "--silent",
        "--no-audit",
        "--no-fund",
        "e2b@latest",
    ]);
    let installed = output(install.current_dir(&home));
    let package = fs::read_to_string(home.join("node_modules/e2b/package.json"));
    let Ok(package) = package else {
        let reason = installed.unwrap_or_else(|e| e);
        return Err(format!(
            "npm can't install e2b (apt-get install npm): {reason}"
        ));
    };
    let package: serde_json::Value = serde_json::from_str(&package).map_err(|e| e.to_string())?;
    Ok(Client {
        program: PathBuf::from("node"),
        scripts: Some(home),
        version: package["version"].as_str().unwrap_or_default().to_owned(),
    })
}

/// Where a client is installed; one test at a time, until the lock is dropped.
fn place(name: &str) -> (PathBuf, File) {
    let all = Path::new(env!("CARGO_TARGET_TMPDIR")).join("clients");
    fs::create_dir_all(&all).expect("a directory for the clients");
    let lock = File::create(all.join(format!("{name}.lock"))).expect("a lock");
    lock.lock().expect("the lock");
    (all.join(name), lock)
}

/// Standard output, or the last line of what a failed program said.
fn output(command: &mut Command) -> Result<String, String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|e| e.to_string())?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    Err(said.lines().last().unwrap_or("failed").to_owned())
}
