//! Paths as clients write them, made absolute and clean. Pure.
//!
//! Relative paths, `~` and `~/x` start at the user's home. `.` and `..` are resolved in the text,
//! as the clients do, so that a path is the same before and after somebody changes a link in it,
//! and none of them is left for the kernel to resolve.

use std::fmt;

/// Longest path that the kernel takes in one piece, in bytes. Source: `PATH_MAX` less the NUL.
const MAX_BYTES: usize = 4095;
/// Longest name of a file, in bytes. Source: `NAME_MAX`.
const MAX_NAME_BYTES: usize = 255;

/// An absolute path without `.`, `..`, empty components or NUL.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct GuestPath(String);

/// Why a text is no path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PathError {
    /// C strings end at a NUL.
    #[error("A path has a NUL")]
    Nul,
    /// The kernel would refuse it.
    #[error("A path has more than {MAX_BYTES} bytes, or a name more than {MAX_NAME_BYTES}")]
    TooLong,
}

impl GuestPath {
    /// The path that `text` means to a user with that (absolute) home.
    ///
    /// # Errors
    /// Any [`PathError`].
    pub(crate) fn resolve(text: &str, home: &str) -> Result<GuestPath, PathError> {
        if text.contains('\0') || home.contains('\0') {
            return Err(PathError::Nul);
        }
        let (start, rest) = match text {
            "~" => (home, ""),
            text if text.starts_with('/') => ("", text),
            text => (home, text.strip_prefix("~/").unwrap_or(text)),
        };
        let mut names: Vec<&str> = Vec::new();
        for name in start.split('/').chain(rest.split('/')) {
            match name {
                "" | "." => {}
                ".." => drop(names.pop()),
                name if name.len() > MAX_NAME_BYTES => return Err(PathError::TooLong),
                name => names.push(name),
            }
        }
        let path = format!("/{}", names.join("/"));
        if path.len() > MAX_BYTES {
            return Err(PathError::TooLong);
        }
        Ok(GuestPath(path))
    }

    /// The text of it.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The directory that it is in, and its name there; `None` for the root.
    pub(crate) fn split(&self) -> Option<(&str, &str)> {
        let (directory, name) = self.0.rsplit_once('/')?;
        let directory = if directory.is_empty() { "/" } else { directory };
        (!name.is_empty()).then_some((directory, name))
    }

    /// Its last component; `/` for the root.
    pub(crate) fn name(&self) -> &str {
        self.split().map_or("/", |(_, name)| name)
    }

    /// Its components, from the root down.
    pub(crate) fn components(&self) -> impl Iterator<Item = &str> {
        self.0.split('/').filter(|name| !name.is_empty())
    }

    /// Something below it; `relative` has no `..`.
    pub(crate) fn below(&self, relative: &str) -> String {
        match self.0.as_str() {
            "/" => format!("/{relative}"),
            path => format!("{path}/{relative}"),
        }
    }
}

impl fmt::Display for GuestPath {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(text: &str) -> String {
        GuestPath::resolve(text, "/home/user").unwrap().0
    }

    #[test]
    fn paths_are_absolute_and_clean() {
        for (text, path) in [
            ("/a/b", "/a/b"),
            ("//a/./b/", "/a/b"),
            ("/a/../b", "/b"),
            ("/../..", "/"),
            ("a", "/home/user/a"),
            ("", "/home/user"),
            ("~", "/home/user"),
            ("~/a", "/home/user/a"),
            ("~a", "/home/user/~a"),
            ("../other", "/home/other"),
            ("../../../x", "/x"),
            ("...", "/home/user/..."),
        ] {
            assert_eq!(resolved(text), path, "{text:?}");
        }
    }

    #[test]
    fn what_the_kernel_would_refuse_is_refused() {
        let error = |text: &str| GuestPath::resolve(text, "/").unwrap_err();
        assert_eq!(error("/a\0b"), PathError::Nul);
        assert_eq!(error(&format!("/{}", "n".repeat(256))), PathError::TooLong);
        assert_eq!(error(&"/abc".repeat(1024)), PathError::TooLong);
        assert!(GuestPath::resolve(&"/abc".repeat(1023), "/").is_ok());
    }

    #[test]
    fn root_has_no_parent() {
        let path = |text| GuestPath::resolve(text, "/").unwrap();
        assert_eq!(path("/").split(), None);
        assert_eq!(path("/").name(), "/");
        assert_eq!(path("/a").split(), Some(("/", "a")));
        assert_eq!(path("/a/b").split(), Some(("/a", "b")));
        assert_eq!(path("/").below("x"), "/x");
        assert_eq!(path("/a").below("x/y"), "/a/x/y");
    }
}
