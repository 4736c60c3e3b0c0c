//! An engine in this process, a build to serve, and memory that faults.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its own part"
)]

pub mod asking;
pub mod huge;
pub mod shared;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread::JoinHandle;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use snapshot_format::{BuildId, BuildStore, PageCount, PageIndex, PageSize, PublishInfo};
use uffd_engine::control::{self, Report, Request, Succession};
use uffd_engine::server::{self, EngineOptions};
use uffd_engine::sys::mapping::{CACHE_PAGE, CHUNK_BYTES};
use uffd_engine::sys::uffd::{FEATURE_EVENT_REMOVE, Uffd};
use uffd_engine::vmm_side::{self, GuestMemory};
use uffd_engine::{PageStates, Tracking};

pub const PAGE: u64 = 4096;

/// Says by name that a test did not run, for the summary of `cargo verify`.
pub fn skip(test: &str, reason: &str) {
    println!("skipped: {test}: {reason}");
}

/// Whether this machine has userfaultfd for us; otherwise the test is skipped.
pub fn has_uffd(test: &str) -> bool {
    match Uffd::create(FEATURE_EVENT_REMOVE) {
        Ok(_) => true,
        Err(error) => {
            skip(test, &format!("no userfaultfd: {error}"));
            false
        }
    }
}

/// The word that a page of the test build holds at its start; `None` for a zero page.
pub fn content(page: u64) -> Option<u64> {
    (page % 4 != 3).then_some(0xB111_D000_0000_0000 | page)
}

pub struct Host {
    pub dir: tempfile::TempDir,
    pub store: BuildStore,
    pub build: BuildId,
    pub pages: u64,
    engine: Option<JoinHandle<()>>,
    pub control: OwnedFd,
    next_request: u64,
    engines: u32,
}

/// A session between two engines.
pub struct Surrendered {
    pub report: Report,
    pub fds: Vec<OwnedFd>,
}

impl Surrendered {
    pub fn session(&self) -> &str {
        let Report::Surrendered { session, .. } = &self.report else {
            panic!("{:?}", self.report)
        };
        session
    }

    /// What goes on with it.
    fn request(&self, request: u64) -> Request {
        let Report::Surrendered {
            session,
            store,
            build,
            succession,
            regions,
            tracking,
            ..
        } = &self.report
        else {
            panic!("{:?}", self.report)
        };
        let (session, store) = (session.clone(), store.clone());
        let (build, regions) = (*build, regions.clone());
        match succession {
            Succession::Adopt => Request::Adopt {
                request,
                session,
                store,
                build,
                regions,
                tracking: *tracking,
            },
            Succession::ServePages => Request::ServePages {
                request,
                session,
                store,
                build,
                regions,
                surrendered: true,
            },
        }
    }
}

impl Host {
    /// An engine with one worker, and a build of `pages` pages: three with content, one zero,
    /// repeating.
    pub fn start(pages: u64) -> Self {
        Self::serving(pages, |page| {
            let mut bytes = vec![0u8; PAGE as usize];
            if let Some(word) = content(page) {
                bytes[..8].copy_from_slice(&word.to_le_bytes());
                bytes[4088..].copy_from_slice(&word.to_le_bytes());
            }
            bytes
        })
    }

    /// An engine with one worker, and a build with these pages.
    pub fn serving(pages: u64, bytes_of: impl Fn(u64) -> Vec<u8>) -> Self {
        Self::serving_pages_of(PageSize::Size4K, pages, bytes_of)
    }

    /// The same with pages of another size.
    pub fn serving_pages_of(
        page_size: PageSize,
        pages: u64,
        bytes_of: impl Fn(u64) -> Vec<u8>,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = BuildStore::open_or_create(&dir.path().join("builds")).unwrap();
        let build = BuildId::from_bytes([7; 16]);
        let mut staging = store.stage(build).unwrap();
        let mut writer = staging
            .memory_writer(None, page_size, PageCount::new(pages))
            .unwrap();
        for page in 0..pages {
            writer.pages(PageIndex::new(page), &bytes_of(page)).unwrap();
        }
        writer.finish().unwrap();
        std::fs::write(staging.file_path("vmstate"), b"state").unwrap();
        staging.add_file("vmstate").unwrap();
        staging.publish(PublishInfo::default()).unwrap();

        let options = EngineOptions::default();
        let (engine, control) = start_engine(&dir.path().join("control"), options);
        Self {
            dir,
            store,
            build,
            pages,
            engine: Some(engine),
            control,
            next_request: 1,
            engines: 0,
        }
    }

    pub fn data_file(&self) -> PathBuf {
        self.store.path(&self.build).join("memory.data")
    }

    pub fn number(&mut self) -> u64 {
        self.next_request += 1;
        self.next_request
    }

    /// Tells the engine to expect a hand-off; returns where.
    pub fn expect(&mut self, session: &str, states: &PageStates, deadline_ms: u64) -> PathBuf {
        let (store, build) = (self.store.root().to_path_buf(), self.build);
        let make = |request| Request::Expect {
            request,
            session: session.into(),
            store,
            build,
            deadline_ms,
        };
        self.expect_by(session, states, make)
    }

