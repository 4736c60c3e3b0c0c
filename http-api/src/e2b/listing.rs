//! Lists of sandboxes: filters, order and pages.

use std::cmp::Reverse;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderName};
use jiff::Timestamp;
use percent_encoding::percent_decode_str;
use serde::Deserialize;

use super::known;
use super::refusal::{Refusal, bad};
use super::wire::{Listed, state};
use crate::clock::now_ms;
use crate::control_plane::ControlPlane;
use crate::problem::ApiError;
use crate::wire::Sandbox;

/// The most of one page. Source: E2B's API.
pub(super) const MAX_PAGE: usize = 100;

const NEXT_TOKEN: HeaderName = HeaderName::from_static("x-next-token");

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Filter {
    metadata: Option<String>,
    state: Option<String>,
    order: Option<String>,
    started_after: Option<String>,
    template: Option<String>,
    limit: Option<usize>,
    next_token: Option<String>,
}

type Asked = Result<Query<Filter>, axum::extract::rejection::QueryRejection>;

/// The old list: what runs, all of it.
pub(super) async fn running<C: ControlPlane>(
    State(control): State<C>,
    filter: Asked,
) -> Result<Json<Vec<Listed>>, Refusal> {
    let Query(filter) = filter.map_err(|error| bad("query", error.body_text()))?;
    let filter = Filter {
        state: Some("running".to_owned()),
        metadata: filter.metadata,
        ..Filter::default()
    };
    let query = Wanted::read(&filter)?;
    let (page, _) = query.page(control.list().await?, usize::MAX);
    Ok(Json(show(page)))
}

/// The new list, in pages.
pub(super) async fn page<C: ControlPlane>(
    State(control): State<C>,
    filter: Asked,
) -> Result<(HeaderMap, Json<Vec<Listed>>), Refusal> {
    let Query(filter) = filter.map_err(|error| bad("query", error.body_text()))?;
    let limit = filter.limit.unwrap_or(MAX_PAGE);
    if !(1..=MAX_PAGE).contains(&limit) {
        let detail = format!("is {limit}; 1 to {MAX_PAGE} are possible");
        return Err(bad("limit", detail).into());
    }
    let query = Wanted::read(&filter)?;
    let (page, more) = query.page(control.list().await?, limit);
    Ok((next_token(more), Json(show(page))))
}

fn show(page: Vec<Sandbox>) -> Vec<Listed> {
    let now = now_ms();
    page.into_iter()
        .map(|sandbox| Listed::new(sandbox, now))
        .collect()
}

/// The header of a page that isn't the last.
pub(super) fn next_token(token: Option<String>) -> HeaderMap {
    let value = token.and_then(|token| token.parse().ok());
    value.map(|value| (NEXT_TOKEN, value)).into_iter().collect()
}

/// A filter that was understood.
#[derive(Debug, Default)]
struct Wanted {
    labels: Vec<(String, String)>,
    states: Option<Vec<String>>,
    ascending: bool,
    started_after_ms: Option<u64>,
    template: Option<String>,
    /// The last one of the page before: when it began, and its id.
    after: Option<(u64, String)>,
}

impl Wanted {
    fn read(filter: &Filter) -> Result<Self, ApiError> {
        let states = filter.state.as_ref().map(|list| {
            let states = list.split(',').map(|s| s.trim().to_owned());
            states.collect::<Vec<_>>()
        });
        for state in states.iter().flatten() {
            if !matches!(state.as_str(), "running" | "paused") {
                let detail = format!("has {state:?}; running and paused are possible");
                return Err(bad("state", detail));
            }
        }
        let ascending = match filter.order.as_deref() {
            Some("asc") => true,
            None | Some("desc") => false,
            Some(other) => {
                let detail = format!("is {other:?}; asc and desc are possible");
                return Err(bad("order", detail));
            }
        };
        let time = |text: &String| {
            let time: Result<Timestamp, _> = text.parse();
            let time = time.map_err(|error| bad("startedAfter", error.to_string()))?;
            Ok::<_, ApiError>(u64::try_from(time.as_millisecond()).unwrap_or(0))
        };
        let cursor = |token: &String| {
            let parts = token.split_once('-');
            let parsed = parts.and_then(|(ms, id)| Some((ms.parse().ok()?, id.to_owned())));
            parsed.ok_or_else(|| bad("nextToken", "is not one of ours"))
        };
        let template = filter.template.as_deref().map(|template| {
            let bare = template.split_once(':').map_or(template, |(bare, _)| bare);
            bare.to_owned()
        });
        Ok(Self {
            labels: labels(filter.metadata.as_deref().unwrap_or_default()),
            states,
            ascending,
            started_after_ms: filter.started_after.as_ref().map(time).transpose()?,
            template,
            after: filter.next_token.as_ref().map(cursor).transpose()?,
        })
    }

