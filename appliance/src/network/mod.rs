//! Network slots: a namespace, a link to the host and a tap for each sandbox.
//!
//! Addresses are arithmetic ([`address`]), rules are values ([`rules`]), building is
//! netlink ([`slot`]); one thread does it ([`slots`]), mostly ahead, because a thread must change its
//! namespace to make another's content, and no other thread of the daemon should.

pub mod address;
mod attribute;
pub mod namespace;
pub mod nftables;
pub mod range;
mod ready;
pub mod rules;
mod shaping;
pub mod slot;
pub mod slots;

pub use address::{Pool, SlotIndex};
pub use ready::Depth;
pub use rules::Egress;
pub use slot::{Slot, SlotError};
pub use slots::Slots;
