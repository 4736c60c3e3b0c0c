//! The sandbox host's program: the daemon, the engine it starts, the launcher that becomes
//! a VMM, and tools.
//!
//! ```text
//!   http-api ──▶ gateway ──▶ shard (one per core) ──▶ sandbox::Owner (one task each)
//!                                                        │       │        │       │
//!                                              catalogue  network  disks   engines  vmm
//! ```
//!
//! # Architecture invariant
//! Page contents are none of its business: it moves builds, descriptors and processes, and
//! `snapshot-format` and `uffd-engine` look inside. A request is judged before anything is
//! touched; whatever is touched is given back by one function, however far it got.

pub mod args;
pub mod claim;
pub mod clock;
pub mod config;

pub mod catalogue;
pub mod events;
pub mod integrity;
pub mod lifetime;
pub mod template;
pub mod tls;
pub mod tokens;

pub mod disks;
pub mod engines;
pub mod guest;
pub mod network;
pub mod vmm;

pub mod host;
pub mod huge_pages;
pub mod inventory;
pub mod metrics;
pub mod reconcile;
pub mod recovery;
pub mod sandbox;

pub mod gateway;
pub mod serve;
pub mod shard;

pub mod cli;
pub mod client;
pub mod engine_serve;
pub mod selftest;
pub mod tools;

pub mod sys;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use tracing_subscriber::EnvFilter;

use args::{Args, Command, DaemonEngineArgs, EngineArgs, EngineCommand};

/// The program; returns its exit status.
#[must_use]
pub fn main() -> ExitCode {
    // On the way of every guest, so without building a command line that it doesn't have.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|word| word == "launch")
    {
        return ExitCode::from(vmm::launch::run());
    }
    let args = Args::parse();
    let filter = EnvFilter::try_from_env("THAW_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colour = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colour);
    log.with_writer(std::io::stderr).init();
    match run(args.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("thaw: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Serve { config } => {
            serve::run(&config::Config::read(&config)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::CheckConfig { config } => {
            config::Config::read(&config)?;
            println!("{} is fine", config.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Ls(args) => cli::run(cli::ls(&args)),
        Command::Create(args) => cli::run(cli::create(&args)),
        Command::Exec(args) => cli::run(cli::exec(&args)),
        Command::Shell(args) => cli::run(cli::shell(&args)),
        Command::Pause(args) => cli::run(cli::pause(&args)),
        Command::Resume(args) => cli::run(cli::resume(&args)),
        Command::Fork(args) => cli::run(cli::fork(&args)),
        Command::Rm { ids, at } => cli::run(cli::rm(&at, &ids)),
        Command::Top(args) => cli::run(cli::top(&args)),
        Command::Events(args) => cli::run(cli::events(&args)),
        Command::Host(args) => cli::run(cli::host(&args)),
        Command::Drain { undo, at } => cli::run(cli::drain(&at, undo)),
        Command::Openapi => tools::openapi(),
        Command::Completions { shell } => tools::completions(shell),
        Command::Man { dir } => tools::man(&dir),
        Command::Token(args) => tools::token(&args),
        Command::Snapshot(command) => tools::snapshot(command),
        Command::Try(args) => selftest::run(&args),
        Command::Engine(EngineArgs { command, by_daemon }) => match (command, by_daemon) {
            (Some(EngineCommand::Serve(args)), _) => engine_serve::run(args),
            (None, Some(args)) => engine(args),
            (None, None) => anyhow::bail!("An engine needs orders: see `thaw engine serve --help`"),
        },
        Command::Launch => Ok(ExitCode::FAILURE),
    }
}

/// The engine's control socket is its standard input.
fn engine(args: DaemonEngineArgs) -> Result<ExitCode> {
    use std::os::fd::AsFd;
    if engines::topology::nodes().len() > 1 {
        uffd_engine::sys::process::bind_memory_to_node(args.node)
            .with_context(|| format!("Binding memory to node {}", args.node))?;
    }
    let listener = std::io::stdin().as_fd().try_clone_to_owned()?;
    let options = uffd_engine::server::EngineOptions {
        cpus: args.cpus,
        worker: uffd_engine::WorkerOptions {
            read_slots: args.read_slots,
            window_pages: args.window_pages,
            waiting: uffd_engine::Waiting::spinning(args.spin_us),
        },
        keep_placement: args.keep_placement,
    };
    uffd_engine::server::run(&listener, &options)
        .with_context(|| format!("Engine of node {}", args.node))?;
    Ok(ExitCode::SUCCESS)
}
