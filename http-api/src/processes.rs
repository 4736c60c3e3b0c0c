//! Processes and files in a running sandbox: the other half of the control plane, which talks to
//! guests.

use std::future::Future;
use std::pin::Pin;

use axum::body::Body;
use futures_util::Stream;

use crate::ids::SandboxId;
use crate::problem::ApiError;
use crate::wire::process::{
    FileEntry, FilePlace, ProcessInfo, ProcessOutput, Signal, StartProcess, TerminalSize, Which,
    WrittenFile,
};

/// What a process says, until it ends or its sandbox leaves.
pub type ProcessStream = Pin<Box<dyn Stream<Item = ProcessOutput> + Send>>;

/// A file on its way out.
pub struct FileContent {
    /// Its size in bytes, where that is known.
    pub length: Option<u64>,
    /// Its bytes.
    pub body: Body,
}

/// Whoever talks to guests. A refusal of the guest is a [`ApiError::BadRequest`] or
/// [`ApiError::NotFound`] with its words.
pub trait Processes: Clone + Send + Sync + 'static {
    /// Starts a process. It goes on when the stream is dropped.
    fn start(
        &self,
        id: SandboxId,
        process: StartProcess,
    ) -> impl Future<Output = Result<ProcessStream, ApiError>> + Send;
    /// Listens to one that runs.
    fn find(
        &self,
        id: SandboxId,
        which: Which,
    ) -> impl Future<Output = Result<ProcessStream, ApiError>> + Send;
    /// Sends bytes to its terminal, or to its standard input.
    fn input(
        &self,
        id: SandboxId,
        which: Which,
        terminal: bool,
        bytes: Vec<u8>,
    ) -> impl Future<Output = Result<(), ApiError>> + Send;
    /// Changes its terminal's size.
    fn resize(
        &self,
        id: SandboxId,
        which: Which,
        size: TerminalSize,
    ) -> impl Future<Output = Result<(), ApiError>> + Send;
    /// Sends a signal to its group.
    fn signal(
        &self,
        id: SandboxId,
        which: Which,
        signal: Signal,
    ) -> impl Future<Output = Result<(), ApiError>> + Send;
    /// Those that callers started and that run.
    fn processes(
        &self,
        id: SandboxId,
    ) -> impl Future<Output = Result<Vec<ProcessInfo>, ApiError>> + Send;
    /// Reads a file.
    fn read_file(
        &self,
        id: SandboxId,
        place: FilePlace,
    ) -> impl Future<Output = Result<FileContent, ApiError>> + Send;
    /// Writes a file, making the directories that it needs.
    fn write_file(
        &self,
        id: SandboxId,
        place: FilePlace,
        content: Body,
    ) -> impl Future<Output = Result<WrittenFile, ApiError>> + Send;
    /// The entries of a directory, and of those in it down to this depth; 1 is its own.
    fn list_files(
        &self,
        id: SandboxId,
        place: FilePlace,
        depth: u32,
    ) -> impl Future<Output = Result<Vec<FileEntry>, ApiError>> + Send;
    /// Makes a directory, with those that it needs. One that is there is an error.
    fn make_dir(
        &self,
        id: SandboxId,
        place: FilePlace,
    ) -> impl Future<Output = Result<FileEntry, ApiError>> + Send;
    /// Removes a file, or a directory with all that is in it.
    fn remove_file(
        &self,
        id: SandboxId,
        place: FilePlace,
    ) -> impl Future<Output = Result<(), ApiError>> + Send;
}
