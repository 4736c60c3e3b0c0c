//! `/v1/events`: what happens, as it happens, and what has happened since.
//!
//! Server-sent events: `id`, `event` and one line of JSON. A client that comes back says the last
//! id it has seen, in `Last-Event-ID` as browsers do or as `?after=`, and misses nothing that the
//! host has not forgotten.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::HeaderMap;
use axum::response::sse::{self, KeepAlive, Sse};
use futures_util::{Stream, StreamExt, future};
use serde::Deserialize;

use crate::control_plane::ControlPlane;
use crate::options::Place;
use crate::problem::ApiError;

/// A silent stream carries a comment this often, so that both sides know that the other is there.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// `?after=17&sandbox=one`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Asked {
    after: Option<u64>,
    sandbox: Option<String>,
}

pub(crate) async fn events<C: ControlPlane>(
    State(control): State<C>,
    place: Place,
    headers: HeaderMap,
    asked: Result<Query<Asked>, QueryRejection>,
) -> Result<Sse<impl Stream<Item = Result<sse::Event, Infallible>>>, ApiError> {
    let Query(asked) = asked.map_err(|error| ApiError::BadRequest {
        field: "query".into(),
        detail: error.body_text(),
    })?;
    let last = headers.get("last-event-id").map(|value| {
        let text = value.to_str().unwrap_or_default();
        text.trim().parse().map_err(|_| ApiError::BadRequest {
            field: "Last-Event-ID".into(),
            detail: format!("is {text:?}; the id of an event is a number"),
        })
    });
    let after = last.transpose()?.or(asked.after);
    let events = control.events(after).await?;
    let wanted = asked.sandbox;
    let events = events.filter_map(move |event| {
        // Held for as long as the stream is.
        let _ = &place;
        let other = event.sandbox.is_some() && wanted.is_some() && event.sandbox != wanted;
        let line = serde_json::to_string(&event).unwrap_or_default();
        let sent = sse::Event::default()
            .id(event.id.to_string())
            .event(event.kind.name())
            .data(line);
        future::ready((!other).then_some(Ok(sent)))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}
