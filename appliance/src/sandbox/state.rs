//! What may be done to a sandbox in which state: a pure table.
//!
//! ```text
//!   creating ──▶ running ──pause──▶ pausing ──▶ paused ──resume──▶ resuming ──▶ running
//!                  │  ▲                │ failed before its build was published
//!          snapshot│  └────────────────┘
//!                  ▼
//!             snapshotting ──▶ running          (a paused one stays paused)
//!
//!   any ──delete──▶ destroying ──▶ gone          any ──its VMM ended──▶ failed
//! ```

use http_api::ApiError;
use http_api::wire::SandboxState;
use thiserror::Error;

/// What somebody wants of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// To disk.
    Pause,
    /// Back from disk.
    Resume,
    /// A template of it.
    Snapshot,
    /// A command in it.
    Exec,
    /// Away with it.
    Destroy,
}

impl Operation {
    const fn past(self) -> &'static str {
        match self {
            Self::Pause => "paused",
            Self::Resume => "resumed",
            Self::Snapshot => "snapshotted",
            Self::Exec => "used for a command",
            Self::Destroy => "deleted",
        }
    }
}

/// Why it can't be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Denied {
    /// Something else is being done to it.
    #[error("The sandbox is {state}; it can't be {} before that is done", operation.past())]
    Underway {
        /// The state it is in.
        state: SandboxState,
        /// What was asked.
        operation: Operation,
    },
    /// It is where the operation would bring it.
    #[error("The sandbox is {state} already")]
    Already {
        /// The state it is in.
        state: SandboxState,
    },
    /// It has to be resumed first.
    #[error("The sandbox is paused; resume it first, then it can be {}", operation.past())]
    Asleep {
        /// What was asked.
        operation: Operation,
    },
    /// It has failed.
    #[error("The sandbox has failed and can only be deleted")]
    Failed,
}

impl Denied {
    /// The state that forbids it.
    #[must_use]
    pub const fn state(self) -> SandboxState {
        match self {
            Self::Underway { state, .. } | Self::Already { state } => state,
            Self::Asleep { .. } => SandboxState::Paused,
            Self::Failed => SandboxState::Failed,
        }
    }
}

impl From<Denied> for ApiError {
    fn from(denied: Denied) -> Self {
        Self::Denied {
            state: denied.state(),
            detail: denied.to_string(),
        }
    }
}

/// The state a sandbox is in while the operation is carried out.
///
/// # Errors
/// The state forbids the operation.
pub fn begin(state: SandboxState, operation: Operation) -> Result<SandboxState, Denied> {
    use Operation as O;
    use SandboxState as S;
    match (operation, state) {
        (O::Destroy, S::Destroying) | (O::Pause, S::Paused) | (O::Resume, S::Running) => {
            Err(Denied::Already { state })
        }
        (O::Destroy, _) => Ok(S::Destroying),
        (_, S::Failed) => Err(Denied::Failed),
        (_, S::Creating | S::Pausing | S::Resuming | S::Snapshotting | S::Destroying) => {
            Err(Denied::Underway { state, operation })
        }
        (O::Pause, S::Running) => Ok(S::Pausing),
        (O::Resume, S::Paused) => Ok(S::Resuming),
        (O::Snapshot, S::Running) => Ok(S::Snapshotting),
        (O::Snapshot, S::Paused) => Ok(S::Paused),
        (O::Exec, S::Running) => Ok(S::Running),
        (O::Exec, S::Paused) => Err(Denied::Asleep { operation }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [SandboxState; 8] = [
        SandboxState::Creating,
        SandboxState::Running,
        SandboxState::Pausing,
        SandboxState::Paused,
        SandboxState::Resuming,
        SandboxState::Snapshotting,
        SandboxState::Failed,
        SandboxState::Destroying,
    ];

    #[test]
    fn a_sandbox_can_be_deleted_in_any_state_but_once() {
        for state in STATES {
            let allowed = begin(state, Operation::Destroy).is_ok();
            assert_eq!(allowed, state != SandboxState::Destroying, "{state}");
        }
    }

    #[test]
    fn only_settled_states_allow_anything_else() {
        for operation in [
            Operation::Pause,
            Operation::Resume,
            Operation::Snapshot,
            Operation::Exec,
        ] {
            for state in STATES {
                let settled = matches!(state, SandboxState::Running | SandboxState::Paused);
                if !settled {
                    assert!(begin(state, operation).is_err(), "{operation:?} in {state}");
                }
            }
        }
    }

    #[test]
    fn a_refusal_names_the_state() {
        for operation in [
            Operation::Pause,
            Operation::Resume,
            Operation::Snapshot,
            Operation::Exec,
        ] {
            for state in STATES {
                if let Err(denied) = begin(state, operation) {
                    assert_eq!(denied.state(), state);
                    let text = denied.to_string();
                    assert!(text.contains(&state.to_string()), "{text}");
                }
            }
        }
    }

    #[test]
    fn resume_of_a_running_sandbox_is_denied() {
        let denied = begin(SandboxState::Running, Operation::Resume).unwrap_err();
        assert_eq!(
            denied,
            Denied::Already {
                state: SandboxState::Running
            }
        );
    }
}
