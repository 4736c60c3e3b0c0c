//! A stopped guest, taken from its VMM as by a migration: its state and the files of its memory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;

use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use uffd_engine::memory_image::Part;

use super::{A_LITTLE, CloudHypervisorMachine, MIGRATING, PAUSED};
use crate::vmm::VmmError;
use crate::vmm::api::{ApiFault, finish};
use crate::vmm::cloud_hypervisor::StateError;
use crate::vmm::cloud_hypervisor::bodies::SendMigration;
use crate::vmm::cloud_hypervisor::command::url;
use crate::vmm::cloud_hypervisor::layout::Layout;
use crate::vmm::cloud_hypervisor::receive::{Held, Received, receive};
use crate::vmm::cloud_hypervisor::state::Contents;
use crate::vmm::memory::MemorySize;
use crate::vmm::own_user::give;

/// What is refused with these words is possible a little later.
const NOT_YET: &str = "restore is still in progress";
const NOT_YET_EITHER: &str = "restore is in progress";

/// A guest that was taken and waits, stopped, for what becomes of it.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) held: Held,
    /// Its VMM answers when it has let the guest go, or at once, according to its version.
    pub(super) asking: JoinHandle<Result<(), ApiFault>>,
}

/// What of a guest is kept, and the files that its memory is in, by slots.
type GuestParts = (Contents, Vec<(u32, File)>);

impl CloudHypervisorMachine {
    /// Takes the stopped guest: what a build keeps of it, and its memory.
    pub(in crate::vmm::cloud_hypervisor) async fn take_guest(
        &mut self,
    ) -> Result<(Vec<u8>, Vec<Part>), VmmError> {
        let state = self.guest_state().await?;
        if state != PAUSED {
            return Err(self.refused("vm.send-migration", format!("its guest is {state}")));
        }
        let socket = self.paths.take();
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).and_then(|listener| {
            self.user.map_or(Ok(()), |user| give(&socket, user))?;
            Ok(listener)
        });
        let listener = listener.map_err(|source| self.io("listening for its guest", source))?;
        let deadline = Instant::now() + self.patience;
        let taken = loop {
            match self.take(&listener).await {
                Err(VmmError::Refused { answer, .. })
                    if is_not_yet(&answer) && Instant::now() < deadline =>
                {
                    sleep(A_LITTLE).await;
                }
                taken => break taken,
            }
        };
        let _ = fs::remove_file(&socket);
        let (contents, files) = taken?;
        kept(self.memory, contents, files).map_err(|error| self.state(error))
    }

    /// Has its VMM hand it over; it stays stopped, and its VMM waits.
    async fn take(&mut self, listener: &UnixListener) -> Result<GuestParts, VmmError> {
        let then = self.events.said();
        let body = SendMigration {
            destination_url: url(&self.paths.inside(&self.paths.take())),
            local: true,
            preserve_source: true,
        };
        let mut api = self.api.beside();
        let mut asking =
            tokio::spawn(async move { api.put("/api/v1/vm.send-migration", &body).await });
        let (events, mut answered) = (&self.events, false);
        let exchange = async {
            let receiving = receive(listener);
            tokio::pin!(receiving);
            loop {
                tokio::select! {
                    received = &mut receiving => return received,
                    answer = &mut asking, if !answered => {
                        answered = true;
                        answer.map_err(io::Error::other)??;
                    }
                    () = events.migration_fails(then) => {
                        return Err(ApiFault::Refused("it says that the migration failed".into()));
                    }
                }
            }
        };
        let done = finish(&self.name, "vm.send-migration", self.patience, exchange).await;
        match self.judge(done).await {
            Ok(received) => {
                if answered {
                    asking = tokio::spawn(async { Ok(()) });
                }
                let Received {
                    config,
                    state,
                    memory,
                    held,
                } = received;
                self.taken = Some(Taken { held, asking });
                Ok((Contents { config, state }, memory))
            }
            Err(error) => {
                asking.abort();
                Err(error)
            }
        }
    }
}

/// A guest as a build keeps it, and the parts of its memory in their order.
fn kept(
    memory: MemorySize,
    contents: Contents,
    files: Vec<(u32, File)>,
) -> Result<(Vec<u8>, Vec<Part>), StateError> {
    let mut config = contents.config()?;
    let layout = Layout::of(&config, memory)?;
    let mut files: BTreeMap<u32, File> = files.into_iter().collect();
    let mut parts = Vec::with_capacity(files.len());
    for mapping in layout.mappings() {
        let file = files.remove(&mapping.slot);
        parts.push(Part {
            file: file.ok_or_else(|| StateError::Field {
                field: "slot",
                problem: format!("is {}, and no memory came for it", mapping.slot),
            })?,
            offset: mapping.file_offset,
            bytes: mapping.bytes,
        });
    }
    layout.put_into_one_file(&mut config);
    let packed = Contents {
        config: config.to_string().into_bytes(),
        state: contents.state,
    };
    Ok((packed.pack(), parts))
}

fn is_not_yet(answer: &str) -> bool {
    [NOT_YET, NOT_YET_EITHER, MIGRATING]
        .iter()
        .any(|words| answer.contains(words))
}
