//! Files in a guest, through its daemon.

use axum::body::Body;
use envd::protocol::FILES_PATH;
use http_api::FileContent;
use http_api::wire::process::{FileEntry, FilePlace, WrittenFile};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request, header};
use serde::Deserialize;
use serde_json::json;

use super::error::broken;
use super::{Guest, GuestError};

/// Connect, unary: the entries of a directory.
const LIST_PATH: &str = "/filesystem.Filesystem/ListDir";
/// Connect, unary: a new directory.
const MAKE_DIR_PATH: &str = "/filesystem.Filesystem/MakeDir";
/// Connect, unary: away with something.
const REMOVE_PATH: &str = "/filesystem.Filesystem/Remove";

/// The path of a request for one file.
fn path_of(place: &FilePlace) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("path", &place.path);
    if let Some(user) = &place.user {
        query.append_pair("username", user);
    }
    format!("{FILES_PATH}?{}", query.finish())
}

impl Guest {
    /// A file's bytes, as they are read.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn read_file(&self, place: &FilePlace) -> Result<FileContent, GuestError> {
        let path = path_of(place);
        let request = Request::builder().method(Method::GET).uri(&path);
        let request = request.body(Full::new(Bytes::new()));
        let request = request.map_err(|error| broken(&path, error))?;
        let response = self.send(&path, request).await?;
        let length = response.headers().get(header::CONTENT_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
        Ok(FileContent {
            length,
            body: Body::new(response.into_body()),
        })
    }

    /// Writes a file as its bytes come.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn write_file(
        &self,
        place: &FilePlace,
        content: Body,
    ) -> Result<WrittenFile, GuestError> {
        #[derive(Deserialize)]
        struct Written {
            path: String,
        }
        let path = path_of(place);
        let request = Request::builder().method(Method::POST).uri(&path);
        let request = request.header("content-type", "application/octet-stream");
        let request = request
            .body(content)
            .map_err(|error| broken(&path, error))?;
        let response = self.send(&path, request).await?;
        let body = response.into_body().collect().await;
        let body = body.map_err(|error| broken(&path, error))?.to_bytes();
        let mut written: Vec<Written> =
            serde_json::from_slice(&body).map_err(|error| broken(&path, error))?;
        match written.pop() {
            Some(Written { path }) => Ok(WrittenFile { path }),
            None => Err(broken(&path, std::io::Error::other("nothing was written"))),
        }
    }

    /// The entries of a directory, down to a depth.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn list_files(
        &self,
        place: &FilePlace,
        depth: u32,
    ) -> Result<Vec<FileEntry>, GuestError> {
        #[derive(Deserialize)]
        struct Listed {
            #[serde(default)]
            entries: Vec<Entry>,
        }
        let message = json!({ "path": place.path, "depth": depth });
        let listed = self.unary(LIST_PATH, &message, place.user.as_deref());
        let listed: Listed =
            serde_json::from_value(listed.await?).map_err(|error| broken(LIST_PATH, error))?;
        Ok(listed.entries.into_iter().map(FileEntry::from).collect())
    }

    /// Makes a directory, with those that it needs.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn make_dir(&self, place: &FilePlace) -> Result<FileEntry, GuestError> {
        #[derive(Deserialize)]
        struct Made {
            entry: Entry,
        }
        let message = json!({ "path": place.path });
        let made = self.unary(MAKE_DIR_PATH, &message, place.user.as_deref());
        let made: Made =
            serde_json::from_value(made.await?).map_err(|error| broken(MAKE_DIR_PATH, error))?;
        Ok(made.entry.into())
    }

    /// Removes a file, or a directory with all that is in it.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn remove_file(&self, place: &FilePlace) -> Result<(), GuestError> {
        let message = json!({ "path": place.path });
        let removed = self.unary(REMOVE_PATH, &message, place.user.as_deref());
        removed.await.map(|_| ())
    }
}

/// Proto3's JSON: what has its default value is left out, 64-bit numbers are texts.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Entry {
    name: String,
    path: String,
    r#type: String,
    size: Option<serde_json::Value>,
    mode: u32,
    owner: String,
    group: String,
    modified_time: Option<String>,
    symlink_target: Option<String>,
}

impl From<Entry> for FileEntry {
    fn from(entry: Entry) -> Self {
        let kind = match entry.r#type.as_str() {
            "FILE_TYPE_FILE" => "file",
            "FILE_TYPE_DIRECTORY" => "directory",
            _ => "other",
        };
        let size = entry.size.and_then(|size| match size {
            serde_json::Value::String(text) => text.parse().ok(),
            other => other.as_u64(),
        });
        Self {
            name: entry.name,
            path: entry.path,
            kind: kind.to_owned(),
            size: size.unwrap_or(0),
            mode: entry.mode,
            owner: entry.owner,
            group: entry.group,
            modified: entry.modified_time,
            symlink_target: entry.symlink_target,
        }
    }
}
