//! What callers are told that don't get what they asked for.

use http_api::ApiError;
use http_api::wire::SandboxState;

use crate::catalogue::CatalogueError;
use crate::guest::GuestError;

/// What is told to whoever listens to a command of a sandbox that no longer runs.
pub(super) fn left_in(state: SandboxState) -> String {
    match state {
        SandboxState::Pausing | SandboxState::Paused => {
            "The sandbox was paused; the command goes on when it is resumed, but the rest of its \
             output is lost"
                .to_owned()
        }
        state => format!("The sandbox is {state} now, and the command went with it"),
    }
}

pub(super) fn task_failed() -> ApiError {
    ApiError::Failed {
        code: "internal",
        detail: "The task that did it failed".into(),
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "the shape that `map_err` wants"
)]
pub(super) fn catalogue_failed(error: CatalogueError) -> ApiError {
    ApiError::failed("catalogue_failed", &error)
}

pub(super) fn exec_failed(error: &GuestError) -> ApiError {
    match error {
        // The guest's daemon has judged the request.
        GuestError::Refused { body, .. } => ApiError::BadRequest {
            field: "cmd".into(),
            detail: body.clone(),
        },
        GuestError::TooMuchOutput => ApiError::BadRequest {
            field: "cmd".into(),
            detail: error.to_string(),
        },
        GuestError::Silent { .. } | GuestError::Broken { .. } => {
            ApiError::failed("guest_failed", error)
        }
    }
}
