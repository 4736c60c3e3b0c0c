//! One sandbox: one task owns it, one table judges requests, one file per thing that can
//! be done to it.
//!
//! The [`cell`] is what everybody may see of a sandbox; the [`owner`] is the task that
//! changes it, one operation after the other. Rules that hold through every failure:
//!
//! - a pause that fails before its build is published leaves the sandbox running;
//! - a resume that fails leaves it paused, its build untouched;
//! - a snapshot never changes the sandbox;
//! - a guest that runs when its daemon dies runs on, and is the next daemon's;
//! - a row is in the catalogue before anything on the host exists, and leaves it last.

pub mod cell;
pub mod connections;
pub mod owner;
pub mod state;

pub mod adoption;
mod boot;
mod disk_limits;
mod error;
mod expiry;
mod live;
mod restore;
pub mod snapshot;
mod templating;

pub use cell::Cell;
pub use connections::{Connection, Connections};
pub use error::OperationError;
pub use owner::{Given, Job, Owner, Reply};
pub use templating::NewTemplate;
