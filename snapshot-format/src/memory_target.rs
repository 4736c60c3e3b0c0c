//! The memory of a build that is being staged: its geometry, its parent, and how its map and
//! sums are written once all changes are known.

use std::path::PathBuf;
use std::sync::Arc;

use crate::build::Build;
use crate::build_id::BuildId;
use crate::changes::Changes;
use crate::error::FormatError;
use crate::extent::Origin;
use crate::manifest::file_name;
use crate::map_encode::{MapContent, encode_map};
use crate::map_header::BuildEntry;
use crate::overlay::{keep_referenced, overlay, own_origin};
use crate::staging::Staging;
use crate::storage::{Storage, write_new_file};
use crate::sums_builder::SumsBuilder;
use crate::units::{Generation, PageCount, PageSize};

/// What writing a memory came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteSummary {
    /// Pages with content of their own.
    pub stored_pages: PageCount,
    /// Pages that are zero now and had content in the parent.
    pub zero_pages_changed: PageCount,
    /// Pages that were written but are what the parent has, so they are inherited.
    pub dropped_pages: PageCount,
    /// The bytes of the stored pages.
    pub bytes: u64,
    /// Extents of the new map.
    pub extents: usize,
}

#[derive(Debug)]
pub(crate) struct MemoryTarget {
    pub(crate) storage: Arc<dyn Storage>,
    dir: PathBuf,
    build_id: BuildId,
    pub(crate) page_size: PageSize,
    pub(crate) memory_pages: PageCount,
    parent: Option<Build>,
    generation: Generation,
}

impl MemoryTarget {
    /// Refuses a geometry that the format can't describe or that is not the parent's.
    pub(crate) fn new(
        staging: &Staging,
        parent: Option<&Build>,
        page_size: PageSize,
        memory_pages: PageCount,
    ) -> Result<Self, FormatError> {
        if memory_pages.is_zero() || memory_pages > page_size.max_memory_pages() {
            let pages = memory_pages;
            return Err(FormatError::MemorySize { pages, page_size });
        }
        let mut generation = Generation::BASE;
        if let Some(map) = parent.map(Build::map) {
            if map.page_size() != page_size || map.memory_pages() != memory_pages {
                return Err(FormatError::ParentGeometry {
                    parent: map.build_id(),
                    pages: memory_pages,
                    page_size,
                    parent_pages: map.memory_pages(),
                    parent_page_size: map.page_size(),
                });
            }
            generation = map.generation().next().ok_or(FormatError::TooManyBuilds {
                builds: u32::MAX as usize,
            })?;
        }
        Ok(Self {
            storage: Arc::clone(staging.store().storage()),
            dir: staging.dir().to_owned(),
            build_id: staging.build_id(),
            page_size,
            memory_pages,
            parent: parent.cloned(),
            generation,
        })
    }

    pub(crate) fn data_path(&self) -> PathBuf {
        self.dir.join(file_name::DATA)
    }

    pub(crate) fn parent(&self) -> Option<&Build> {
        self.parent.as_ref()
    }

    /// The origin of this build's own pages while its changes are collected.
    pub(crate) fn own_origin(&self) -> Origin {
        own_origin(self.parent_builds().len())
    }

    fn parent_builds(&self) -> &[BuildEntry] {
        self.parent().map_or(&[], |parent| parent.map().builds())
    }

    /// Writes `memory.sums` and `memory.map`.
    pub(crate) fn finish(
        self,
        changes: &Changes,
        sums: SumsBuilder,
    ) -> Result<WriteSummary, FormatError> {
        let data_pages = PageCount::new(sums.data_bytes() / self.page_size.bytes());
        let (sums_file, sums_crc) = sums.finish(self.build_id);
        self.write_file(file_name::SUMS, &sums_file)?;

        let parent = self.parent().map(Build::map);
        let mut extents = overlay(parent, changes.extents(), self.memory_pages);
        let own = BuildEntry {
            id: self.build_id,
            generation: self.generation,
            data_pages,
            sums_crc,
        };
        let builds = keep_referenced(&mut extents, self.parent_builds(), own)
            .map_err(|builds| FormatError::TooManyBuilds { builds })?;
        let map = encode_map(&MapContent {
            page_size: self.page_size,
            memory_pages: self.memory_pages,
            parent: parent.map(crate::MemoryMap::build_id),
            builds: &builds,
            extents: &extents,
        });
        self.write_file(file_name::MAP, &map)?;
        Ok(WriteSummary {
            stored_pages: changes.stored,
            zero_pages_changed: changes.zeroed,
            dropped_pages: changes.dropped,
            bytes: changes.stored.get() * self.page_size.bytes(),
            extents: extents.len(),
        })
    }

    fn write_file(&self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        write_new_file(&*self.storage, &self.dir.join(name), bytes)
    }
}
