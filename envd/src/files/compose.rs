//! `POST /files/compose`: several files become one, in order, and are gone afterwards.
//!
//! The bytes are copied inside the kernel, and shared instead of copied where the file system can.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use rustix::fs::{AtFlags, unlinkat};
use serde::Deserialize;

use super::content;
use super::replacement::Replacement;
use super::request::{Written, off_the_loop, owner};
use crate::filesystem::{FileError, GuestPath, Metadata, Owner, Place};
use crate::refusal::{Refusal, json};
use crate::routes::Guest;

/// Most sources of one file.
const MAX_SOURCES: usize = 10_000;

/// The body.
#[derive(Debug, Deserialize)]
struct ComposeRequest {
    source_paths: Vec<String>,
    destination: String,
    #[serde(default)]
    username: Option<String>,
}

/// The route.
pub(crate) async fn compose(
    State(guest): State<Arc<Guest>>,
    body: Bytes,
) -> Result<Response, Refusal> {
    let request: ComposeRequest = serde_json::from_slice(&body)
        .map_err(|e| Refusal::bad_request(format!("The body: {e}")))?;
    if request.source_paths.is_empty() || request.source_paths.len() > MAX_SOURCES {
        let message = format!("Field source_paths: must have 1 to {MAX_SOURCES} paths");
        return Err(Refusal::bad_request(message));
    }
    let owner = owner(&guest, request.username.as_deref())?;
    let destination = owner.path(&request.destination)?;
    let sources = request.source_paths.iter().map(|path| owner.path(path));
    let sources: Vec<GuestPath> = sources.collect::<Result<_, _>>()?;
    let written = Written::new(&destination, &Metadata::new());
    off_the_loop(move || join(&sources, &destination, &owner)).await?;
    Ok(json(StatusCode::OK, &written))
}

fn join(sources: &[GuestPath], destination: &GuestPath, owner: &Owner) -> Result<(), FileError> {
    let mut bytes = 0;
    for source in sources {
        bytes += content::open(source)?.size;
    }
    let replacement = Replacement::begin(destination, owner, bytes)?;
    for source in sources {
        let mut file = content::open(source)?.file;
        std::io::copy(&mut file, &mut replacement.file()).map_err(|e| replacement.failed(&e))?;
    }
    replacement.commit(&Metadata::new())?;
    // Each once; and one that was the destination is the result now.
    let used: BTreeSet<&GuestPath> = sources.iter().filter(|path| *path != destination).collect();
    for source in used {
        let place = Place::of(source)?;
        unlinkat(&place.directory, &place.name, AtFlags::empty())
            .map_err(|e| FileError::new("Removing", source.as_str(), e))?;
    }
    Ok(())
}
