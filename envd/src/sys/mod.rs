//! The only unsafe code of the daemon: what nix doesn't wrap safely. Decisions are made elsewhere.

pub(crate) mod entropy;
pub(crate) mod launch;
pub(crate) mod loopback;
pub(crate) mod readiness;
pub(crate) mod trim;
pub(crate) mod wait;
