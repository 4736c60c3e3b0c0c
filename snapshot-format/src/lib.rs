#![doc = include_str!("../FORMAT.md")]

// Words and checks that everything uses.
mod build_id;
mod checksum;
mod error;
mod le;
mod units;

// memory.map: reading it, and making a new one from a parent and changes.
mod extent;
mod extent_check;
mod extent_limits;
mod map_cursor;
mod map_encode;
mod map_header;
mod memory_map;
mod overlay;
mod top_index;

// The other files, and a build of all of them.
mod build;
mod chunk_table;
mod data_file;
mod encoding;
mod manifest;
mod sparse;
mod stored_chunk;
mod sums;
mod sums_builder;

// From pages to a published build.
mod adopt;
mod build_store;
mod changes;
mod memory_target;
mod memory_writer;
mod parent_pages;
mod staging;
mod storage;

// One build instead of a chain.
mod chunk_source;
mod file_copy;
mod merge;
mod merge_attempt;
mod merge_journal;
mod merge_map;
mod merge_plan;
mod merge_policy;
mod merged_data;

// What a restore touches first.
mod working_set;
mod working_set_file;

// From store to store.
mod export;
mod import;
mod stream_file;
mod stream_layout;
mod stream_reader;

// Looking at a build.
mod data_check;
mod difference;
mod inspection;
mod verify;

mod sys;

pub use build::Build;
pub use build_id::{BuildId, InvalidBuildId};
pub use build_store::BuildStore;
pub use data_file::DataFile;
pub use difference::{Difference, DifferenceProgress, MAX_RUNS};
pub use encoding::Encoding;
pub use error::{Fault, FormatError};
pub use export::{ExportProgress, ExportSummary};
pub use extent::{EXTENT_BYTES, Extent, Origin};
pub use import::{ImportOptions, ImportSummary};
pub use inspection::{InspectedBuild, Inspection};
pub use manifest::{FileEntry, MAX_MANIFEST_BYTES, Manifest, MemoryShape, file_name};
pub use map_cursor::{MapCursor, OriginRun, OriginRuns};
pub use map_header::{BuildEntry, FORMAT_VERSION, MAX_BUILDS};
pub use memory_map::MemoryMap;
pub use memory_target::WriteSummary;
pub use memory_writer::MemoryWriter;
pub use merge::{MergeOptions, MergeOutcome, MergeProgress};
pub use merge_policy::{ChainCost, MergePolicy, MergeReason};
pub use staging::{PublishInfo, Published, Staging};
pub use storage::{DiskStorage, Storage};
pub use sums::{CHUNK_BYTES, DataSums, SumsHeader};
pub use units::{ByteOffset, Generation, MAX_MEMORY_BYTES, PageCount, PageIndex, PageSize};
pub use verify::{
    MAX_FAULTS, VerifyOptions, VerifyProgress, VerifyReport, verify, verify_data, verify_with,
};
pub use working_set::{
    IgnoredWorkingSet, MAX_WORKING_SET_RUNS, PageRun, WorkingSet, WorkingSetFile,
};
