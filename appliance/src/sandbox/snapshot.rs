//! A running guest to a build: its vCPUs stop, devices, memory and disk are written, the
//! build is published. What happens to the guest after that is the caller's affair.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http_api::ids::SandboxId;
use snapshot_format::{
    BuildId, Manifest, PageIndex, PublishInfo, Staging, WriteSummary, file_name,
};
use uffd_engine::dirty::{Capture, Captured};
use uffd_engine::dirty_set::UnwrittenPages;
use uffd_engine::memory_image::MemoryImage;
use uffd_engine::region::{ClaimedRegion, RegionTable};
use uffd_engine::{PageState, PageStates, Tracking};

use super::OperationError;
use super::live::Live;
use crate::catalogue::{BuildRow, SandboxRow};
use crate::engines::EngineError;
use crate::guest::Guest;
use crate::host::{Host, Reservation};
use crate::integrity;
use crate::vmm::DiskLimits;
use crate::vmm::compatibility::MadeBy;
use crate::vmm::memory::MemorySize;

/// How long the guest may take to write back what it holds.
const PREPARE_TIME: Duration = Duration::from_secs(2);

/// The label of a build that names the sandbox it was taken of.
pub(crate) const LABEL_SANDBOX: &str = "sandbox";
/// The label that says whether the guest's disk had limits, which its device state has then, too.
const LABEL_DISK_LIMITS: &str = "disk_limits";
const NO_DISK_LIMITS: &str = "none";
/// The label that says how changed pages were told from others.
const LABEL_CAPTURE: &str = "capture";
/// The label that says what it was taken for.
pub(crate) const LABEL_PURPOSE: &str = "purpose";

/// What becomes of the disk's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The sandbox ends here: the build gets its disk, without a copy.
    Pause,
    /// The sandbox goes on: the build gets a copy.
    Template,
}

impl Purpose {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Template => "template",
        }
    }
}

/// Whether the device state of a build with this manifest may hold limits of the disk: older ones
/// don't say.
pub(super) fn had_disk_limits(manifest: &Manifest) -> bool {
    let said = manifest.labels.get(LABEL_DISK_LIMITS);
    said.is_none_or(|said| said != NO_DISK_LIMITS)
}

/// A build that was published and is in nobody's row yet.
pub(super) struct Taken {
    pub(super) row: BuildRow,
    pub(super) reservation: Reservation,
}

/// Stops the guest and publishes a build of it. The guest is stopped afterwards, whether
/// this succeeded or not.
pub(super) async fn take(
    host: &Arc<Host>,
    row: &SandboxRow,
    live: &mut Live,
    guest: &Guest,
    purpose: Purpose,
) -> Result<Taken, OperationError> {
    if let Err(error) = guest.prepare(PREPARE_TIME).await {
        // It costs space, not correctness.
        tracing::warn!(sandbox_id = %row.id, %error, "The guest did not prepare itself");
    }
    if let Some(session) = &live.session {
        session.attachment.settle().await;
    }
    live.machine.stop().await?;
    let served = match &live.session {
        Some(session) => Some(session.attachment.regions().ok_or(EngineError::Lost)?),
        None => None,
    };
    let saved = live.machine.save(served.as_deref()).await?;
    let reservation = host.reserve_build();
    let work = Work {
        host: host.clone(),
        id: reservation.id,
        parent: row.build,
        memory: saved.memory,
        states: match &live.session {
            Some(session) => Some(session.states.clone()),
            None => all_written(row)?,
        },
        writes: live
            .session
            .as_ref()
            .zip(served)
            .map(|(session, regions)| Writes {
                tracking: session.tracking,
                vmm: live.machine.pid(),
                regions,
            }),
        size: row.shape.memory(),
        vmstate: saved.state,
        vmm: host.drivers.made_by(live.driver.as_ref()),
        sandbox: row.id.clone(),
        purpose,
        labels: labels(row, host.disk_limits.with(row.disk_limits), purpose),
    };
    let written = tokio::task::spawn_blocking(move || work.write());
    let row = written.await.map_err(|_| OperationError::Worker)??;
    Ok(Taken { row, reservation })
}

/// The table of a guest that has a parent and was served by nobody: all of its memory came from
/// the parent, so what isn't there any more was given back.
fn all_written(row: &SandboxRow) -> Result<Option<Arc<PageStates>>, OperationError> {
    if row.build.is_none() {
        return Ok(None);
    }
    let pages = row.shape.memory().pages();
    let states = PageStates::create(pages).map_err(|source| OperationError::File {
        operation: "Making the page-state table".into(),
        source,
    })?;
    states.set_run(PageIndex::new(0), pages, PageState::Dirty);
    Ok(Some(Arc::new(states)))
}

fn labels(row: &SandboxRow, limits: DiskLimits, purpose: Purpose) -> BTreeMap<String, String> {
    let limits = if limits == DiskLimits::default() {
        NO_DISK_LIMITS
    } else {
        "some"
    };
    BTreeMap::from([
        (LABEL_SANDBOX.to_owned(), row.id.to_string()),
        (LABEL_DISK_LIMITS.to_owned(), limits.to_owned()),
        (LABEL_PURPOSE.to_owned(), purpose.name().to_owned()),
        ("template".to_owned(), row.template.to_string()),
        ("vcpus".to_owned(), row.shape.vcpus.to_string()),
        ("memory_mb".to_owned(), row.shape.memory_mb.to_string()),
    ])
}

/// Who noticed a guest's writes, and where to ask.
struct Writes {
    tracking: Tracking,
    vmm: i32,
    regions: Vec<ClaimedRegion>,
}

