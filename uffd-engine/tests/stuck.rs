//! A source that does not answer: whoever waits for it waits, and nobody else.

mod support;

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request as FuseRequest,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{Shutdown, shutdown};
use snapshot_format::PageCount;
use support::shared::punch;
use support::{Host, PAGE, evict, has_uffd, skip};
use uffd_engine::PageStates;
use uffd_engine::control::{Report, Request};
use uffd_engine::sys::uffd::{FEATURE_EVENT_REMOVE, FEATURE_MISSING_SHMEM, Uffd};
use uffd_engine::vmm_side::{self, GuestMemory};

/// Pages of the memory file that nobody serves, and threads that wait for one each: more than a
/// worker has read slots.
const STUCK_PAGES: u64 = 4096;
const WAITING: u64 = 96;
const PAGES: u64 = 2048;

/// A file system of one file, whose reads come back once somebody lets them; its opening as well,
/// if it is to.
struct StuckFile {
    let_go: Arc<AtomicBool>,
    asked: mpsc::Sender<()>,
    opens_at_once: bool,
}

/// Does something once it is let go, in a thread of its own.
fn once(let_go: &Arc<AtomicBool>, done: impl FnOnce(bool) + Send + 'static) {
    let let_go = let_go.clone();
    std::thread::spawn(move || {
        let patience = Instant::now() + Duration::from_secs(120);
        while !let_go.load(Ordering::Acquire) {
            if Instant::now() > patience {
                return done(false);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        done(true);
    });
}

fn attributes(inode: INodeNo) -> FileAttr {
    let file = inode != INodeNo::ROOT;
    FileAttr {
        ino: inode,
        size: if file { STUCK_PAGES * PAGE } else { 0 },
        blocks: STUCK_PAGES * PAGE / 512,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if file {
            FileType::RegularFile
        } else {
            FileType::Directory
        },
        perm: 0o755,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        flags: 0,
        blksize: 4096,
    }
}

impl Filesystem for StuckFile {
    fn lookup(&self, _: &FuseRequest, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        let attributes = attributes(INodeNo(2));
        reply.entry(&Duration::from_secs(60), &attributes, Generation(0));
    }

    fn getattr(&self, _: &FuseRequest, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&Duration::from_secs(60), &attributes(inode));
    }

    fn open(&self, _: &FuseRequest, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let opened = |reply: ReplyOpen| reply.opened(FileHandle(0), FopenFlags::empty());
        if self.opens_at_once {
            return opened(reply);
        }
        let _ = self.asked.send(());
        once(&self.let_go, move |_| opened(reply));
    }

    fn read(
        &self,
        _: &FuseRequest,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _ = self.asked.send(());
        once(&self.let_go, move |let_go| {
            if !let_go {
                return reply.error(Errno::EIO);
            }
            let first = offset / PAGE;
            let pages = first..first + u64::from(size) / PAGE;
            let bytes: Vec<u8> = pages
                .flat_map(|page| (page + 1).to_le_bytes().repeat(PAGE as usize / 8))
                .collect();
            reply.data(&bytes);
        });
    }
}

/// Has a session serve the stuck file.
fn attach_file(host: &mut Host, file: &Path) -> (GuestMemory, Uffd, UnixStream) {
    let memory = GuestMemory::anonymous(STUCK_PAGES * PAGE).unwrap();
    let uffd = Uffd::create(FEATURE_EVENT_REMOVE).unwrap();
    let connection = attach_memory(host, file, &memory, &uffd);
    (memory, uffd, connection)
}

/// The same for memory of the caller's.
fn attach_memory(host: &mut Host, file: &Path, memory: &GuestMemory, uffd: &Uffd) -> UnixStream {
    let states = PageStates::create(PageCount::new(STUCK_PAGES)).unwrap();
    let make = |request| Request::ExpectFile {
        request,
        session: "stuck".to_owned(),
        file: file.to_path_buf(),
        page_bytes: PAGE,
        deadline_ms: 5000,
    };
    let socket = host.expect_by("stuck", &states, make);
    memory.register(uffd).unwrap();
    let connection = vmm_side::hand_off(&socket, uffd, &[memory.as_region()]).unwrap();
    let (report, _) = host.report();
    assert!(matches!(report, Report::Attached { .. }), "{report:?}");
    connection
}

#[test]
fn a_source_that_is_stuck_stalls_no_other_session() {
    const NAME: &str = "a_source_that_is_stuck_stalls_no_other_session";
    if !has_uffd(NAME) {
        return;
    }
    let Some(stuck) = Mounted::new(NAME, true) else {
        return;
    };
    let mut host = Host::start(PAGES);
    let (memory, _uffd, _connection) = attach_file(&mut host, &stuck.file());
    let states = PageStates::create(PageCount::new(PAGES)).unwrap();
    let good = host.attach("good", &states);

    std::thread::scope(|scope| {
        for thread in 0..WAITING {
            let memory = &memory;
            scope.spawn(move || {
                let page = thread * (STUCK_PAGES / WAITING);
                assert_eq!(memory.read(page * PAGE), page + 1);
            });
        }
        stuck
            .asked
            .recv_timeout(Duration::from_secs(30))
            .expect("the stuck file was never read");
        // All the others have had their chance to take every slot there is.
        std::thread::sleep(Duration::from_millis(200));
        evict(&host.data_file());
        let (done, is_done) = mpsc::channel();
        let good = &good;
        scope.spawn(move || {
            (0..PAGES).step_by(32).for_each(|page| good.check(page));
            let _ = done.send(());
        });
        let served = is_done.recv_timeout(Duration::from_secs(30));
        stuck.let_go.store(true, Ordering::Release);
        served.expect("a session waits for another's source");
    });
    let stats = host.stats("good");
    assert!(
        stats.pages_read > 0,
        "nothing came from the disk: {stats:?}"
    );
    assert!(host.stats("stuck").pages_read >= WAITING);
    drop(host);
    stuck.unmount();
}

/// A guest's threads wait for pages that are being read, and its VMM gives them back meanwhile, as
/// QEMU does; of some, the engine never hears.
#[test]
fn pages_given_back_while_they_are_read_are_zero_or_what_was_read() {
    const NAME: &str = "pages_given_back_while_they_are_read_are_zero_or_what_was_read";
    if !has_uffd(NAME) {
        return;
    }
    let Some(stuck) = Mounted::new(NAME, true) else {
        return;
    };
    let mut host = Host::start(PAGES);
    let ram = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
    ram.set_len(STUCK_PAGES * PAGE).unwrap();
    let memory = GuestMemory::shared(&ram, STUCK_PAGES * PAGE).unwrap();
    let uffd = Uffd::create(FEATURE_EVENT_REMOVE | FEATURE_MISSING_SHMEM).unwrap();
    let _connection = attach_memory(&mut host, &stuck.file(), &memory, &uffd);
    // Far from each other, so that each is a read of its own.
    let (told, untold) = (100, 2000);
    std::thread::scope(|scope| {
        let memory = &memory;
        let read = |page: u64| {
            let thread = scope.spawn(move || memory.read(page * PAGE));
            stuck
                .asked
                .recv_timeout(Duration::from_secs(30))
                .expect("the stuck file was never read");
            thread
        };
        let (told_reader, untold_reader) = (read(told), read(untold));
        punch(&ram, untold, 1);
        punch(&ram, told, 1);
        memory.give_back(told * PAGE, PAGE).unwrap();
        // Its event was read; an answer comes after it was heeded.
        assert_eq!(host.stats("stuck").removes, 1);
        stuck.let_go.store(true, Ordering::Release);
        assert_eq!(told_reader.join().unwrap(), 0);
        // It was never there: what it would have been is what it is.
        assert_eq!(untold_reader.join().unwrap(), untold + 1);
    });
    // From now on they are pages like any other.
    memory.write(told * PAGE + 8, 5);
    assert_eq!(memory.read(told * PAGE + 8), 5);
    punch(&ram, told, 1);
    punch(&ram, untold, 1);
    for page in [told, untold] {
        assert_eq!(memory.read(page * PAGE), 0, "page {page}");
        assert_eq!(memory.read(page * PAGE + 8), 0, "page {page}");
    }
    let stats = host.stats("stuck");
    assert_eq!((stats.poisoned, stats.pages_zeroed), (0, 3), "{stats:?}");
    drop(host);
    stuck.unmount();
}

#[test]
fn a_file_that_is_not_opened_keeps_nobody_else_from_beginning() {
    const NAME: &str = "a_file_that_is_not_opened_keeps_nobody_else_from_beginning";
    if !has_uffd(NAME) {
        return;
    }
    let Some(stuck) = Mounted::new(NAME, false) else {
        return;
    };
    let mut host = Host::start(PAGES);
    let states = PageStates::create(PageCount::new(STUCK_PAGES)).unwrap();
    let make = |session: &'static str, deadline_ms| {
        let file = stuck.file();
        move |request| Request::ExpectFile {
            request,
            session: session.to_owned(),
            file,
            page_bytes: PAGE,
            deadline_ms,
        }
    };
    host.expect_by("patient", &states, make("patient", 60_000));
    host.expect_by("hasty", &states, make("hasty", 100));
    host.expect_by("gone", &states, make("gone", 60_000));
    stuck
        .asked
        .recv_timeout(Duration::from_secs(30))
        .expect("the stuck file was never opened");
    // Refused at its deadline, and said so.
    match host.report().0 {
        Report::Refused { reason, .. } => assert!(reason.contains("in time"), "{reason}"),
        other => panic!("expected a refusal, got {other:?}"),
    }
    // Another begins, is served and ends meanwhile, and one that waits can be called off.
    let good_states = PageStates::create(PageCount::new(PAGES)).unwrap();
    let good = host.attach("good", &good_states);
    (0..PAGES).step_by(32).for_each(|page| good.check(page));
    assert!(host.detach("good").faults > 0);
    assert_eq!(host.detach("gone").faults, 0);
    // Who was patient begins in the end, with the orders that came meanwhile.
    let stats = Request::Stats {
        request: 7777,
        session: "patient".to_owned(),
    };
    uffd_engine::control::send(host.control.as_fd(), &stats, &[]).unwrap();
    stuck.let_go.store(true, Ordering::Release);
    match host.report().0 {
        Report::Stats { request: 7777, .. } => {}
        other => panic!("expected counters, got {other:?}"),
    }
    drop(host);
    stuck.unmount();
}

