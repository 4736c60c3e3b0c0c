//! Engines that have outlived their daemon, and the next daemon, which this process plays: its
//! engines are processes of the program, those before them are threads here or no engines at all.

mod support;

use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use appliance::config::EngineConfig;
use appliance::engines::{Engines, Node, SessionEvent, control_socket, topology};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use snapshot_format::{BuildId, BuildStore, PageCount, PageIndex, PageSize, PublishInfo};
use support::{needs, skip, wait_for};
use uffd_engine::control::{self, Report, Request, Succession};
use uffd_engine::server::{self, EngineOptions};
use uffd_engine::sys::fdpass;
use uffd_engine::sys::process::{pidfd_open, pidfd_signal};
use uffd_engine::sys::uffd::{FEATURE_EVENT_REMOVE, Uffd};
use uffd_engine::vmm_side::{self, GuestMemory};
use uffd_engine::{PageStates, Tracking};

const PAGE: u64 = 4096;
const PAGES: u64 = 512;
const PATIENCE: Duration = Duration::from_secs(10);

/// Leaves the test when there is no userfaultfd.
macro_rules! needs_uffd {
    ($test:literal) => {
        if let Err(reason) = needs::for_fakes() {
            return skip($test, &reason);
        }
    };
}

/// A run directory, and a build whose page `n` begins with the word `n + 1`.
struct Place {
    dir: tempfile::TempDir,
    store: BuildStore,
    build: BuildId,
}

/// Engines that end with the test.
struct Running(Engines);

impl Deref for Running {
    type Target = Engines;

