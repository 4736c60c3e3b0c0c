//! What happened, on the wire.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::SandboxState;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A sandbox is in another state; `state` says which.
    State,
    /// A sandbox is gone; `reason` says why.
    Deleted,
    /// Events were forgotten: read the list of sandboxes again, then go on from here.
    Reset,
}

impl EventKind {
    /// The name on the wire.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::State => "state",
            Self::Deleted => "deleted",
            Self::Reset => "reset",
        }
    }
}

/// One event of `GET /v1/events`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// Larger than those of all events before, across restarts.
    pub id: u64,
    /// Unix milliseconds.
    pub at_ms: u64,
    /// What it is about.
    pub kind: EventKind,
    /// The sandbox's id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
    /// The state it is in now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<SandboxState>,
    /// The run that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub execution_id: Option<String>,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}
