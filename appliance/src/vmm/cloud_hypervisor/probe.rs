//! Which Cloud Hypervisor, does it run guests here, and what of it can be relied on?
//!
//! A guest of a few instructions is started under Landlock, stopped, taken, let go on, and given to
//! another process with its memory served: what all later pauses and resumes do is seen before
//! the first of them. What doesn't work is done without where that is possible, and said:
//!
//! ```text
//!   Landlock           ─▶ none, if the kernel has none
//!   an acknowledgement ─▶ a refusal, which lets older versions keep their guest, too
//!   page requests      ─▶ paging of its own, out of a file
//!   that in time       ─▶ all of the file before the guest goes on, before version 53
//!   a user of its own  ─▶ the daemon's, if the program can't be run or what it needs not be had
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use http_api::wire::VmmInfo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use uffd_engine::memory_image::Part;

use super::bodies::FromFile;
use super::command::{Boot, Layout as Paths};
use super::machine::CloudHypervisorMachine;
use super::receive::Release;
use super::waiting::Start;
use super::{CloudHypervisor, probe_guest, protocol, state, unpacked};
use crate::vmm::own_user::Users;
use crate::vmm::probe_guest::SAYS;
use crate::vmm::probing::{self, KERNEL_TIME, MISSES_ITS_ROOT, ProbeError, shape};
use crate::vmm::{GuestShape, Machine, PageRequests, Paging, VmmError, kernel_image};

/// The oldest whose migrations are understood.
const OLDEST: (u32, u32) = (52, 0);
/// Page requests came with this one.
const WITH_REQUESTS: (u32, u32) = (53, 0);
const PROBE_MEMORY_MB: u32 = 32;
const NAME: &str = "the probe";

/// What to look at, and where there is room for it.
#[derive(Clone, Debug)]
pub struct Probe<'a> {
    /// The program.
    pub program: &'a Path,
    /// A directory for sockets, which is emptied.
    pub run_dir: &'a Path,
    /// Where unpacked kernels are kept.
    pub kernels: PathBuf,
    /// How long it may take for one command.
    pub patience: Duration,
    /// Who it is to be, or why not another than the daemon's user.
    pub users: Result<Users, String>,
}

/// A guest that was taken.
struct Guest {
    state: Vec<u8>,
    memory: Vec<u8>,
}