    fn deref(&self) -> &Engines {
        &self.0
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Memory that an engine serves.
struct Guest {
    memory: GuestMemory,
    uffd: Uffd,
    _connection: UnixStream,
}

impl Guest {
    #[track_caller]
    fn check(&self, pages: impl Iterator<Item = u64>) {
        for page in pages {
            assert_eq!(self.memory.read(page * PAGE), page + 1, "page {page}");
        }
    }
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = BuildStore::open_or_create(&dir.path().join("builds")).unwrap();
        let build = BuildId::from_bytes([7; 16]);
        let mut staging = store.stage(build).unwrap();
        let (size, pages) = (PageSize::Size4K, PageCount::new(PAGES));
        let mut writer = staging.memory_writer(None, size, pages).unwrap();
        for page in 0..PAGES {
            let bytes = (page + 1).to_le_bytes().repeat(PAGE as usize / 8);
            writer.pages(PageIndex::new(page), &bytes).unwrap();
        }
        writer.finish().unwrap();
        std::fs::write(staging.file_path("vmstate"), b"state").unwrap();
        staging.add_file("vmstate").unwrap();
        staging.publish(PublishInfo::default()).unwrap();
        Self { dir, store, build }
    }

    fn run(&self) -> &Path {
        self.dir.path()
    }

    /// The next daemon's engines.
    fn start(&self) -> Running {
        let cpus = topology::nodes().swap_remove(0).cpus;
        let node = Node { number: 0, cpus };
        let config = EngineConfig::default();
        let engines = Engines::start_program(&needs::thaw(), self.run(), &[node], &config);
        Running(engines.unwrap())
    }

    /// An engine of a daemon before, with these sessions; that daemon dies.
    fn engine(&self, node: u32, sessions: &[&str]) -> (JoinHandle<()>, Vec<Guest>) {
        let path = control_socket(self.run(), node);
        let listener = listen_at(&path);
        let engine =
            std::thread::spawn(move || server::run(&listener, &EngineOptions::default()).unwrap());
        let daemon = connect_to(&path);
        let attach = |session: &&str| self.attach(&daemon, session);
        let guests = sessions.iter().map(attach).collect();
        (engine, guests)
    }

    fn attach(&self, daemon: &OwnedFd, session: &str) -> Guest {
        let path = self.run().join(format!("{session}.sock"));
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let states = PageStates::create(PageCount::new(PAGES)).unwrap();
        let expect = Request::Expect {
            request: 1,
            session: session.into(),
            store: self.store.root().to_path_buf(),
            build: self.build,
            deadline_ms: 5000,
        };
        let fds = [listener.as_fd(), states.as_fd()];
        control::send(daemon.as_fd(), &expect, &fds).unwrap();
        let memory = GuestMemory::anonymous(PAGES * PAGE).unwrap();
        let uffd = Uffd::create(FEATURE_EVENT_REMOVE).unwrap();
        memory.register(&uffd).unwrap();
        let connection = vmm_side::hand_off(&path, &uffd, &[memory.as_region()]).unwrap();
        let attached = control::receive::<Report>(daemon.as_fd()).unwrap();
        assert!(matches!(attached, Some((Report::Attached { .. }, _))));
        Guest {
            memory,
            uffd,
            _connection: connection,
        }
    }

    /// What an engine would say of such a session.
    fn surrendered(&self, session: &str, guest: &Guest) -> Report {
        Report::Surrendered {
            session: session.into(),
            store: self.store.root().to_path_buf(),
            build: self.build,
            succession: Succession::Adopt,
            regions: vec![guest.memory.as_region()],
            tracking: Tracking::Off,
            replays: false,
            load_bytes_per_second: None,
        }
    }
}

fn packets(flags: SockFlag) -> OwnedFd {
    let flags = flags | SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap()
}

fn listen_at(path: &Path) -> OwnedFd {
    let listener = packets(SockFlag::SOCK_NONBLOCK);
    bind(listener.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&listener, Backlog::new(4).unwrap()).unwrap();
    listener
}

fn connect_to(path: &Path) -> OwnedFd {
    let daemon = packets(SockFlag::empty());
    connect(daemon.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    daemon
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().unwrap().block_on(future)
}

/// The sessions that the engines have, claimed or not.
fn sessions(engines: &Engines) -> Vec<String> {
    let (names, _) = block_on(engines.sessions(Duration::ZERO));
    names.into_iter().collect()
}

#[test]
fn sessions_of_an_earlier_daemon_are_inherited_claimed_once_or_let_go() {
    needs_uffd!("sessions_of_an_earlier_daemon_are_inherited_claimed_once_or_let_go");
    let place = Place::new();
    let (old, guests) = place.engine(0, &["claimed", "unclaimed"]);
    let [claimed, unclaimed] = &guests[..] else {
        unreachable!("two were asked for")
    };
    claimed.check(0..PAGES / 4);
    claimed.memory.write(PAGE, 42);
    let engines = std::thread::scope(|scope| {
        let walking = scope.spawn(|| claimed.check(2..PAGES / 2));
        let engines = place.start();
        walking.join().unwrap();
        engines
    });
    // By itself.
    old.join().unwrap();
    assert_eq!(engines.inherited(), ["claimed", "unclaimed"]);
    let mut inherited = engines.claim_inherited("claimed").unwrap();
    assert!(engines.claim_inherited("claimed").is_none());
    assert!(engines.claim_inherited("unknown").is_none());
    assert_eq!(engines.inherited(), ["unclaimed"]);
    assert_eq!(inherited.attachment.session(), "claimed");
    assert_eq!(inherited.build, place.build);
    assert_eq!(inherited.tracking, Tracking::Off);
    assert_eq!(
        inherited.attachment.regions(),
        Some(vec![claimed.memory.as_region()])
    );
    assert!(inherited.states.get(PageIndex::new(1)).is_installed());
    unclaimed.check(0..9);

    engines.drop_inherited();
    assert!(engines.inherited().is_empty());
    assert_eq!(sessions(&engines), ["claimed"]);
    claimed.check(2..PAGES);
    assert_eq!(claimed.memory.read(PAGE), 42, "what the guest wrote");
    assert!(inherited.events.try_recv().is_err());
    let stats = block_on(inherited.attachment.detach()).unwrap();
    assert_eq!(stats.pages_installed, PAGES, "{stats:?}");
    let installed = inherited.states.count_installed();
    assert_eq!(installed, PageCount::new(PAGES));
    drop(engines);
    assert!(!control_socket(place.run(), 0).exists());
}

#[test]
fn sessions_are_handed_on_from_daemon_to_daemon_and_to_fewer_nodes() {
    needs_uffd!("sessions_are_handed_on_from_daemon_to_daemon_and_to_fewer_nodes");
    let place = Place::new();
    let (one, mut guests) = place.engine(0, &["near"]);
    let (other, far) = place.engine(3, &["far"]);
    guests.extend(far);
    let engines = place.start();
    one.join().unwrap();
    other.join().unwrap();
    assert_eq!(engines.inherited(), ["far", "near"]);
    assert!(!control_socket(place.run(), 3).exists());
    guests.iter().for_each(|guest| guest.check(0..9));

    // The engine that went on with them dies: its successor has nothing but what was inherited.
    let claimed = engines.claim_inherited("far").unwrap();
    let before = engine_of(&place).unwrap();
    let pidfd = pidfd_open(before).unwrap();
    pidfd_signal(pidfd.as_fd(), libc::SIGKILL).unwrap();
    guests.iter().for_each(|guest| guest.check(0..PAGES));
    wait_for("another engine", PATIENCE, || {
        engine_of(&place).filter(|engine| *engine != before)
    });
    drop(claimed);
}

/// The engine that this test has started in its run directory.
fn engine_of(place: &Place) -> Option<i32> {
    // Its standard input is its socket, which keeps the name it was bound to.
    let path = place.run().join("engine-0.new.sock");
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let sockets: Vec<String> = sockets
        .lines()
        .filter(|line| line.ends_with(path.to_str().unwrap()))
        .filter_map(|line| Some(format!("socket:[{}]", line.split_whitespace().nth(6)?)))
        .collect();
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .find_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let input = std::fs::read_link(entry.path().join("fd/0")).ok()?;
            let is_it = sockets.iter().any(|socket| input == Path::new(socket));
            is_it.then_some(pid)
        })
}

