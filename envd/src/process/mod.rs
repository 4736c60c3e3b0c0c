//! Processes that clients start: from the request to the last event.
//!
//! ```text
//! Start ─▶ launch (who, where, with what) ─▶ children (fork under the reaper's lock)
//!                                               │ pid            │ exit status, exactly once
//!    output (stdout, stderr; or terminal) ◀─────┘                ▼
//!                 │ chunks                                   table::supervise
//!                 └────────▶ audience (bounded) ◀── End ─────────┘
//!                                └─▶ events ─▶ the client's stream
//! ```
//!
//! - A client that disconnects ends nothing; a deadline kills the process group.
//! - While a client is attached, a full queue holds the process's output back; nothing is dropped.
//!   With nobody attached, output is read and thrown away, so that the process never blocks on it.
//! - A pid is signalled only while its process is unreaped, so never somebody else's.

mod audience;
mod children;
mod events;
mod input;
mod launch;
mod output;
pub(crate) mod service;
mod streams;
mod table;
mod terminal;

pub(crate) use table::Processes;
