//! E2B's own client packages, unmodified, against a daemon with real guests.
//!
//! The packages are installed below the target directory, from the registries that pip and npm are
//! set up for; the newest ones are looked for each time. Where that can't be done, and nothing is
//! installed from before, the test is skipped by name. What a client has to be able to do is in
//! the script beside it.

mod support;

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

use support::clients::{self, Client};
use support::daemon::Daemon;
use support::needs;
use support::place::Place;
use support::{skip, wait_for};

/// The scripts wait for no single thing longer than two minutes.
const MAX_SECONDS: &str = "900";

/// A daemon on TCP ports of its own that asks for a token.
struct Host {
    place: Place,
    daemon: Daemon,
    api: u16,
    traffic: u16,
    token: String,
}

impl Host {
    fn start(instance: &str, pool: u16, inputs: &needs::GuestInputs) -> Self {
        let place = Place::new(instance, pool, Some(inputs));
        // Both are held until both are known.
        let ports = [0, 0].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
        let [api, traffic] = ports.map(|port| port.local_addr().unwrap().port());
        place.reconfigure(&[
            (
                "listen = []",
                &format!("require_token = true\nlisten = [\"127.0.0.1:{api}\"]"),
            ),
            ("listen=[]", &format!("listen = [\"127.0.0.1:{traffic}\"]")),
        ]);
        let made = thaw(&place, &["token", "create", "--name", "test"]);
        let token = String::from_utf8(made.stdout).unwrap().trim().to_owned();
        assert!(
            token.starts_with("e2b_"),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        let daemon = Daemon::start(&place);
        Self {
            place,
            daemon,
            api,
            traffic,
            token,
        }
    }

    /// A client's program in the client's surroundings.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("timeout");
        command
            .arg(MAX_SECONDS)
            .arg(program)
            .env("E2B_API_KEY", &self.token)
            .env("E2B_API_URL", format!("http://127.0.0.1:{}", self.api))
            .env(
                "E2B_SANDBOX_URL",
                format!("http://127.0.0.1:{}", self.traffic),
            );
        command
    }

    /// Nothing is left, and the daemon ends well.
    fn stop(self) {
        assert_eq!(self.place.leftovers(), Vec::<String>::new());
        self.daemon.stop();
    }
}

fn thaw(place: &Place, args: &[&str]) -> Output {
    let mut command = Command::new(needs::thaw());
    command.args(args).arg("--config").arg(&place.config);
    command.output().unwrap()
}

fn run(test: &str, name: &str, pool: u16, client: Result<Client, String>, script: &str) {
    let inputs = match needs::for_guests() {
        Ok(inputs) => inputs,
        Err(reason) => return skip(test, &reason),
    };
    let client = match client {
        Ok(client) => client,
        Err(reason) => return skip(test, &reason.replace('\n', " ")),
    };
    let _turn = needs::one_at_a_time();
    let host = Host::start(name, pool, &inputs);
    let script = client.script(
        &Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/clients")
            .join(script),
    );
    let output = host.command(&client.program).arg(script).output().unwrap();
    client.passed("e2b", &output);
    host.stop();
}

#[test]
fn guest_e2b_python_newest() {
    let python = clients::python("newest", "e2b");
    run(
        "guest_e2b_python_newest",
        "tepyn",
        40,
        python,
        "sync_client.py",
    );
}

#[test]
fn guest_e2b_python_asynchronous() {
    let python = clients::python("newest", "e2b");
    run(
        "guest_e2b_python_asynchronous",
        "tepya",
        41,
        python,
        "async_client.py",
    );
}

#[test]
fn guest_e2b_python_2_50() {
    let python = clients::python("2.50", "e2b==2.50.0");
    run(
        "guest_e2b_python_2_50",
        "tepyo",
        42,
        python,
        "sync_client.py",
    );
}

#[test]
fn guest_e2b_javascript_newest() {
    let javascript = clients::javascript(&["e2b@latest"], "e2b");
    run(
        "guest_e2b_javascript_newest",
        "tejs",
        43,
        javascript,
        "client.mjs",
    );
}

#[test]
fn the_version_that_gates_features_is_that_of_the_guests_daemon() {
    assert_eq!(http_api::e2b::ENVD_VERSION, envd::protocol::COMPAT_VERSION);
}

/// The command line of E2B: create, list, exec, pause, resume, metrics, kill.
#[test]
fn guest_e2b_command_line() {
    const TEST: &str = "guest_e2b_command_line";
    let inputs = match needs::for_guests() {
        Ok(inputs) => inputs,
        Err(reason) => return skip(TEST, &reason),
    };
    let client = match clients::javascript(&["@e2b/cli@latest"], "@e2b/cli") {
        Ok(client) => client,
        Err(reason) => return skip(TEST, &reason.replace('\n', " ")),
    };
    let _turn = needs::one_at_a_time();
    let host = Host::start("tecli", 44, &inputs);
    let home = host.place.root.join("home");
    std::fs::create_dir_all(&home).unwrap();
    let program = client
        .scripts
        .as_ref()
        .unwrap()
        .join("node_modules/.bin/e2b");
    let e2b = |args: &[&str]| {
        let mut command = host.command(&program);
        let output = command
            .arg("sandbox")
            .args(args)
            .env("HOME", &home)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said, error)
    };
    let good = |args: &[&str]| {
        let (status, said, error) = e2b(args);
        assert_eq!(status, Some(0), "{args:?}: {said}\n{error}");
        said
    };
    let listed = |state: &str| {
        let list = good(&["list", "--format", "json", "--state", state]);
        let list: serde_json::Value = serde_json::from_str(&list).unwrap();
        let ids = list.as_array().unwrap().iter();
        ids.map(|b| b["sandboxId"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    println!("@e2b/cli {}", client.version);
    let made = good(&["create", "base", "--detach", "--timeout", "600"]);
    let id = made.lines().last().unwrap().trim().to_owned();
    assert_eq!(listed("running"), [id.as_str()]);
    let ran = good(&["exec", &id, "echo", "from inside"]);
    assert_eq!(ran, "from inside");
    let (status, _, _) = e2b(&["exec", &id, "sh", "-c", "exit 5"]);
    assert_eq!(status, Some(5));
    good(&["pause", &id]);
    assert_eq!(listed("paused"), [id.as_str()]);
    good(&["resume", &id]);
    assert_eq!(listed("running"), [id.as_str()]);
    let info = good(&["info", &id, "--format", "json"]);
    assert!(info.contains("\"state\": \"running\""), "{info}");
    let metrics = good(&["metrics", &id, "--format", "json"]);
    assert!(metrics.contains("memTotal"), "{metrics}");
    good(&["kill", &id]);
    wait_for("it is gone", std::time::Duration::from_secs(60), || {
        listed("running,paused").is_empty().then_some(())
    });
    host.stop();
}
