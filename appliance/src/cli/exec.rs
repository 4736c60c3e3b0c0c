//! `thaw exec`: a command whose output comes as it does here, and whose exit status is ours.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use futures_util::{SinkExt, StreamExt};
use http_api::wire::ExecResult;
use serde_json::{Value, json};
use tokio::signal::ctrl_c;
use tokio_tungstenite::tungstenite::Message;

use super::{client, print_json};
use crate::args::ExecArgs;

/// Runs it.
///
/// # Errors
/// As the daemon's; a command that fails is none.
pub async fn exec(args: &ExecArgs) -> Result<ExitCode> {
    let (cmd, rest) = args.command.split_first().context("No command is given")?;
    let mut request = json!({ "cmd": cmd, "args": rest });
    for (name, value) in [("cwd", &args.cwd), ("user", &args.user)] {
        if let Some(value) = value {
            request[name] = json!(value);
        }
    }
    if args.at.json {
        let path = format!("/v1/sandboxes/{}/exec", args.id);
        let result: ExecResult = client(&args.at)?.post(&path, &request).await?;
        print_json(&result)?;
        return Ok(status(result.exit_code.into()));
    }
    request["type"] = json!("start");
    let path = format!("/v1/sandboxes/{}/exec/stream", args.id);
    let mut socket = client(&args.at)?.socket(&path).await?;
    socket.send(Message::text(request.to_string())).await?;
    loop {
        let message = tokio::select! {
            message = socket.next() => message,
            _ = ctrl_c() => {
                // Its end is told, and ours then.
                socket.send(Message::text(r#"{"type":"stop"}"#)).await?;
                continue;
            }
        };
        let Message::Text(text) = message.context("The daemon closed the connection")?? else {
            continue;
        };
        let message: Value = serde_json::from_str(&text)?;
        let data = message["data"].as_str().unwrap_or_default();
        match message["type"].as_str() {
            Some("stdout") => print(&mut std::io::stdout(), data)?,
            Some("stderr") => print(&mut std::io::stderr(), data)?,
            Some("exit") => return Ok(status(message["exit_code"].as_i64().unwrap_or(-1))),
            Some("error") => bail!("{data}"),
            _ => {}
        }
    }
}

fn print(to: &mut impl Write, text: &str) -> Result<()> {
    to.write_all(text.as_bytes())?;
    Ok(to.flush()?)
}

/// What a shell makes of it: 0 to 255, and 137 for who was killed.
pub(super) fn status(exit_code: i64) -> ExitCode {
    ExitCode::from(u8::try_from(exit_code).unwrap_or(137))
}
