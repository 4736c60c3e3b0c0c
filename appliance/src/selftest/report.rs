//! What a trial found, for a person and as JSON.

use std::time::Duration;

use serde::Serialize;

/// One step and what it took.
#[derive(Debug, Serialize)]
pub(super) struct Step {
    pub(super) name: String,
    pub(super) ms: f64,
}

/// The whole trial.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    pub(super) vmm: String,
    pub(super) vmm_reason: String,
    pub(super) disks: String,
    pub(super) steps: Vec<Step>,
    pub(super) guest_pages: u64,
    pub(super) base_pages: u64,
    pub(super) diff_pages: u64,
    pub(super) faults: u64,
    pub(super) fault_us_p50: f64,
    pub(super) fault_us_p99: f64,
    pub(super) pages_resident_after_resume: u64,
    pub(super) memory_intact: bool,
    pub(super) process_survived: bool,
    pub(super) clones_are_separate: bool,
    pub(super) leftovers: Vec<String>,
}

impl Report {
    pub(super) fn time(&mut self, name: &str, took: Duration) {
        self.steps.push(Step {
            name: name.to_owned(),
            ms: took.as_secs_f64() * 1000.0,
        });
    }

    pub(super) fn is_good(&self) -> bool {
        self.memory_intact
            && self.process_survived
            && self.clones_are_separate
            && self.leftovers.is_empty()
    }

    pub(super) fn print(&self) {
        let width = self
            .steps
            .iter()
            .map(|step| step.name.len())
            .max()
            .unwrap_or(0)
            .max(30);
        println!("\n{:width$}  {:>10}", "step", "ms");
        println!("{:─<width$}  {:─>10}", "", "");
        for step in &self.steps {
            println!("{:width$}  {:>10.1}", step.name, step.ms);
        }
        println!("{:─<width$}  {:─>10}", "", "");
        let percent = |part: u64| 100.0 * part as f64 / self.guest_pages.max(1) as f64;
        let numbers = [
            ("pages of the guest", format!("{}", self.guest_pages), None),
            (
                "pages in its first build",
                self.base_pages.to_string(),
                Some(self.base_pages),
            ),
            (
                "pages in the diff after resume",
                self.diff_pages.to_string(),
                Some(self.diff_pages),
            ),
            (
                "pages resident right after resume",
                self.pages_resident_after_resume.to_string(),
                Some(self.pages_resident_after_resume),
            ),
            ("faults served", self.faults.to_string(), None),
            (
                "fault service p50, µs",
                format!("{:.1}", self.fault_us_p50),
                None,
            ),
            (
                "fault service p99, µs",
                format!("{:.1}", self.fault_us_p99),
                None,
            ),
        ];
        for (name, value, pages) in numbers {
            let share = pages.map(|pages| format!("  {:.1} %", percent(pages)));
            println!("{name:width$}  {value:>10}{}", share.unwrap_or_default());
        }
        println!("{:─<width$}  {:─>10}", "", "");
        let yes_or_no = |good: bool| if good { "yes" } else { "NO" };
        println!(
            "{:width$}  {:>10}",
            "memory intact (SHA-256)",
            yes_or_no(self.memory_intact)
        );
        println!(
            "{:width$}  {:>10}",
            "process went on (same pid)",
            yes_or_no(self.process_survived)
        );
        println!(
            "{:width$}  {:>10}",
            "clones are separate",
            yes_or_no(self.clones_are_separate)
        );
        println!("{:width$}  {:>10}", "left over", self.leftovers.len());
        for leftover in &self.leftovers {
            println!("  ! {leftover}");
        }
        println!("\nVMM: {}\n     {}", self.vmm, self.vmm_reason);
        println!("Disks: {}", self.disks);
    }
}
