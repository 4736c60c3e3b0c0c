//! The names and the index of an export stream; FORMAT.md describes it.

use serde::{Deserialize, Serialize};

use crate::build_id::BuildId;
use crate::error::FormatError;
use crate::map_header::FORMAT_VERSION;

/// The first entry.
pub(crate) const INDEX_NAME: &str = "export.json";
/// The longest index that is read: ids of 65,535 builds, and some more.
pub(crate) const MAX_INDEX_BYTES: u64 = 4 << 20;
/// The size of a run: an offset and a length, 64 bits each.
pub(crate) const RUN_BYTES: u64 = 16;

/// The most runs of one file; one that has more travels with its holes.
pub(crate) const MAX_RUNS: usize = 1 << 22;

/// What a stream contains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StreamIndex {
    format_version: u32,
    /// The build that was asked for; also the last of `builds`.
    pub(crate) build: BuildId,
    /// Ancestors before those who take pages from them.
    pub(crate) builds: Vec<BuildId>,
}

impl StreamIndex {
    /// An index of at least one build.
    pub(crate) fn new(builds: Vec<BuildId>) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            build: *builds.last().expect("a stream has the build it is for"),
            builds,
        }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("an index has only strings and numbers")
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, FormatError> {
        let index: Self = serde_json::from_slice(bytes)
            .map_err(|error| unexpected(INDEX_NAME, "an index", error))?;
        if index.format_version != FORMAT_VERSION {
            return Err(FormatError::Unsupported {
                file: INDEX_NAME.into(),
                what: "format version",
                found: index.format_version.into(),
            });
        }
        let mut sorted = index.builds.clone();
        sorted.sort_unstable();
        sorted.dedup();
        if sorted.len() != index.builds.len() || index.builds.last() != Some(&index.build) {
            let expected = "each build once, and the one it is for last";
            return Err(unexpected(INDEX_NAME, expected, "another list"));
        }
        Ok(index)
    }
}

/// The entry of a file.
pub(crate) fn entry_name(id: &BuildId, file: &str) -> String {
    format!("{id}/{file}")
}

/// The entry before that of a file with holes. No file has a comma in its name.
pub(crate) fn runs_name(id: &BuildId, file: &str) -> String {
    format!("{id}/{file},runs")
}

pub(crate) fn unexpected(
    entry: &str,
    expected: impl std::fmt::Display,
    found: impl std::fmt::Display,
) -> FormatError {
    FormatError::StreamContent {
        entry: entry.to_owned(),
        expected: expected.to_string(),
        found: found.to_string(),
    }
}
