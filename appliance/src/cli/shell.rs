//! `thaw shell`: a terminal in a sandbox, in this one.

use std::io::{IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::{SinkExt, StreamExt};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio_tungstenite::tungstenite::Message;

use super::client;
use super::exec::status;
use crate::args::ShellArgs;

/// Leaves the other screen that editors use, shows the cursor, ends reports of the mouse and of
/// pasting, and goes below what is there: where the cursor was on that screen says nothing about this
/// one. Source: xterm's control sequences.
const LEAVE: &str = "\x1b[?1047l\x1b[?25h\x1b[?1000l\x1b[?1006l\x1b[?2004l\x1b[0m\x1b[999;1H\r\n";

/// This terminal, every key passed on; as it was when this is dropped.
struct Raw<'a> {
    terminal: BorrowedFd<'a>,
    before: Termios,
}

impl<'a> Raw<'a> {
    fn enter(terminal: BorrowedFd<'a>) -> Result<Self> {
        let before = tcgetattr(terminal).context("Reading the terminal's settings")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(terminal, SetArg::TCSANOW, &raw).context("Changing the terminal's settings")?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Raw<'_> {
    fn drop(&mut self) {
        let _ = tcsetattr(self.terminal, SetArg::TCSANOW, &self.before);
    }
}

/// Runs it until the shell ends.
///
/// # Errors
/// This is no terminal, or as the daemon's.
pub async fn shell(args: &ShellArgs) -> Result<ExitCode> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        bail!("Standard input is no terminal; use `thaw exec` for commands");
    }
    let path = format!("/v1/sandboxes/{}/pty", args.id);
    let mut socket = client(&args.at)?.socket(&path).await?;
    let (cols, rows) = crate::sys::terminal::size(stdin.as_fd()).unwrap_or((80, 24));
    let mut start = json!({ "type": "start", "cols": cols, "rows": rows });
    if let Some(user) = &args.user {
        start["user"] = json!(user);
    }
    if let Some((cmd, rest)) = args.command.split_first() {
        start["cmd"] = json!(cmd);
        start["args"] = json!(rest);
    }
    let term = std::env::var("TERM").unwrap_or_else(|_| "xterm-256color".to_owned());
    start["env"] = json!({ "TERM": term });
    socket.send(Message::text(start.to_string())).await?;

    let raw = Raw::enter(stdin.as_fd())?;
    let mut keys = tokio::io::stdin();
    let mut resized = signal(SignalKind::window_change())?;
    let mut buffer = [0; 4096];
    let code = loop {
        let message = tokio::select! {
            message = socket.next() => message,
            read = keys.read(&mut buffer) => {
                let data = STANDARD.encode(&buffer[..read?]);
                let input = json!({ "type": "input", "data": data });
                socket.send(Message::text(input.to_string())).await?;
                continue;
            }
            _ = resized.recv() => {
                if let Some((cols, rows)) = crate::sys::terminal::size(stdin.as_fd()) {
                    let size = json!({ "type": "resize", "cols": cols, "rows": rows });
                    socket.send(Message::text(size.to_string())).await?;
                }
                continue;
            }
        };
        let Message::Text(text) = message.context("The daemon closed the connection")?? else {
            continue;
        };
        let message: Value = serde_json::from_str(&text)?;
        let data = message["data"].as_str().unwrap_or_default();
        match message["type"].as_str() {
            Some("output") => {
                let mut out = std::io::stdout();
                out.write_all(&STANDARD.decode(data)?)?;
                out.flush()?;
            }
            Some("exit") => break status(message["exit_code"].as_i64().unwrap_or(-1)),
            Some("error") => {
                // What ran there has had no chance to.
                print!("{LEAVE}");
                drop(raw);
                bail!("{data}");
            }
            _ => {}
        }
    };
    drop(raw);
    Ok(code)
}
