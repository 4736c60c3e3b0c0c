//! Memory of 2 MiB pages, served from a build of 2 MiB pages.

mod support;

use std::fs;

use snapshot_format::{PageCount, PageIndex, PageSize};
use support::{Guest, Host, evict, has_uffd, skip};
use uffd_engine::vmm_side::GuestMemory;
use uffd_engine::{PageState, PageStates};

const HUGE: u64 = 2 << 20;
const PAGES: u64 = 8;
const OVERCOMMIT: &str = "/proc/sys/vm/nr_overcommit_hugepages";

/// Pages that the kernel may make when they are needed, for as long as this lives.
struct Allowed {
    before: String,
}

impl Allowed {
    fn pages(test: &str) -> Option<Self> {
        let before = fs::read_to_string(OVERCOMMIT).ok()?;
        let allowed = before.trim().parse::<u64>().ok()? + PAGES;
        if let Err(error) = fs::write(OVERCOMMIT, allowed.to_string()) {
            skip(test, &format!("huge pages can't be allowed: {error}"));
            return None;
        }
        Some(Self { before })
    }
}

impl Drop for Allowed {
    fn drop(&mut self) {
        let _ = fs::write(OVERCOMMIT, self.before.trim());
    }
}

fn memory(test: &str) -> Option<GuestMemory> {
    if !has_uffd(test) {
        return None;
    }
    GuestMemory::huge(PAGES * HUGE)
        .inspect_err(|error| skip(test, &format!("no 2 MiB pages: {error}")))
        .ok()
}

/// A word at both ends and in the middle of every page but the last of each four.
fn word(page: u64) -> u64 {
    if page % 4 == 3 { 0 } else { 0xB16_0000 + page }
}

const PLACES: [u64; 3] = [0, HUGE / 2, HUGE - 8];

fn host() -> Host {
    Host::serving_pages_of(PageSize::Size2M, PAGES, |page| {
        let mut bytes = vec![0; HUGE as usize];
        for at in PLACES {
            let at = at as usize;
            bytes[at..at + 8].copy_from_slice(&word(page).to_le_bytes());
        }
        bytes
    })
}

fn check(guest: &Guest, page: u64) {
    for at in PLACES {
        assert_eq!(
            guest.memory.read(page * HUGE + at),
            word(page),
            "page {page}, {at:#x}"
        );
    }
}

/// One test, because the allowance is the machine's.
#[test]
fn huge_pages_are_served_whole_from_the_page_cache_and_from_disk() {
    const NAME: &str = "huge_pages_are_served_whole_from_the_page_cache_and_from_disk";
    let Some(_allowed) = Allowed::pages(NAME) else {
        return;
    };
    for cold in [false, true] {
        let Some(memory) = memory(NAME) else { return };
        let mut host = host();
        if cold {
            evict(&host.data_file());
        }
        let states = PageStates::create(PageCount::new(PAGES)).unwrap();
        let guest = host.attach_memory("s1", &states, memory);
        for page in [5, 3, 0, 7, 1, 2, 4, 6] {
            check(&guest, page);
        }
        guest.memory.write(2 * HUGE + 64, 9);
        guest.memory.give_back(HUGE, 2 * HUGE).unwrap();
        for page in [1, 2] {
            assert_eq!(guest.memory.read(page * HUGE), 0, "page {page}");
            assert_eq!(guest.memory.read(page * HUGE + 64), 0, "page {page}");
        }
        check(&guest, 0);
        let stats = host.detach("s1");
        // Two that were zero in the build, two that were given back.
        assert_eq!(stats.pages_zeroed, 4, "{stats:?}");
        assert_eq!(stats.pages_copied, 6, "{stats:?}");
        assert_eq!(stats.pages_read > 0, cold, "{stats:?}");
        assert_eq!(stats.pages_installed, PAGES, "{stats:?}");
        assert_eq!(states.get(PageIndex::new(1)), PageState::Zero);
    }
}