    /// The same by a request of the caller's.
    pub fn expect_by(
        &mut self,
        session: &str,
        states: &PageStates,
        make: impl FnOnce(u64) -> Request,
    ) -> PathBuf {
        let path = self.dir.path().join(format!("{session}.sock"));
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let request = make(self.number());
        control::send(
            self.control.as_fd(),
            &request,
            &[listener.as_fd(), states.as_fd()],
        )
        .unwrap();
        path
    }

    pub fn report(&mut self) -> (Report, Vec<OwnedFd>) {
        control::receive(self.control.as_fd())
            .unwrap()
            .expect("the engine closed its socket")
    }

    /// Memory served by the engine, and the userfaultfd that a daemon would keep.
    pub fn attach(&mut self, session: &str, states: &PageStates) -> Guest {
        let memory = GuestMemory::anonymous(self.pages * PAGE).unwrap();
        self.attach_memory(session, states, memory)
    }

    /// The same for memory of any kind.
    pub fn attach_memory(
        &mut self,
        session: &str,
        states: &PageStates,
        memory: GuestMemory,
    ) -> Guest {
        let uffd = Uffd::create(FEATURE_EVENT_REMOVE).unwrap();
        self.attach_uffd(session, states, memory, &uffd)
    }

    /// The same with a userfaultfd of the caller's.
    pub fn attach_uffd(
        &mut self,
        session: &str,
        states: &PageStates,
        memory: GuestMemory,
        uffd: &Uffd,
    ) -> Guest {
        let socket = self.expect(session, states, 5000);
        memory.register(uffd).unwrap();
        let connection = vmm_side::hand_off(&socket, uffd, &[memory.as_region()]).unwrap();
        let (report, fds) = self.report();
        assert!(matches!(report, Report::Attached { .. }), "{report:?}");
        Guest {
            memory,
            kept: fds.into_iter().next().unwrap(),
            _connection: connection,
        }
    }

    /// Sends a request and takes the next report.
    pub fn ask(&mut self, request: impl FnOnce(u64) -> Request) -> (Report, Vec<OwnedFd>) {
        let request = request(self.number());
        control::send(self.control.as_fd(), &request, &[]).unwrap();
        self.report()
    }

    /// Has a session's writes tracked from now on: `Stats` if they are.
    pub fn track(&mut self, session: &str, tracking: Tracking) -> Report {
        let track = |request| Request::Track {
            request,
            session: session.to_owned(),
            tracking,
        };
        self.ask(track).0
    }

    pub fn stats(&mut self, session: &str) -> uffd_engine::SessionStats {
        let request = Request::Stats {
            request: self.number(),
            session: session.into(),
        };
        control::send(self.control.as_fd(), &request, &[]).unwrap();
        match self.report().0 {
            Report::Stats { stats, .. } => stats,
            other => panic!("expected stats, got {other:?}"),
        }
    }

    pub fn detach(&mut self, session: &str) -> uffd_engine::SessionStats {
        let request = Request::Detach {
            request: self.number(),
            session: session.into(),
        };
        control::send(self.control.as_fd(), &request, &[]).unwrap();
        match self.report().0 {
            Report::Detached { stats, .. } => stats,
            other => panic!("expected detached, got {other:?}"),
        }
    }

    /// Makes the engine forget a session that was refused.
    pub fn forget(&mut self, session: &str) {
        let request = Request::Detach {
            request: self.number(),
            session: session.into(),
        };
        control::send(self.control.as_fd(), &request, &[]).unwrap();
        let _ = self.report();
    }

    /// Stops this engine and starts another, as after a crash; sessions are lost.
    pub fn replace_engine(&mut self) {
        self.replace_engine_by(EngineOptions::default());
    }

    /// The same with a successor that is set up in another way.
    pub fn replace_engine_by(&mut self, options: EngineOptions) {
        control::send(self.control.as_fd(), &Request::Shutdown, &[]).unwrap();
        self.engine.take().unwrap().join().unwrap();
        let (engine, control) = start_engine(&self.dir.path().join("control2"), options);
        self.engine = Some(engine);
        self.control = control;
    }

    pub fn adopt(&mut self, session: &str, guest: &Guest, states: &PageStates) {
        self.adopt_tracking(session, guest, states, Tracking::Off);
    }

    pub fn adopt_tracking(
        &mut self,
        session: &str,
        guest: &Guest,
        states: &PageStates,
        tracking: Tracking,
    ) {
        self.send_adopt(session, guest, states, tracking);
        let (report, _) = self.report();
        assert!(matches!(report, Report::Attached { .. }), "{report:?}");
    }

    /// Has the engine surrender its sessions, which ends it, and starts another.
    pub fn surrender(&mut self) -> Vec<Surrendered> {
        let request = self.number();
        control::send(self.control.as_fd(), &Request::Surrender { request }, &[]).unwrap();
        self.surrendered(request)
    }

