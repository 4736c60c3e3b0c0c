//! `cargo verify`: every check there is, to the end, whatever fails on the way.
//!
//! Tests find what they need in the environment: `THAW_INPUTS` (the directory of the inputs),
//! `THAW_BIN` (the `thaw` binary) and `THAW_PRELOAD` (the preload library), both as just built.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result};

use crate::invocation::line_of;
use crate::packages::Archive;
use crate::report::{self, Report};
use crate::workspace::Workspace;

/// Runs all steps, prints the tally; success only when nothing failed.
pub(crate) fn run(workspace: &Workspace) -> Result<ExitCode> {
    let mut report = Report::default();
    if let Err(error) = Archive::default().install_for_tests() {
        // The tests that need them say so, by name.
        eprintln!("{error:#}");
    }
    for (name, arguments) in [
        ("format", &["fmt", "--all", "--check"][..]),
        (
            "lints",
            &[
                "clippy",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ],
        ),
        // With the tests: built alone, half of the dependencies would be built twice, for
        // the features that only tests ask for.
        ("build", &["build", "--workspace", "--all-targets"]),
    ] {
        check(name, workspace.cargo().args(arguments), &mut report)?;
    }
    report.add(tests(workspace)?);
    report.add(plain_tests(
        "doc tests",
        workspace,
        &["test", "--workspace", "--doc"],
    )?);
    let mut docs = workspace.cargo();
    docs.args(["doc", "--workspace", "--no-deps"])
        .env("RUSTDOCFLAGS", "-D warnings");
    check("docs", &mut docs, &mut report)?;

    println!();
    for name in &report.flaky {
        println!("flaky: {name}: failed, and passed when it was run again");
    }
    for (name, reason) in &report.skipped {
        println!("skipped: {name}: {reason}");
    }
    for name in &report.failed {
        println!("failed: {name}");
    }
    println!("{}", report.summary());
    Ok(if report.failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// A step that counts only when it fails.
fn check(name: &str, command: &mut Command, report: &mut Report) -> Result<()> {
    announce(name, command);
    if !command
        .status()
        .with_context(|| format!("Starting {}", line_of(command)))?
        .success()
    {
        report
            .failed
            .push(format!("{name} (`{}`)", line_of(command)));
    }
    Ok(())
}

/// With nextest where there is one: a process per test, guests one at a time.
fn tests(workspace: &Workspace) -> Result<Report> {
    let probe = workspace.cargo().args(["nextest", "--version"]).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        let arguments = [
            "test",
            "--workspace",
            "--lib",
            "--bins",
            "--tests",
            "--",
            "--show-output",
        ];
        return plain_tests("tests", workspace, &arguments);
    }
    // Where .config/nextest.toml has it put: always below the root's own target directory.
    let junit = workspace.root().join("target/nextest/default/junit.xml");
    // An old one must not be taken for this run's.
    let _ = fs::remove_file(&junit);
    let mut command = workspace.cargo();
    command.args([
        "nextest",
        "run",
        "--workspace",
        "--no-fail-fast",
        "--no-tests",
        "pass",
    ]);
    surround(&mut command, workspace);
    announce("tests", &command);
    let status = command.status().context("Starting cargo nextest")?;
    let mut report = match fs::read_to_string(&junit) {
        Ok(xml) => report::from_junit(&xml)?,
        Err(_) => Report::default(),
    };
    if !status.success() && report.failed.is_empty() {
        report
            .failed
            .push("tests (did not build or did not run)".to_owned());
    }
    Ok(report)
}

/// Without nextest, and for doc tests: shown as it comes, and read along the way.
fn plain_tests(name: &str, workspace: &Workspace, arguments: &[&str]) -> Result<Report> {
    let mut command = workspace.cargo();
    command.args(arguments).stdout(Stdio::piped());
    if !arguments.contains(&"--") {
        command.arg("--no-fail-fast");
    }
    surround(&mut command, workspace);
    announce(name, &command);
    let mut child = command
        .spawn()
        .with_context(|| format!("Starting {}", line_of(&command)))?;
    let mut text = String::new();
    for line in BufReader::new(child.stdout.take().context("No output to read")?).lines() {
        let line = line.context("Reading the tests' output")?;
        println!("{line}");
        text.push_str(&line);
        text.push('\n');
    }
    let status = child.wait().context("Waiting for the tests")?;
    let mut report = report::from_plain(&text);
    if !status.success() && report.failed.is_empty() {
        report
            .failed
            .push(format!("{name} (did not build or did not run)"));
    }
    Ok(report)
}

fn surround(command: &mut Command, workspace: &Workspace) {
    let built = workspace.target().join("debug");
    command
        .env("THAW_INPUTS", workspace.inputs())
        .env("THAW_BIN", built.join("thaw"))
        .env("THAW_PRELOAD", built.join("libuffd_preload.so"));
}

fn announce(name: &str, command: &Command) {
    eprintln!("\n== {name}: {}", line_of(command));
}
