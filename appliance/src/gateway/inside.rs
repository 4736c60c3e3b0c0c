//! Processes and files in running sandboxes: finds the guest, and puts its refusals into the
//! words of the API.

use axum::body::Body;
use http_api::ids::SandboxId;
use http_api::wire::process::{
    FileEntry, FilePlace, ProcessInfo, Signal, StartProcess, TerminalSize, Which, WrittenFile,
};
use http_api::{ApiError, FileContent, ProcessStream, Processes};
use serde::Deserialize;

use super::Gateway;
use crate::guest::{Guest, GuestError, Left};
use crate::shard::Request;

impl Gateway {
    /// The guest of a running sandbox, and what tells when it no longer is one.
    async fn guest(&self, id: &SandboxId) -> Result<(Guest, Left), ApiError> {
        let route = self.ask(id, |reply| Request::Route(id.clone(), reply));
        let mut route = route.await?;
        let guest = Guest::at(route.address).with_token(route.access_token.take());
        let left = Box::pin(async move { super::refusal::left_in(route.left().await) });
        Ok((guest, left))
    }
}

impl Processes for Gateway {
    async fn start(&self, id: SandboxId, process: StartProcess) -> Result<ProcessStream, ApiError> {
        let (guest, left) = self.guest(&id).await?;
        let started = guest.start(&process, left).await;
        started.map_err(|error| judged(&error, "cmd", "program", &process.cmd))
    }

    async fn find(&self, id: SandboxId, which: Which) -> Result<ProcessStream, ApiError> {
        let (guest, left) = self.guest(&id).await?;
        let name = shown(&which);
        let found = guest.find(which, left).await;
        found.map_err(|error| judged(&error, "process", "process", &name))
    }

    async fn input(
        &self,
        id: SandboxId,
        which: Which,
        terminal: bool,
        bytes: Vec<u8>,
    ) -> Result<(), ApiError> {
        let (guest, _) = self.guest(&id).await?;
        let name = shown(&which);
        let sent = guest.input(which, terminal, &bytes).await;
        sent.map_err(|error| judged(&error, "input", "process", &name))
    }

    async fn resize(
        &self,
        id: SandboxId,
        which: Which,
        size: TerminalSize,
    ) -> Result<(), ApiError> {
        let (guest, _) = self.guest(&id).await?;
        let name = shown(&which);
        let resized = guest.resize(which, size).await;
        resized.map_err(|error| judged(&error, "size", "process", &name))
    }

    async fn signal(&self, id: SandboxId, which: Which, signal: Signal) -> Result<(), ApiError> {
        let (guest, _) = self.guest(&id).await?;
        let name = shown(&which);
        let sent = guest.signal(which, signal).await;
        sent.map_err(|error| judged(&error, "signal", "process", &name))
    }

    async fn processes(&self, id: SandboxId) -> Result<Vec<ProcessInfo>, ApiError> {
        let (guest, _) = self.guest(&id).await?;
        let listed = guest.processes().await;
        listed.map_err(|error| judged(&error, "id", "sandbox", id.as_str()))
    }

    async fn read_file(&self, id: SandboxId, place: FilePlace) -> Result<FileContent, ApiError> {
        let (guest, _) = self.guest(&id).await?;
        let content = guest.read_file(&place).await;
        content.map_err(|error| judged(&error, "path", "file", &place.path))
    }

    async fn write_file(
        &self,
        id: SandboxId,
        place: FilePlace,
        content: Body,
    ) -> Result<WrittenFile, ApiError> {
        let (guest, _) = self.guest(&id).await?;
        let written = guest.write_file(&place, content).await;
        written.map_err(|error| judged(&error, "path", "file", &place.path))
    }

    async fn list_files(
        &self,
        id: SandboxId,
        place: FilePlace,
        depth: u32,
    ) -> Result<Vec<FileEntry>, ApiError> {
        let (guest, _) = self.guest(&id).await?;
        let listed = guest.list_files(&place, depth).await;
        listed.map_err(|error| judged(&error, "path", "directory", &place.path))
    }

    async fn make_dir(&self, id: SandboxId, place: FilePlace) -> Result<FileEntry, ApiError> {
        let (guest, _) = self.guest(&id).await?;
        let made = guest.make_dir(&place).await;
        made.map_err(|error| judged(&error, "path", "directory", &place.path))
    }

    async fn remove_file(&self, id: SandboxId, place: FilePlace) -> Result<(), ApiError> {
        let (guest, _) = self.guest(&id).await?;
        let removed = guest.remove_file(&place).await;
        removed.map_err(|error| judged(&error, "path", "file", &place.path))
    }
}

fn shown(which: &Which) -> String {
    match which {
        Which::Pid(pid) => pid.to_string(),
        Which::Tag(tag) => tag.clone(),
    }
}

/// What the guest's daemon said, in the API's words.
fn judged(error: &GuestError, field: &str, what: &'static str, name: &str) -> ApiError {
    #[derive(Deserialize)]
    struct Said {
        message: String,
    }
    let GuestError::Refused { status, body, .. } = error else {
        return ApiError::failed("guest_failed", error);
    };
    if status.starts_with("404") || status == "not_found" {
        let name = name.to_owned();
        return ApiError::NotFound { what, name };
    }
    if status.starts_with("409") || status == "already_exists" {
        let name = name.to_owned();
        return ApiError::Exists { what, name };
    }
    let said: Result<Said, _> = serde_json::from_str(body);
    let detail = said.map_or_else(|_| body.clone(), |said| said.message);
    if status.starts_with("507") {
        return ApiError::Full { detail };
    }
    if status.starts_with('5') || matches!(status.as_str(), "internal" | "unavailable") {
        return ApiError::failed("guest_failed", error);
    }
    let field = field.to_owned();
    ApiError::BadRequest { field, detail }
}
