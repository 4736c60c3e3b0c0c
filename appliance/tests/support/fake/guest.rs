//! What runs in a fake: memory, and a thread that counts in it while it is not stopped.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use appliance::vmm::memory::MemorySize;
use nix::fcntl::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use snapshot_format::PageSize;
use uffd_engine::sys::uffd::{FEATURE_EVENT_REMOVE, Uffd};
use uffd_engine::vmm_side::{self, GuestMemory};

pub(crate) const PAGE: u64 = 4096;
/// The page that the counter is in.
const COUNTER: u64 = PAGE;

/// What a device state holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) memory_bytes: u64,
    pub(crate) huge_pages: bool,
    pub(crate) has_network: bool,
    pub(crate) has_disk: bool,
    pub(crate) disk_limits: Value,
    pub(crate) vsock: Option<String>,
}

impl State {
    pub(crate) fn memory_size(&self) -> MemorySize {
        MemorySize {
            bytes: self.memory_bytes,
            page_size: if self.huge_pages {
                PageSize::Size2M
            } else {
                PageSize::Size4K
            },
        }
    }

    fn memory(&self) -> io::Result<GuestMemory> {
        if self.huge_pages {
            GuestMemory::huge(self.memory_bytes)
        } else {
            GuestMemory::anonymous(self.memory_bytes)
        }
    }
}

/// One guest.
pub(crate) struct Guest {
    pub(crate) state: State,
    pub(crate) memory: GuestMemory,
    /// The file that it is in, if it is in one.
    file: Option<File>,
    running: Mutex<bool>,
    disk_limits: Mutex<Value>,
    changed: Condvar,
    /// Held open as Firecracker does.
    _handoff: Option<(Uffd, UnixStream)>,
}

impl Guest {
    /// A new one, stopped.
    pub(crate) fn boot(state: State) -> io::Result<Arc<Self>> {
        let memory = state.memory()?;
        let guest = Arc::new(Self::new(state, memory, None));
        guest.start();
        Ok(guest)
    }

    /// One whose memory somebody serves, stopped.
    pub(crate) fn served(state: State, by: &Path) -> io::Result<Arc<Self>> {
        let memory = state.memory()?;
        let uffd = Uffd::create(FEATURE_EVENT_REMOVE)?;
        memory.register(&uffd)?;
        let connection = vmm_side::hand_off(by, &uffd, &[memory.as_region()])?;
        let guest = Arc::new(Self::new(state, memory, Some((uffd, connection))));
        guest.start();
        Ok(guest)
    }

    /// One whose memory is in a file, stopped; it is there whoever serves it.
    pub(crate) fn in_file(state: State, file: File) -> io::Result<Arc<Self>> {
        let memory = GuestMemory::shared(&file, state.memory_bytes)?;
        let guest = Self {
            file: Some(file),
            ..Self::new(state, memory, None)
        };
        Ok(Arc::new(guest))
    }

    fn new(state: State, memory: GuestMemory, handoff: Option<(Uffd, UnixStream)>) -> Self {
        Self {
            disk_limits: Mutex::new(state.disk_limits.clone()),
            state,
            memory,
            file: None,
            running: Mutex::new(false),
            changed: Condvar::new(),
            _handoff: handoff,
        }
    }