#[test]
fn a_source_that_is_stuck_keeps_no_session_from_being_surrendered() {
    const NAME: &str = "a_source_that_is_stuck_keeps_no_session_from_being_surrendered";
    if !has_uffd(NAME) {
        return;
    }
    let (Some(stuck), Some(unopened)) = (Mounted::new(NAME, true), Mounted::new(NAME, false))
    else {
        return;
    };
    let mut host = Host::start(PAGES);
    let (memory, uffd, _connection) = attach_file(&mut host, &stuck.file());
    let states = PageStates::create(PageCount::new(PAGES)).unwrap();
    let good = host.attach("good", &states);
    let file = unopened.file();
    let none = PageStates::create(PageCount::new(STUCK_PAGES)).unwrap();
    host.expect_by("unopened", &none, |request| Request::ExpectFile {
        request,
        session: "unopened".to_owned(),
        file,
        page_bytes: PAGE,
        deadline_ms: 60_000,
    });
    std::thread::scope(|scope| {
        for thread in 0..WAITING {
            let memory = &memory;
            // Nobody will answer these any more.
            scope.spawn(move || memory.read(thread * (STUCK_PAGES / WAITING) * PAGE));
        }
        let patience = Duration::from_secs(30);
        let asked = stuck.asked.recv_timeout(patience);
        asked.expect("the stuck file was never read");
        let asked = unopened.asked.recv_timeout(patience);
        asked.expect("the other file was never opened");
        evict(&host.data_file());
        let good = &good;
        let walking = scope.spawn(|| (0..PAGES).step_by(32).for_each(|page| good.check(page)));
        let all = host.surrender();
        let names: Vec<_> = all.iter().map(support::Surrendered::session).collect();
        assert_eq!(names, ["good"]);
        host.take_over(&all[0]);
        walking.join().unwrap();
        // Nothing of it was waited for.
        assert!(!stuck.let_go.load(Ordering::Acquire));
        assert!(!unopened.let_go.load(Ordering::Acquire));
        let all = uffd.zero(memory.base(), STUCK_PAGES * PAGE);
        assert_eq!(all.bytes, STUCK_PAGES * PAGE);
        stuck.let_go.store(true, Ordering::Release);
        unopened.let_go.store(true, Ordering::Release);
    });
    drop(host);
    stuck.unmount_when_unused();
    unopened.unmount_when_unused();
}

