//! What a build keeps as a guest's device state: the configuration and the state that a migration
//! brings, in one container.
//!
//! ```text
//!   0 "THAWCLHV"   8 version, 1 (4)   12 zero (4)   16 length of the configuration (8)
//!   24 length of the state (8)   32 the configuration, then the state: JSON, as they came
//! ```
//!
//! The configuration says that all memory is in one file, laid out as in the build.

use serde_json::Value;
use thiserror::Error;

/// Names this container; builds of another version are another format.
pub(super) const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"THAWCLHV";
const HEADER_BYTES: usize = 32;

/// Why a device state is of no use.
#[derive(Debug, Error)]
pub enum StateError {
    /// It begins or ends in a way that ours don't.
    #[error("It is no device state of Cloud Hypervisor's: {problem}")]
    Container {
        /// What is wrong.
        problem: String,
    },
    /// One part is no JSON.
    #[error("Reading its {part}")]
    Json {
        /// Which.
        part: &'static str,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// A member is unusable.
    #[error("{field} {problem}")]
    Field {
        /// Which.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The memory has another size.
    #[error("It has {found} bytes of memory, and {expected} are the guest's")]
    Size {
        /// By the state.
        found: u64,
        /// By the sandbox.
        expected: u64,
    },
}

/// A configuration and a state, not looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// The migration's configuration.
    pub config: Vec<u8>,
    /// The devices' state.
    pub state: Vec<u8>,
}

impl Contents {
    /// As bytes of a build.
    #[must_use]
    pub fn pack(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.config.len() + self.state.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        for part in [&self.config, &self.state] {
            bytes.extend_from_slice(&(part.len() as u64).to_le_bytes());
        }
        bytes.extend_from_slice(&self.config);
        bytes.extend_from_slice(&self.state);
        bytes
    }

    /// Out of a build.
    ///
    /// # Errors
    /// It isn't what [`Self::pack`] makes.
    pub fn unpack(bytes: &[u8]) -> Result<Self, StateError> {
        let problem = |problem: String| StateError::Container { problem };
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Err(problem(format!("it has {} bytes", bytes.len())));
        };
        if !header.starts_with(MAGIC) {
            return Err(problem("it begins with something else".into()));
        }
        let version = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        if version != VERSION {
            return Err(problem(format!("it has version {version}")));
        }
        if header[12..16] != [0; 4] {
            return Err(problem("its reserved bytes are not zero".into()));
        }
        let length = |at: usize| {
            let bytes = header[at..at + 8].try_into().expect("eight bytes");
            u64::from_le_bytes(bytes)
        };
        let (config, state) = (length(16), length(24));
        if config.checked_add(state) != Some(rest.len() as u64) {
            let found = rest.len();
            return Err(problem(format!(
                "{found} bytes follow its header, which says {config} and {state}"
            )));
        }
        let (config, state) = rest.split_at(config as usize);
        Ok(Self {
            config: config.to_vec(),
            state: state.to_vec(),
        })
    }

    /// The configuration as JSON.
    ///
    /// # Errors
    /// It is none.
    pub fn config(&self) -> Result<Value, StateError> {
        json("configuration", &self.config)
    }
}

pub(super) fn json(part: &'static str, bytes: &[u8]) -> Result<Value, StateError> {
    serde_json::from_slice(bytes).map_err(|source| StateError::Json { part, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_packed_is_unpacked_and_nothing_else_is() {
        let contents = Contents {
            config: b"{\"a\":1}".to_vec(),
            state: b"[2]".to_vec(),
        };
        let packed = contents.pack();
        assert_eq!(Contents::unpack(&packed).unwrap(), contents);
        assert_eq!(contents.config().unwrap()["a"], 1);
        for length in 0..packed.len() {
            assert!(Contents::unpack(&packed[..length]).is_err(), "{length}");
        }
        for at in 0..HEADER_BYTES {
            let mut damaged = packed.clone();
            damaged[at] ^= 0x80;
            assert!(Contents::unpack(&damaged).is_err(), "{at}");
        }
        let longer = [&packed[..], b"x"].concat();
        assert!(Contents::unpack(&longer).is_err());
    }
}
