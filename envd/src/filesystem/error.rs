//! Why something could not be done to a file; an errno gets its meaning here, once.

use axum::http::StatusCode;
use connectrpc::{ConnectError, ErrorCode};
use rustix::io::Errno;

use super::path::PathError;
use crate::refusal::Refusal;

/// One variant per thing that a client can do differently. Each names its path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FileError {
    /// The path can't be one.
    #[error("Field path: {0}")]
    Path(#[from] PathError),
    /// Nobody of that name, so nowhere to start and nobody to own what is made.
    #[error("No user {0:?} in this guest")]
    NoSuchUser(String),
    /// It, or a directory on the way to it, isn't there.
    #[error("No file or directory {0:?}")]
    NotFound(String),
    /// It is there already.
    #[error("{0:?} exists already")]
    Exists(String),
    /// The operation is for directories.
    #[error("{0:?} is not a directory")]
    NotADirectory(String),
    /// The operation is for files.
    #[error("{0:?} is a directory")]
    IsADirectory(String),
    /// What was asked can't be done to this path.
    #[error("{path:?}: {reason}")]
    Unsuitable { path: String, reason: &'static str },
    /// The guest's kernel forbids it even to root.
    #[error("{operation} {path:?} is not permitted")]
    Denied {
        operation: &'static str,
        path: String,
    },
    /// The file system, or a quota, is full.
    #[error("{operation} {path:?}: no space left")]
    NoSpace {
        operation: &'static str,
        path: String,
    },
    /// More than is given in one answer, or watched at once.
    #[error("{path:?}: more than {limit} {what}")]
    TooMany {
        path: String,
        limit: usize,
        what: &'static str,
    },
    /// A watch had more to tell than was taken from it; what was told until then is complete.
    #[error("Watching {0:?}: too many changes at once, some were lost; list it and watch anew")]
    Lost(String),
    /// Anything else that the kernel said.
    #[error("{operation} {path:?}: {errno}")]
    Failed {
        operation: &'static str,
        path: String,
        errno: Errno,
    },
}

impl FileError {
    /// What an errno means for an operation on a path.
    pub(crate) fn new(operation: &'static str, path: &str, errno: Errno) -> FileError {
        let path = path.to_owned();
        let unsuitable = |path, reason| FileError::Unsuitable { path, reason };
        match errno {
            Errno::NOENT => FileError::NotFound(path),
            Errno::EXIST => FileError::Exists(path),
            Errno::NOTDIR => FileError::NotADirectory(path),
            Errno::ISDIR => FileError::IsADirectory(path),
            Errno::NOTEMPTY => unsuitable(path, "the directory is not empty"),
            Errno::LOOP => unsuitable(path, "too many or forbidden symbolic links"),
            Errno::NAMETOOLONG => FileError::Path(PathError::TooLong),
            Errno::INVAL => unsuitable(path, "not possible with this path"),
            Errno::BUSY => unsuitable(path, "something is mounted there"),
            Errno::ACCESS | Errno::PERM | Errno::ROFS => FileError::Denied { operation, path },
            Errno::NOSPC | Errno::DQUOT => FileError::NoSpace { operation, path },
            errno => FileError::Failed {
                operation,
                path,
                errno,
            },
        }
    }

    /// The same for errors of the standard library.
    pub(crate) fn io(operation: &'static str, path: &str, error: &std::io::Error) -> FileError {
        let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
        FileError::new(operation, path, errno)
    }
}

impl From<FileError> for ConnectError {
    fn from(error: FileError) -> ConnectError {
        let code = match &error {
            FileError::NotFound(_) => ErrorCode::NotFound,
            FileError::Exists(_) => ErrorCode::AlreadyExists,
            FileError::NoSuchUser(_) => ErrorCode::Unauthenticated,
            FileError::Path(_)
            | FileError::NotADirectory(_)
            | FileError::IsADirectory(_)
            | FileError::Unsuitable { .. } => ErrorCode::InvalidArgument,
            FileError::Denied { .. } => ErrorCode::PermissionDenied,
            FileError::NoSpace { .. } | FileError::TooMany { .. } => ErrorCode::ResourceExhausted,
            FileError::Lost(_) => ErrorCode::DataLoss,
            FileError::Failed { .. } => ErrorCode::Internal,
        };
        ConnectError::new(code, error.to_string())
    }
}

impl From<FileError> for Refusal {
    fn from(error: FileError) -> Refusal {
        let status = match &error {
            FileError::NotFound(_) => StatusCode::NOT_FOUND,
            FileError::NoSuchUser(_) => StatusCode::UNAUTHORIZED,
            FileError::Path(_)
            | FileError::Exists(_)
            | FileError::NotADirectory(_)
            | FileError::IsADirectory(_)
            | FileError::Unsuitable { .. }
            | FileError::TooMany { .. } => StatusCode::BAD_REQUEST,
            FileError::Denied { .. } => StatusCode::FORBIDDEN,
            FileError::NoSpace { .. } => StatusCode::INSUFFICIENT_STORAGE,
            FileError::Lost(_) | FileError::Failed { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Refusal {
            status,
            message: error.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_the_codes_that_clients_tell_apart() {
        for (errno, code, status) in [
            (Errno::NOENT, ErrorCode::NotFound, 404),
            (Errno::EXIST, ErrorCode::AlreadyExists, 400),
            (Errno::NOTDIR, ErrorCode::InvalidArgument, 400),
            (Errno::NOSPC, ErrorCode::ResourceExhausted, 507),
            (Errno::DQUOT, ErrorCode::ResourceExhausted, 507),
            (Errno::ROFS, ErrorCode::PermissionDenied, 403),
            (Errno::IO, ErrorCode::Internal, 500),
        ] {
            let error = FileError::new("Writing", "/x", errno);
            assert!(error.to_string().contains("\"/x\""), "{error}");
            assert_eq!(
                Refusal::from(error.clone()).status.as_u16(),
                status,
                "{errno}"
            );
            assert_eq!(ConnectError::from(error).code, code, "{errno}");
        }
    }
}
