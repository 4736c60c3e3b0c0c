//! A build in numbers, for a table or for JSON.

use serde::Serialize;

use crate::build::Build;
use crate::build_id::BuildId;
use crate::error::FormatError;
use crate::extent::Origin;
use crate::merge_policy::{ChainCost, MergePolicy, MergeReason};
use crate::units::{Generation, PageCount, PageSize};

/// What a build's map says, counted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// The build.
    pub build_id: BuildId,
    /// The build it is a diff over.
    pub parent: Option<BuildId>,
    /// How many diffs lie under it.
    pub generation: Generation,
    /// When it was published, in milliseconds since 1970.
    pub created_at_ms: u64,
    /// The page size in bytes.
    pub page_size: PageSize,
    /// The size of the memory.
    pub memory_pages: PageCount,
    /// The size of the memory.
    pub memory_bytes: u64,
    /// Extents of the map.
    pub extents: usize,
    /// Pages that are zero.
    pub zero_pages: PageCount,
    /// Pages whose content is in this build.
    pub own_pages: PageCount,
    /// Pages whose content is in an ancestor.
    pub inherited_pages: PageCount,
    /// The length of `memory.map`.
    pub map_bytes: u64,
    /// The length of all files of this build together, holes included.
    pub total_bytes: u64,
    /// The disk space of the data of all builds that the map refers to; holes take none.
    pub stored_bytes: u64,
    /// The size of the pages that have content; what is stored beyond that is dead for this build.
    pub live_bytes: u64,
    /// Stored over live bytes; 1 is the ideal, and a build without content has it.
    pub space_amplification: f64,
    /// Bytes of the chunks that have to be read to read every page, over live bytes.
    pub read_amplification: f64,
    /// Why the default policy would merge this chain.
    pub merge: Option<MergeReason>,
    /// The builds that the map refers to, ascending by generation; the last is the own one.
    pub builds: Vec<InspectedBuild>,
}

/// A build that a map refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct InspectedBuild {
    /// The build.
    pub build_id: BuildId,
    /// Its generation.
    pub generation: Generation,
    /// The length of its `memory.data` in pages.
    pub data_pages: PageCount,
    /// How many pages of the memory are taken from it.
    pub referenced_pages: PageCount,
    /// How many extents name it.
    pub extents: usize,
}

impl Inspection {
    /// Counts a build's pages.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn of(build: &Build) -> Result<Self, FormatError> {
        let (map, manifest) = (build.map(), build.manifest());
        let mut builds: Vec<_> = map
            .builds()
            .iter()
            .map(|entry| InspectedBuild {
                build_id: entry.id,
                generation: entry.generation,
                data_pages: entry.data_pages,
                referenced_pages: PageCount::default(),
                extents: 0,
            })
            .collect();
        let mut zero_pages = PageCount::default();
        for extent in map.all_extents() {
            match extent.origin {
                Origin::Zero => zero_pages = zero_pages + extent.pages,
                Origin::Build(index) => {
                    let build = &mut builds[usize::from(index)];
                    build.referenced_pages = build.referenced_pages + extent.pages;
                    build.extents += 1;
                }
            }
        }
        let (own, ancestors) = builds
            .split_last()
            .expect("a table ends with its own build");
        let memory_bytes = map.memory_pages().bytes(map.page_size());
        let cost = ChainCost::of(build)?;
        let over_live = |bytes: u64| match cost.live_bytes {
            0 => 1.0,
            live => bytes as f64 / live as f64,
        };
        Ok(Self {
            build_id: build.id(),
            parent: map.parent(),
            generation: map.generation(),
            created_at_ms: manifest.created_at_ms,
            page_size: map.page_size(),
            memory_pages: map.memory_pages(),
            memory_bytes: memory_bytes.expect("a validated memory has at most 16 TiB"),
            extents: map.extent_count(),
            zero_pages,
            own_pages: own.referenced_pages,
            inherited_pages: ancestors.iter().map(|build| build.referenced_pages).sum(),
            map_bytes: map.as_bytes().len() as u64,
            total_bytes: manifest.files.values().map(|file| file.bytes).sum(),
            stored_bytes: cost.stored_bytes,
            live_bytes: cost.live_bytes,
            space_amplification: over_live(cost.stored_bytes),
            read_amplification: over_live(cost.touched_bytes),
            merge: MergePolicy::default().judge(&cost),
            builds,
        })
    }
}
