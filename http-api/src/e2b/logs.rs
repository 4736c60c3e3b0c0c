//! Logs of a sandbox: its console, which is what the host hears of it unasked. What its processes
//! print goes to whoever started them.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use serde::{Deserialize, Serialize};

use super::known;
use super::refusal::{Id, Refusal, bad};
use crate::clock::rfc3339;
use crate::control_plane::ControlPlane;
use crate::problem::ApiError;
use crate::wire::ConsoleLine;

/// The most of one answer. Source: E2B's API.
const MAX_LINES: usize = 1000;

/// `?start=&limit=`, and of the second version `?cursor=&direction=`; times in Unix milliseconds.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Asked {
    start: Option<u64>,
    cursor: Option<u64>,
    limit: Option<usize>,
    direction: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Logs {
    logs: Vec<Line>,
    log_entries: Vec<Entry>,
}

#[derive(Debug, Serialize)]
struct Line {
    timestamp: String,
    line: String,
}

#[derive(Debug, Serialize)]
struct Entry {
    timestamp: String,
    message: String,
    level: &'static str,
    fields: serde_json::Map<String, serde_json::Value>,
}

/// The second version, in words of its own.
#[derive(Debug, Serialize)]
pub(super) struct LogsV2 {
    logs: Vec<Entry>,
}

impl From<&ConsoleLine> for Entry {
    fn from(line: &ConsoleLine) -> Self {
        Self {
            timestamp: rfc3339(line.at_ms),
            message: line.line.clone(),
            // A console has no levels.
            level: "info",
            fields: serde_json::Map::new(),
        }
    }
}

/// The lines that were asked for: from a time on, or back from one.
fn choose(mut lines: Vec<ConsoleLine>, asked: &Asked) -> Result<Vec<ConsoleLine>, ApiError> {
    let limit = asked.limit.unwrap_or(MAX_LINES);
    if limit > MAX_LINES {
        let detail = format!("is {limit}; at most {MAX_LINES} are possible");
        return Err(bad("limit", detail));
    }
    let back = match asked.direction.as_deref() {
        None | Some("forward") => false,
        Some("backward") => true,
        Some(other) => {
            let detail = format!("is {other:?}; forward and backward are possible");
            return Err(bad("direction", detail));
        }
    };
    let from = asked.cursor.or(asked.start);
    lines.retain(|line| {
        from.is_none_or(|from| match back {
            true => line.at_ms <= from,
            false => line.at_ms >= from,
        })
    });
    if back {
        lines.reverse();
    }
    lines.truncate(limit);
    Ok(lines)
}

async fn lines<C: ControlPlane>(
    control: &C,
    id: crate::ids::SandboxId,
    asked: Result<Query<Asked>, QueryRejection>,
) -> Result<Vec<ConsoleLine>, ApiError> {
    let Query(asked) = asked.map_err(|error| bad("query", error.body_text()))?;
    known(control.get(id.clone()).await?)?;
    choose(control.console(id).await?, &asked)
}

pub(super) async fn logs<C: ControlPlane>(
    State(control): State<C>,
    Id(id): Id,
    asked: Result<Query<Asked>, QueryRejection>,
) -> Result<Json<Logs>, Refusal> {
    let lines = lines(&control, id, asked).await?;
    let line = |line: &ConsoleLine| Line {
        timestamp: rfc3339(line.at_ms),
        line: line.line.clone(),
    };
    Ok(Json(Logs {
        logs: lines.iter().map(line).collect(),
        log_entries: lines.iter().map(Entry::from).collect(),
    }))
}

pub(super) async fn logs_v2<C: ControlPlane>(
    State(control): State<C>,
    Id(id): Id,
    asked: Result<Query<Asked>, QueryRejection>,
) -> Result<Json<LogsV2>, Refusal> {
    let lines = lines(&control, id, asked).await?;
    let logs = lines.iter().map(Entry::from).collect();
    Ok(Json(LogsV2 { logs }))
}
