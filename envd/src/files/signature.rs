//! Signatures of file URLs: whoever holds the access token can let others read or write one file.
//!
//! `v1_` and the unpadded base64 of SHA-256 over `path:operation:user:token[:expiration]`, with the
//! parameters as they are in the URL. The text is joined ambiguously, so a user with a colon, which
//! no account has, is refused: without one in the user, and with an operation that is one of two
//! words, every text can be taken apart in one way only.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::request::parameter;

/// What a signature allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Read,
    Write,
}

/// Whether the query of a request carries a signature that allows the operation now.
pub(crate) fn admits(
    query: Option<&str>,
    operation: Operation,
    token: &str,
    now: SystemTime,
) -> bool {
    let Some(presented) = parameter(query, "signature") else {
        return false;
    };
    let path = parameter(query, "path").unwrap_or_default();
    let user = parameter(query, "username").unwrap_or_default();
    let expiration = parameter(query, "signature_expiration");
    if user.contains(':') || expiration.as_deref().is_some_and(|at| has_expired(at, now)) {
        return false;
    }
    let expected = sign(&path, operation, &user, token, expiration.as_deref());
    expected.as_bytes().ct_eq(presented.as_bytes()).into()
}

fn sign(
    path: &str,
    operation: Operation,
    user: &str,
    token: &str,
    expiration: Option<&str>,
) -> String {
    let operation = match operation {
        Operation::Read => "read",
        Operation::Write => "write",
    };
    let mut text = format!("{path}:{operation}:{user}:{token}");
    if let Some(expiration) = expiration {
        text.push(':');
        text.push_str(expiration);
    }
    format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(text)))
}

/// A time that isn't one has passed.
fn has_expired(seconds: &str, now: SystemTime) -> bool {
    let digits = seconds.bytes().all(|byte| byte.is_ascii_digit());
    match seconds.parse() {
        Ok(seconds) if digits => {
            let end = UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
            end.is_none_or(|end| now > end)
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by E2B's Python client (2.63.0): `get_signature("/a b", "read", "user", "secret")`.
    const SIGNED: &str = "v1_PEA/icv+z+JO9bsZ7QQJfW5MQV9ADdOES2Wk1FxeiFU";

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn query(path: &str, user: &str, signature: &str) -> String {
        form_urlencoded::Serializer::new(String::new())
            .append_pair("path", path)
            .append_pair("username", user)
            .append_pair("signature", signature)
            .finish()
    }

    #[test]
    fn signature_of_the_clients_is_ours() {
        assert_eq!(
            sign("/a b", Operation::Read, "user", "secret", None),
            SIGNED
        );
    }

    #[test]
    fn signature_allows_one_file_one_user_and_one_operation() {
        let admitted = |path: &str, user: &str, operation, token| {
            admits(Some(&query(path, user, SIGNED)), operation, token, at(0))
        };
        assert!(admitted("/a b", "user", Operation::Read, "secret"));
        assert!(!admitted("/a", "user", Operation::Read, "secret"));
        assert!(!admitted("/a b", "root", Operation::Read, "secret"));
        assert!(!admitted("/a b", "user", Operation::Write, "secret"));
        assert!(!admitted("/a b", "user", Operation::Read, "other"));
        assert!(!admits(Some("path=/a"), Operation::Read, "secret", at(0)));
    }

    #[test]
    fn signature_ends_at_its_expiration() {
        let signature = sign("/a", Operation::Read, "", "t", Some("100"));
        let query = format!("{}&signature_expiration=100", query("/a", "", &signature));
        assert!(admits(Some(&query), Operation::Read, "t", at(100)));
        assert!(!admits(Some(&query), Operation::Read, "t", at(101)));
        let later = query.replace("=100", "=200");
        assert!(!admits(Some(&later), Operation::Read, "t", at(100)));
        for odd in ["", "soon", "-1", "+200", "99999999999999999999"] {
            let signature = sign("/a", Operation::Read, "", "t", Some(odd));
            let odd = form_urlencoded::Serializer::new(self::query("/a", "", &signature))
                .append_pair("signature_expiration", odd)
                .finish();
            assert!(!admits(Some(&odd), Operation::Read, "t", at(100)), "{odd}");
        }
    }

    #[test]
    fn text_that_could_be_taken_apart_differently_is_refused() {
        // A signature to read `/a:write:x` for nobody is also the text of one to write `/a`.
        let signature = sign("/a:write:x", Operation::Read, "", "t", None);
        let forged = query("/a", "x:read:", &signature);
        assert_eq!(
            sign("/a", Operation::Write, "x:read:", "t", None),
            signature
        );
        assert!(!admits(Some(&forged), Operation::Write, "t", at(0)));
    }
}
