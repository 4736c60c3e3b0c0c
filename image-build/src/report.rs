//! What tests said: passed, failed, and skipped by name and reason.
//!
//! A test that can't run on this machine prints one line `skipped: <test>: <reason>` to standard
//! output and returns. It has passed as far as the test runner knows; here it is counted for what
//! it is. A test marked `#[ignore]` counts as skipped too.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};

/// The tally of a run.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) passed: usize,
    /// Names of tests and of other steps.
    pub(crate) failed: Vec<String>,
    /// Reasons by name.
    pub(crate) skipped: BTreeMap<String, String>,
    /// Names of tests that failed first and passed when they were run again: of those that passed.
    pub(crate) flaky: Vec<String>,
}

impl Report {
    /// Adds another tally.
    pub(crate) fn add(&mut self, other: Report) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.skipped.extend(other.skipped);
        self.flaky.extend(other.flaky);
    }

    /// The last line of `cargo verify`.
    pub(crate) fn summary(&self) -> String {
        let (failed, skipped) = (self.failed.len(), self.skipped.len());
        format!("{} passed, {failed} failed, {skipped} skipped", self.passed)
    }

    /// Takes a test that ended well, whatever it said.
    fn ended_well(&mut self, name: &str, output: &str) {
        match skip_of(output) {
            Some((_, reason)) => {
                self.skipped.insert(name.to_owned(), reason.to_owned());
            }
            None => self.passed += 1,
        }
    }
}

/// Reads nextest's JUnit file, with the output of tests that passed.
pub(crate) fn from_junit(xml: &str) -> Result<Report> {
    let document = roxmltree::Document::parse(xml).context("Reading nextest's JUnit file")?;
    let mut report = Report::default();
    for case in document
        .descendants()
        .filter(|node| node.has_tag_name("testcase"))
    {
        let binary = case.attribute("classname").unwrap_or_default();
        let name = format!("{binary} {}", case.attribute("name").unwrap_or_default());
        let child = |tag: &str| case.children().find(|node| node.has_tag_name(tag));
        if child("failure").is_some() || child("error").is_some() {
            report.failed.push(name);
        } else if child("skipped").is_some() {
            report.skipped.insert(name, "marked #[ignore]".to_owned());
        } else {
            let output = child("system-out")
                .and_then(|node| node.text())
                .unwrap_or_default();
            report.ended_well(&name, output);
            if child("flakyFailure").is_some() || child("flakyError").is_some() {
                report.flaky.push(name);
            }
        }
    }
    Ok(report)
}

/// Reads what `cargo test -- --show-output` prints.
pub(crate) fn from_plain(text: &str) -> Report {
    let mut report = Report::default();
    for line in text.lines() {
        if let Some((name, reason)) = skip_of(line) {
            // Its line `test … ok` was, or will be, counted as well.
            let known = report.skipped.insert(name.to_owned(), reason.to_owned());
            if known.is_none() {
                report.passed = report.passed.wrapping_sub(1);
            }
            continue;
        }
        let Some((name, result)) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.rsplit_once(" ... "))
        else {
            continue;
        };
        if result == "ok" {
            report.passed = report.passed.wrapping_add(1);
        } else if result.starts_with("ignored") {
            report
                .skipped
                .insert(name.to_owned(), "marked #[ignore]".to_owned());
        } else if result.starts_with("FAILED") {
            report.failed.push(name.to_owned());
        }
    }
    report
}

/// Name and reason of the first line `skipped: <test>: <reason>`.
fn skip_of(output: &str) -> Option<(&str, &str)> {
    // A test's output may follow its name on one line: `test name ... skipped: …`.
    output
        .lines()
        .find_map(|line| line.trim().strip_prefix("skipped: ")?.split_once(": "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const JUNIT: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="nextest-run" tests="4" failures="1" errors="0" uuid="x" time="5.1">
    <testsuite name="envd" tests="3" disabled="0" errors="0" failures="1">
        <testcase name="a::good" classname="envd" timestamp="x" time="0.005">
            <system-out>
running 1 test
test a::good ... ok
</system-out>
            <system-err></system-err>
        </testcase>
        <testcase name="a::bad" classname="envd" timestamp="x" time="0.160">
            <failure message="thread panicked" type="test failure">left &lt; right</failure>
            <system-out>skipped: a::bad: never mind, it failed</system-out>
        </testcase>
        <testcase name="quiet" classname="envd::daemon" time="0.1"/>
        <testcase name="late" classname="envd::daemon" time="0.1">
            <flakyFailure timestamp="x" time="0.2" message="panicked" type="test failure">not yet</flakyFailure>
        </testcase>
    </testsuite>
    <testsuite name="guest">
        <testcase name="guest_boots" classname="image-build::guest" time="0.005">
            <system-out>
running 1 test
skipped: guest_boots: no qemu-system-x86_64: install it
test guest_boots ... ok
</system-out>
        </testcase>
    </testsuite>
</testsuites>"#;

    #[test]
    fn junit_is_tallied_with_its_skips() {
        let report = from_junit(JUNIT).unwrap();
        assert_eq!(report.passed, 3);
        assert_eq!(report.failed, ["envd a::bad"]);
        assert_eq!(report.flaky, ["envd::daemon late"]);
        let reason = &report.skipped["image-build::guest guest_boots"];
        assert_eq!(reason, "no qemu-system-x86_64: install it");
        assert_eq!(report.summary(), "3 passed, 1 failed, 1 skipped");
        assert!(from_junit("<testsuites").is_err());
    }

    #[test]
    fn plain_output_is_tallied_with_its_skips() {
        let text = "\nrunning 4 tests\ntest a::good ... ok\ntest b ... FAILED\n\
            test c ... ignored, needs a moon\ntest guest_boots ... ok\n\nsuccesses:\n\n\
            ---- guest_boots stdout ----\nskipped: guest_boots: no qemu: install it\n\n\
            successes:\n    a::good\n    guest_boots\n\n\
            test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured\n\
            test src/lib.rs - protocol (line 12) ... ok\n\
            test src/lib.rs - (line 3) - compile ... ok\n";
        let report = from_plain(text);
        assert_eq!(report.passed, 3);
        assert_eq!(report.failed, ["b"]);
        assert_eq!(report.skipped["guest_boots"], "no qemu: install it");
        assert_eq!(report.skipped["c"], "marked #[ignore]");
    }

    #[test]
    fn skip_before_its_result_line_counts_once() {
        let report = from_plain("skipped: a: no\ntest a ... ok\n");
        assert_eq!((report.passed, report.skipped.len()), (0, 1));
    }
}
