//! A running guest to a build: its vCPUs stop, devices, memory and disk are written, the
//! build is published. What happens to the guest after that is the caller's affair.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http_api::ids::SandboxId;
use snapshot_format::{
    BuildId, PageCount, PageSize, PublishInfo, Staging, WriteSummary, file_name,
};
use uffd_engine::{PageStates, dirty};

use super::OperationError;
use super::live::Live;
use crate::catalogue::{BuildRow, SandboxRow};
use crate::guest::Guest;
use crate::host::{Host, Reservation};
use crate::integrity;

/// How long the guest may take to write back what it holds.
const PREPARE_TIME: Duration = Duration::from_secs(2);

/// The label of a build that names the sandbox it was taken of.
pub(crate) const LABEL_SANDBOX: &str = "sandbox";
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
    live.machine.stop().await?;
    let vmstate = live.machine.save().await?;
    let reservation = host.reserve_build();
    let memory = live.machine.memory().try_clone();
    let work = Work {
        host: host.clone(),
        id: reservation.id,
        parent: row.build,
        memory: memory.map_err(|source| OperationError::File {
            operation: "Sharing the guest's memory".into(),
            source,
        })?,
        states: live.session.as_ref().map(|session| session.states.clone()),
        memory_bytes: row.shape.memory_bytes(),
        vmstate,
        sandbox: row.id.clone(),
        purpose,
        labels: labels(row, purpose),
    };
    let written = tokio::task::spawn_blocking(move || work.write());
    let row = written.await.map_err(|_| OperationError::Worker)??;
    Ok(Taken { row, reservation })
}

fn labels(row: &SandboxRow, purpose: Purpose) -> BTreeMap<String, String> {
    BTreeMap::from([
        (LABEL_SANDBOX.to_owned(), row.id.to_string()),
        (LABEL_PURPOSE.to_owned(), purpose.name().to_owned()),
        ("template".to_owned(), row.template.to_string()),
        ("vcpus".to_owned(), row.shape.vcpus.to_string()),
        ("memory_mb".to_owned(), row.shape.memory_mb.to_string()),
    ])
}

/// All that the blocking part needs.
struct Work {
    host: Arc<Host>,
    id: BuildId,
    parent: Option<BuildId>,
    memory: fs::File,
    states: Option<Arc<PageStates>>,
    memory_bytes: u64,
    vmstate: Vec<u8>,
    sandbox: SandboxId,
    purpose: Purpose,
    labels: BTreeMap<String, String>,
}

impl Work {
    fn write(self) -> Result<BuildRow, OperationError> {
        let store = &self.host.store;
        let mut staging = store.stage(self.id)?;
        let summary = self.write_memory(&staging)?;
        let vmstate = staging.file_path(file_name::VMSTATE);
        fs::write(&vmstate, &self.vmstate).map_err(|source| file("Writing", &vmstate, source))?;
        staging.add_file(file_name::VMSTATE)?;
        self.put_disk(&mut staging)?;
        let info = self.host.driver.info();
        let vmm = BTreeMap::from([
            ("name".to_owned(), info.name.clone()),
            ("version".to_owned(), info.version.clone()),
            ("accelerator".to_owned(), info.accelerator.clone()),
        ]);
        staging.publish(PublishInfo {
            created_at_ms: crate::clock::now_ms(),
            vmm,
            labels: self.labels.clone(),
        })?;
        describe(store, self.id, summary.stored_pages.get()).inspect_err(|_| {
            let _ = store.remove(&self.id);
        })
    }

    fn write_memory(&self, staging: &Staging) -> Result<WriteSummary, OperationError> {
        let parent = self
            .parent
            .map(|id| self.host.store.open(&id))
            .transpose()?;
        let pages = PageCount::new(self.memory_bytes / PageSize::Size4K.bytes());
        let mut writer = staging.memory_writer(parent.as_ref(), PageSize::Size4K, pages)?;
        let page_bytes = PageSize::Size4K.bytes();
        let states = self.states.as_deref();
        dirty::capture(&self.memory, pages, page_bytes, states, &mut writer)?;
        Ok(writer.finish()?)
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
