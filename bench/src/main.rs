//! Measures Thaw against baselines: `cargo run --release -p bench -- page-fault`.
//!
//! ```text
//!   page-fault ──spawns──▶ one process per subject ◀── hand-off ── the faulter process
//!       │                  (floor, engine, …)                        │ touches, times, checks
//!       └── rounds: floor, ours, floor, ours, … ──▶ report ◀─────────┘
//! ```
//!
//! A *workload* asks for pages in some way, a *subject* serves them, a *report* says what
//! came out and on what machine. Workloads know subjects only as something that takes a
//! hand-off at a socket, so another handler slots in without the workload knowing.
//!
//! # Architecture invariant
//! This crate measures; it can't change what it measures. It drives subjects through the
//! interfaces that the daemon uses too, from outside their processes.

mod args;
mod config;
mod envd;

mod workload;

mod faulter;
mod order;
mod subject;

mod aligned;
mod child;
mod placement;
mod source;

mod host;
#[path = "../../appliance/tests/support/machine.rs"]
mod machine;
mod report;

mod sys;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Args, Command};

fn main() -> ExitCode {
    // As `thaw` does.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|word| word == "launch")
    {
        return ExitCode::from(appliance::vmm::launch::run());
    }
    let done = match Args::parse().command {
        Command::PageFault(args) => {
            config::PageFault::new(args).and_then(|config| workload::page_fault::run(&config))
        }
        Command::Format(args) => {
            config::Format::new(args).and_then(|config| workload::format::run(&config))
        }
        Command::Populate(args) => {
            config::Ahead::new(args).and_then(|config| workload::ahead::populate::run(&config))
        }
        Command::Replay(args) => {
            config::Ahead::new(args).and_then(|config| workload::ahead::replay::run(&config))
        }
        Command::Sessions(args) => {
            config::Ahead::new(args).and_then(|config| workload::ahead::sessions::run(&config))
        }
        Command::Slots(args) => {
            config::Slots::new(args).and_then(|config| workload::slots::run(&config))
        }
        Command::Disks(args) => {
            config::Disks::new(args).and_then(|config| workload::disks::run(&config))
        }
        Command::Api(args) => config::Api::new(args).and_then(|config| workload::api::run(&config)),
        Command::Restore(args) => {
            config::Restore::new(args).and_then(|config| workload::restore::run(&config))
        }
        Command::DisksInside(args) => workload::disks::mapped::inside(&args),
        Command::Envd(args) => envd::run(&args),
        Command::Faulter(args) => faulter::run(&args),
        Command::Floor(args) => subject::floor::run(&args),
        Command::Engine(args) => subject::ours::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
