//! A report as text.

use std::fmt::{self, Display, Formatter};

use super::ratio::{Quotients, median};
use super::{PageFaultReport, SubjectReport};

impl Display for PageFaultReport {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.head(f)?;
        self.faults(f)?;
        self.passes(f)?;
        self.warnings(f)
    }
}

impl PageFaultReport {
    fn head(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (host, setup) = (&self.host, &self.setup);
        writeln!(f, "{}: {}, {}", self.bench, setup.closed_loop, setup.source)?;
        host.head(f)?;
        writeln!(f, "  VMM      {}", setup.vmm)?;
        let cpus = setup.cpus;
        let cores = if cpus.faulter == cpus.worker {
            "same core"
        } else {
            "two cores"
        };
        writeln!(
            f,
            "  pinned   {cores}: faulter CPU {}, worker CPU {}",
            cpus.faulter, cpus.worker
        )?;
        writeln!(
            f,
            "  touches  {:?} order, seed {}; {} rounds of {} pages of {} bytes, after {} not counted",
            setup.order,
            setup.seed,
            setup.rounds,
            setup.touches_per_round,
            setup.page_bytes,
            setup.warm_up_rounds
        )
    }

    /// Subjects of which every touch is one fault.
    fn faults(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let title = "one fault, µs";
        writeln!(
            f,
            "\n  {title:26}{:>9}{:>9}{:>9}{:>9}{:>9}{:>10}",
            "count", "p50", "p90", "p99", "p99.9", "max"
        )?;
        for subject in &self.subjects {
            let Some(us) = subject.fault_us else { continue };
            writeln!(
                f,
                "  {:26}{:>9}{:>9.2}{:>9.2}{:>9.2}{:>9.2}{:>10.2}",
                subject.name, us.count, us.p50, us.p90, us.p99, us.p99_9, us.max
            )?;
        }
        writeln!(f)?;
        for ratio in &self.ratios {
            for (what, quotients) in [("p50", &ratio.p50), ("p99", &ratio.p99)] {
                let Some(quotients) = quotients else { continue };
                let title = format!("{}/{}, {what}", ratio.subject, ratio.baseline);
                line_of(f, &title, quotients)?;
            }
        }
        Ok(())
    }

    /// All subjects, by the time that the whole memory took.
    fn passes(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let title = "whole pass";
        writeln!(
            f,
            "\n  {title:26}{:>9}{:>14}{:>12}{:>10}",
            "window", "faults/round", "µs/page", "ratio"
        )?;
        for subject in &self.subjects {
            let us: Vec<f64> = subject.rounds.iter().map(|r| r.pass_us_per_page).collect();
            let ratio = self.ratios.iter().find(|r| r.subject == subject.name);
            writeln!(
                f,
                "  {:26}{:>9}{:>14}{:>12.2}{:>10.3}",
                subject.name,
                subject.window_pages,
                faults_per_round(subject),
                median(&us),
                ratio.map_or(1.0, |r| r.pass.median)
            )?;
        }
        Ok(())
    }

    fn warnings(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.setup.rounds < 3 {
            writeln!(f, "\n  Fewer than 3 rounds: this is no measurement")?;
        }
        if !self.host.optimised {
            writeln!(f, "\n  Debug build: this is no measurement; use --release")?;
        }
        let rounds = self.subjects.iter().flat_map(|subject| &subject.rounds);
        let from_disk: u64 = rounds.map(|round| round.pages_from_disk).sum();
        if from_disk > 0 && self.setup.source.starts_with("warm") {
            writeln!(f, "\n  Not warm: {from_disk} pages came from the disk")?;
        }
        Ok(())
    }
}

fn line_of(f: &mut Formatter<'_>, title: &str, quotients: &Quotients) -> fmt::Result {
    let rounds: Vec<String> = quotients
        .by_round
        .iter()
        .map(|ratio| format!("{ratio:.3}"))
        .collect();
    writeln!(
        f,
        "  {title:37} {:.3}   median of rounds: {}",
        quotients.median,
        rounds.join(" ")
    )
}

fn faults_per_round(subject: &SubjectReport) -> String {
    let total: Option<u64> = subject.rounds.iter().map(|round| round.faults).sum();
    let per_round = |total| total / subject.rounds.len().max(1) as u64;
    total.map_or_else(|| "unsaid".to_owned(), |total| per_round(total).to_string())
}