impl Probe<'_> {
    /// Finds out about one Cloud Hypervisor.
    ///
    /// # Errors
    /// Why it can't be used.
    pub async fn run(&self) -> Result<CloudHypervisor, ProbeError> {
        let version = probing::version_of(self.program, "--version").await?;
        let number = probing::new_enough(self.program, &version, OLDEST)?;
        let driver = CloudHypervisor {
            program: self.program.to_owned(),
            // Its states change with its versions, and no release says from which one on: a state
            // is read by the version that wrote it.
            state_format: format!("{}-{version}", state::VERSION),
            info: VmmInfo {
                name: "cloud-hypervisor".into(),
                version,
                accelerator: "kvm".into(),
                reason: String::new(),
            },
            paging: Paging::Requested,
            release: Release::Acknowledged,
            from_file: FromFile::OnDemand,
            landlock: true,
            users: self.users.as_ref().ok().copied(),
            patience: self.patience,
            kernels: self.kernels.clone(),
        };
        let tried = self.try_all(driver, number).await;
        crate::host::remove_dir(self.run_dir);
        tried
    }

    async fn try_all(
        &self,
        mut driver: CloudHypervisor,
        number: (u32, u32),
    ) -> Result<CloudHypervisor, ProbeError> {
        let failed = ProbeError::guest(self.program);
        let started = Instant::now();
        crate::host::remove_dir(self.run_dir);
        let kernel = self.run_dir.join("probe.elf");
        probing::write(&kernel, &probe_guest::elf())?;
        let mut without = Vec::new();
        if let Err(reason) = &self.users {
            without.push(as_the_daemon(reason));
        }
        let guest = loop {
            match self.save(&driver, &kernel).await {
                Ok(guest) => break guest,
                Err(Tried::Boot(error)) if driver.landlock && is_of_landlock(&error) => {
                    driver.landlock = false;
                    without.push(format!("no Landlock ({})", uffd_engine::chain(&error)));
                }
                Err(Tried::Boot(error)) if driver.users.is_some() => {
                    self.give_up_users(&mut driver, &mut without, &error);
                }
                // It ends itself when it hears that its guest was taken.
                Err(Tried::GoOn(_)) if driver.release == Release::Acknowledged => {
                    driver.release = Release::Refused;
                    without.push("its guests are snapshotted by refusing them".to_owned());
                }
                Err(Tried::Boot(error) | Tried::GoOn(error)) => return Err(failed(error)),
            }
        };
        if number < WITH_REQUESTS {
            driver.paging = Paging::Own;
            driver.from_file = FromFile::Before;
        }
        let mut restored = self.restore(&driver, &guest).await;
        if let (Err(error), Some(users)) = (&restored, driver.users) {
            // Both ways want a userfaultfd, which its user may not have.
            driver.users = None;
            let again = self.restore(&driver, &guest).await;
            driver.users = Some(users);
            if again.is_ok() {
                self.give_up_users(&mut driver, &mut without, error);
                restored = again;
            }
        }
        let requested = match (restored, driver.paging) {
            (Ok(()), Paging::Own) => Err("it is older than 53".to_owned()),
            (Ok(()), _) => Ok(()),
            (Err(error), Paging::Own) => return Err(failed(error)),
            (Err(error), _) => {
                driver.paging = Paging::Own;
                self.restore(&driver, &guest).await.map_err(failed)?;
                Err(uffd_engine::chain(&error))
            }
        };
        if let Err(reason) = requested {
            let how = if number < WITH_REQUESTS {
                "it reads all memory out of a file before a guest goes on"
            } else {
                "it pages by itself out of a file"
            };
            without.push(format!("{how} ({reason})"));
            tracing::warn!(
                program = %self.program.display(), reason,
                "Guests of this Cloud Hypervisor are not served: it can't ask for pages"
            );
        }
        let took = started.elapsed();
        let confined = if driver.landlock {
            "under Landlock and its filters"
        } else {
            "under its filters"
        };
        let who = driver.users.map(|users| format!(", {users}"));
        let who = who.unwrap_or_default();
        let pages = match driver.paging {
            Paging::Own => "",
            Paging::HandedOver | Paging::Requested => "; it asks for pages",
        };
        let without: String = without.iter().map(|text| format!("; {text}")).collect();
        driver.info.reason = format!(
            "a guest ran {confined}{who}, was taken and given back in {took:.1?}{pages}{without}"
        );
        Ok(driver)
    }

    /// From now on they run as the daemon's user.
    fn give_up_users(
        &self,
        driver: &mut CloudHypervisor,
        without: &mut Vec<String>,
        error: &VmmError,
    ) {
        let reason = uffd_engine::chain(error);
        tracing::warn!(
            program = %self.program.display(), reason,
            "Cloud Hypervisors run as the daemon's user"
        );
        driver.users = None;
        without.push(as_the_daemon(&reason));
    }

    /// Boots, stops, takes, and lets go on.
    async fn save(&self, driver: &CloudHypervisor, kernel: &Path) -> Result<Guest, Tried> {
        let shape = shape(kernel, PROBE_MEMORY_MB);
        let started = self.start(driver, &shape, Some(kernel)).await;
        let mut machine = started.map_err(Tried::Boot)?;
        let booted = machine.boot(&shape, None, driver.landlock);
        booted.await.map_err(Tried::Boot)?;
        let console = machine.console();
        let said = probing::says(NAME, &console, SAYS, self.patience);
        said.await.map_err(Tried::Boot)?;
        machine.stop().await.map_err(Tried::Boot)?;
        let (state, parts) = machine.take_guest().await.map_err(Tried::Boot)?;
        let memory = read_all(&parts).map_err(|source| {
            Tried::Boot(VmmError::Io {
                name: NAME.into(),
                command: "reading its memory".into(),
                source,
            })
        })?;
        let until_now = console.text();
        machine.go_on().await.map_err(Tried::GoOn)?;
        let goes_on = async {
            while console.text() == until_now {
                sleep(Duration::from_millis(5)).await;
            }
        };
        let goes_on = timeout(self.patience, goes_on).await;
        goes_on.map_err(|_| Tried::GoOn(silent(self.patience)))?;
        machine.kill().await;
        Ok(Guest { state, memory })
    }

    /// Gives a guest to another process.
    async fn restore(&self, driver: &CloudHypervisor, guest: &Guest) -> Result<(), VmmError> {
        let shape = shape(Path::new(""), PROBE_MEMORY_MB);
        let contents = unpacked(NAME, &guest.state)?;
        let mut machine = self.start(driver, &shape, None).await?;
        let failed = |source| VmmError::Io {
            name: NAME.into(),
            command: "serving its memory".into(),
            source,
        };
        let serving = if driver.paging == Paging::Own {
            let file = Paths::new(self.run_dir).own_memory();
            fs::create_dir_all(file.parent().unwrap_or(self.run_dir))
                .and_then(|()| fs::write(&file, &guest.memory))
                .map_err(failed)?;
            machine
                .restore_own(&contents, driver.landlock, true)
                .await?;
            None
        } else {
            let (asks, asked) = oneshot::channel();
            let memory = guest.memory.clone();
            let serving = tokio::spawn(async move {
                if let Ok(requests) = asked.await {
                    // It ends with the VMM.
                    let _ = serve(requests, &memory).await;
                }
            });
            machine.give(&contents, driver.landlock, true, asks).await?;
            Some(serving)
        };
        let said = probing::says(NAME, &machine.console(), SAYS, self.patience).await;
        machine.kill().await;
        if let Some(serving) = serving {
            serving.abort();
        }
        said
    }

    async fn start(
        &self,
        driver: &CloudHypervisor,
        shape: &GuestShape,
        kernel: Option<&Path>,
    ) -> Result<CloudHypervisorMachine, VmmError> {
        let start = Start {
            name: NAME,
            paths: &Paths::new(self.run_dir),
            place: None,
            boot: kernel.map(|kernel| Boot {
                kernel,
                initrd: None,
            }),
        };
        CloudHypervisorMachine::start(driver, start, shape.memory()).await
    }

    /// Whether the kernel that guests will use gets as far as missing its root.
    ///
    /// # Errors
    /// [`ProbeError::Kernel`], if it doesn't.
    pub async fn try_kernel(
        &self,
        driver: &CloudHypervisor,
        kernel: &Path,
        cache: &Path,
    ) -> Result<String, ProbeError> {
        let booting = self.boot_kernel(driver, kernel);
        probing::try_kernel(&driver.info, kernel, cache, self.run_dir, booting).await
    }

    async fn boot_kernel(&self, driver: &CloudHypervisor, kernel: &Path) -> Result<(), VmmError> {
        let shape = shape(kernel, 256);
        let elf = kernel_image::unpacked(NAME, kernel, &driver.kernels).await?;
        let mut machine = self.start(driver, &shape, Some(&elf)).await?;
        machine.boot(&shape, None, driver.landlock).await?;
        let said = probing::says(NAME, &machine.console(), MISSES_ITS_ROOT, KERNEL_TIME).await;
        machine.kill().await;
        said
    }
}