    fn admits(&self, sandbox: &Sandbox) -> bool {
        let states = self.states.as_ref();
        let has = |(key, value): &(String, String)| sandbox.labels.get(key) == Some(value);
        states.is_none_or(|wanted| wanted.iter().any(|w| w == state(sandbox.state)))
            && self
                .started_after_ms
                .is_none_or(|after| sandbox.started_at_ms >= after)
            && self
                .template
                .as_ref()
                .is_none_or(|t| sandbox.template.as_str() == t)
            && self.labels.iter().all(has)
    }

    /// One page, and the token of the next if there is one.
    fn page(&self, all: Vec<Sandbox>, limit: usize) -> (Vec<Sandbox>, Option<String>) {
        let known = all.into_iter().filter_map(|sandbox| known(sandbox).ok());
        let mut found: Vec<Sandbox> = known.filter(|sandbox| self.admits(sandbox)).collect();
        let key = |sandbox: &Sandbox| (sandbox.started_at_ms, sandbox.id.to_string());
        found.sort_by_key(key);
        if !self.ascending {
            found.sort_by_key(|sandbox| Reverse(key(sandbox)));
        }
        if let Some(after) = &self.after {
            found.retain(|sandbox| match self.ascending {
                true => key(sandbox) > *after,
                false => key(sandbox) < *after,
            });
        }
        let more = found.len() > limit;
        found.truncate(limit);
        let last = found.last().filter(|_| more).map(key);
        (found, last.map(|(ms, id)| format!("{ms}-{id}")))
    }
}

/// `key=value&…`, each of them percent-encoded twice: by the client, and as a query.
fn labels(metadata: &str) -> Vec<(String, String)> {
    let plain = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    form_urlencoded::parse(metadata.as_bytes())
        .map(|(key, value)| (plain(&key), plain(&value)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::SandboxState;
    use crate::wire::sandbox::example;

    fn sandboxes() -> Vec<Sandbox> {
        let one = |id: &str, started_at_ms, state, owner: &str| Sandbox {
            started_at_ms,
            labels: [("owner".to_owned(), owner.to_owned())].into(),
            ..example(id, state)
        };
        vec![
            one("a", 10, SandboxState::Running, "x y"),
            one("b", 20, SandboxState::Paused, "z"),
            one("c", 20, SandboxState::Snapshotting, "z"),
            one("d", 30, SandboxState::Failed, "z"),
        ]
    }

    fn ids(filter: &Filter, limit: usize) -> (String, Option<String>) {
        let (page, next) = Wanted::read(filter).unwrap().page(sandboxes(), limit);
        (page.iter().map(|s| s.id.as_str()).collect(), next)
    }

    #[test]
    fn pages_are_newest_first_and_end() {
        let mut filter = Filter::default();
        let (first, next) = ids(&filter, 2);
        assert_eq!(first, "cb");
        filter.next_token = next;
        assert_eq!(ids(&filter, 2), ("a".into(), None));
        filter = Filter {
            order: Some("asc".into()),
            ..Filter::default()
        };
        assert_eq!(ids(&filter, 3), ("abc".into(), None));
    }

    #[test]
    fn filters_hold_together() {
        let metadata = |text: &str| Filter {
            metadata: Some(text.into()),
            ..Filter::default()
        };
        assert_eq!(ids(&metadata("owner=z"), 9).0, "cb");
        assert_eq!(ids(&metadata("owner=x%2520y"), 9).0, "a");
        assert_eq!(ids(&metadata("owner=z&other=1"), 9).0, "");
        let paused = Filter {
            state: Some("paused".into()),
            ..metadata("owner=z")
        };
        assert_eq!(ids(&paused, 9).0, "b");
        let late = Filter {
            started_after: Some("1970-01-01T00:00:00.020Z".into()),
            ..Filter::default()
        };
        assert_eq!(ids(&late, 9).0, "cb");
        let template = Filter {
            template: Some("base:default".into()),
            ..Filter::default()
        };
        assert_eq!(ids(&template, 9).0, "cba");
    }

    #[test]
    fn what_is_no_filter_is_refused_by_name() {
        let wrong = [
            (
                "state",
                Filter {
                    state: Some("asleep".into()),
                    ..Filter::default()
                },
            ),
            (
                "order",
                Filter {
                    order: Some("up".into()),
                    ..Filter::default()
                },
            ),
            (
                "startedAfter",
                Filter {
                    started_after: Some("noon".into()),
                    ..Filter::default()
                },
            ),
            (
                "nextToken",
                Filter {
                    next_token: Some("x".into()),
                    ..Filter::default()
                },
            ),
        ];
        for (field, filter) in wrong {
            match Wanted::read(&filter) {
                Err(ApiError::BadRequest { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }
}
