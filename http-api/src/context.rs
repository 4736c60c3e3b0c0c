//! Which request this is, for whatever is done because of it: its id, and the trace that its caller
//! has it in.
//!
//! ```text
//!   traceparent ─▶ enter ─▶ handler ─▶ control plane ─ … ─▶ the guest's daemon (traceparent)
//!                    │         │
//!                    │         └─▶ problem documents: request_id, trace_id
//!                    └─▶ logs: request_id, trace_id
//! ```
//!
//! It travels with the task. Whoever hands work to another task takes [`current`] along and gives
//! it to [`within`] there.

use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;

/// Carries a trace from one program to the next. Source: W3C Trace Context.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Carries a request's id back to who asked.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

tokio::task_local! {
    static CURRENT: Context;
}

/// One request.
#[derive(Clone, Debug)]
pub struct Context {
    request_id: Arc<str>,
    trace: Option<Trace>,
    span: tracing::Span,
}

impl Context {
    /// A request with these headers; what is done for it is logged within this span.
    #[must_use]
    pub fn begin(headers: &HeaderMap, span: tracing::Span) -> Self {
        Self {
            request_id: next_request_id().into(),
            trace: Trace::of(headers),
            span,
        }
    }

    /// Unique while the process lives.
    #[must_use]
    pub fn request_id(&self) -> &str {
        &self.request_id
    }

    /// The trace that the caller has it in, 32 hexadecimal digits.
    #[must_use]
    pub fn trace_id(&self) -> Option<String> {
        self.trace.map(|trace| format!("{:032x}", trace.id))
    }

    /// `traceparent` for what is asked of others because of this request.
    #[must_use]
    pub fn traceparent(&self) -> Option<HeaderValue> {
        let trace = self.trace?;
        HeaderValue::try_from(trace.child().to_string()).ok()
    }
}

/// The request that this task works for, if it is one.
#[must_use]
pub fn current() -> Option<Context> {
    CURRENT.try_with(Clone::clone).ok()
}

/// Does something for a request, or for none.
pub async fn within<T>(context: Option<Context>, work: impl Future<Output = T>) -> T {
    match context {
        Some(context) => {
            let span = context.span.clone();
            CURRENT.scope(context, work).instrument(span).await
        }
        None => work.await,
    }
}

/// Around every route.
pub(crate) async fn enter(request: Request, next: Next) -> Response {
    let span = tracing::info_span!(
        "request",
        method = %request.method(),
        path = request.uri().path(),
        request_id = tracing::field::Empty,
        trace_id = tracing::field::Empty,
    );
    let context = Context::begin(request.headers(), span);
    context.span.record("request_id", &*context.request_id);
    if let Some(trace_id) = context.trace_id() {
        context.span.record("trace_id", trace_id);
    }
    let name = HeaderValue::try_from(&*context.request_id);
    let mut response = within(Some(context), next.run(request)).await;
    if let Ok(name) = name {
        response.headers_mut().insert(REQUEST_ID, name);
    }
    response
}

/// Restarts are told apart by the log's time.
pub(crate) fn next_request_id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("req-{:08x}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A place in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Trace {
    id: u128,
    parent: u64,
    flags: u8,
}

impl Trace {
    /// What is no trace is no error: the request is met without one.
    fn of(headers: &HeaderMap) -> Option<Self> {
        let mut all = headers.get_all(TRACEPARENT).iter();
        let text = all.next()?.to_str().ok()?;
        // Two of them are none.
        all.next().is_none().then(|| Self::parse(text.trim()))?
    }

    /// `00-{32 digits}-{16 digits}-{2 digits}`, all lowercase hexadecimal. Later versions may go
    /// on after that.
    fn parse(text: &str) -> Option<Self> {
        let digits = |part: &str, length: usize| {
            let legal = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
            (part.len() == length && part.bytes().all(legal)).then_some(())
        };
        let mut parts = text.split('-');
        let [version, id, parent, flags] = [(); 4].map(|()| parts.next());
        let (version, id, parent, flags) = (version?, id?, parent?, flags?);
        for (part, length) in [(version, 2), (id, 32), (parent, 16), (flags, 2)] {
            digits(part, length)?;
        }
        let more = parts.next().is_some();
        if version == "ff" || (version == "00" && more) {
            return None;
        }
        let trace = Self {
            id: u128::from_str_radix(id, 16).ok()?,
            parent: u64::from_str_radix(parent, 16).ok()?,
            flags: u8::from_str_radix(flags, 16).ok()?,
        };
        (trace.id != 0 && trace.parent != 0).then_some(trace)
    }

    /// The same trace, one step on.
    fn child(self) -> Self {
        static STEP: AtomicU64 = AtomicU64::new(0);
        let step = STEP.fetch_add(1, Ordering::Relaxed);
        // Keyed by the system's random numbers: unlikely to be anybody else's.
        let parent = RandomState::new().hash_one((step, self.parent)).max(1);
        // The one flag that is ours to pass on: whether the caller keeps a record.
        let flags = self.flags & 1;
        Self {
            id: self.id,
            parent,
            flags,
        }
    }
}

impl std::fmt::Display for Trace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { id, parent, flags } = self;
        write!(f, "00-{id:032x}-{parent:016x}-{flags:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_trace_is_read_as_it_is_written() {
        assert_eq!(Trace::parse(GOOD).unwrap().to_string(), GOOD);
        let later = format!("{}-more", GOOD.replacen("00", "cc", 1));
        assert!(Trace::parse(&later).is_some(), "a later version goes on");
    }

    #[test]
    fn what_is_no_trace_is_none() {
        for bad in [
            "",
            "00",
            &GOOD.replacen("00", "ff", 1),
            &format!("{GOOD}-more"),
            &GOOD.to_uppercase(),
            &GOOD[..GOOD.len() - 1],
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        ] {
            assert_eq!(Trace::parse(bad), None, "{bad}");
        }
        let mut headers = HeaderMap::new();
        headers.append(TRACEPARENT, HeaderValue::from_static(GOOD));
        assert!(Trace::of(&headers).is_some());
        headers.append(TRACEPARENT, HeaderValue::from_static(GOOD));
        assert_eq!(Trace::of(&headers), None, "two of them");
    }

    #[test]
    fn a_step_further_is_another_place_in_the_same_trace() {
        let first = Trace::parse(GOOD).unwrap();
        let (one, two) = (first.child(), first.child());
        assert_eq!((one.id, one.flags), (first.id, 1));
        assert!(one.parent != first.parent && one.parent != two.parent);
    }

    #[tokio::test]
    async fn a_request_travels_with_its_task_only() {
        let context = Context {
            request_id: "req-1".into(),
            trace: Trace::parse(GOOD),
            span: tracing::Span::none(),
        };
        let inside = within(Some(context), async {
            let same = current().unwrap();
            let other = tokio::spawn(async { current().is_some() });
            (same, other.await.unwrap())
        });
        let (same, other) = inside.await;
        assert_eq!(same.request_id(), "req-1");
        assert_eq!(same.trace_id().unwrap(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert!(!other && current().is_none());
    }
}
