//! What a request for a file says: which, and for whom.

use axum::http::StatusCode;
use serde::Serialize;

use crate::accounts::Accounts;
use crate::filesystem::{FileError, GuestPath, Metadata, Owner};
use crate::refusal::Refusal;
use crate::routes::Guest;

/// The first value of a parameter in a query string.
pub(crate) fn parameter(query: Option<&str>, name: &str) -> Option<String> {
    form_urlencoded::parse(query.unwrap_or_default().as_bytes())
        .find(|(key, _)| key == name)
        .map(|(_, value)| value.into_owned())
}

/// What is told of a file that was written.
#[derive(Debug, Serialize)]
pub(super) struct Written {
    path: String,
    name: String,
    r#type: &'static str,
    #[serde(skip_serializing_if = "Metadata::is_empty")]
    metadata: Metadata,
}

impl Written {
    pub(super) fn new(path: &GuestPath, metadata: &Metadata) -> Written {
        Written {
            path: path.to_string(),
            name: path.name().to_owned(),
            r#type: "file",
            metadata: metadata.clone(),
        }
    }
}

/// The user of a request, as far as files are concerned.
pub(super) fn owner(guest: &Guest, name: Option<&str>) -> Result<Owner, Refusal> {
    let accounts = Accounts::read().map_err(|e| Refusal::failed("Reading the accounts", &e))?;
    let values = guest.settings.lock().clone();
    let name = name.filter(|name| !name.is_empty());
    Ok(Owner::of(name, &values, &accounts)?)
}

/// Runs what touches the disk on a thread of its own; it goes on if nobody waits for it.
pub(super) async fn off_the_loop<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FileError> + Send + 'static,
) -> Result<T, Refusal> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(error) => Err(Refusal {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            message: error.to_string(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_decoded_as_forms_are() {
        let query = Some("path=%2Fa%20b%2Bc+d&username=&path=second");
        assert_eq!(parameter(query, "path").as_deref(), Some("/a b+c d"));
        assert_eq!(parameter(query, "username").as_deref(), Some(""));
        assert_eq!(parameter(query, "signature"), None);
        assert_eq!(parameter(None, "path"), None);
    }
}
