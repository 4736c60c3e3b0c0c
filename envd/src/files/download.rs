//! `GET /files`: a file, or a part of one, as it is or compressed.

use std::io::{self, Read, Seek as _, SeekFrom};
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use flate2::Compression;
use flate2::read::GzEncoder;
use futures_util::stream;
use tokio::sync::mpsc;

use super::content::{self, Content};
use super::encoding::{Coding, coding};
use super::range::{Part, part};
use super::request::{off_the_loop, owner, parameter};
use crate::filesystem::{FileError, GuestPath};
use crate::refusal::Refusal;
use crate::routes::Guest;

/// Bytes that are read at once.
const CHUNK: usize = 256 * 1024;
/// Chunks that wait for a slow client.
const QUEUE: usize = 2;

/// The route.
pub(crate) async fn download(
    State(guest): State<Arc<Guest>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let query = query.as_deref();
    let text =
        parameter(query, "path").ok_or_else(|| Refusal::bad_request("Field path is missing"))?;
    let owner = owner(&guest, parameter(query, "username").as_deref())?;
    let path = owner.path(&text)?;
    let value = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let Some(coding) = coding(value(header::ACCEPT_ENCODING)) else {
        return Err(Refusal {
            status: StatusCode::NOT_ACCEPTABLE,
            message: "Header Accept-Encoding: a file is sent as it is or with gzip".to_owned(),
        });
    };
    let opening = path.clone();
    let opened = off_the_loop(move || content::open(&opening)).await?;
    // A range of what it was before isn't a range of what it is now.
    let fresh = value(header::IF_RANGE).is_none_or(|tag| tag == opened.tag);
    // A file of /proc has no size, but content.
    let part = match (value(header::RANGE).filter(|_| fresh), opened.size) {
        (range @ Some(_), size) if size > 0 => part(range, size),
        _ => Part::Whole,
    };
    respond(&path, opened, part, coding).await
}

async fn respond(
    path: &GuestPath,
    content: Content,
    part: Part,
    coding: Coding,
) -> Result<Response, Refusal> {
    let Content {
        mut file,
        size,
        tag,
    } = content;
    let mut headers = HeaderMap::new();
    let mut put = |name: HeaderName, value: String| {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(name, value);
        }
    };
    put(header::CONTENT_TYPE, "application/octet-stream".to_owned());
    put(header::ACCEPT_RANGES, "bytes".to_owned());
    put(header::ETAG, tag);
    put(header::VARY, "accept-encoding".to_owned());
    put(header::CONTENT_DISPOSITION, disposition(path.name()));
    let (status, length) = match part {
        Part::Unsatisfiable => {
            put(header::CONTENT_RANGE, format!("bytes */{size}"));
            return Ok((StatusCode::RANGE_NOT_SATISFIABLE, headers).into_response());
        }
        Part::Bytes { first, last } => {
            put(
                header::CONTENT_RANGE,
                format!("bytes {first}-{last}/{size}"),
            );
            file.seek(SeekFrom::Start(first))
                .map_err(|e| FileError::io("Reading", path.as_str(), &e))?;
            (StatusCode::PARTIAL_CONTENT, Some(last - first + 1))
        }
        Part::Whole => (StatusCode::OK, (size > 0).then_some(size)),
    };
    // A part of a file is sent as it is.
    let compressed = coding == Coding::Gzip && status == StatusCode::OK;
    let content: Box<dyn Read + Send> = match length {
        Some(length) => Box::new(file.take(length)),
        None => Box::new(file),
    };
    let (content, length): (Box<dyn Read + Send>, _) = if compressed {
        put(header::CONTENT_ENCODING, "gzip".to_owned());
        (Box::new(GzEncoder::new(content, Compression::fast())), None)
    } else {
        (content, length)
    };
    if let Some(length) = length {
        put(header::CONTENT_LENGTH, length.to_string());
    }
    let body = body(path, content, length).await?;
    Ok((status, headers, body).into_response())
}

/// All of a reader: at once if it is short, else chunk by chunk from a thread.
async fn body(
    path: &GuestPath,
    mut content: Box<dyn Read + Send>,
    length: Option<u64>,
) -> Result<Body, Refusal> {
    let name = path.to_string();
    let first = off_the_loop(move || {
        let first = chunk(&mut content).map_err(|e| FileError::io("Reading", &name, &e))?;
        Ok((first, content))
    });
    let (first, mut content) = first.await?;
    let is_all = match length {
        Some(length) => first.len() as u64 == length,
        None => first.len() < CHUNK,
    };
    if is_all {
        return Ok(Body::from(first));
    }
    let (sender, receiver) = mpsc::channel::<io::Result<Bytes>>(QUEUE);
    let mut left = length.map(|length| length - first.len() as u64);
    tokio::task::spawn_blocking(move || {
        if sender.blocking_send(Ok(first)).is_err() {
            return;
        }
        while left != Some(0) {
            let next = chunk(&mut content);
            let has_failed = next.is_err();
            // A file that became shorter ends the body early, which the client sees by its length.
            let is_over = next.as_ref().is_ok_and(Bytes::is_empty);
            if let (Ok(bytes), Some(left)) = (&next, left.as_mut()) {
                *left -= bytes.len() as u64;
            }
            if is_over || sender.blocking_send(next).is_err() || has_failed {
                return;
            }
        }
    });
    let chunks = stream::unfold(receiver, |mut receiver| async move {
        let chunk = receiver.recv().await?;
        Some((chunk, receiver))
    });
    Ok(Body::from_stream(chunks))
}

/// The next chunk: full, unless the content ends in it.
fn chunk(content: &mut dyn Read) -> io::Result<Bytes> {
    let mut bytes = Vec::with_capacity(CHUNK);
    content.take(CHUNK as u64).read_to_end(&mut bytes)?;
    Ok(bytes.into())
}

/// A name that browsers save the file under.
fn disposition(name: &str) -> String {
    let mut text = "inline; filename*=UTF-8''".to_owned();
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_encoded_for_the_header() {
        assert_eq!(
            disposition("a b\".é"),
            "inline; filename*=UTF-8''a%20b%22.%C3%A9"
        );
    }
}
