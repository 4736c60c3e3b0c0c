//! `thaw events`: what happens, line by line.

use std::process::ExitCode;

use anyhow::{Context, Result};
use http_api::wire::{Event, EventKind};
use http_body_util::BodyExt;

use super::client;
use crate::args::EventsArgs;

/// Prints events until it is ended.
///
/// # Errors
/// As the daemon's.
pub async fn events(args: &EventsArgs) -> Result<ExitCode> {
    let path = match args.after {
        Some(after) => format!("/v1/events?after={after}"),
        None => "/v1/events".to_owned(),
    };
    let mut response = client(&args.at)?.stream(&path).await?;
    let mut rest = Vec::new();
    while let Some(frame) = response.body_mut().frame().await {
        let frame = frame.context("The daemon closed the connection")?;
        rest.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            let Some(data) = line.strip_prefix(b"data: ") else {
                continue;
            };
            if args.at.json {
                print!("{}", String::from_utf8_lossy(data));
            } else {
                println!("{}", in_words(&serde_json::from_slice(data)?));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn in_words(event: &Event) -> String {
    let what = match (event.kind, event.state) {
        (EventKind::State, Some(state)) => state.to_string(),
        (kind, _) => kind.name().to_owned(),
    };
    let sandbox = event.sandbox.as_deref().unwrap_or("-");
    let reason = event.reason.as_deref().unwrap_or_default();
    let line = format!("{:>8}  {sandbox:<24}  {what:<13} {reason}", event.id);
    line.trim_end().to_owned()
}
