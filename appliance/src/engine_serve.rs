//! `thaw engine serve`: a page-fault handler for whoever runs Firecracker by hand.

use std::process::ExitCode;

use anyhow::Result;
use uffd_engine::server::EngineOptions;
use uffd_engine::standalone::{Happening, Standalone};
use uffd_engine::{Waiting, WorkerOptions};

use crate::args::EngineServeArgs;

/// Serves until it is killed, and says on standard output who comes and goes.
///
/// # Errors
/// The snapshot or the socket can't be used, or the engine has ended.
pub fn run(args: EngineServeArgs) -> Result<ExitCode> {
    let options = EngineOptions {
        cpus: args.cpus,
        worker: WorkerOptions {
            waiting: Waiting::spinning(args.spin_us),
            ..WorkerOptions::default()
        },
        ..EngineOptions::default()
    };
    let mut engine = Standalone::start(&args.socket, &args.snapshot, args.page_size, options)?;
    println!(
        "serving {} at {}",
        args.snapshot.display(),
        args.socket.display()
    );
    loop {
        println!("{}", sentence(&engine.wait()?));
    }
}

fn sentence(happening: &Happening) -> String {
    match happening {
        Happening::Attached { number, pid } => format!("VMM {number}: process {pid} attached"),
        Happening::Refused { reason } => {
            format!("refused: {reason}; if it was a VMM, end it: it waits for its memory")
        }
        Happening::Failed { number, reason } => format!("VMM {number}: failed: {reason}"),
        Happening::Ended { number, stats } => format!(
            "VMM {number}: ended after {} faults, {} pages copied, {} read, {} zero; \
             service p50 {:.1} \u{b5}s, p99 {:.1} \u{b5}s",
            stats.faults,
            stats.pages_copied,
            stats.pages_read,
            stats.pages_zeroed,
            stats.service_us_p50,
            stats.service_us_p99
        ),
    }
}
