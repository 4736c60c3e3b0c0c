//! A subject against the baseline, round by round.

use serde::Serialize;

use super::latency::Percentiles;
use super::{RoundReport, SubjectReport};

/// Quotients of what two subjects did in the same round, and their medians.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Ratio {
    pub(crate) subject: String,
    pub(crate) baseline: String,
    /// Of the rounds' median faults; `None` if not every touch is one fault.
    pub(crate) p50: Option<Quotients>,
    /// Of the rounds' 99th percentiles; noisy on a shared machine.
    pub(crate) p99: Option<Quotients>,
    /// Of the time per touched page.
    pub(crate) pass: Quotients,
}

/// One quotient per round.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Quotients {
    pub(crate) median: f64,
    pub(crate) by_round: Vec<f64>,
}

impl Ratio {
    pub(crate) fn new(subject: &SubjectReport, baseline: &SubjectReport) -> Self {
        let faults = |of: fn(&Percentiles) -> f64| {
            quotients(subject, baseline, |round| round.fault_us.as_ref().map(of))
        };
        Self {
            subject: subject.name.clone(),
            baseline: baseline.name.clone(),
            p50: faults(|us| us.p50),
            p99: faults(|us| us.p99),
            pass: quotients(subject, baseline, |round| Some(round.pass_us_per_page))
                .expect("every round has a pass"),
        }
    }
}

fn quotients(
    subject: &SubjectReport,
    baseline: &SubjectReport,
    of: impl Fn(&RoundReport) -> Option<f64>,
) -> Option<Quotients> {
    let rounds = subject.rounds.iter().zip(&baseline.rounds);
    let by_round: Vec<f64> = rounds
        .map(|(ours, theirs)| Some(of(ours)? / of(theirs)?))
        .collect::<Option<_>>()?;
    Some(Quotients {
        median: median(&by_round),
        by_round,
    })
}

/// The middle value; of an even number, the middle of the middle two.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    } else {
        sorted[middle]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(name: &str, pass: &[f64]) -> SubjectReport {
        let round = |us: &f64| RoundReport {
            fault_us: None,
            pass_us_per_page: *us,
            faults: Some(1),
            pages_from_disk: 0,
        };
        SubjectReport {
            name: name.to_owned(),
            window_pages: 4,
            fault_us: None,
            rounds: pass.iter().map(round).collect(),
        }
    }

    #[test]
    fn rounds_are_compared_with_their_own_baseline() {
        let ratio = Ratio::new(
            &subject("ours", &[2.0, 30.0, 3.0]),
            &subject("floor", &[1.0, 10.0, 2.0]),
        );
        assert_eq!(ratio.pass.by_round, [2.0, 3.0, 1.5]);
        assert!((ratio.pass.median - 2.0).abs() < 1e-9);
        assert!(ratio.p50.is_none());
    }

    #[test]
    fn the_median_of_two_is_between_them() {
        assert!((median(&[4.0, 1.0]) - 2.5).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
    }
}
