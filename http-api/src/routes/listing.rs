//! Which sandboxes `GET /v1/sandboxes` shows, and in pages if asked to.
//!
//! Without a filter the list is the whole inventory. Pages are by id, so that a sandbox that is
//! there from the first to the last of them is in exactly one.

use axum::extract::RawQuery;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::problem::ApiError;
use crate::wire::{Sandbox, SandboxState};

/// Carries the cursor of the next page; absent on the last.
const NEXT_CURSOR: HeaderName = HeaderName::from_static("x-next-cursor");
/// The most of one page.
const MAX_PAGE: usize = 1000;

/// `?state=running,paused&label=key=value&template=base&limit=100&cursor=…`
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Filter {
    states: Vec<SandboxState>,
    labels: Vec<(String, String)>,
    template: Option<String>,
    limit: Option<usize>,
    cursor: Option<String>,
}

impl Filter {
    /// From a query; a name that is none is an error, as in bodies.
    pub(super) fn read(RawQuery(query): &RawQuery) -> Result<Self, ApiError> {
        let mut filter = Self::default();
        let query = query.as_deref().unwrap_or_default();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let bad = |detail: String| ApiError::BadRequest {
                field: name.to_string(),
                detail,
            };
            match &*name {
                "state" => {
                    for name in value.split(',') {
                        let json = serde_json::Value::String(name.trim().to_owned());
                        let state = serde_json::from_value(json);
                        filter.states.push(state.map_err(|e| bad(e.to_string()))?);
                    }
                }
                "label" => {
                    let pair = value.split_once('=');
                    let (key, value) =
                        pair.ok_or_else(|| bad(format!("is {value:?}; key=value is needed")))?;
                    filter.labels.push((key.to_owned(), value.to_owned()));
                }
                "template" => filter.template = Some(value.into_owned()),
                "cursor" => filter.cursor = Some(value.into_owned()),
                "limit" => {
                    let limit = value.parse().ok();
                    let limit = limit.filter(|limit| (1..=MAX_PAGE).contains(limit));
                    let detail = || bad(format!("is {value:?}; 1 to {MAX_PAGE} are possible"));
                    filter.limit = Some(limit.ok_or_else(detail)?);
                }
                _ => {
                    let detail = "is unknown; state, label, template, limit and cursor are known";
                    return Err(bad(detail.to_owned()));
                }
            }
        }
        Ok(filter)
    }

    fn admits(&self, sandbox: &Sandbox) -> bool {
        let has = |(key, value): &(String, String)| sandbox.labels.get(key) == Some(value);
        (self.states.is_empty() || self.states.contains(&sandbox.state))
            && self.labels.iter().all(has)
            && self
                .template
                .as_ref()
                .is_none_or(|t| sandbox.template.as_str() == t)
            && self
                .cursor
                .as_ref()
                .is_none_or(|last| sandbox.id.as_str() > last.as_str())
    }

    /// One page of a list in order of ids, and the headers that lead to the next.
    pub(super) fn page(&self, mut all: Vec<Sandbox>) -> (HeaderMap, Vec<Sandbox>) {
        all.retain(|sandbox| self.admits(sandbox));
        let limit = self.limit.unwrap_or(usize::MAX);
        let more = all.len() > limit;
        all.truncate(limit);
        let mut headers = HeaderMap::new();
        if let (true, Some(last)) = (more, all.last()) {
            let link = format!("<?{}>; rel=\"next\"", self.next(last.id.as_str()));
            let cursor = last.id.as_str();
            for (name, text) in [(NEXT_CURSOR, cursor), (header::LINK, &link)] {
                if let Ok(value) = HeaderValue::from_str(text) {
                    headers.insert(name, value);
                }
            }
        }
        (headers, all)
    }

    /// The query of the next page.
    fn next(&self, cursor: &str) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        for state in &self.states {
            query.append_pair("state", &state.to_string());
        }
        for (key, value) in &self.labels {
            query.append_pair("label", &format!("{key}={value}"));
        }
        if let Some(template) = &self.template {
            query.append_pair("template", template);
        }
        if let Some(limit) = self.limit {
            query.append_pair("limit", &limit.to_string());
        }
        query.append_pair("cursor", cursor).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::sandbox::example;

    fn read(query: &str) -> Result<Filter, ApiError> {
        Filter::read(&RawQuery(Some(query.to_owned())))
    }

    fn sandboxes() -> Vec<Sandbox> {
        let labelled = |id: &str, state, owner: &str| Sandbox {
            labels: [("owner".to_owned(), owner.to_owned())].into(),
            ..example(id, state)
        };
        vec![
            labelled("a", SandboxState::Running, "x=y&z"),
            labelled("b", SandboxState::Paused, "me"),
            labelled("c", SandboxState::Failed, "me"),
        ]
    }

    fn ids(query: &str) -> String {
        let (_, page) = read(query).unwrap().page(sandboxes());
        page.iter().map(|sandbox| sandbox.id.as_str()).collect()
    }

    #[test]
    fn filters_hold_together() {
        assert_eq!(ids(""), "abc");
        assert_eq!(ids("state=running,paused"), "ab");
        assert_eq!(ids("state=running&state=failed"), "ac");
        assert_eq!(ids("label=owner=me"), "bc");
        assert_eq!(ids("label=owner%3Dx%3Dy%26z"), "a");
        assert_eq!(ids("label=owner=me&state=failed&template=base"), "c");
        assert_eq!(ids("template=other"), "");
    }

    #[test]
    fn pages_lead_on_to_the_last_one() {
        let mut query = "limit=2&label=owner=me".to_owned();
        let (headers, page) = read(&query).unwrap().page(sandboxes());
        assert!(headers.is_empty() && page.len() == 2, "there is no third");
        query = "limit=1&label=owner=me".to_owned();
        let (headers, page) = read(&query).unwrap().page(sandboxes());
        assert_eq!(
            (page.len(), &headers["x-next-cursor"]),
            (1, &HeaderValue::from_static("b"))
        );
        let link = headers["link"].to_str().unwrap();
        let next = link.strip_prefix("<?").unwrap().split_once('>').unwrap().0;
        assert_eq!(ids(next), "c");
    }

    #[test]
    fn what_is_no_filter_is_named() {
        for (query, field) in [
            ("state=asleep", "state"),
            ("label=owner", "label"),
            ("limit=0", "limit"),
            ("limit=many", "limit"),
            ("stat=running", "stat"),
        ] {
            match read(query) {
                Err(ApiError::BadRequest { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{query}: {other:?}"),
            }
        }
    }
}
