//! Memory of 2 MiB pages, served from a build of 2 MiB pages.

mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use snapshot_format::{BuildId, PageCount, PageIndex, PageSize, PublishInfo};
use support::huge::{self, Allowed};
use support::{Guest, Host, evict, has_uffd, skip};
use uffd_engine::control::{self, Report, Request};
use uffd_engine::dirty::Capture;
use uffd_engine::dirty_set::UnwrittenPages;
use uffd_engine::memory_image::{MemoryImage, ProcessMemory};
use uffd_engine::region::{ClaimedRegion, RegionTable};
use uffd_engine::server::EngineOptions;
use uffd_engine::standalone::{Happening, Standalone};
use uffd_engine::sys::process::pidfd_open;
use uffd_engine::sys::uffd::{
    FEATURE_EVENT_REMOVE, FEATURE_MISSING_HUGETLBFS, FEATURE_WP_ASYNC, FEATURE_WP_SHARED, Uffd,
};
use uffd_engine::vmm_side::{self, GuestMemory};
use uffd_engine::{PageState, PageStates, Tracking};

const HUGE: u64 = 2 << 20;
const PAGES: u64 = 8;

/// As many as the tests here have, or a line that says why there are none.
fn allowed(test: &str) -> Option<Allowed> {
    let allowed = huge::turn().and_then(|turn| Allowed::mib(turn, (PAGES * HUGE) >> 20));
    allowed.inspect_err(|reason| skip(test, reason)).ok()
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

#[test]
fn huge_pages_are_served_whole_from_the_page_cache_and_from_disk() {
    const NAME: &str = "huge_pages_are_served_whole_from_the_page_cache_and_from_disk";
    let Some(_allowed) = allowed(NAME) else {
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

#[test]
fn a_plain_memory_file_serves_huge_pages_to_whom_it_is_told() {
    const NAME: &str = "a_plain_memory_file_serves_huge_pages_to_whom_it_is_told";
    let Some(_allowed) = allowed(NAME) else {
        return;
    };
    let Some(memory) = memory(NAME) else { return };
    let dir = tempfile::tempdir().unwrap();
    let (path, socket) = (dir.path().join("mem"), dir.path().join("s"));
    let file = File::create(&path).unwrap();
    file.set_len(PAGES * HUGE).unwrap();
    for page in (0..PAGES).filter(|page| word(*page) != 0) {
        for at in PLACES {
            let word = word(page).to_le_bytes();
            file.write_all_at(&word, page * HUGE + at).unwrap();
        }
    }
    let serve = |page_size| {
        let engine = Standalone::start(&socket, &path, page_size, EngineOptions::default());
        engine.unwrap()
    };
    let uffd = Uffd::create(FEATURE_EVENT_REMOVE).unwrap();
    memory.register(&uffd).unwrap();
    let hand_over = || vmm_side::hand_off(&socket, &uffd, &[memory.as_region()]).unwrap();

    let mut small = serve(None);
    let _refused = hand_over();
    let Happening::Refused { reason } = small.wait().unwrap() else {
        panic!("accepted")
    };
    assert!(reason.contains("pages of another size"), "{reason}");
    fs::remove_file(&socket).unwrap();

    let mut engine = serve(Some(PageSize::Size2M));
    let _connection = hand_over();
    let happening = engine.wait().unwrap();
    assert!(
        matches!(happening, Happening::Attached { .. }),
        "{happening:?}"
    );
    for page in [5, 3, 0, 7, 1, 2, 4, 6] {
        for at in PLACES {
            assert_eq!(memory.read(page * HUGE + at), word(page), "page {page}");
        }
    }
    memory.give_back(HUGE, HUGE).unwrap();
    assert_eq!(memory.read(HUGE + HUGE / 2), 0);
}

/// Memory whose writes are noticed by the engine, and by the kernel, as Firecracker's and QEMU's.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Anonymous,
    SharedFile,
}

struct Tracked {
    host: Host,
    guest: Guest,
    states: PageStates,
}

impl Tracked {
    fn start(test: &str, kind: Kind) -> Option<Self> {
        let (memory, features) = match kind {
            Kind::Anonymous => (memory(test)?, FEATURE_EVENT_REMOVE),
            Kind::SharedFile => {
                let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
                let file = File::from(memfd_create(c"ram", flags).unwrap());
                file.set_len(PAGES * HUGE).unwrap();
                let memory = GuestMemory::shared(&file, PAGES * HUGE).unwrap();
                let asynchronous = FEATURE_WP_SHARED | FEATURE_WP_ASYNC;
                (
                    memory,
                    FEATURE_EVENT_REMOVE | FEATURE_MISSING_HUGETLBFS | asynchronous,
                )
            }
        };
        let uffd = match Uffd::create(features) {
            Ok(uffd) => uffd,
            Err(error) => {
                skip(test, &format!("{kind:?}: {error}"));
                return None;
            }
        };
        let mut host = host();
        let states = PageStates::create(PageCount::new(PAGES)).unwrap();
        let guest = host.attach_uffd("s1", &states, memory, &uffd);
        let tracking = match kind {
            Kind::Anonymous => Tracking::Events,
            Kind::SharedFile => Tracking::Kernel,
        };
        let report = host.track("s1", tracking);
        assert!(matches!(report, Report::Stats { .. }), "{report:?}");
        Some(Self {
            host,
            guest,
            states,
        })
    }

    fn regions(&self) -> RegionTable {
        let region = self.guest.memory.as_region();
        RegionTable::new(&[region], HUGE, PageCount::new(PAGES)).unwrap()
    }
}

#[test]
fn huge_pages_that_were_written_are_known_and_the_build_is_the_memory() {
    const NAME: &str = "huge_pages_that_were_written_are_known_and_the_build_is_the_memory";
    let Some(_allowed) = allowed(NAME) else {
        return;
    };
    for kind in [Kind::Anonymous, Kind::SharedFile] {
        let Some(mut tracked) = Tracked::start(NAME, kind) else {
            return;
        };
        let pid = std::process::id() as i32;
        let pages = PageCount::new(PAGES);
        let memory = &tracked.guest.memory;
        // Read, written after that, written first, and given back; two are never touched.
        for page in [0, 1, 3, 4] {
            check(&tracked.guest, page);
        }
        for page in [1, 3, 5] {
            memory.write(page * HUGE + HUGE / 2 + 64, 9);
        }
        tracked.host.stats("s1");

        let image = MemoryImage::Process(ProcessMemory::open(pid, tracked.regions()).unwrap());
        let present = || image.present(pages, HUGE).unwrap().get();
        assert_eq!(present(), 5, "{kind:?}");
        let unwritten = match kind {
            Kind::Anonymous => UnwrittenPages::of_tracked(&tracked.states),
            Kind::SharedFile => UnwrittenPages::of_pagemap(pid, &tracked.regions(), pages).unwrap(),
        };
        let parent = tracked.host.store.open(&tracked.host.build).unwrap();
        let capture = Capture {
            memory: &image,
            pages,
            page_bytes: HUGE,
            states: Some(&tracked.states),
            unwritten: Some(&unwritten),
            check: Some(&parent),
        };
        let id = BuildId::from_bytes([8; 16]);
        let mut staging = tracked.host.store.stage(id).unwrap();
        let mut writer = staging
            .memory_writer(Some(&parent), PageSize::Size2M, pages)
            .unwrap();
        let captured = capture.write(&mut writer).unwrap();
        // Nothing was brought in to be looked at.
        assert_eq!(present(), 5, "{kind:?}");
        assert_eq!(captured.compared.get(), 3, "{kind:?} {captured:?}");
        assert_eq!(captured.unwritten.get(), 2, "{kind:?} {captured:?}");
        assert_eq!(writer.finish().unwrap().stored_pages.get(), 3, "{kind:?}");
        fs::write(staging.file_path("vmstate"), b"state").unwrap();
        staging.add_file("vmstate").unwrap();
        staging.publish(PublishInfo::default()).unwrap();

        let build = tracked.host.store.open(&id).unwrap();
        let mut bytes = vec![0; HUGE as usize];
        for page in 0..PAGES {
            build.read_page(PageIndex::new(page), &mut bytes).unwrap();
            for (index, word) in bytes.as_chunks::<8>().0.iter().enumerate() {
                let ours = memory.read(page * HUGE + index as u64 * 8);
                let theirs = u64::from_le_bytes(*word);
                assert_eq!(theirs, ours, "{kind:?}, page {page}, word {index}");
            }
        }
    }
}

/// Asks for one page, as Cloud Hypervisor does, and waits until it is there.
fn ask(vmm: &mut UnixStream, page: u64) {
    let mut request = vec![9, 0, 0, 0, 0, 0, 0, 0];
    for word in [16, page * HUGE, HUGE] {
        request.extend_from_slice(&word.to_le_bytes());
    }
    vmm.write_all(&request).unwrap();
    let mut response = [0; 16];
    vmm.read_exact(&mut response).unwrap();
    assert_eq!(u16::from_le_bytes([response[0], response[1]]), 1);
}

#[test]
fn huge_pages_that_a_vmm_asks_for_are_in_its_file_and_stay_as_its_guest_has_them() {
    const NAME: &str =
        "huge_pages_that_a_vmm_asks_for_are_in_its_file_and_stay_as_its_guest_has_them";
    let Some(_allowed) = allowed(NAME) else {
        return;
    };
    let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let file = File::from(memfd_create(c"ram", flags).unwrap());
    file.set_len(PAGES * HUGE).unwrap();
    let memory = match GuestMemory::shared(&file, PAGES * HUGE) {
        Ok(memory) => memory,
        Err(error) => return skip(NAME, &format!("no 2 MiB pages: {error}")),
    };
    let states = PageStates::create(PageCount::new(PAGES)).unwrap();
    let mut host = host();
    let (mut vmm, theirs) = UnixStream::pair().unwrap();
    let pidfd = pidfd_open(std::process::id() as i32).unwrap();
    let request = Request::ServePages {
        request: 1,
        session: "ch".to_owned(),
        store: host.store.root().to_path_buf(),
        build: host.build,
        regions: vec![ClaimedRegion {
            base: 0,
            ..memory.as_region()
        }],
        surrendered: false,
    };
    let fds = [theirs.as_fd(), file.as_fd(), pidfd.as_fd(), states.as_fd()];
    control::send(host.control.as_fd(), &request, &fds).unwrap();
    let (report, _) = host.report();
    assert!(matches!(report, Report::Attached { .. }), "{report:?}");

    let word = |page: u64| memory.read(page * HUGE + HUGE / 2);
    for page in [5, 3, 0, 7, 1, 2] {
        ask(&mut vmm, page);
        for at in PLACES {
            assert_eq!(
                memory.read(page * HUGE + at),
                self::word(page),
                "page {page}"
            );
        }
    }
    // Zero in the build, and not; asked for again, both are as the guest has them.
    for page in [3, 5] {
        memory.write(page * HUGE + HUGE / 2, 9);
        ask(&mut vmm, page);
        assert_eq!(word(page), 9, "page {page}");
    }
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, punch, 5 * HUGE as i64, HUGE as i64).unwrap();
    ask(&mut vmm, 5);
    assert_eq!(word(5), 0, "it came back as it was in the build");
    drop(vmm);
    let (report, _) = host.report();
    assert!(matches!(report, Report::Ended { .. }), "{report:?}");
    let stats = host.detach("ch");
    assert_eq!(stats.pages_copied, 4, "{stats:?}");
    assert_eq!(stats.pages_zeroed, 3, "{stats:?}");
}