    /// Receives what the engine was asked to surrender; then as [`Self::surrender`].
    pub fn surrendered(&mut self, asked: u64) -> Vec<Surrendered> {
        let mut all = Vec::new();
        loop {
            match self.report() {
                (report @ Report::Surrendered { .. }, fds) => {
                    all.push(Surrendered { report, fds });
                }
                (Report::SurrenderedAll { request, sessions }, _) => {
                    assert_eq!((request, sessions), (asked, all.len() as u64));
                    break;
                }
                // What it said of its sessions before.
                (other, _) => eprintln!("said before: {other:?}"),
            }
        }
        let end = control::receive::<Report>(self.control.as_fd()).unwrap();
        assert!(end.is_none(), "{end:?}");
        // By itself.
        self.engine.take().unwrap().join().unwrap();
        self.engines += 1;
        let path = self.dir.path().join(format!("successor-{}", self.engines));
        let (engine, control) = start_engine(&path, EngineOptions::default());
        self.engine = Some(engine);
        self.control = control;
        all
    }

    /// Connects to the engine as another daemon.
    pub fn reconnect(&mut self) {
        self.control = connect_to(&self.dir.path().join("control"));
    }

    /// Has the engine go on with a session.
    pub fn take_over(&mut self, surrendered: &Surrendered) {
        let request = surrendered.request(self.number());
        let fds: Vec<_> = surrendered.fds.iter().map(AsFd::as_fd).collect();
        control::send(self.control.as_fd(), &request, &fds).unwrap();
        let (report, _) = self.report();
        assert!(matches!(report, Report::Attached { .. }), "{report:?}");
    }

    /// Tells the engine to adopt a session, and doesn't wait until it has.
    pub fn send_adopt(
        &mut self,
        session: &str,
        guest: &Guest,
        states: &PageStates,
        tracking: Tracking,
    ) {
        let pidfd = uffd_engine::sys::process::pidfd_open(std::process::id() as i32).unwrap();
        let request = Request::Adopt {
            request: self.number(),
            session: session.into(),
            store: self.store.root().to_path_buf(),
            build: self.build,
            regions: vec![guest.memory.as_region()],
            tracking,
        };
        let fds = [guest.kept.as_fd(), pidfd.as_fd(), states.as_fd()];
        control::send(self.control.as_fd(), &request, &fds).unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = control::send(self.control.as_fd(), &Request::Shutdown, &[]);
        if let Some(engine) = self.engine.take() {
            let _ = engine.join();
        }
    }
}

pub struct Guest {
    pub memory: GuestMemory,
    pub kept: OwnedFd,
    _connection: std::os::unix::net::UnixStream,
}

impl Guest {
    pub fn check(&self, page: u64) {
        let expected = content(page).unwrap_or(0);
        assert_eq!(
            self.memory.read(page * PAGE),
            expected,
            "start of page {page}"
        );
        assert_eq!(
            self.memory.read(page * PAGE + 4088),
            expected,
            "end of page {page}"
        );
    }
}

fn start_engine(path: &std::path::Path, options: EngineOptions) -> (JoinHandle<()>, OwnedFd) {
    let packet = |flags| socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    let listener = packet(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK);
    let address = UnixAddr::new(path).unwrap();
    bind(std::os::fd::AsRawFd::as_raw_fd(&listener), &address).unwrap();
    listen(&listener, Backlog::new(4).unwrap()).unwrap();
    let engine = std::thread::spawn(move || {
        server::run(&listener, &options).unwrap();
    });
    (engine, connect_to(path))
}

fn connect_to(path: &std::path::Path) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    let control = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    let address = UnixAddr::new(path).unwrap();
    connect(std::os::fd::AsRawFd::as_raw_fd(&control), &address).unwrap();
    control
}

/// Drops a file from the page cache, as far as the kernel agrees.
pub fn evict(path: &std::path::Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    nix::fcntl::posix_fadvise(
        &file,
        0,
        0,
        nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED,
    )
    .unwrap();
}

/// Brings a part of a file into the page cache, and nothing beside it.
pub fn read_part(path: &std::path::Path, offset: u64, len: u64) {
    use std::os::unix::fs::FileExt;
    let file = File::open(path).unwrap();
    let no_more = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_RANDOM;
    nix::fcntl::posix_fadvise(&file, 0, 0, no_more).unwrap();
    file.read_exact_at(&mut vec![0; len as usize], offset)
        .unwrap();
}

/// Which pages of a file are in the page cache.
pub fn resident_pages(path: &std::path::Path) -> Vec<bool> {
    let file = File::open(path).unwrap();
    let len = file.metadata().unwrap().len();
    let mapping = uffd_engine::sys::mapping::SourceMapping::new(&file, len).unwrap();
    let per_chunk = CHUNK_BYTES / CACHE_PAGE;
    (0..len / CACHE_PAGE)
        .map(|page| {
            mapping
                .look_at_chunk(page / per_chunk)
                .has(page % per_chunk)
        })
        .collect()
}

/// Whether the other side hangs up, in bounded time.
pub fn closed(peer: &std::os::unix::net::UnixStream) -> bool {
    use std::io::Read;
    peer.set_read_timeout(Some(std::time::Duration::from_secs(5)))
        .unwrap();
    let mut peer = peer;
    match peer.read(&mut [0; 8]) {
        Ok(0) => true,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        Ok(_) => false,
    }
}
