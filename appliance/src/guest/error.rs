//! Why a guest did not answer as it should.

use std::time::Duration;

use thiserror::Error;

use super::exec::MAX_OUTPUT_BYTES;

/// Why the guest did not answer as it should.
#[derive(Debug, Error)]
pub enum GuestError {
    /// Nobody answered in time.
    #[error("The guest did not answer {path} within {seconds:.1} s")]
    Silent {
        /// What was asked.
        path: String,
        /// How long it had.
        seconds: f64,
    },
    /// It answered with an error.
    #[error("The guest refused {path} with {status}: {body}")]
    Refused {
        /// What was asked.
        path: String,
        /// HTTP status or Connect code.
        status: String,
        /// What it said.
        body: String,
    },
    /// The connection broke.
    #[error("The connection to the guest broke at {path}")]
    Broken {
        /// What was asked.
        path: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A command printed more than is collected.
    #[error(
        "The command printed more than {MAX_OUTPUT_BYTES} bytes; redirect its output to a file"
    )]
    TooMuchOutput,
}

pub(super) fn broken(
    path: &str,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> GuestError {
    GuestError::Broken {
        path: path.to_owned(),
        source: source.into(),
    }
}

pub(super) fn silent(path: &str, patience: Duration) -> GuestError {
    GuestError::Silent {
        path: path.to_owned(),
        seconds: patience.as_secs_f64(),
    }
}
