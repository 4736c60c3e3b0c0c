//! Memory that is asked for: what the guest misses at once, and all the rest in between.
//!
//! Source: `uffd_handler_loop` in `vmm/src/memory_manager.rs` of Cloud Hypervisor 53.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use uffd_engine::address::HostAddr;
use uffd_engine::sys::uffd::{
    Event, EventBuffer, FEATURE_MINOR_HUGETLBFS, FEATURE_MINOR_SHMEM, FEATURE_MISSING_HUGETLBFS,
    FEATURE_MISSING_SHMEM, Uffd,
};

use super::guest::Guest;
use super::migration::{self, Slot};

/// As Cloud Hypervisor calls it: the driver looks for it.
const THREAD: &str = "uffd-handler";

/// Whether memory is being asked for still.
pub(crate) fn is_restoring() -> bool {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.flatten().any(|task| {
        let name = std::fs::read_to_string(task.path().join("comm"));
        name.is_ok_and(|name| name.trim() == THREAD)
    })
}

/// Asks for all of a guest's memory from now on.
pub(crate) fn begin(
    guest: &Arc<Guest>,
    slots: Vec<Slot>,
    connection: UnixStream,
) -> io::Result<()> {
    let state = &guest.state;
    let uffd = Uffd::create(if state.huge_pages {
        FEATURE_MISSING_HUGETLBFS | FEATURE_MINOR_HUGETLBFS
    } else {
        FEATURE_MISSING_SHMEM | FEATURE_MINOR_SHMEM
    })?;
    uffd.register_missing_and_minor(guest.memory.base(), state.memory_bytes)?;
    let guest = guest.clone();
    std::thread::Builder::new()
        .name(THREAD.into())
        .spawn(move || {
            // Cloud Hypervisor ends then, without an error of its own.
            if let Err(error) = bring(&guest, &slots, &connection, &uffd) {
                eprintln!("UFFD handler exited with error: {error}");
                std::process::exit(0);
            }
            // Held open until the end, as Cloud Hypervisor does.
            std::mem::forget(connection);
        })
        .map(|_| ())
}

/// Is never done bringing memory in.
pub(crate) fn never_done() {
    let forever = || {
        loop {
            std::thread::park();
        }
    };
    let thread = std::thread::Builder::new().name(THREAD.into());
    thread.spawn(forever).map(drop).unwrap();
}

fn bring(guest: &Guest, slots: &[Slot], connection: &UnixStream, uffd: &Uffd) -> io::Result<()> {
    let size = guest.state.memory_size();
    let (pages, page_bytes) = (size.pages().get(), size.page_size.bytes());
    let mut served = vec![false; pages as usize];
    let (mut next, mut buffer) = (0, EventBuffer::default());
    loop {
        uffd.read_events(&mut buffer)?;
        let base = guest.memory.base();
        let missed = buffer.iter().filter_map(|event| match event {
            Event::Fault { addr, .. } => Some((addr.get() - base.get()) / page_bytes),
            _ => None,
        });
        let mut wanted: Vec<u64> = missed.collect();
        if wanted.is_empty() {
            while next < pages && served[next as usize] {
                next += 1;
            }
            if next == pages {
                return Ok(());
            }
            wanted.push(next);
        }
        for page in wanted {
            let at = page * page_bytes;
            let slot = slots.iter().find(|slot| slot.has(at)).unwrap();
            ask(connection, slot.address + at - slot.offset, page_bytes)?;
            served[page as usize] = true;
            let addr = HostAddr::new(base.get() + at);
            while let Err(error) = uffd.map_present(addr, page_bytes) {
                match error.raw_os_error() {
                    Some(libc::EAGAIN) => std::thread::yield_now(),
                    Some(libc::EEXIST) => {
                        uffd.wake(addr, page_bytes)?;
                        break;
                    }
                    _ => return Err(error),
                }
            }
        }
    }
}

fn ask(mut connection: &UnixStream, address: u64, bytes: u64) -> io::Result<()> {
    let mut request = migration::header(migration::PAGE_FAULT, 16).to_vec();
    request.extend_from_slice(&address.to_le_bytes());
    request.extend_from_slice(&bytes.to_le_bytes());
    connection.write_all(&request)?;
    let mut answer = [0; 16];
    connection.read_exact(&mut answer)?;
    if answer == migration::header(migration::OK, 0) {
        return Ok(());
    }
    Err(io::Error::other(format!("a page was refused: {answer:?}")))
}