/// All that the blocking part needs.
struct Work {
    host: Arc<Host>,
    id: BuildId,
    parent: Option<BuildId>,
    memory: MemoryImage,
    states: Option<Arc<PageStates>>,
    /// What is known of the writes of a guest that was served.
    writes: Option<Writes>,
    size: MemorySize,
    vmstate: Vec<u8>,
    vmm: MadeBy,
    sandbox: SandboxId,
    purpose: Purpose,
    labels: BTreeMap<String, String>,
}

impl Work {
    fn write(self) -> Result<BuildRow, OperationError> {
        let store = &self.host.store;
        let mut staging = store.stage(self.id)?;
        let (summary, captured) = self.write_memory(&staging)?;
        tracing::info!(
            build_id = %self.id,
            source = ?captured.source,
            compared_pages = captured.compared.get(),
            unwritten_pages = captured.unwritten.get(),
            stored_pages = summary.stored_pages.get(),
            "Captured"
        );
        let vmstate = staging.file_path(file_name::VMSTATE);
        fs::write(&vmstate, &self.vmstate).map_err(|source| file("Writing", &vmstate, source))?;
        staging.add_file(file_name::VMSTATE)?;
        self.put_disk(&mut staging)?;
        let mut labels = self.labels.clone();
        labels.insert(LABEL_CAPTURE.to_owned(), captured.source.name().to_owned());
        staging.publish(PublishInfo {
            created_at_ms: crate::clock::now_ms(),
            vmm: self.vmm.clone(),
            labels,
        })?;
        let row = describe(store, self.id, summary.stored_pages.get()).inspect_err(|_| {
            let _ = store.remove(&self.id);
        })?;
        if let (Purpose::Pause, Some(parent)) = (self.purpose, self.parent) {
            let sets = self.host.engines.working_sets();
            sets.inherit(store.clone(), parent, self.id);
        }
        Ok(row)
    }

    fn write_memory(&self, staging: &Staging) -> Result<(WriteSummary, Captured), OperationError> {
        let parent = self
            .parent
            .map(|id| self.host.store.open(&id))
            .transpose()?;
        let (page_size, pages) = (self.size.page_size, self.size.pages());
        let mut writer = staging.memory_writer(parent.as_ref(), page_size, pages)?;
        let unwritten = self.unwritten();
        let capture = Capture {
            memory: &self.memory,
            pages,
            page_bytes: page_size.bytes(),
            states: self.states.as_deref(),
            unwritten: unwritten.as_ref(),
            check: parent.as_ref().filter(|_| self.host.engine.check_writes),
        };
        let captured = capture.write(&mut writer)?;
        Ok((writer.finish()?, captured))
    }

    /// The pages that need not be looked at; `None` is all of them.
    fn unwritten(&self) -> Option<UnwrittenPages> {
        let writes = self.writes.as_ref()?;
        match writes.tracking {
            Tracking::Off => None,
            Tracking::Events => self.states.as_deref().map(UnwrittenPages::of_tracked),
            Tracking::Kernel => self.remembered(writes),
        }
    }

    /// What the kernel remembers.
    fn remembered(&self, writes: &Writes) -> Option<UnwrittenPages> {
        let (page_bytes, pages) = (self.size.page_size.bytes(), self.size.pages());
        let regions = RegionTable::new(&writes.regions, page_bytes, pages).ok()?;
        match UnwrittenPages::of_pagemap(writes.vmm, &regions, pages) {
            Ok(unwritten) => Some(unwritten),
            Err(error) => {
                let error = uffd_engine::chain(&error);
                tracing::warn!(build_id = %self.id, error, "Comparing all of the memory");
                None
            }
        }
    }

    fn put_disk(&self, staging: &mut Staging) -> Result<(), OperationError> {
        let (disks, id) = (&self.host.disks, self.sandbox.as_str());
        // In the staging directory with the memory, so that one rename publishes both.
        let dir = staging.file_path("");
        let kept = match self.purpose {
            // Second names for the same files: if anything fails from here on, the staging
            // directory goes and the running guest's disk is as it was.
            Purpose::Pause => disks.keep(id, &dir)?,
            Purpose::Template => disks.flatten(id, &dir)?,
        };
        for file in kept {
            let path = dir.join(file.name);
            match disks.known_entry(&path).filter(|_| file.is_shared) {
                Some(entry) => staging.add_known_file(file.name, entry)?,
                None => {
                    let entry = staging.add_file(file.name)?;
                    if file.is_shared {
                        disks.remember_entry(&path, entry);
                    }
                }
            }
        }
        Ok(())
    }
}

/// The catalogue's row of a published build.
///
/// # Errors
/// The build can't be opened again.
pub(crate) fn describe(
    store: &snapshot_format::BuildStore,
    id: BuildId,
    stored_pages: u64,
) -> Result<BuildRow, OperationError> {
    let build = store.open(&id)?;
    let data = store.path(&id).join(file_name::DATA);
    let identity =
        integrity::identity(&data).map_err(|source| file("Looking at", &data, source))?;
    let uses = build
        .map()
        .builds()
        .iter()
        .map(|entry| entry.id)
        .filter(|used| *used != id);
    Ok(BuildRow {
        id,
        generation: build.map().generation(),
        stored_pages,
        identity,
        uses: uses.collect(),
    })
}

fn file(operation: &str, path: &Path, source: std::io::Error) -> OperationError {
    OperationError::File {
        operation: format!("{operation} {}", path.display()),
        source,
    }
}
