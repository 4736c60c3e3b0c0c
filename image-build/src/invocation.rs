//! Running other programs: what they print is kept, and shown when they fail.

use std::io::ErrorKind;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// Lines of a failed program's output that are shown.
const SHOWN_LINES: usize = 30;

/// Runs a program and gives its standard output.
///
/// # Errors
/// When it can't be started, or fails; with the end of what it printed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let result = command.stdin(Stdio::null()).output();
    let output = match result {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("There is no program {name} here; this needs a Debian or Ubuntu system with it")
        }
        result => result.with_context(|| format!("Starting {name}"))?,
    };
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let printed = [output.stdout, output.stderr].concat();
    let printed = String::from_utf8_lossy(&printed);
    let lines: Vec<&str> = printed.lines().collect();
    let end = lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n");
    bail!("`{}` failed ({}):\n{end}", line_of(command), output.status)
}

/// The command as one would type it.
pub(crate) fn line_of(command: &Command) -> String {
    let program = command.get_program();
    let program = std::path::Path::new(program).file_name().unwrap_or(program);
    let words = std::iter::once(program).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
