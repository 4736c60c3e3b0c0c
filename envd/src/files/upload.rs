//! `POST /files`: one file as the body, or one or many as the parts of a form.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use flate2::write::MultiGzDecoder;
use futures_util::{Stream, StreamExt as _};
use tokio::sync::mpsc;

use super::disposition::file_name;
use super::replacement::Replacement;
use super::request::{Written, owner, parameter};
use crate::filesystem::{GuestPath, Metadata, Owner, checked_metadata};
use crate::refusal::{Refusal, json};
use crate::routes::Guest;

/// Pieces of a body that wait for the disk.
const QUEUE: usize = 4;
/// Name of the parts that are files; others are left alone.
const FIELD: &str = "file";
/// How a header begins whose rest is the key of metadata.
const METADATA_PREFIX: &str = "x-metadata-";
/// How long the rest of a body is taken after it was refused, so that its sender, who writes first
/// and reads afterwards, gets to read why.
const DRAIN: Duration = Duration::from_secs(5);

/// A body on its way to the disk. A queue that closes without the end is a body that broke off.
enum Piece {
    Bytes(Bytes),
    End,
}

/// What goes for all files of a request.
struct Form {
    owner: Owner,
    /// The parameter, which wins over names of parts.
    path: Option<String>,
    metadata: Metadata,
    gzip: bool,
}

/// The route.
pub(crate) async fn upload(
    State(guest): State<Arc<Guest>>,
    request: Request,
) -> Result<Response, Refusal> {
    let (head, body) = request.into_parts();
    let query = head.uri.query();
    let form = Form {
        owner: owner(&guest, parameter(query, "username").as_deref())?,
        path: parameter(query, "path").filter(|path| !path.is_empty()),
        metadata: metadata(&head.headers)?,
        gzip: gzip(&head.headers)?,
    };
    let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
    let mut body = body.into_data_stream();
    let written = match text(header::CONTENT_TYPE).map(multer::parse_boundary) {
        Some(Ok(boundary)) => form.parts(&mut body, boundary).await,
        // Any other type is a file.
        _ => {
            let length = text(header::CONTENT_LENGTH).and_then(|length| length.parse().ok());
            form.whole(&mut body, length.unwrap_or(0)).await
        }
    };
    if written.is_err() {
        let drained = async { while let Some(Ok(_)) = body.next().await {} };
        let _ = tokio::time::timeout(DRAIN, drained).await;
    }
    Ok(json(StatusCode::OK, &written?))
}

impl Form {
    async fn whole(
        &self,
        body: &mut (impl Stream<Item = Result<Bytes, axum::Error>> + Unpin),
        length: u64,
    ) -> Result<Vec<Written>, Refusal> {
        let Some(path) = &self.path else {
            return Err(Refusal::bad_request("Field path is missing"));
        };
        let path = self.owner.path(path)?;
        let pieces = body.map(|piece| piece.map_err(|e| broke_off(&e)));
        self.write(&path, pieces, length).await?;
        Ok(vec![Written::new(&path, &self.metadata)])
    }

    async fn parts(
        &self,
        body: &mut (impl Stream<Item = Result<Bytes, axum::Error>> + Unpin + Send),
        boundary: String,
    ) -> Result<Vec<Written>, Refusal> {
        if self.gzip {
            let message = "Header Content-Encoding: gzip is for a single file, not for a form";
            return Err(Refusal::bad_request(message));
        }
        let mut form = multer::Multipart::new(body, boundary);
        let mut written: Vec<(GuestPath, Written)> = Vec::new();
        while let Some(field) = form.next_field().await.map_err(|e| broke_off(&e))? {
            if field.name() != Some(FIELD) {
                continue;
            }
            let disposition = field.headers().get(header::CONTENT_DISPOSITION);
            let name = disposition.and_then(|value| file_name(value.as_bytes()));
            let Some(text) = self.path.clone().or(name.filter(|name| !name.is_empty())) else {
                let message = "Field path is missing, and a part has no readable file name";
                return Err(Refusal::bad_request(message));
            };
            let path = self.owner.path(&text)?;
            if written.iter().any(|(other, _)| *other == path) {
                let message = format!("Field path: two parts are to be {:?}", path.as_str());
                return Err(Refusal::bad_request(message));
            }
            let pieces = field.map(|piece| piece.map_err(|e| broke_off(&e)));
            self.write(&path, pieces, 0).await?;
            let told = Written::new(&path, &self.metadata);
            written.push((path, told));
        }
        if written.is_empty() {
            let message = format!("The form has no part with the name {FIELD:?}");
            return Err(Refusal::bad_request(message));
        }
        Ok(written.into_iter().map(|(_, told)| told).collect())
    }

