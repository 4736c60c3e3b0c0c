//! How long a sandbox may run, and what becomes of it then: values in, values out; the clock is a
//! parameter.
//!
//! ```text
//!   runs:    expires_at ──────────▶ time is up        rests:    left, standing still
//!               ▲        run(now)                                  │
//!               └──────────────────────────────────────────────────┘
//! ```

use http_api::wire::{CreateSandbox, OnTimeout, SetTimeout};
use serde::{Deserialize, Serialize};

/// One sandbox's time. At most one of `expires_at_ms` and `left_ms` is there, and neither for one
/// that may run for ever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lifetime {
    /// What becomes of it when its time is up.
    pub on_timeout: OnTimeout,
    /// Whether traffic brings it back.
    pub auto_resume: bool,
    /// What was last asked for; for ever when absent.
    pub timeout_ms: Option<u64>,
    /// While it runs: when its time is up, Unix milliseconds.
    pub expires_at_ms: Option<u64>,
    /// While it doesn't: what it has left.
    pub left_ms: Option<u64>,
}

impl Lifetime {
    /// That of a new sandbox, whose time has not begun.
    #[must_use]
    pub fn of(request: &CreateSandbox) -> Self {
        let timeout_ms = request.timeout_s.map(|seconds| seconds * 1000);
        Self {
            on_timeout: request.on_timeout,
            auto_resume: request.auto_resume,
            timeout_ms,
            expires_at_ms: None,
            left_ms: timeout_ms,
        }
    }

    /// It begins to run.
    pub fn run(&mut self, now_ms: u64) {
        if let (Some(timeout), None) = (self.timeout_ms, self.expires_at_ms) {
            let left = self.left_ms.take().unwrap_or(timeout);
            self.expires_at_ms = Some(now_ms.saturating_add(left));
        }
    }

    /// It runs no longer. Whose time was up has all of it again: it would end at once otherwise.
    pub fn rest(&mut self, now_ms: u64) {
        if let Some(at) = self.expires_at_ms.take() {
            let left = at.saturating_sub(now_ms);
            self.left_ms = if left == 0 {
                self.timeout_ms
            } else {
                Some(left)
            };
        }
    }

    /// What somebody asks for.
    pub fn set(&mut self, request: SetTimeout, runs: bool, now_ms: u64) {
        let timeout_ms = request.timeout_s.map(|seconds| seconds * 1000);
        let longer = match (self.left(now_ms), timeout_ms) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(left), Some(asked)) => asked > left,
        };
        if request.extend_only && !longer {
            return;
        }
        self.timeout_ms = timeout_ms;
        self.expires_at_ms = None;
        self.left_ms = timeout_ms;
        if runs {
            self.run(now_ms);
        }
    }

    /// Its end could not be brought about: later, then.
    pub fn postpone(&mut self, by_ms: u64, now_ms: u64) {
        self.expires_at_ms = self.expires_at_ms.map(|_| now_ms.saturating_add(by_ms));
    }

    fn left(&self, now_ms: u64) -> Option<u64> {
        let running = self.expires_at_ms.map(|at| at.saturating_sub(now_ms));
        running.or(self.left_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(timeout_s: Option<u64>) -> Lifetime {
        let request = serde_json::json!({ "template": "t", "timeout_s": timeout_s });
        Lifetime::of(&serde_json::from_value(request).unwrap())
    }

    fn set(timeout_s: Option<u64>, extend_only: bool) -> SetTimeout {
        SetTimeout {
            timeout_s,
            extend_only,
        }
    }

    #[test]
    fn time_that_it_rests_does_not_count() {
        let mut time = seconds(Some(10));
        time.run(1_000);
        assert_eq!(time.expires_at_ms, Some(11_000));
        time.rest(4_000);
        assert_eq!((time.expires_at_ms, time.left_ms), (None, Some(7_000)));
        time.rest(5_000);
        time.run(100_000);
        assert_eq!((time.expires_at_ms, time.left_ms), (Some(107_000), None));
        time.run(101_000);
        assert_eq!(time.expires_at_ms, Some(107_000), "it ran already");
    }

    #[test]
    fn whose_time_was_up_has_it_again() {
        let mut time = seconds(Some(10));
        time.run(0);
        time.rest(10_005);
        time.run(20_000);
        assert_eq!(time.expires_at_ms, Some(30_000));
    }

    #[test]
    fn without_an_end_there_is_none() {
        let mut time = seconds(None);
        time.run(5);
        time.rest(6);
        assert_eq!((time.expires_at_ms, time.left_ms), (None, None));
        time.set(set(Some(1), true), true, 5);
        assert_eq!(time.expires_at_ms, None, "for ever is longer");
        time.set(set(Some(1), false), true, 5);
        assert_eq!(time.expires_at_ms, Some(1_005));
        time.set(set(None, true), true, 5);
        assert_eq!(time.timeout_ms, None);
    }

    #[test]
    fn extending_never_shortens() {
        let mut time = seconds(Some(10));
        time.run(0);
        time.set(set(Some(5), true), true, 0);
        assert_eq!(time.expires_at_ms, Some(10_000));
        time.set(set(Some(5), true), true, 6_000);
        assert_eq!(time.expires_at_ms, Some(11_000));
        time.set(set(Some(1), false), true, 6_000);
        assert_eq!(time.expires_at_ms, Some(7_000));
        time.rest(6_500);
        time.set(set(Some(3), false), false, 6_500);
        assert_eq!((time.expires_at_ms, time.left_ms), (None, Some(3_000)));
    }
}
