//! The HTTP API of a sandbox host: what it says on the wire, and nothing of what
//! happens behind it.
//!
//! A request becomes a wire type ([`wire`]), passes validation that needs no state
//! ([`body`], [`ids`]), and reaches the [`ControlPlane`], whoever implements it. Every
//! error leaves as `application/problem+json` ([`problem`]).
//!
//! The same control plane answers clients of E2B ([`e2b`]) and of Wrenn in their words, and what runs inside
//! sandboxes is reached through a listener of its own ([`traffic`]). Who may ask is decided before
//! any route ([`auth`]); what a connection may cost, before any request ([`server`]); what a request
//! may, by the listener's [`options`]. Which request something is done for travels along ([`context`]).
//!
//! # Architecture invariant
//! Knows no VMM, no file, no thread of the daemon. Whatever can be refused by looking
//! at the request alone is refused here; whatever needs state is refused by the
//! [`ControlPlane`], with an error of [`problem::ApiError`]'s kinds.

pub mod ids;
pub mod wire;

pub mod auth;
pub mod body;
pub mod context;
pub mod options;
pub mod problem;
pub mod server;

mod clock;
mod control_plane;
mod openapi;
mod processes;
mod router;
mod routes;
mod stream;

pub mod e2b;
pub mod traffic;
mod wrenn;

pub use control_plane::{Aim, ControlPlane, EventStream, Readiness};
pub use openapi::document as openapi;
pub use problem::ApiError;
pub use processes::{FileContent, ProcessStream, Processes};
pub use router::{router, routes};
pub use traffic::{Traffic, Way};