#[test]
fn reads_under_way_when_a_daemon_takes_nothing_are_made_again() {
    const NAME: &str = "reads_under_way_when_a_daemon_takes_nothing_are_made_again";
    if !has_uffd(NAME) {
        return;
    }
    let Some(stuck) = Mounted::new(NAME, true) else {
        return;
    };
    let mut host = Host::start(PAGES);
    let (memory, uffd, _connection) = attach_file(&mut host, &stuck.file());
    std::thread::scope(|scope| {
        let (done, is_done) = mpsc::channel();
        let memory = &memory;
        scope.spawn(move || {
            let _ = done.send(memory.read(9 * PAGE));
        });
        let asked = stuck.asked.recv_timeout(Duration::from_secs(30));
        asked.expect("the stuck file was never read");
        // A daemon that is killed when it has asked.
        shutdown(host.control.as_raw_fd(), Shutdown::Read).unwrap();
        let request = Request::Surrender { request: 1 };
        uffd_engine::control::send(host.control.as_fd(), &request, &[]).unwrap();
        host.reconnect();
        // Answered by the same engine, which has its session back then.
        host.stats("stuck");
        stuck.let_go.store(true, Ordering::Release);
        let read = is_done.recv_timeout(Duration::from_secs(30));
        // Whoever waits still waits no longer.
        let _ = uffd.zero(memory.base(), STUCK_PAGES * PAGE);
        assert_eq!(read, Ok(10), "the page was never installed");
    });
    drop(host);
    stuck.unmount_when_unused();
}