    /// Writes one file as it arrives.
    async fn write(
        &self,
        path: &GuestPath,
        mut pieces: impl Stream<Item = Result<Bytes, Refusal>> + Unpin,
        length: u64,
    ) -> Result<(), Refusal> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (path, owner) = (path.clone(), self.owner.clone());
        let (metadata, gzip) = (self.metadata.clone(), self.gzip);
        let writer = tokio::task::spawn_blocking(move || {
            let replacement = Replacement::begin(&path, &owner, length)?;
            fill(&replacement, receiver, gzip)?;
            Ok::<_, Refusal>(replacement.commit(&metadata)?)
        });
        let mut broken = None;
        while let Some(piece) = pieces.next().await {
            match piece {
                Ok(bytes) => {
                    if sender.send(Piece::Bytes(bytes)).await.is_err() {
                        // The writer has failed, and says why below.
                        break;
                    }
                }
                Err(refusal) => {
                    broken = Some(refusal);
                    break;
                }
            }
        }
        if broken.is_none() {
            let _ = sender.send(Piece::End).await;
        }
        drop(sender);
        let written = writer.await;
        if let Some(refusal) = broken {
            return Err(refusal);
        }
        written.map_err(|e| Refusal::failed("Writing the file", &io::Error::other(e)))?
    }
}

/// Writes all pieces; an error when they broke off.
fn fill(
    replacement: &Replacement,
    mut pieces: mpsc::Receiver<Piece>,
    gzip: bool,
) -> Result<(), Refusal> {
    let mut plain = replacement.file();
    let mut decoder = gzip.then(|| MultiGzDecoder::new(replacement.file()));
    loop {
        match pieces.blocking_recv() {
            Some(Piece::Bytes(bytes)) => match &mut decoder {
                Some(decoder) => decoder
                    .write_all(&bytes)
                    .map_err(|e| not_written(replacement, &e))?,
                None => plain
                    .write_all(&bytes)
                    .map_err(|e| replacement.failed(&e))?,
            },
            Some(Piece::End) => break,
            None => return Err(Refusal::bad_request("The body broke off")),
        }
    }
    if let Some(decoder) = decoder {
        decoder.finish().map_err(|e| not_written(replacement, &e))?;
    }
    Ok(())
}

/// An error of the disk has an errno; one without is the decoder's.
fn not_written(replacement: &Replacement, error: &io::Error) -> Refusal {
    match error.raw_os_error() {
        Some(_) => replacement.failed(error).into(),
        None => Refusal::bad_request(format!("The body is not complete gzip: {error}")),
    }
}

fn broke_off(error: &dyn std::error::Error) -> Refusal {
    Refusal::bad_request(format!("The body broke off: {error}"))
}

fn metadata(headers: &HeaderMap) -> Result<Metadata, Refusal> {
    let pairs = headers.iter().filter_map(|(name, value)| {
        let key = name.as_str().strip_prefix(METADATA_PREFIX)?;
        Some((key, value.as_bytes()))
    });
    checked_metadata(pairs).map_err(|e| Refusal::bad_request(e.to_string()))
}

fn gzip(headers: &HeaderMap) -> Result<bool, Refusal> {
    let Some(encoding) = headers.get(header::CONTENT_ENCODING) else {
        return Ok(false);
    };
    match encoding.to_str().map(str::trim).unwrap_or_default() {
        "" | "identity" => Ok(false),
        name if name.eq_ignore_ascii_case("gzip") => Ok(true),
        name => Err(Refusal {
            status: StatusCode::UNSUPPORTED_MEDIA_TYPE,
            message: format!("Header Content-Encoding: {name:?} is not gzip"),
        }),
    }
}
