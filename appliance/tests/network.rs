//! Who can reach whom, in real namespaces: a host of our own with slots, guests, and an outside.
//!
//! ```text
//!  guest 1 ── tap0│slot 0│── host (a namespace) ── outside 198.51.100.2
//!  guest 2 ── tap0│slot 1│──┘  198.51.100.1        also 10.9.9.9 and 169.254.169.254
//! ```
//!
//! A guest is a namespace with a veth pair in the tap's place; the slot's rules go by the name.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread::JoinHandle;
use std::time::Duration;

use appliance::network::address::{GATEWAY, GATEWAY_MAC, GUEST, TAP};
use appliance::network::{Egress, Slot, SlotIndex, Slots, namespace, nftables};
use futures_util::TryStreamExt;
use http_api::wire::NetworkPolicy;
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::packet_route::link::{InfoData, InfoVeth};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const MANAGEMENT: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 9);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// How long a packet that is dropped is waited for.
const PATIENCE: Duration = Duration::from_millis(400);
const GUEST_MAC: [u8; 6] = [0x06, 0x00, 0xa9, 0xfe, 0x64, 0x02];

/// A network namespace that only this test has.
struct Net(File);

impl Net {
    fn new() -> Self {
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("root can make namespaces");
            Self(File::open("/proc/thread-self/ns/net").unwrap())
        })
        .join()
        .unwrap()
    }

    fn of(slot: &Slot) -> Self {
        Self(File::open(&slot.namespace).unwrap())
    }

    /// Runs in this namespace, on a thread of its own.
    fn run<T: Send + 'static>(&self, act: impl FnOnce() -> T + Send + 'static) -> T {
        self.start(act).join().unwrap()
    }

    fn start<T: Send + 'static>(&self, act: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let namespace = self.0.try_clone().unwrap();
        std::thread::spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
            act()
        })
    }

    /// Configures links in this namespace.
    fn links<F>(&self, act: impl FnOnce(Handle) -> F + Send + 'static)
    where
        F: Future<Output = ()>,
    {
        self.run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build().unwrap();
            runtime.block_on(async {
                let (connection, handle, _) = rtnetlink::new_connection().unwrap();
                let driver = tokio::spawn(connection);
                act(handle).await;
                driver.abort();
            });
        });
    }

    /// Answers every connection with the peer's address, as this namespace sees it.
    fn listen(&self, address: Ipv4Addr, port: u16) {
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
    fn reaches_soon(&self, address: Ipv4Addr, port: u16) -> IpAddr {
        let what = format!("reaching {address}:{port}");
        support::wait_for(&what, 20 * PATIENCE, || self.reaches(address, port))
    }

    /// Connects; returns whom the other side saw.
    fn reaches(&self, address: Ipv4Addr, port: u16) -> Option<IpAddr> {
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

async fn index(handle: &Handle, name: &str) -> u32 {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    links
        .try_next()
        .await
        .unwrap()
        .expect("the link is there")
        .header
        .index
}

async fn up(handle: &Handle, name: &str, addresses: &[(Ipv4Addr, u8)]) {
    let link = index(handle, name).await;
    for (address, prefix) in addresses {
        let added = handle.address().add(link, IpAddr::V4(*address), *prefix);
        added.execute().await.unwrap();
    }
    let change = LinkMessageBuilder::<LinkUnspec>::new().index(link).up();
    handle.link().set(change.build()).execute().await.unwrap();
}

/// A pair of links, here under `name` and in `other` under `peer`.
async fn pair(handle: &Handle, (name, mac): (&str, [u8; 6]), other: &File, peer: (&str, [u8; 6])) {
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

async fn route_via(handle: &Handle, gateway: Ipv4Addr) {
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(gateway)
        .build();
    handle.route().add(route).execute().await.unwrap();
}

/// A guest in a slot: a namespace where its VM would be.
fn guest_in(slot: &Slot) -> Net {
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
fn host_and_outside() -> (Net, Net) {
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

fn build(host: &Net, instance: &'static str, egress: Egress, count: u32) -> (Slots, Vec<Slot>) {
    host.run(move || {
        let pool = "10.231.7.0/24".parse().unwrap();
        let slots = Slots::start(instance, pool, egress).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let built = (0..count).map(|index| {
            // A killed run's.
            runtime.block_on(slots.take_down(SlotIndex(index))).unwrap();
            let policy = NetworkPolicy::default();
            runtime
                .block_on(slots.build(SlotIndex(index), policy))
                .unwrap()
        });
        let built = built.collect();
        (slots, built)
    })
}

fn end(host: &Net, slots: Slots, built: &[Slot]) {
    let indexes: Vec<SlotIndex> = built.iter().map(|slot| slot.index).collect();
    host.run(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        for index in indexes {
            runtime.block_on(slots.take_down(index)).unwrap();
        }
        runtime.block_on(slots.end()).unwrap();
        assert_eq!(nftables::tables().unwrap(), Vec::<String>::new());
    });
}

fn egress(internet: bool) -> Egress {
    Egress {
        internet,
        closed: vec![
            "10.0.0.0/8".parse().unwrap(),
            "169.254.0.0/16".parse().unwrap(),
        ],
        resolver: Some(OUTSIDE),
    }
}

fn is_root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        support::skip(test, "network namespaces need root");
    }
    root
}

#[test]
fn guests_reach_the_outside_and_nothing_else() {
    if !is_root("guests_reach_the_outside_and_nothing_else") {
        return;
    }
    let (host, outside) = host_and_outside();
    let (slots, built) = build(&host, "neta", egress(true), 2);
    let (one, other) = (guest_in(&built[0]), guest_in(&built[1]));
    let addresses = [built[0].address, built[1].address];
    one.listen(GUEST, 80);
    other.listen(GUEST, 80);
    for address in [OUTSIDE, MANAGEMENT, METADATA] {
        outside.listen(address, 7000);
    }
    let everywhere = Ipv4Addr::UNSPECIFIED;
    host.listen(everywhere, 7001);

    // The host reaches guests, and guests the outside, in the host's name.
    host.reaches_soon(addresses[0], 80);
    host.reaches_soon(addresses[1], 80);
    assert_eq!(one.reaches_soon(OUTSIDE, 7000), IpAddr::V4(HOST));
    assert_eq!(other.reaches_soon(OUTSIDE, 7000), IpAddr::V4(HOST));

    // What is closed is closed, though the host itself reaches it.
    for address in [MANAGEMENT, METADATA] {
        host.reaches_soon(address, 7000);
        assert_eq!(one.reaches(address, 7000), None, "{address}");
    }
    let host_end = Ipv4Addr::from(u32::from(addresses[0]) - 1);
    for address in [HOST, host_end] {
        assert_eq!(one.reaches(address, 7001), None, "the host's {address}");
    }
    assert_eq!(one.reaches(addresses[1], 80), None, "another guest");
    assert_eq!(outside.reaches(addresses[0], 80), None, "from the outside");
    assert_eq!(one.reaches(GATEWAY, 7001), None, "the gateway");
    end(&host, slots, &built);
}

#[test]
fn names_are_looked_up_through_the_gateway() {
    if !is_root("names_are_looked_up_through_the_gateway") {
        return;
    }
    let (host, outside) = host_and_outside();
    let (slots, built) = build(&host, "netb", egress(true), 1);
    let guest = guest_in(&built[0]);
    let resolver = outside.run(|| UdpSocket::bind((OUTSIDE, 53)).unwrap());
    std::thread::spawn(move || {
        let mut query = [0; 64];
        while let Ok((length, from)) = resolver.recv_from(&mut query) {
            resolver.send_to(&query[..length], from).unwrap();
        }
    });
    let ask = || {
        guest.run(|| {
            let socket = UdpSocket::bind((GUEST, 0)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.send_to(b"a name", (GATEWAY, 53)).unwrap();
            let mut answer = [0; 64];
            let (length, from) = socket.recv_from(&mut answer).ok()?;
            Some((answer[..length].to_vec(), from.ip()))
        })
    };
    let answer = support::wait_for("an answer", 20 * PATIENCE, ask);
    // From whom it asked, or no client would take it.
    assert_eq!(answer, (b"a name".to_vec(), IpAddr::V4(GATEWAY)));
    end(&host, slots, &built);
}

#[test]
fn a_guest_in_anothers_name_is_not_heard() {
    if !is_root("a_guest_in_anothers_name_is_not_heard") {
        return;
    }
    const FORGED: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
    let (host, outside) = host_and_outside();
    let (slots, built) = build(&host, "netc", egress(true), 1);
    let guest = guest_in(&built[0]);
    guest.links(|handle| async move { up(&handle, "eth0", &[(FORGED, 32)]).await });
    let heard = outside.run(|| {
        let socket = UdpSocket::bind((OUTSIDE, 7002)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    });
    let send = |from: Ipv4Addr| {
        guest.run(move || {
            let socket = UdpSocket::bind((from, 0)).unwrap();
            socket.send_to(b"hello", (OUTSIDE, 7002)).unwrap();
        });
    };
    let hears = || heard.recv(&mut [0; 8]).ok();
    let own = || {
        send(GUEST);
        hears()
    };
    support::wait_for("a packet of its own", 20 * PATIENCE, own);
    while hears().is_some() {}
    send(FORGED);
    assert_eq!(hears(), None, "a forged packet arrived");
    end(&host, slots, &built);
}

#[test]
fn a_guest_without_internet_reaches_nothing_and_is_reached_by_the_host() {
    if !is_root("a_guest_without_internet_reaches_nothing_and_is_reached_by_the_host") {
        return;
    }
    let (host, outside) = host_and_outside();
    let (slots, built) = build(&host, "netd", egress(false), 1);
    let guest = guest_in(&built[0]);
    guest.listen(GUEST, 80);
    outside.listen(OUTSIDE, 7000);
    host.reaches_soon(built[0].address, 80);
    assert_eq!(guest.reaches(OUTSIDE, 7000), None);
    end(&host, slots, &built);
}

/// Replaces the policy of a slot, from the host.
fn set_policy(host: &Net, slots: &Slots, slot: &Slot, policy: NetworkPolicy) {
    let (slots, index) = (slots.clone(), slot.index);
    host.run(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(slots.set_policy(index, policy)).unwrap();
    });
}

#[test]
fn policy_of_one_sandbox_is_replaced_while_it_runs() {
    if !is_root("policy_of_one_sandbox_is_replaced_while_it_runs") {
        return;
    }
    let (host, outside) = host_and_outside();
    let (slots, built) = build(&host, "netf", egress(true), 2);
    let (one, other) = (guest_in(&built[0]), guest_in(&built[1]));
    one.listen(GUEST, 80);
    for address in [OUTSIDE, MANAGEMENT] {
        outside.listen(address, 7000);
    }
    one.reaches_soon(OUTSIDE, 7000);
    let network = |text: &str| vec![text.parse().unwrap()];
    let policy = |internet, allow, deny| NetworkPolicy {
        allow_internet_access: internet,
        allow,
        deny,
    };

    set_policy(
        &host,
        &slots,
        &built[0],
        policy(true, vec![], network("198.51.100.0/24")),
    );
    assert_eq!(one.reaches(OUTSIDE, 7000), None, "denied");
    other.reaches_soon(OUTSIDE, 7000);
    let allowed = policy(true, network("198.51.100.2/32"), network("198.51.100.0/24"));
    set_policy(&host, &slots, &built[0], allowed);
    one.reaches_soon(OUTSIDE, 7000);
    set_policy(&host, &slots, &built[0], policy(false, vec![], vec![]));
    assert_eq!(one.reaches(OUTSIDE, 7000), None, "cut off");
    host.reaches_soon(built[0].address, 80);
    set_policy(
        &host,
        &slots,
        &built[0],
        policy(false, network("198.51.100.2/32"), vec![]),
    );
    one.reaches_soon(OUTSIDE, 7000);
    // What the host has closed, no sandbox opens.
    set_policy(
        &host,
        &slots,
        &built[0],
        policy(false, network("0.0.0.0/0"), vec![]),
    );
    one.reaches_soon(OUTSIDE, 7000);
    assert_eq!(one.reaches(MANAGEMENT, 7000), None, "closed by the host");
    assert_eq!(one.reaches(built[1].address, 80), None, "another guest");
    end(&host, slots, &built);
}

#[test]
fn slots_leave_nothing_and_another_instance_is_not_touched() {
    if !is_root("slots_leave_nothing_and_another_instance_is_not_touched") {
        return;
    }
    let (host, _outside) = host_and_outside();
    let others = host.run(|| {
        let pool = "10.232.7.0/24".parse().unwrap();
        // Its links begin like the other instance's.
        Slots::start("netex", pool, egress(true)).unwrap()
    });
    let (slots, built) = build(&host, "nete", egress(true), 3);
    let links = |host: &Net| {
        host.run(|| {
            let links = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            links
                .lines()
                .filter(|line| line.trim().starts_with("nete"))
                .count()
        })
    };
    assert_eq!(links(&host), 3);
    host.run(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        for slot in &built {
            runtime.block_on(slots.take_down(slot.index)).unwrap();
            // A second time does no harm.
            runtime.block_on(slots.take_down(slot.index)).unwrap();
        }
        runtime.block_on(slots.end()).unwrap();
        assert_eq!(nftables::tables().unwrap(), ["thaw-netex"]);
        runtime.block_on(others.end()).unwrap();
    });
    assert_eq!(links(&host), 0);
    assert_eq!(namespace::list("nete").unwrap(), Vec::<String>::new());
}
