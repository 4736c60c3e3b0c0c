//! `envd [--listen ADDRESS:PORT] [--borrowed-machine]`: the guest's daemon.
//!
//! As PID 1 it never exits on a wrong argument, because that would be a kernel panic.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;

use envd::daemon::{Machine, Options, run};
use envd::protocol::PORT;

const USAGE: &str = "usage: envd [--listen ADDRESS:PORT] [--borrowed-machine]
            [--control-groups DIRECTORY] [--version]

  --listen ADDRESS:PORT  where to listen (default 0.0.0.0:49983; port 0 takes a free one)
  --borrowed-machine     leave clock, entropy, host name and page cache of this machine alone
  --control-groups DIRECTORY
                         where in the cgroup v2 hierarchy processes are put (default: found,
                         unless the machine is borrowed)";

fn main() -> ExitCode {
    let mut options = Options {
        listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)),
        machine: Machine::Owned,
        control_groups: None,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--listen" => match arguments.next().map(|address| address.parse()) {
                Some(Ok(address)) => options.listen = address,
                _ if !is_first_process() => return usage("--listen needs ADDRESS:PORT"),
                _ => {}
            },
            "--borrowed-machine" => options.machine = Machine::Borrowed,
            "--control-groups" => match arguments.next() {
                Some(directory) => options.control_groups = Some(directory.into()),
                None if !is_first_process() => return usage("--control-groups needs a directory"),
                None => {}
            },
            "--version" => {
                println!("envd {}", env!("CARGO_PKG_VERSION"));
                return ExitCode::SUCCESS;
            }
            other if !is_first_process() => return usage(&format!("unknown argument {other}")),
            _ => {}
        }
    }
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("envd: Listening on {}: {error}", options.listen);
            ExitCode::FAILURE
        }
    }
}

fn is_first_process() -> bool {
    std::process::id() == 1
}

fn usage(problem: &str) -> ExitCode {
    eprintln!("envd: {problem}\n{USAGE}");
    ExitCode::from(2)
}
