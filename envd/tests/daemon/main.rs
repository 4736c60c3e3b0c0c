//! The real binary, driven over loopback as a client drives it, without a VM.

mod client;

mod files;
mod filesystem;
mod host_only;
mod input;
mod processes;
mod watch;