/// The stuck file where it can be seen.
struct Mounted {
    mountpoint: tempfile::TempDir,
    mounted: fuser::BackgroundSession,
    let_go: Arc<AtomicBool>,
    asked: mpsc::Receiver<()>,
}

impl Mounted {
    /// `None` where there is no FUSE, which is said.
    fn new(test: &str, opens_at_once: bool) -> Option<Self> {
        let mountpoint = tempfile::tempdir().unwrap();
        let let_go = Arc::new(AtomicBool::new(false));
        let (asked, reads) = mpsc::channel();
        let stuck = StuckFile {
            let_go: let_go.clone(),
            asked,
            opens_at_once,
        };
        match fuser::spawn_mount(stuck, mountpoint.path(), &Config::default()) {
            Ok(mounted) => Some(Self {
                mountpoint,
                mounted,
                let_go,
                asked: reads,
            }),
            Err(error) => {
                skip(test, &format!("no FUSE: {error}"));
                None
            }
        }
    }

    fn file(&self) -> PathBuf {
        self.mountpoint.path().join("memory")
    }

    /// For an engine that ended without waiting for its own threads, or with a read under way: the
    /// kernel lets go of its file after the ring is closed.
    fn unmount_when_unused(self) {
        let patience = Instant::now() + Duration::from_secs(30);
        let unmount = || {
            let mut command = std::process::Command::new("umount");
            command.arg(self.mountpoint.path()).output().unwrap()
        };
        loop {
            let output = unmount();
            if output.status.success() {
                break;
            }
            assert!(Instant::now() < patience, "{output:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.mounted.join().unwrap();
    }

    fn unmount(self) {
        self.mounted.umount_and_join().unwrap();
    }
}
