//! One engine process: its socket, its reader thread, and what is kept for its successor.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use parking_lot::Mutex;
use snapshot_format::BuildStore;
use tokio::sync::{mpsc, oneshot};
use uffd_engine::control::{self, Report, Request};
use uffd_engine::region::ClaimedRegion;
use uffd_engine::sys::process::pidfd_open;
use uffd_engine::{Tracking, recording};

use super::inheritance::{self, Heirloom};
use super::kept::{Kept, KeptMemory, KeptVmm};
use super::topology::Node;
use super::will::Will;
use super::working_sets::WorkingSets;
use super::{EngineError, SessionEvent, control_socket, new_socket};
use crate::config::EngineConfig;

type Answer = oneshot::Sender<Report>;

#[derive(Debug, Default)]
struct Shared {
    connection: Option<OwnedFd>,
    waiting: HashMap<u64, Answer>,
    /// Sessions that a successor was asked to adopt, by request.
    adopting: HashMap<u64, String>,
    kept: HashMap<String, Kept>,
    /// What is said of sessions that were taken over, and that nobody has claimed.
    inherited: HashMap<String, mpsc::Receiver<SessionEvent>>,
    thread: Option<JoinHandle<()>>,
}

impl Shared {
    /// Whether what was attached asks for pages, and has no userfaultfd to be handed over.
    fn is_asked(&self, report: &Report) -> bool {
        let Report::Attached { session, .. } = report else {
            return false;
        };
        let vmm = self
            .kept
            .get(session)
            .and_then(|kept| kept.attached.as_ref());
        vmm.is_some_and(|vmm| matches!(vmm.memory, KeptMemory::Requests { .. }))
    }
}

/// One engine, through all its lives.
#[derive(Debug)]
pub(super) struct Link {
    program: PathBuf,
    node: Node,
    config: EngineConfig,
    run_dir: PathBuf,
    next_request: AtomicU64,
    stopping: AtomicBool,
    working_sets: Arc<WorkingSets>,
    shared: Mutex<Shared>,
}

impl Link {
    /// Starts the process and the thread that listens to it. It goes on with the sessions of an
    /// engine of this node whose daemon has died, and of those at the sockets `strays`.
    pub(super) fn start(
        (program, run_dir): (&Path, &Path),
        node: Node,
        config: EngineConfig,
        working_sets: Arc<WorkingSets>,
        strays: &[PathBuf],
    ) -> Result<Arc<Self>, EngineError> {
        let number = node.number;
        let failed = |source| EngineError::Start {
            node: number,
            source,
        };
        let link = Arc::new(Self {
            program: program.to_owned(),
            node,
            config,
            run_dir: run_dir.to_owned(),
            next_request: AtomicU64::new(1),
            stopping: AtomicBool::new(false),
            working_sets,
            shared: Mutex::default(),
        });
        // Of a daemon that died as it started.
        link.inherit(&[new_socket(run_dir, number)]);
        // Guests whose engine has surrendered wait until another serves them: it is there already.
        let child = link.spawn().map_err(failed)?;
        link.inherit(&[control_socket(run_dir, number)]);
        link.inherit(strays);
        if let Err(error) = link.publish().and_then(|()| link.hand_on().map(drop)) {
            link.stop();
            return Err(failed(error));
        }
        let weak = Arc::downgrade(&link);
        let thread = std::thread::Builder::new()
            .name(format!("engine-{number}"))
            .spawn(move || supervise(child, &weak))
            .map_err(failed)?;
        link.shared.lock().thread = Some(thread);
        Ok(link)
    }

