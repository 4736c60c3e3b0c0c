//! Starting the daemon: machine, socket, reaper, in this order, on one thread.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;

use crate::boot;
use crate::connections::Connections;
use crate::filesystem::Collectors;
use crate::freeze::Turns;
use crate::freezer::{Freezer, hierarchy};
pub use crate::machine::Machine;
use crate::memory::Preload;
use crate::metrics::Cpu;
use crate::open_files;
use crate::process::Processes;
use crate::routes::{Guest, router};
use crate::settings::Settings;

/// How long a blocking helper thread outlives its work: an idle guest has one thread.
const HELPER_THREAD_LINGERS: Duration = Duration::from_millis(10);

/// How to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Whose machine it is.
    pub machine: Machine,
    /// Directory of the cgroup v2 hierarchy below which processes are put; on a machine of our
    /// own it is found.
    pub control_groups: Option<PathBuf>,
}

impl Guest {
    /// Nothing set, nothing running.
    pub(crate) fn new(machine: Machine, freezer: Freezer, port: u16) -> Guest {
        Guest {
            freezer,
            port,
            turns: Turns::default(),
            preload: Preload::default(),
            cpu: Cpu::default(),
            watchers: Collectors::default(),
            machine,
            settings: Settings::default(),
            processes: Processes::default(),
            connections: Connections::new(),
        }
    }
}

/// Runs until killed. The address it listens on is the first line of standard output.
///
/// # Errors
/// When the runtime or the socket can't be had.
pub fn run(options: &Options) -> io::Result<()> {
    if std::process::id() == 1 {
        boot::set_up_machine();
    }
    open_files::raise();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(HELPER_THREAD_LINGERS)
        .build()?;
    runtime.block_on(serve(options))
}

/// A machine without control groups does everything but freeze.
fn freezer(options: &Options) -> Freezer {
    let mounts = || std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let directory = match (&options.control_groups, options.machine) {
        (Some(directory), _) => Some(directory.clone()),
        (None, Machine::Owned) => hierarchy(&mounts()),
        (None, Machine::Borrowed) => None,
    };
    let Some(directory) = directory else {
        return Freezer::default();
    };
    Freezer::within(&directory).unwrap_or_else(|error| {
        let directory = directory.display();
        eprintln!("envd: Making a control group in {directory}: {error}");
        Freezer::default()
    })
}

async fn serve(options: &Options) -> io::Result<()> {
    let listener = TcpListener::bind(options.listen).await?;
    let address = listener.local_addr()?;
    let guest = Arc::new(Guest::new(
        options.machine,
        freezer(options),
        address.port(),
    ));
    let mut stdout = io::stdout();
    // The console may be gone; that is no reason not to serve.
    let _ = writeln!(stdout, "envd listening on {address}");
    let _ = stdout.flush();

    let reaper = Arc::clone(&guest);
    tokio::spawn(async move {
        if let Err(error) = reaper.processes.reap_for_ever().await {
            eprintln!("envd: Listening for ended children: {error}");
        }
    });
    guest
        .connections
        .serve(listener, router(Arc::clone(&guest)))
        .await;
    Ok(())
}
