//! The HTTP API of a sandbox host: what it says on the wire, and nothing of what
//! happens behind it.
//!
//! A request becomes a wire type ([`wire`]), passes validation that needs no state
//! ([`body`], [`ids`]), and reaches the [`ControlPlane`], whoever implements it. Every
//! error leaves as `application/problem+json` ([`problem`]).
//!
//! # Architecture invariant
//! Knows no VMM, no file, no thread of the daemon. Whatever can be refused by looking
//! at the request alone is refused here; whatever needs state is refused by the
//! [`ControlPlane`], with an error of [`problem::ApiError`]'s kinds.

pub mod body;
pub mod ids;
pub mod problem;
pub mod wire;

mod control_plane;
mod router;
mod routes;

pub use control_plane::{ControlPlane, Readiness};
pub use problem::ApiError;
pub use router::router;