    /// Ends the process and waits until it has; its sessions end with it.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        let thread = {
            let mut shared = self.shared.lock();
            if let Some(connection) = &shared.connection {
                let _ = control::send(connection.as_fd(), &Request::Shutdown, &[]);
            }
            shared.thread.take()
        };
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(node = self.node.number, "An engine's thread panicked");
        }
        let _ = std::fs::remove_file(control_socket(&self.run_dir, self.node.number));
        let _ = std::fs::remove_file(new_socket(&self.run_dir, self.node.number));
    }

    pub(super) fn node(&self) -> u32 {
        self.node.number
    }

    /// The sessions that have memory, by name.
    pub(super) fn names(&self) -> Vec<String> {
        let shared = self.shared.lock();
        let attached = |kept: &&Kept| kept.attached.is_some();
        let kept = shared.kept.iter().filter(|(_, kept)| attached(kept));
        kept.map(|(name, _)| name.clone()).collect()
    }

    pub(super) fn sessions(&self) -> usize {
        self.shared.lock().kept.len()
    }

    fn connection(&self) -> Option<OwnedFd> {
        self.shared.lock().connection.as_ref()?.try_clone().ok()
    }

    /// Sends a request; the answer arrives through the returned channel, which closes
    /// without one when the engine dies.
    pub(super) fn ask(
        &self,
        request: impl FnOnce(u64) -> Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<oneshot::Receiver<Report>, EngineError> {
        let number = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (answer, receiver) = oneshot::channel();
        let mut shared = self.shared.lock();
        shared.waiting.insert(number, answer);
        let sent = match &shared.connection {
            Some(connection) => control::send(connection.as_fd(), &request(number), fds).is_ok(),
            None => false,
        };
        if !sent {
            shared.waiting.remove(&number);
            return Err(EngineError::Lost);
        }
        Ok(receiver)
    }

    /// Sends the request that makes a session, and keeps what its successors need from now
    /// on: a hand-off is noted by whoever hears of it first, which is before an answer.
    pub(super) fn ask_for_session(
        &self,
        session: &str,
        kept: Kept,
        request: impl FnOnce(u64) -> Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<oneshot::Receiver<Report>, EngineError> {
        self.shared.lock().kept.insert(session.to_owned(), kept);
        let asked = self.ask(request, fds);
        if asked.is_err() {
            self.forget(session);
        }
        asked
    }

    /// The guest's memory as its VMM mapped it; `None` before the hand-off.
    pub(super) fn regions(&self, session: &str) -> Option<Vec<ClaimedRegion>> {
        let shared = self.shared.lock();
        let vmm = shared.kept.get(session)?.attached.as_ref()?;
        Some(vmm.regions.clone())
    }

    /// Notes what a session's engine was told, for successors to be told as well.
    pub(super) fn note(&self, session: &str, told: impl FnOnce(&mut Kept)) {
        if let Some(kept) = self.shared.lock().kept.get_mut(session) {
            told(kept);
        }
    }

    /// A session is over.
    pub(super) fn forget(&self, session: &str) {
        self.shared.lock().kept.remove(session);
    }

    /// Starts a process and connects to it.
    fn spawn(&self) -> io::Result<Child> {
        let path = new_socket(&self.run_dir, self.node.number);
        let address = UnixAddr::new(&path)?;
        let _ = std::fs::remove_file(&path);
        let packet = |flags| socket(AddressFamily::Unix, SockType::SeqPacket, flags, None);
        let listener = packet(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
        bind(listener.as_raw_fd(), &address)?;
        listen(&listener, Backlog::new(4)?)?;
        let child = Command::new(&self.program)
            .arg("engine")
            .args(["--node", &self.node.number.to_string()])
            .args(["--cpus", &self.node.cpu_list()])
            .args(["--window-pages", &self.config.window_pages.to_string()])
            .args(["--read-slots", &self.config.read_slots.to_string()])
            .args(["--spin-us", &self.config.spin_us.unwrap_or(0).to_string()])
            .args(self.config.pin_vcpus.then_some("--keep-placement"))
            .stdin(listener)
            .stdout(Stdio::null())
            .spawn()?;
        let connection = packet(SockFlag::SOCK_CLOEXEC)?;
        connect(connection.as_raw_fd(), &address)?;
        self.shared.lock().connection = Some(connection);
        Ok(child)
    }

    /// Has a daemon that comes after this one find the engine.
    fn publish(&self) -> io::Result<()> {
        let path = control_socket(&self.run_dir, self.node.number);
        std::fs::rename(new_socket(&self.run_dir, self.node.number), path)
    }

    /// Takes over what engines have whose daemon has died.
    fn inherit(&self, sockets: &[PathBuf]) {
        for path in sockets {
            for taken in inheritance::take_over(path) {
                let mut shared = self.shared.lock();
                shared.kept.insert(taken.session.clone(), taken.kept);
                shared.inherited.insert(taken.session, taken.events);
            }
        }
    }

    /// The sessions that were taken over and that nobody has claimed.
    pub(super) fn inherited(&self) -> Vec<String> {
        self.shared.lock().inherited.keys().cloned().collect()
    }

    /// Gives away what is said of one of those, and what it looks at of what is kept of it.
    pub(super) fn claim<T>(
        &self,
        session: &str,
        look: impl FnOnce(&Kept) -> T,
    ) -> Option<(mpsc::Receiver<SessionEvent>, T)> {
        let mut shared = self.shared.lock();
        let events = shared.inherited.remove(session)?;
        let kept = shared.kept.get(session)?;
        Some((events, look(kept)))
    }

    /// Starts a successor and has it adopt every session.
    fn replace(&self) -> io::Result<Child> {
        {
            // Who waited for an answer of the dead one is told by its channel closing.
            let mut shared = self.shared.lock();
            shared.connection = None;
            shared.waiting.clear();
        }
        let child = self.spawn()?;
        self.publish()?;
        let sessions = self.hand_on()?;
        let node = self.node.number;
        tracing::warn!(
            node,
            sessions,
            "An engine ended and was replaced; its guests go on"
        );
        Ok(child)
    }

    /// Has an engine that was just started adopt every session; how many those are.
    fn hand_on(&self) -> io::Result<usize> {
        let mut shared = self.shared.lock();
        let Some(connection) = &shared.connection else {
            return Err(io::Error::other("the engine has no connection"));
        };
        let mut adopting = HashMap::new();
        for (session, kept) in &shared.kept {
            if let Some(request) = self.send_adoption(connection, session, kept)? {
                adopting.insert(request, session.clone());
            }
        }
        shared.adopting = adopting;
        // The next one's predecessor will have died.
        for kept in shared.kept.values_mut() {
            kept.note_surrendered(false);
        }
        Ok(shared.kept.len())
    }

    /// Has an engine adopt a session, and do ahead of its faults what was done; the request's number,
    /// if the session has memory.
    fn send_adoption(
        &self,
        engine: &OwnedFd,
        session: &str,
        kept: &Kept,
    ) -> io::Result<Option<u64>> {
        let number = || self.next_request.fetch_add(1, Ordering::Relaxed);
        let request = number();
        let Some((adopt, fds)) = kept.adoption(session, request) else {
            return Ok(None);
        };
        control::send(engine.as_fd(), &adopt, &fds)?;
        // Pages that are there already are passed over. Nobody waits for the answers.
        for order in kept.orders(session, number) {
            control::send(engine.as_fd(), &order, &[])?;
        }
        Ok(Some(request))
    }

    /// Goes on with a session that no engine has had; gives what is said about it.
    pub(super) fn take_in(&self, heirloom: Heirloom) -> mpsc::Receiver<SessionEvent> {
        let Heirloom {
            session,
            kept,
            events,
        } = heirloom;
        let mut shared = self.shared.lock();
        let sent = shared
            .connection
            .as_ref()
            .map(|engine| self.send_adoption(engine, &session, &kept));
        // One that can't be reached is dead, and its successor adopts all that is kept.
        if let Some(Ok(Some(request))) = sent {
            shared.adopting.insert(request, session.clone());
        }
        shared.kept.insert(session, kept);
        events
    }

    /// What is to be said of a session to a daemon that finds nobody who has it.
    pub(super) fn will(&self, session: &str, tracking: Tracking) -> Option<Will> {
        let shared = self.shared.lock();
        let kept = shared.kept.get(session)?;
        let vmm = kept.attached.as_ref()?;
        Some(Will {
            build: kept.build,
            regions: vmm.regions.clone(),
            asks: matches!(vmm.memory, KeptMemory::Requests { .. }),
            tracking,
            replays: kept.replays,
            load_bytes_per_second: kept.load_bytes_per_second,
        })
    }

    fn hear(&self, report: Report, fds: Vec<OwnedFd>) {
        match &report {
            Report::Failed { session, reason } => self.fail(session, reason),
            // The daemon watches its VMMs itself; and what is surrendered is the next one's.
            Report::Ended { .. } | Report::Surrendered { .. } | Report::SurrenderedAll { .. } => {}
            Report::Loaded { session, pages } => {
                tracing::info!(session, pages, "All memory is loaded");
                self.note(session, |kept| kept.load_bytes_per_second = None);
            }
            Report::Recorded { session, .. } => self.keep_recording(session, fds),
            Report::Attached {
                request, session, ..
            } if !fds.is_empty() => {
                let request = *request;
                let report = match self.attach(session, &report, fds) {
                    Ok(()) => report,
                    Err(reason) => Report::Refused { request, reason },
                };
                let answer = self.shared.lock().waiting.remove(&request);
                if let Some(answer) = answer {
                    let _ = answer.send(report);
                }
            }
            Report::Attached { request, .. }
            | Report::Refused { request, .. }
            | Report::Stats { request, .. }
            | Report::Detached { request, .. } => {
                let (answer, adopted, asks) = {
                    let mut shared = self.shared.lock();
                    (
                        shared.waiting.remove(request),
                        shared.adopting.remove(request),
                        shared.is_asked(&report),
                    )
                };
                if let Some(answer) = answer {
                    let report = if asks { report } else { with_uffd(report) };
                    let _ = answer.send(report);
                } else if let (Some(session), Report::Refused { reason, .. }) = (adopted, &report) {
                    self.fail(&session, reason);
                }
            }
        }
    }

    /// Notes a hand-off for a successor.
    fn attach(&self, session: &str, report: &Report, fds: Vec<OwnedFd>) -> Result<(), String> {
        let Report::Attached {
            peer_pid, regions, ..
        } = report
        else {
            return Ok(());
        };
        let pidfd = pidfd_open(*peer_pid)
            .map_err(|error| format!("the VMM ended during its hand-off: {error}"))?;
        let mut shared = self.shared.lock();
        let uffd = fds.into_iter().next();
        if let (Some(kept), Some(uffd)) = (shared.kept.get_mut(session), uffd) {
            kept.attached = Some(KeptVmm {
                memory: KeptMemory::Userfaultfd(uffd),
                pidfd,
                regions: regions.clone(),
            });
        }
        Ok(())
    }

    /// Puts what a session touched first beside its build. It is advice: whatever goes wrong
    /// with it costs speed, and only later.
    fn keep_recording(&self, session: &str, fds: Vec<OwnedFd>) {
        let of = |kept: &Kept| (kept.store.clone(), kept.build);
        let Some((root, build)) = self.shared.lock().kept.get(session).map(of) else {
            return;
        };
        let Some(Ok(touches)) = fds.into_iter().next().map(recording::from_memfd) else {
            return;
        };
        match BuildStore::open_or_create(&root) {
            Ok(store) => self.working_sets.keep(store, build, touches),
            Err(error) => tracing::warn!(build_id = %build, %error, "A working set is lost"),
        }
    }

    /// Tells one session's sandbox that its memory can't be served any more.
    fn fail(&self, session: &str, reason: &str) {
        tracing::error!(node = self.node.number, session, reason, "A session failed");
        if let Some(kept) = self.shared.lock().kept.get(session) {
            let event = SessionEvent::Failed(reason.to_owned());
            let _ = kept.events.try_send(event);
        }
    }

    fn fail_all(&self, reason: &str) {
        let mut shared = self.shared.lock();
        shared.waiting.clear();
        for kept in shared.kept.values() {
            let _ = kept
                .events
                .try_send(SessionEvent::Failed(reason.to_owned()));
        }
    }
}

/// A hand-off without its userfaultfd is none: no successor could go on with it.
fn with_uffd(report: Report) -> Report {
    match report {
        Report::Attached { request, .. } => {
            let reason = "it kept the userfaultfd to itself".to_owned();
            Report::Refused { request, reason }
        }
        report => report,
    }
}

/// The thread of one link: hears its engine, and replaces it when it ends.
fn supervise(mut child: Child, link: &Weak<Link>) {
    let mut failures_in_a_row = 0u32;
    while let Some(connection) = link.upgrade().and_then(|link| link.connection()) {
        let heard = listen_to(&connection, link);
        let _ = child.wait();
        let Some(link) = link.upgrade() else { return };
        if link.stopping.load(Ordering::Acquire) {
            return;
        }
        // An engine that dies as soon as it starts must not become a fork loop.
        failures_in_a_row = if heard { 0 } else { failures_in_a_row + 1 };
        std::thread::sleep(Duration::from_millis(u64::from(
            20 * failures_in_a_row.min(100),
        )));
        child = match link.replace() {
            Ok(child) => child,
            Err(error) => {
                tracing::error!(node = link.node(), %error, "No successor for an engine");
                return link.fail_all(&format!("its engine can't be restarted: {error}"));
            }
        };
    }
    let _ = child.wait();
}

/// Hears an engine's reports until its socket closes; whether there were any.
fn listen_to(connection: &OwnedFd, link: &Weak<Link>) -> bool {
    let mut heard = false;
    loop {
        match control::receive::<Report>(connection.as_fd()) {
            Ok(Some((report, fds))) => {
                heard = true;
                let Some(link) = link.upgrade() else {
                    return heard;
                };
                link.hear(report, fds);
            }
            Ok(None) => return heard,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A killed peer resets the connection.
            Err(error) => {
                tracing::debug!(%error, "An engine's socket closed");
                return heard;
            }
        }
    }
}
