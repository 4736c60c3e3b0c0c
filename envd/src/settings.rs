//! What `/init` has set: the token, the environment and the defaults of processes started later.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use subtle::ConstantTimeEq as _;

/// The settings of this guest; everything is unset until the first `/init`.
#[derive(Debug, Default)]
pub(crate) struct Settings(Mutex<Values>);

/// The values themselves.
#[derive(Debug, Clone, Default)]
pub(crate) struct Values {
    /// Asked of every route but `/health`.
    pub(crate) access_token: Option<String>,
    /// Environment of processes, between the defaults and the request's own.
    pub(crate) environment: BTreeMap<String, String>,
    /// User of processes whose request names none.
    pub(crate) default_user: Option<String>,
    /// Working directory of processes whose request names none.
    pub(crate) default_workdir: Option<String>,
}

impl Settings {
    /// Reads or changes the values; never held across an await.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Values> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a request with this token may pass, in time that doesn't depend on the token.
    pub(crate) fn admits(&self, presented: Option<&[u8]>) -> bool {
        match (&self.lock().access_token, presented) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(token), Some(presented)) => token.as_bytes().ct_eq(presented).into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_is_asked_for_once_it_is_set() {
        let settings = Settings::default();
        assert!(settings.admits(None));
        settings.lock().access_token = Some("secret".to_owned());
        assert!(settings.admits(Some(b"secret")));
        for wrong in [
            None,
            Some(&b""[..]),
            Some(b"secre"),
            Some(b"secret2"),
            Some(b"Secret"),
        ] {
            assert!(!settings.admits(wrong));
        }
    }
}