    /// The file that its memory is in.
    pub(crate) fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }

    /// Its only processor.
    pub(crate) fn start(self: &Arc<Self>) {
        let guest = self.clone();
        std::thread::spawn(move || {
            loop {
                {
                    let _running = guest.while_running();
                    guest.memory.write(COUNTER, guest.memory.read(COUNTER) + 1);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
    }

    /// Waits until it runs, and keeps it from being stopped.
    pub(crate) fn while_running(&self) -> MutexGuard<'_, bool> {
        let running = self.running.lock().unwrap();
        self.changed
            .wait_while(running, |running| !*running)
            .unwrap()
    }

    pub(crate) fn set_running(&self, on: bool) {
        *self.running.lock().unwrap() = on;
        self.changed.notify_all();
    }

    pub(crate) fn is_running(&self) -> bool {
        *self.running.lock().unwrap()
    }

    pub(crate) fn limit_disk(&self, limits: Value) {
        *self.disk_limits.lock().unwrap() = limits;
    }

    pub(crate) fn disk_limits(&self) -> Value {
        self.disk_limits.lock().unwrap().clone()
    }

    pub(crate) fn count(&self) -> u64 {
        self.memory.read(COUNTER)
    }

    /// The content of a page, which is touched for it.
    fn page(&self, page: u64) -> io::Result<[u8; PAGE as usize]> {
        let at = page * PAGE;
        let _ = self.memory.read(at);
        let mut bytes = [0; PAGE as usize];
        File::open("/proc/self/mem")?.read_exact_at(&mut bytes, self.memory.base().get() + at)?;
        Ok(bytes)
    }

    /// All of its memory but the counter, in one number.
    pub(crate) fn hash(&self) -> u64 {
        let mut hash = 0xCBF2_9CE4_8422_2325u64;
        for page in 0..self.state.memory_bytes / PAGE {
            let mut bytes = self.page(page).unwrap();
            if page == COUNTER / PAGE {
                bytes[..8].fill(0);
            }
            for word in bytes.as_chunks::<8>().0 {
                let mixed = hash ^ u64::from_le_bytes(*word);
                hash = mixed.wrapping_mul(0x0100_0000_01B3).rotate_left(23);
            }
        }
        hash
    }

    /// Fills pages with what follows from a seed.
    pub(crate) fn fill(&self, first: u64, pages: u64, seed: u64) {
        for page in first..first + pages {
            for word in 0..PAGE / 8 {
                let value = (seed ^ (page << 20) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                self.memory.write(page * PAGE + word * 8, value | 1);
            }
        }
    }

    /// Puts all of its memory there.
    pub(crate) fn overwrite(&self, bytes: &[u8]) {
        for (at, word) in bytes.as_chunks::<8>().0.iter().enumerate() {
            let word = u64::from_le_bytes(*word);
            if word != 0 {
                self.memory.write(at as u64 * 8, word);
            }
        }
    }

    /// Gives pages back, as a balloon does.
    pub(crate) fn give_back(&self, first: u64, pages: u64) -> io::Result<()> {
        let Some(file) = &self.file else {
            return self.memory.give_back(first * PAGE, pages * PAGE);
        };
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (from, bytes) = ((first * PAGE) as i64, (pages * PAGE) as i64);
        Ok(fallocate(file, hole, from, bytes)?)
    }

    /// Writes the pages that are in memory into a file of the whole length.
    pub(crate) fn save_resident(&self, file: &File) -> io::Result<()> {
        file.set_len(self.state.memory_bytes)?;
        let pagemap = File::open("/proc/self/pagemap")?;
        let first = self.memory.base().get() / PAGE;
        for page in 0..self.state.memory_bytes / PAGE {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, (first + page) * 8)?;
            if u64::from_le_bytes(entry) >> 62 == 0 {
                continue;
            }
            file.write_all_at(&self.page(page)?, page * PAGE)?;
        }
        Ok(())
    }

    /// Its network's end, which a real one would have behind the tap device.
    pub(crate) fn take_address() -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            let driver = tokio::spawn(connection);
            let address = std::net::IpAddr::V4(appliance::network::address::GUEST);
            let added = handle.address().add(1, address, 32).execute().await;
            driver.abort();
            match added {
                // Left by the last guest of this slot.
                Err(rtnetlink::Error::NetlinkError(error))
                    if error.to_io().raw_os_error() == Some(libc::EEXIST) =>
                {
                    Ok(())
                }
                added => added.map_err(io::Error::other),
            }
        })
    }
}
