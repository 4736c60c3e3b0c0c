//! What tells the values of one metric apart.

use std::fmt::{self, Write as _};

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Timed {
    /// A sandbox was made, of a disk or of memory.
    Create,
    /// One was written to disk.
    Pause,
    /// One was brought back.
    Resume,
    /// Copies were made of one, however many.
    Fork,
    /// A template was made of one.
    Snapshot,
    /// A command ran, output collected.
    Exec,
    /// One was removed.
    Delete,
}

impl EncodeLabelValue for Timed {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        encoder.write_str(match self {
            Self::Create => "create",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Fork => "fork",
            Self::Snapshot => "snapshot",
            Self::Exec => "exec",
            Self::Delete => "delete",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Operation {
    pub(super) operation: Timed,
    /// `ok`, or the error's code.
    pub(super) outcome: &'static str,
}

/// How far a restore has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Milestone {
    /// Its build was checked.
    Checked,
    /// It has claimed its slot, its disk and, where one waits, its VMM.
    Claimed,
    /// Its VMM has let the guest run.
    Running,
    /// `envd` has answered.
    Answered,
}

impl EncodeLabelValue for Milestone {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        encoder.write_str(match self {
            Self::Checked => "checked",
            Self::Claimed => "claimed",
            Self::Running => "running",
            Self::Answered => "answered",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Until {
    pub(super) until: Milestone,
    /// `waiting` if it found a VMM that waited, `started` if it had to start one.
    pub(super) vmm: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Waiting {
    /// `anybody` or `paused`.
    pub(super) r#for: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct State {
    pub(super) state: String,
}
