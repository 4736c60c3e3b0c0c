//! What answers in place of `envd` where a guest is too small to have one: a process in every
//! slot's network namespace, at the guest's address.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use appliance::network::address::GUEST;
use nix::sched::{CloneFlags, setns};

use super::fake::guest::Guest;
use super::fake::http;
use super::place::names;

/// Set for a process that is to be one: its namespace.
const NAMESPACE: &str = "THAW_TEST_STAND_IN";

/// Stand-ins for all sandboxes of an instance, from when their slots appear.
pub(crate) struct StandIns {
    stop: Arc<AtomicBool>,
    watching: Option<JoinHandle<()>>,
}

impl StandIns {
    /// `test` is the name of a test of this program that calls [`run_if_wanted`].
    pub(crate) fn watch(instance: &str, test: &'static str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, prefix) = (stop.clone(), format!("{instance}-"));
        let watching = std::thread::spawn(move || {
            let mut known: Vec<(PathBuf, Child)> = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let dir = Path::new("/run/netns");
                for name in names(dir).iter().filter(|name| name.starts_with(&prefix)) {
                    let path = dir.join(name);
                    if !known.iter().any(|(known, _)| *known == path) {
                        known.push((path.clone(), start(&path, test)));
                    }
                }
                known.retain_mut(|(_, child)| child.try_wait().is_ok_and(|end| end.is_none()));
                std::thread::sleep(Duration::from_millis(5));
            }
            for (_, mut child) in known {
                let _ = child.kill();
                let _ = child.wait();
            }
        });
        Self {
            stop,
            watching: Some(watching),
        }
    }
}

impl Drop for StandIns {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(watching) = self.watching.take() {
            let _ = watching.join();
        }
    }
}

fn start(namespace: &Path, test: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--nocapture", "--exact", test])
        .env(NAMESPACE, namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Whether this process is to be one; it ends with its namespace's name then.
pub(crate) fn run_if_wanted() {
    let Some(path) = std::env::var_os(NAMESPACE).map(PathBuf::from) else {
        return;
    };
    let served = serve(&path);
    // A slot that is still being built: the next one comes at once.
    std::process::exit(i32::from(served.is_err()));
}

fn serve(path: &Path) -> std::io::Result<()> {
    let namespace = std::fs::File::open(path)?;
    let own = namespace.metadata()?.ino();
    setns(namespace, CloneFlags::CLONE_NEWNET)?;
    Guest::take_address()?;
    let listener = TcpListener::bind(SocketAddr::from((GUEST, envd::protocol::PORT)))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut reader = std::io::BufReader::new(&stream);
            while let Ok(Some(request)) = http::read(&mut reader) {
                let _ = match request.route() {
                    "/health" => http::send(&stream, 200, "{\"version\":\"0.0.0\"}"),
                    _ => http::send(&stream, 204, ""),
                };
            }
        }
    });
    // A sandbox that is paused and resumed at once has another one of the same name.
    while std::fs::metadata(path).is_ok_and(|now| now.ino() == own) {
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
