//! A build in numbers, for a table or for JSON.

use serde::Serialize;

use crate::build::Build;
use crate::build_id::BuildId;
use crate::extent::Origin;
use crate::units::{Generation, PageCount, PageSize};

/// What a build's map says, counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
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
    pub fn of(build: &Build) -> Self {
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
        Self {
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
            builds,
        }
    }
}
