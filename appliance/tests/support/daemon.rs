//! One run of `thaw serve`.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::api::Api;
use super::place::Place;
use super::{needs, procs, wait_for};

/// Recovery, engines, and a busy host.
const START: Duration = Duration::from_secs(60);
const STOP: Duration = Duration::from_secs(60);

/// A running daemon; killed when it is dropped.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    pub(crate) api: Api,
}

impl Daemon {
    /// Starts it and waits until it takes requests.
    pub(crate) fn start(place: &Place) -> Self {
        Self::try_start(place).unwrap_or_else(|status| {
            panic!("the daemon ended at its start: {status}");
        })
    }

    /// Starts it and waits until it takes requests, or has ended; its log says why.
    pub(crate) fn try_start(place: &Place) -> Result<Self, ExitStatus> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(&place.log)
            .unwrap();
        let child = Command::new(needs::thaw())
            .arg("serve")
            .arg("--config")
            .arg(&place.config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let api = Api::at(&place.socket());
        let mut daemon = Self { child, api };
        let ended = wait_for("the daemon is ready", START, || {
            if let Some(status) = daemon.child.try_wait().unwrap() {
                return Some(Some(status));
            }
            let ready = daemon.api.try_call("GET", "/readyz", None);
            ready
                .is_ok_and(|answer| answer.status == 200)
                .then_some(None)
        });
        ended.map_or(Ok(daemon), Err)
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// SIGTERM; it has to end well.
    pub(crate) fn stop(mut self) {
        self.terminate();
        let status = self.wait();
        assert!(status.success(), "the daemon stopped with {status}");
    }

    pub(crate) fn terminate(&self) {
        kill(Pid::from_raw(self.pid()), Signal::SIGTERM).unwrap();
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let child = &mut self.child;
        wait_for("the daemon ends", STOP, || child.try_wait().unwrap())
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        let status = self.child.wait().unwrap();
        assert_eq!(status.signal(), Some(9), "it had ended before: {status}");
    }
}

impl Daemon {
    /// SIGKILL, and the next one, which takes over what runs.
    #[allow(dead_code, reason = "not every test binary kills one")]
    pub(crate) fn killed_and_followed(self, place: &Place) -> Self {
        self.kill();
        Self::start(place)
    }
}

impl Daemon {
    /// SIGKILL, to it and to all of its engines at once.
    #[allow(dead_code, reason = "not every test binary kills one")]
    pub(crate) fn kill_with_engines(self, place: &Place) {
        let ours = procs::of(place);
        for process in ours.iter().filter(|process| !process.is_vmm()) {
            process.try_signal(libc::SIGKILL);
        }
        self.kill();
        // It may have started a successor of one that died first.
        while let Some(engine) = procs::engine(place) {
            engine.kill();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the program to its end, which has to come by itself. What it prints goes through
/// files: an engine that it leaves behind would keep a pipe open.
pub(crate) fn run(arguments: &[&str]) -> Output {
    let (mut stdout, mut stderr) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let mut child = Command::new(needs::thaw())
        .args(arguments)
        .env("THAW_LOG", "info")
        .stdin(Stdio::null())
        .stdout(stdout.try_clone().unwrap())
        .stderr(stderr.try_clone().unwrap())
        .spawn()
        .unwrap();
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if started.elapsed() > START {
            let _ = child.kill();
            let _ = child.wait();
            let said = contents(&mut stderr);
            let said = String::from_utf8_lossy(&said);
            panic!("`thaw {}` runs still: {said}", arguments.join(" "));
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    Output {
        status,
        stdout: contents(&mut stdout),
        stderr: contents(&mut stderr),
    }
}

fn contents(file: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}
