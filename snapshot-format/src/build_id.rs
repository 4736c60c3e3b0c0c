//! The 128-bit name of a build; its text form is 32 lowercase hexadecimal digits.
//!
//! The crate makes no ids: the caller supplies 16 random bytes. Sixteen zero bytes mean "no
//! build" in the files and are refused as an id.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The identity of one immutable set of artefacts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BuildId([u8; 16]);

/// A text that is no build id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Build id is not 32 lowercase hexadecimal digits, or all of them are zero")]
pub struct InvalidBuildId;

impl BuildId {
    /// The id of these bytes, whatever they are. All-zero bytes make an id that no store
    /// accepts.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes, in the order of the text form.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Whether this is the all-zero value that means "no build".
    pub const fn is_nil(&self) -> bool {
        u128::from_ne_bytes(self.0) == 0
    }
}

impl FromStr for BuildId {
    type Err = InvalidBuildId;

    fn from_str(text: &str) -> Result<Self, InvalidBuildId> {
        let digits: &[u8; 32] = text.as_bytes().try_into().map_err(|_| InvalidBuildId)?;
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.as_chunks::<2>().0) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        let id = Self(bytes);
        if id.is_nil() {
            Err(InvalidBuildId)
        } else {
            Ok(id)
        }
    }
}

fn nibble(digit: u8) -> Result<u8, InvalidBuildId> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        _ => Err(InvalidBuildId),
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BuildId({self})")
    }
}

impl Serialize for BuildId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BuildId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips() {
        let id = BuildId::from_bytes(*b"\x00\x01\x7f\x80\xffabcdefghijk");
        assert_eq!(id.to_string(), "00017f80ff6162636465666768696a6b");
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn other_spellings_of_an_id_are_refused() {
        for text in [
            "",
            "00",
            "00017F80FF6162636465666768696A6B",
            "00017f80ff6162636465666768696a6",
            "00017f80ff6162636465666768696a6b0",
            "+0017f80ff6162636465666768696a6b",
            "00000000000000000000000000000000",
        ] {
            assert_eq!(text.parse::<BuildId>(), Err(InvalidBuildId), "{text}");
        }
    }
}
