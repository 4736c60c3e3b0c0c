//! A host of a test's own, with slots, guests, and an outside, all of them network namespaces.
//!
//! ```text
//!  guest 1 ── tap0│slot 0│── host (a namespace) ── outside 198.51.100.2
//!  guest 2 ── tap0│slot 1│──┘  198.51.100.1        also 10.9.9.9 and 169.254.169.254
//! ```
//!
//! A guest is a namespace with a veth pair in the tap's place; the slot's rules go by the name.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::thread::JoinHandle;
use std::time::Duration;

use appliance::network::Slot;
use appliance::network::address::{GATEWAY, GATEWAY_MAC, GUEST, TAP};
use futures_util::TryStreamExt;
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::packet_route::link::{InfoData, InfoVeth};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
pub(crate) const MANAGEMENT: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 9);
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// How long a packet that is dropped is waited for.
pub(crate) const PATIENCE: Duration = Duration::from_millis(400);
pub(crate) const GUEST_MAC: [u8; 6] = [0x06, 0x00, 0xa9, 0xfe, 0x64, 0x02];

/// A network namespace that only this test has.
pub(crate) struct Net(pub(crate) File);

impl Net {
    pub(crate) fn new() -> Self {
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("root can make namespaces");
            Self(File::open("/proc/thread-self/ns/net").unwrap())
        })
        .join()
        .unwrap()
    }

    pub(crate) fn of(slot: &Slot) -> Self {
        Self(File::open(&slot.namespace).unwrap())
    }

    /// Runs in this namespace, on a thread of its own.
    pub(crate) fn run<T: Send + 'static>(&self, act: impl FnOnce() -> T + Send + 'static) -> T {
        self.start(act).join().unwrap()
    }

    pub(crate) fn start<T: Send + 'static>(
        &self,
        act: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let namespace = self.0.try_clone().unwrap();
        std::thread::spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
            act()
        })
    }

    /// As [`Net::run`], in a runtime.
    pub(crate) fn block_on<F>(&self, act: impl FnOnce() -> F + Send + 'static) -> F::Output
    where
        F: Future<Output: Send + 'static>,
    {
        self.run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build().unwrap();
            runtime.block_on(async { act().await })
        })
    }

    /// Configures links in this namespace, or asks for them.
    pub(crate) fn links<F>(&self, act: impl FnOnce(Handle) -> F + Send + 'static) -> F::Output
    where
        F: Future<Output: Send + 'static>,
    {
        self.block_on(|| async {
            let (connection, handle, _) = rtnetlink::new_connection().unwrap();
            let driver = tokio::spawn(connection);
            let done = act(handle).await;
            driver.abort();
            done
        })
    }

    /// The names of its links.
    pub(crate) fn link_names(&self) -> Vec<String> {
        let text = self.run(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap());
        // Two lines of headings.
        let links = text.lines().skip(2).filter_map(|line| line.split_once(':'));
        links.map(|(name, _)| name.trim().to_owned()).collect()
    }

    /// Answers every connection with the peer's address, as this namespace sees it.
    pub(crate) fn listen(&self, address: Ipv4Addr, port: u16) {
        let listener = self.run(move || TcpListener::bind((address, port)).unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let peer = stream.peer_addr().unwrap().ip().to_string();
                let _ = stream.write_all(peer.as_bytes());
            }
        });
    }

    /// As [`Net::reaches`], for what has to work: a link that was just made loses packets for up to a
    /// second, until the kernel has noticed its carrier.
    pub(crate) fn reaches_soon(&self, address: Ipv4Addr, port: u16) -> IpAddr {
        let what = format!("reaching {address}:{port}");
        super::wait_for(&what, 20 * PATIENCE, || self.reaches(address, port))
    }

    /// Connects; returns whom the other side saw.
    pub(crate) fn reaches(&self, address: Ipv4Addr, port: u16) -> Option<IpAddr> {
        self.run(move || {
            let target = SocketAddr::from((address, port));
            let mut stream = TcpStream::connect_timeout(&target, PATIENCE).ok()?;
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut seen = String::new();
            stream.read_to_string(&mut seen).ok()?;
            seen.parse().ok()
        })
    }
}

pub(crate) async fn index(handle: &Handle, name: &str) -> u32 {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    links
        .try_next()
        .await
        .unwrap()
        .expect("the link is there")
        .header
        .index
}

pub(crate) async fn up(handle: &Handle, name: &str, addresses: &[(Ipv4Addr, u8)]) {
    let link = index(handle, name).await;
    for (address, prefix) in addresses {
        let added = handle.address().add(link, IpAddr::V4(*address), *prefix);
        added.execute().await.unwrap();
    }
    let change = LinkMessageBuilder::<LinkUnspec>::new().index(link).up();
    handle.link().set(change.build()).execute().await.unwrap();
}

/// A pair of links, here under `name` and in `other` under `peer`.
pub(crate) async fn pair(
    handle: &Handle,
    (name, mac): (&str, [u8; 6]),
    other: &File,
    peer: (&str, [u8; 6]),
) {
    let peer_link = LinkMessageBuilder::<LinkUnspec>::new()
        .name(peer.0)
        .address(peer.1.to_vec())
        .setns_by_fd(other.as_raw_fd())
        .build();
    let link = LinkMessageBuilder::<LinkVeth>::new(name, peer.0)
        .address(mac.to_vec())
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer_link)))
        .build();
    handle.link().add(link).execute().await.unwrap();
}

pub(crate) async fn route_via(handle: &Handle, gateway: Ipv4Addr) {
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(gateway)
        .build();
    handle.route().add(route).execute().await.unwrap();
}

/// A guest in a slot: a namespace where its VM would be.
pub(crate) fn guest_in(slot: &Slot) -> Net {
    let (guest, inside) = (Net::new(), Net::of(slot));
    let namespace = guest.0.try_clone().unwrap();
    inside.links(|handle| async move {
        let tap = index(&handle, TAP).await;
        handle.link().del(tap).execute().await.unwrap();
        pair(&handle, (TAP, GATEWAY_MAC), &namespace, ("eth0", GUEST_MAC)).await;
        up(&handle, TAP, &[(GATEWAY, 30)]).await;
    });
    guest.links(|handle| async move {
        up(&handle, "lo", &[]).await;
        up(&handle, "eth0", &[(GUEST, 30)]).await;
        route_via(&handle, GATEWAY).await;
    });
    guest
}

/// The host, with a link to the outside.
pub(crate) fn host_and_outside() -> (Net, Net) {
    let (host, outside) = (Net::new(), Net::new());
    let namespace = outside.0.try_clone().unwrap();
    host.links(|handle| async move {
        up(&handle, "lo", &[]).await;
        let (ours, theirs) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        pair(&handle, ("up0", ours), &namespace, ("up0", theirs)).await;
        up(&handle, "up0", &[(HOST, 24)]).await;
    });
    outside.links(|handle| async move {
        up(&handle, "lo", &[(MANAGEMENT, 32), (METADATA, 32)]).await;
        up(&handle, "up0", &[(OUTSIDE, 24)]).await;
        route_via(&handle, HOST).await;
    });
    // So that only rules keep guests from those.
    host.links(|handle| async move { route_via(&handle, OUTSIDE).await });
    (host, outside)
}

pub(crate) fn is_root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        super::skip(test, "network namespaces need root");
    }
    root
}