#[test]
fn a_session_that_no_engine_adopts_has_failed() {
    needs_uffd!("a_session_that_no_engine_adopts_has_failed");
    let place = Place::new();
    let (old, guests) = place.engine(0, &["lost"]);
    guests[0].check(0..9);
    std::fs::remove_dir_all(place.store.path(&place.build)).unwrap();
    let engines = place.start();
    old.join().unwrap();
    let mut inherited = engines.claim_inherited("lost").unwrap();
    let event = block_on(async { tokio::time::timeout(PATIENCE, inherited.events.recv()).await });
    assert!(
        matches!(event, Ok(Some(SessionEvent::Failed(_)))),
        "{event:?}"
    );
}

/// Plays an engine: what it is asked on each connection, which it closes after it has answered the
/// first with this.
fn fake(
    path: &Path,
    answer: impl FnOnce(&OwnedFd) + Send + 'static,
) -> JoinHandle<Vec<&'static str>> {
    let listener = packets(SockFlag::empty());
    bind(listener.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&listener, Backlog::new(4).unwrap()).unwrap();
    std::thread::spawn(move || {
        let mut answer = Some(answer);
        let mut asked = Vec::new();
        while asked.last() != Some(&"shutdown") {
            let daemon = fdpass::accept(listener.as_fd()).unwrap();
            nix::fcntl::fcntl(
                &daemon,
                nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()),
            )
            .unwrap();
            match control::receive::<Request>(daemon.as_fd()).unwrap() {
                Some((Request::Surrender { .. }, _)) => asked.push("surrender"),
                Some((Request::Shutdown, _)) => asked.push("shutdown"),
                other => panic!("{other:?}"),
            }
            if let Some(answer) = answer.take() {
                answer(&daemon);
            }
        }
        asked
    })
}

#[test]
fn an_engine_that_does_not_know_how_to_surrender_is_ended() {
    let place = Place::new();
    let old = fake(&control_socket(place.run(), 0), |_| {});
    let engines = place.start();
    assert_eq!(old.join().unwrap(), ["surrender", "shutdown"]);
    assert!(engines.inherited().is_empty());
}

#[test]
fn what_an_engine_surrenders_before_it_dies_is_not_lost() {
    needs_uffd!("what_an_engine_surrenders_before_it_dies_is_not_lost");
    let place = Place::new();
    let (old, guests) = place.engine(7, &["whole", "maimed"]);
    // They are its no more; a fake has them.
    let path = control_socket(place.run(), 7);
    control::send(connect_to(&path).as_fd(), &Request::Shutdown, &[]).unwrap();
    old.join().unwrap();
    std::fs::remove_file(path).unwrap();
    let whole = place.surrendered("whole", &guests[0]);
    let maimed = place.surrendered("maimed", &guests[1]);
    let uffd = guests[0].uffd.try_clone().unwrap();
    let states = PageStates::create(PageCount::new(PAGES)).unwrap();
    let old = fake(&control_socket(place.run(), 0), move |daemon| {
        let pidfd = pidfd_open(std::process::id() as i32).unwrap();
        let fds = [uffd.as_fd(), pidfd.as_fd(), states.as_fd()];
        // One of which something is missing, something that nobody knows, and one that is right.
        control::send(daemon.as_fd(), &maimed, &fds[..2]).unwrap();
        fdpass::send(daemon.as_fd(), b"{\"op\":\"singing\"}", &[]).unwrap();
        control::send(daemon.as_fd(), &whole, &fds).unwrap();
    });
    let engines = place.start();
    assert_eq!(old.join().unwrap(), ["surrender", "shutdown"]);
    assert_eq!(engines.inherited(), ["whole"]);
    guests[0].check(0..PAGES);
}
