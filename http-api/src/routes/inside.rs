//! What is inside of a running sandbox: its processes and its files.

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::{Segment, name};
use crate::body::JsonBody;
use crate::problem::ApiError;
use crate::processes::Processes;
use crate::wire::process::{FileEntry, FilePlace, ProcessInfo, SendSignal, Which, WrittenFile};

type Asked = Result<Query<FilePlace>, QueryRejection>;

fn place(asked: Asked) -> Result<FilePlace, ApiError> {
    let Query(place) = asked.map_err(|error| ApiError::BadRequest {
        field: "query".into(),
        detail: error.body_text(),
    })?;
    if place.path.is_empty() {
        return Err(ApiError::BadRequest {
            field: "path".into(),
            detail: "is empty".into(),
        });
    }
    Ok(place)
}

pub(crate) async fn processes<C: Processes>(
    State(control): State<C>,
    Segment(id): Segment,
) -> Result<Json<Vec<ProcessInfo>>, ApiError> {
    control.processes(name("id", &id)?).await.map(Json)
}

pub(crate) async fn signal<C: Processes>(
    State(control): State<C>,
    path: Result<Path<(String, String)>, PathRejection>,
    JsonBody(request): JsonBody<SendSignal>,
) -> Result<StatusCode, ApiError> {
    let Path((id, pid)) = path.map_err(|error| ApiError::BadRequest {
        field: "path".into(),
        detail: error.body_text(),
    })?;
    let (id, pid) = (name("id", &id)?, name("pid", &pid)?);
    control.signal(id, Which::Pid(pid), request.signal).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn read<C: Processes>(
    State(control): State<C>,
    Segment(id): Segment,
    asked: Asked,
) -> Result<Response, ApiError> {
    let content = control.read_file(name("id", &id)?, place(asked)?).await?;
    let mut response = content.body.into_response();
    let headers = response.headers_mut();
    let kind = HeaderValue::from_static("application/octet-stream");
    headers.insert(header::CONTENT_TYPE, kind);
    if let Some(length) = content.length {
        headers.insert(header::CONTENT_LENGTH, length.into());
    }
    Ok(response)
}

pub(crate) async fn write<C: Processes>(
    State(control): State<C>,
    Segment(id): Segment,
    asked: Asked,
    content: Body,
) -> Result<Json<WrittenFile>, ApiError> {
    let written = control.write_file(name("id", &id)?, place(asked)?, content);
    written.await.map(Json)
}

pub(crate) async fn list<C: Processes>(
    State(control): State<C>,
    Segment(id): Segment,
    asked: Asked,
) -> Result<Json<Vec<FileEntry>>, ApiError> {
    let listed = control.list_files(name("id", &id)?, place(asked)?, 1);
    listed.await.map(Json)
}
