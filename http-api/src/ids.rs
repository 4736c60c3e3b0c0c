//! Names that callers choose: checked once, then carried as types.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;

/// Why a name was refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum IdError {
    /// Empty or too long.
    #[error("must have 1 to {most} characters, has {found}")]
    Length {
        /// The limit.
        most: usize,
        /// What was given.
        found: usize,
    },
    /// The first character is not a letter.
    #[error("must start with a lowercase letter")]
    Start,
    /// A character that no name has.
    #[error("must not contain {character:?}; allowed are {allowed}")]
    Character {
        /// The first offender.
        character: char,
        /// What would do.
        allowed: &'static str,
    },
}

/// What a sandbox's id looks like, for readers of the API's document.
pub(crate) const SANDBOX_ID: &str = "^[a-z][a-z0-9]{0,56}$";
/// What a template's name looks like.
pub(crate) const TEMPLATE_NAME: &str = "^[a-z][a-z0-9._-]{0,62}$";

/// A sandbox's id: lowercase letters and digits, starting with a letter, at most 57
/// characters, so that `{port}-{id}` is one DNS label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct SandboxId(String);

/// A template's name: as a sandbox id, with `-`, `_` and `.` inside, at most 63 characters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct TemplateName(String);

fn check(text: &str, most: usize, extra: &str, allowed: &'static str) -> Result<(), IdError> {
    if text.is_empty() || text.len() > most {
        return Err(IdError::Length {
            most,
            found: text.chars().count(),
        });
    }
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || extra.contains(c);
    if let Some(character) = text.chars().find(|c| !legal(*c)) {
        return Err(IdError::Character { character, allowed });
    }
    if !text.starts_with(|c: char| c.is_ascii_lowercase()) {
        return Err(IdError::Start);
    }
    Ok(())
}

impl FromStr for SandboxId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        check(text, 57, "", "lowercase letters and digits")?;
        Ok(Self(text.to_owned()))
    }
}

impl SandboxId {
    /// The id that stands for a caller's key: the same for the same key, always.
    #[must_use]
    pub fn of_key(key: &[u8]) -> Self {
        use sha2::Digest;
        const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
        let hash = sha2::Sha256::digest(key);
        let letters = hash
            .iter()
            .map(|byte| char::from(ALPHABET[usize::from(byte % 32)]));
        Self("k".chars().chain(letters).collect())
    }
}

impl FromStr for TemplateName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        check(
            text,
            63,
            "-_.",
            "lowercase letters, digits, '-', '_' and '.'",
        )?;
        Ok(Self(text.to_owned()))
    }
}

macro_rules! name_type {
    ($type:ident, $pattern:ident) => {
        impl schemars::JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string", "pattern": $pattern })
            }
        }

        impl $type {
            /// The name itself.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

name_type!(SandboxId, SANDBOX_ID);
name_type!(TemplateName, TEMPLATE_NAME);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_dns_label_after_a_port() {
        assert!("a".repeat(57).parse::<SandboxId>().is_ok());
        assert!("a".repeat(58).parse::<SandboxId>().is_err());
        for bad in ["", "1a", "a-b", "A", "a/b", "ä", "..", "a b"] {
            assert!(bad.parse::<SandboxId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_keys_id_is_one_that_a_caller_could_choose() {
        let id = SandboxId::of_key(b"0f7b-1");
        assert_eq!(id.as_str().parse::<SandboxId>().as_ref(), Ok(&id));
        assert_eq!(id, SandboxId::of_key(b"0f7b-1"));
        assert_ne!(id, SandboxId::of_key(b"0f7b-2"));
    }

    #[test]
    fn a_template_name_is_no_path() {
        assert!("base".parse::<TemplateName>().is_ok());
        assert!("py-3.12_v2".parse::<TemplateName>().is_ok());
        for bad in ["", ".", "..", "../x", "a/b", "-a", "9a"] {
            assert!(bad.parse::<TemplateName>().is_err(), "{bad:?}");
        }
    }
}