/// What is said of one that is nobody of its own.
fn as_the_daemon(reason: &str) -> String {
    format!("as the daemon's user ({reason})")
}

/// At what a guest failed.
enum Tried {
    /// Before it was taken.
    Boot(VmmError),
    /// After.
    GoOn(VmmError),
}

fn silent(patience: Duration) -> VmmError {
    VmmError::Timeout {
        name: NAME.into(),
        command: "going on after its guest was taken".into(),
        seconds: patience.as_secs(),
    }
}

fn is_of_landlock(error: &VmmError) -> bool {
    matches!(error, VmmError::Refused { answer, .. } if answer.to_lowercase().contains("landlock"))
}

fn read_all(parts: &[Part]) -> io::Result<Vec<u8>> {
    let mut memory = Vec::new();
    for part in parts {
        let begin = memory.len();
        memory.resize(begin + part.bytes as usize, 0);
        part.file.read_exact_at(&mut memory[begin..], part.offset)?;
    }
    Ok(memory)
}

/// Answers page requests for a guest whose memory begins at 0, until nobody asks any more.
async fn serve(requests: PageRequests, memory: &[u8]) -> io::Result<()> {
    let file = fs::File::from(requests.memory);
    let connection = std::os::unix::net::UnixStream::from(requests.connection);
    connection.set_nonblocking(true)?;
    let mut connection = UnixStream::from_std(connection)?;
    loop {
        let mut request = [0; 2 * protocol::HEADER_BYTES];
        connection.read_exact(&mut request).await?;
        let [.., address, length] = *request.as_chunks::<8>().0 else {
            return Ok(());
        };
        let (from, length) = (u64::from_le_bytes(address), u64::from_le_bytes(length));
        let end = from.saturating_add(length);
        let page = memory.get(from as usize..end as usize);
        let page = page.ok_or(io::ErrorKind::InvalidData)?;
        file.write_all_at(page, from)?;
        connection.write_all(&protocol::response(true)).await?;
    }
}
