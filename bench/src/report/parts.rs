//! Reports made of parts: each compares a few ways to do one thing, round by round.

use std::fmt::{self, Display, Formatter};

use serde::Serialize;

use super::ratio::{Quotients, median};
use crate::host::Host;

/// A whole run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PartsReport<S: Serialize> {
    pub(crate) bench: &'static str,
    pub(crate) host: Host,
    pub(crate) setup: S,
    pub(crate) parts: Vec<Part>,
}

/// One thing that was measured in several ways.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Part {
    pub(crate) name: &'static str,
    /// What a sample is, for a reader.
    pub(crate) about: String,
    pub(crate) unit: &'static str,
    pub(crate) subjects: Vec<Series>,
    pub(crate) ratios: Vec<PartRatio>,
    /// What should be reached, and whether this run did.
    pub(crate) goals: Vec<Goal>,
}

/// One subject's samples, one per round.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) median: f64,
    pub(crate) by_round: Vec<f64>,
}

/// A subject's samples over another's of the same round.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PartRatio {
    pub(crate) subject: String,
    pub(crate) baseline: String,
    #[serde(flatten)]
    pub(crate) quotients: Quotients,
}

/// A bound on a median.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Goal {
    pub(crate) what: String,
    pub(crate) bound: Bound,
    pub(crate) found: f64,
    pub(crate) reached: bool,
}

/// Which side of a number is good.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Bound {
    fn holds(self, found: f64) -> bool {
        match self {
            Self::AtMost(bound) => found <= bound,
            Self::AtLeast(bound) => found >= bound,
        }
    }
}

impl Part {
    /// The medians of all subjects; ratios and goals are added later.
    pub(crate) fn new(
        name: &'static str,
        about: impl Into<String>,
        unit: &'static str,
        samples: Vec<(String, Vec<f64>)>,
    ) -> Self {
        let series = |(name, by_round): (String, Vec<f64>)| Series {
            name,
            median: median(&by_round),
            by_round,
        };
        Self {
            name,
            about: about.into(),
            unit,
            subjects: samples.into_iter().map(series).collect(),
            ratios: Vec::new(),
            goals: Vec::new(),
        }
    }

    /// Adds the ratio of two subjects.
    ///
    /// # Panics
    /// If there is no such subject.
    pub(crate) fn ratio(mut self, subject: &str, baseline: &str) -> Self {
        let pairs = self.series(subject).by_round.iter();
        let pairs = pairs.zip(&self.series(baseline).by_round);
        let by_round: Vec<f64> = pairs.map(|(ours, theirs)| ours / theirs).collect();
        self.ratios.push(PartRatio {
            subject: subject.to_owned(),
            baseline: baseline.to_owned(),
            quotients: Quotients {
                median: median(&by_round),
                by_round,
            },
        });
        self
    }

    /// Adds a goal for a subject's median.
    pub(crate) fn goal(mut self, subject: &str, bound: Bound) -> Self {
        let found = self.series(subject).median;
        let what = format!("{subject}, {}", self.unit);
        self.goals.push(Goal {
            what,
            bound,
            found,
            reached: bound.holds(found),
        });
        self
    }

    /// Adds a goal for the ratio that was added last.
    pub(crate) fn ratio_goal(mut self, bound: Bound) -> Self {
        let ratio = self.ratios.last().expect("a ratio was added before");
        let found = ratio.quotients.median;
        self.goals.push(Goal {
            what: format!("{} / {}", ratio.subject, ratio.baseline),
            bound,
            found,
            reached: bound.holds(found),
        });
        self
    }

    fn series(&self, name: &str) -> &Series {
        let found = self.subjects.iter().find(|series| series.name == name);
        found.unwrap_or_else(|| panic!("part {} has no subject {name}", self.name))
    }
}

impl<S: Serialize + Display> Display for PartsReport<S> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.bench)?;
        self.host.head(f)?;
        writeln!(f, "  {}", self.setup)?;
        self.parts
            .iter()
            .try_for_each(|part| write!(f, "\n{part}"))?;
        if !self.host.optimised {
            writeln!(f, "\n  Debug build: this is no measurement; use --release")?;
        }
        Ok(())
    }
}

impl Display for Part {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "  {}: {}", self.name, self.about)?;
        for series in &self.subjects {
            let (low, high) = range(&series.by_round);
            writeln!(
                f,
                "    {:34}{:>12.3} {:6} {low:.3} to {high:.3}",
                series.name, series.median, self.unit
            )?;
        }
        for ratio in &self.ratios {
            let title = format!("{} / {}", ratio.subject, ratio.baseline);
            let (low, high) = range(&ratio.quotients.by_round);
            let median = ratio.quotients.median;
            writeln!(f, "    {title:52}{median:>8.3}   {low:.3} to {high:.3}")?;
        }
        for goal in &self.goals {
            let (sign, bound) = match goal.bound {
                Bound::AtMost(bound) => ("≤", bound),
                Bound::AtLeast(bound) => ("≥", bound),
            };
            let verdict = if goal.reached { "reached" } else { "missed" };
            writeln!(
                f,
                "    goal: {} {sign} {bound}: {:.3}, {verdict}",
                goal.what, goal.found
            )?;
        }
        Ok(())
    }
}

fn range(values: &[f64]) -> (f64, f64) {
    let fold = |start, pick: fn(f64, f64) -> f64| values.iter().copied().fold(start, pick);
    (fold(f64::INFINITY, f64::min), fold(0.0, f64::max))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part() -> Part {
        let samples = vec![
            ("ours".to_owned(), vec![2.0, 30.0, 3.0]),
            ("floor".to_owned(), vec![1.0, 10.0, 2.0]),
        ];
        Part::new("open", "one map", "ms", samples)
    }

    #[test]
    fn ratios_are_formed_within_a_round() {
        let part = part().ratio("ours", "floor");
        assert_eq!(part.ratios[0].quotients.by_round, [2.0, 3.0, 1.5]);
        assert!((part.ratios[0].quotients.median - 2.0).abs() < 1e-9);
    }

    #[test]
    fn goals_are_judged_by_the_median() {
        let part = part()
            .goal("ours", Bound::AtMost(3.0))
            .goal("ours", Bound::AtMost(2.9))
            .ratio("ours", "floor")
            .ratio_goal(Bound::AtLeast(2.5));
        let reached: Vec<_> = part.goals.iter().map(|goal| goal.reached).collect();
        assert_eq!(reached, [true, false, false]);
    }
}
