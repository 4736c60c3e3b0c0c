//! The engine without a daemon: plain memory files, builds, VMMs that come, go, and misbehave.

mod support;

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use snapshot_format::PageSize;
use support::{Host, PAGE, closed, content, has_uffd};
use uffd_engine::server::EngineOptions;
use uffd_engine::standalone::{Happening, Standalone, StandaloneError};
use uffd_engine::sys::uffd::{FEATURE_EVENT_REMOVE, Uffd};
use uffd_engine::vmm_side::{self, GuestMemory};

const PAGES: u64 = 64;

/// A sparse memory file with the pages of the test build.
fn memory_file(path: &Path) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(PAGES * PAGE).unwrap();
    for (page, word) in (0..PAGES).filter_map(|page| Some((page, content(page)?))) {
        for at in [0, 4088] {
            file.write_all_at(&word.to_le_bytes(), page * PAGE + at)
                .unwrap();
        }
    }
}

fn start(socket: &Path, snapshot: &Path) -> Result<Standalone, StandaloneError> {
    Standalone::start(socket, snapshot, None, EngineOptions::default())
}

fn hand_over(socket: &Path) -> (GuestMemory, Uffd, UnixStream) {
    let memory = GuestMemory::anonymous(PAGES * PAGE).unwrap();
    let uffd = Uffd::create(FEATURE_EVENT_REMOVE).unwrap();
    memory.register(&uffd).unwrap();
    let connection = vmm_side::hand_off(socket, &uffd, &[memory.as_region()]).unwrap();
    (memory, uffd, connection)
}

fn check_all(memory: &GuestMemory) {
    for page in (0..PAGES).rev() {
        assert_eq!(
            memory.read(page * PAGE),
            content(page).unwrap_or(0),
            "page {page}"
        );
    }
}

#[test]
fn a_plain_memory_file_serves_one_vmm_after_the_other() {
    if !has_uffd("a_plain_memory_file_serves_one_vmm_after_the_other") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (socket, file) = (dir.path().join("s"), dir.path().join("mem"));
    memory_file(&file);
    let mut engine = start(&socket, &file).unwrap();
    let mut guests = Vec::new();
    for expected in 1..=3 {
        guests.push(hand_over(&socket));
        let Happening::Attached { number, pid } = engine.wait().unwrap() else {
            panic!("not attached")
        };
        assert_eq!((number, pid), (expected, std::process::id() as i32));
    }
    for (memory, ..) in &guests {
        check_all(memory);
    }
}

#[test]
fn a_builds_directory_serves_as_well() {
    if !has_uffd("a_builds_directory_serves_as_well") {
        return;
    }
    let host = Host::start(PAGES);
    let socket = host.dir.path().join("s");
    let mut engine = start(&socket, &host.store.path(&host.build)).unwrap();
    let (memory, _uffd, _connection) = hand_over(&socket);
    assert!(matches!(engine.wait().unwrap(), Happening::Attached { .. }));
    check_all(&memory);
    // It knows its pages.
    let build = host.store.path(&host.build);
    let other = host.dir.path().join("other");
    let start =
        |page_size| Standalone::start(&other, &build, Some(page_size), EngineOptions::default());
    let refused = start(PageSize::Size2M).map(|_| ()).unwrap_err();
    assert!(refused.to_string().contains("--page-size"), "{refused}");
    assert!(start(PageSize::Size4K).is_ok());
}

#[test]
fn a_refused_peer_is_told_of_and_the_next_one_served() {
    if !has_uffd("a_refused_peer_is_told_of_and_the_next_one_served") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (socket, file) = (dir.path().join("s"), dir.path().join("mem"));
    memory_file(&file);
    let mut engine = start(&socket, &file).unwrap();
    for _ in 0..3 {
        let mut peer = UnixStream::connect(&socket).unwrap();
        peer.write_all(b"{}").unwrap();
        let Happening::Refused { reason } = engine.wait().unwrap() else {
            panic!("accepted")
        };
        assert!(reason.contains("not a list"), "{reason}");
        assert!(closed(&peer));
    }
    let (memory, _uffd, _connection) = hand_over(&socket);
    assert!(matches!(engine.wait().unwrap(), Happening::Attached { .. }));
    check_all(&memory);
}

#[test]
fn what_is_no_snapshot_and_a_socket_in_use_are_refused_at_the_start() {
    if !has_uffd("what_is_no_snapshot_and_a_socket_in_use_are_refused_at_the_start") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (socket, file) = (dir.path().join("s"), dir.path().join("mem"));
    let refused = |snapshot: &Path| start(&socket, snapshot).map(|_| ()).unwrap_err();
    assert!(matches!(refused(&file), StandaloneError::NoSnapshot { .. }));
    assert!(matches!(
        refused(dir.path()),
        StandaloneError::NoSnapshot { .. }
    ));
    std::fs::write(&file, b"too short").unwrap();
    assert!(matches!(refused(&file), StandaloneError::Source { .. }));
    memory_file(&file);
    let engine = start(&socket, &file).unwrap();
    assert!(matches!(refused(&file), StandaloneError::Taken { .. }));
    drop(engine);
}

/// Not a test of its own: the VMM of the next one, which runs it in a process that it can kill.
#[test]
fn vmm_for_others_to_kill() {
    let Some(socket) = std::env::var_os("THAW_TEST_VMM_SOCKET") else {
        return;
    };
    let (memory, _uffd, _connection) = hand_over(Path::new(&socket));
    check_all(&memory);
    println!("checked");
    std::thread::park();
}

#[test]
fn a_killed_vmm_is_let_go_of() {
    use std::io::{BufRead, BufReader};
    if !has_uffd("a_killed_vmm_is_let_go_of") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (socket, file) = (dir.path().join("s"), dir.path().join("mem"));
    memory_file(&file);
    let mut engine = start(&socket, &file).unwrap();
    let mut kill_one = |expected| {
        let mut vmm = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "vmm_for_others_to_kill", "--nocapture"])
            .env("THAW_TEST_VMM_SOCKET", &socket)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut says = BufReader::new(vmm.stdout.take().unwrap()).lines();
        assert!(says.any(|line| line.unwrap().contains("checked")));
        let Happening::Attached { .. } = engine.wait().unwrap() else {
            panic!("it did not attach")
        };
        vmm.kill().unwrap();
        vmm.wait().unwrap();
        let Happening::Ended { number, stats } = engine.wait().unwrap() else {
            panic!("it did not end")
        };
        assert_eq!((number, stats.pages_installed), (expected, PAGES));
    };
    kill_one(1);
    // The engine opens the snapshot for the next one, and lets go of polled descriptors, a little
    // later than it says so.
    let settled = || {
        let patience = Instant::now() + Duration::from_secs(5);
        let (mut count, mut since) = (open_descriptors(), Instant::now());
        while since.elapsed() < Duration::from_millis(100) && Instant::now() < patience {
            std::thread::yield_now();
            let now = open_descriptors();
            if now != count {
                (count, since) = (now, Instant::now());
            }
        }
        count
    };
    let before = settled();
    for number in 2..6 {
        kill_one(number);
    }
    let after = settled();
    assert!(
        after <= before,
        "descriptors leaked: {before}, then {after}"
    );
    let (memory, _uffd, _connection) = hand_over(&socket);
    assert!(matches!(engine.wait().unwrap(), Happening::Attached { .. }));
    check_all(&memory);
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
