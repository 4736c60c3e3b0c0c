//! Files: whole ones both ways, directories, removal.

use axum::Json;
use axum::body::{Body as Content, Bytes};
use axum::extract::multipart::{MultipartError, MultipartRejection};
use axum::extract::{Multipart, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::refusal::{Body, Id, Refusal, bad};
use super::wire::{At, Entries, Made};
use crate::problem::ApiError;
use crate::processes::Processes;
use crate::wire::process::FilePlace;

/// Pieces of a file that have arrived and are not yet passed on.
const PIECES: usize = 4;
/// The longest path.
const MAX_PATH_BYTES: usize = 4096;

fn place(path: String) -> Result<FilePlace, ApiError> {
    if path.is_empty() {
        return Err(bad("path", "is empty"));
    }
    Ok(FilePlace { path, user: None })
}

pub(super) async fn read<C: Processes>(
    State(control): State<C>,
    Id(id): Id,
    Body(at): Body<At>,
) -> Result<Response, Refusal> {
    let content = control.read_file(id, place(at.path)?).await?;
    let mut response = content.body.into_response();
    let headers = response.headers_mut();
    let kind = HeaderValue::from_static("application/octet-stream");
    headers.insert(header::CONTENT_TYPE, kind);
    if let Some(length) = content.length {
        headers.insert(header::CONTENT_LENGTH, length.into());
    }
    Ok(response)
}

/// A form of `path` and then `file`, which is passed on as it comes.
pub(super) async fn write<C: Processes>(
    State(control): State<C>,
    Id(id): Id,
    form: Result<Multipart, MultipartRejection>,
) -> Result<StatusCode, Refusal> {
    let form = form.map_err(|error| bad("body", error.body_text()))?;
    let (said, path) = oneshot::channel();
    let (pieces, arriving) = mpsc::channel(PIECES);
    // Ends with this request.
    let mut reading = JoinSet::new();
    reading.spawn(take_apart(form, said, pieces));
    let Ok(path) = path.await else {
        let ended = reading.join_next().await;
        let error = ended.and_then(|ended| ended.ok()?.err());
        return Err(error.unwrap_or_else(|| bad("body", "is incomplete")).into());
    };
    let content = stream::unfold(arriving, |mut arriving| async {
        Some((arriving.recv().await?, arriving))
    });
    let content = Content::from_stream(content);
    control.write_file(id, place(path)?, content).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Tells the path of a form, and then passes on its file. A form that breaks off breaks the file
/// off.
async fn take_apart(
    mut form: Multipart,
    said: oneshot::Sender<String>,
    pieces: mpsc::Sender<Result<Bytes, MultipartError>>,
) -> Result<(), ApiError> {
    let mut path = None;
    loop {
        let field = form.next_field().await.map_err(|error| torn(&error))?;
        let mut field = field.ok_or_else(|| bad("file", "is missing"))?;
        match field.name() {
            Some("path") => {
                let text = field.text().await.map_err(|error| torn(&error))?;
                if text.len() > MAX_PATH_BYTES {
                    return Err(bad("path", "is too long"));
                }
                path = Some(text);
            }
            Some("file") => {
                let path = path.ok_or_else(|| bad("path", "is missing before the file"))?;
                let mut wanted = said.send(path).is_ok();
                while wanted {
                    let piece = match field.chunk().await {
                        Ok(Some(piece)) => Ok(piece),
                        Ok(None) => break,
                        Err(error) => Err(error),
                    };
                    let broken = piece.is_err();
                    wanted = pieces.send(piece).await.is_ok() && !broken;
                }
                return Ok(());
            }
            _ => {}
        }
    }
}

fn torn(error: &MultipartError) -> ApiError {
    bad("body", error.body_text())
}

pub(super) async fn list<C: Processes>(
    State(control): State<C>,
    Id(id): Id,
    Body(at): Body<At>,
) -> Result<Json<Entries>, Refusal> {
    // 0 and 1 are the same to these clients: the directory's own entries.
    let depth = at.depth.unwrap_or(1).max(1);
    let entries = control.list_files(id, place(at.path)?, depth).await?;
    let entries = entries.into_iter().map(Into::into).collect();
    Ok(Json(Entries { entries }))
}

pub(super) async fn make_dir<C: Processes>(
    State(control): State<C>,
    Id(id): Id,
    Body(at): Body<At>,
) -> Result<(StatusCode, Json<Made>), Refusal> {
    let entry = control.make_dir(id, place(at.path)?).await?.into();
    Ok((StatusCode::CREATED, Json(Made { entry })))
}

pub(super) async fn remove<C: Processes>(
    State(control): State<C>,
    Id(id): Id,
    Body(at): Body<At>,
) -> Result<StatusCode, Refusal> {
    control.remove_file(id, place(at.path)?).await?;
    Ok(StatusCode::NO_CONTENT)
}
