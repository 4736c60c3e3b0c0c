//! Messages and service trait generated from `proto/` by the build script; nothing is edited here.
#![expect(unreachable_pub, unexpected_cfgs, reason = "generated code")]
#![allow(
    clippy::all,
    clippy::pedantic,
    unused_qualifications,
    reason = "generated code"
)]

connectrpc::include_generated!();
