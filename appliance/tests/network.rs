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
        // A killed run's.
        for index in appliance::network::slots::existing(instance).unwrap() {
            runtime.block_on(slots.take_down(index)).unwrap();
        }
        let built = (0..count).map(|index| {
            let policy = NetworkPolicy::default();
            runtime
                .block_on(slots.take(SlotIndex(index), policy))
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

/// Runs on the host, for what slots are asked.
fn ask<F: Future<Output = ()>>(host: &Net, act: impl FnOnce() -> F + Send + 'static) {
    host.run(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(act());
    });
}

/// The slots of an instance that are built, as its namespaces say.
fn built_slots(instance: &str) -> Vec<u32> {
    let mut slots = appliance::network::slots::existing(instance).unwrap();
    slots.sort_unstable();
    slots.into_iter().map(|slot| slot.0).collect()
}

fn wait_for_slots(instance: &str, expected: &[u32]) {
    let what = format!("slots {expected:?} of {instance}");
    support::wait_for(&what, 50 * PATIENCE, || {
        (built_slots(instance) == expected).then_some(())
    });
}

#[test]
fn slots_are_built_ahead_kept_for_their_sandbox_and_cleaned_for_the_next() {
    if !is_root("slots_are_built_ahead_kept_for_their_sandbox_and_cleaned_for_the_next") {
        return;
    }
    let (host, outside) = host_and_outside();
    outside.listen(OUTSIDE, 7000);
    let (slots, _) = build(&host, "netg", egress(true), 0);
    slots.keep_ready(2, [SlotIndex(1)]);
    wait_for_slots("netg", &[0, 2]);

    // One that is cut off takes the first; its successor in the same slot is not.
    let cut_off = NetworkPolicy {
        allow_internet_access: false,
        ..NetworkPolicy::default()
    };
    let one = slots.clone();
    ask(&host, || async move {
        drop(one.take(SlotIndex(0), cut_off).await.unwrap());
    });
    wait_for_slots("netg", &[0, 2, 3]);
    let slot = Slot {
        index: SlotIndex(0),
        namespace: namespace::path("netg-0"),
        address: slots.pool().sandbox_end(SlotIndex(0)),
    };
    let guest = guest_in(&slot);
    guest.listen(GUEST, 80);
    host.reaches_soon(slot.address, 80);
    assert_eq!(guest.reaches(OUTSIDE, 7000), None);
    let one = slots.clone();
    ask(&host, || async move {
        one.give_back(SlotIndex(0)).await.unwrap();
        one.release(SlotIndex(0));
    });
    // The highest free one is one too many.
    wait_for_slots("netg", &[0, 2]);
    let one = slots.clone();
    ask(&host, || async move {
        drop(
            one.take(SlotIndex(0), NetworkPolicy::default())
                .await
                .unwrap(),
        );
    });
    assert_eq!(guest.reaches_soon(OUTSIDE, 7000), IpAddr::V4(HOST));

    // A paused sandbox's slot waits for it, beside the free ones.
    let one = slots.clone();
    ask(&host, || async move {
        one.give_back(SlotIndex(0)).await.unwrap();
    });
    wait_for_slots("netg", &[0, 2, 3]);
    end(&host, slots, &[]);
    assert!(built_slots("netg").is_empty(), "nothing is left at the end");
}

#[test]
fn ten_thousand_sandboxes_in_turn_leak_nothing() {
    const CYCLES: u32 = 10_000;
    if !is_root("ten_thousand_sandboxes_in_turn_leak_nothing") {
        return;
    }
    let (host, _outside) = host_and_outside();
    let (slots, _) = build(&host, "neth", egress(true), 0);
    slots.keep_ready(2, []);
    wait_for_slots("neth", &[0, 1]);
    let links = |host: &Net| {
        host.run(|| {
            std::fs::read_to_string("/proc/thread-self/net/dev")
                .unwrap()
                .lines()
                .count()
        })
    };
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = (links(&host), descriptors());
    let worker = slots.clone();
    ask(&host, || async move {
        for cycle in 0..CYCLES {
            let index = SlotIndex(cycle % 2);
            drop(worker.take(index, NetworkPolicy::default()).await.unwrap());
            worker.give_back(index).await.unwrap();
            worker.release(index);
        }
    });
    wait_for_slots("neth", &[0, 1]);
    let after = (links(&host), descriptors());
    assert_eq!(after.0, before.0);
    assert!(
        after.1 <= before.1,
        "descriptors: {before:?}, then {after:?}"
    );
    end(&host, slots, &[]);
    assert!(built_slots("neth").is_empty());
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
        ..NetworkPolicy::default()
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

/// How long so many bytes take from a namespace to a listener in another, until the last has
/// arrived.
fn transfer(from: &Net, to: &Net, listen: Ipv4Addr, target: SocketAddr, bytes: usize) -> Duration {
    let port = target.port();
    let listener = to.run(move || TcpListener::bind((listen, port)).unwrap());
    let receiving = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut received = 0;
        let mut buffer = vec![0; 1 << 16];
        while received < bytes {
            received += stream.read(&mut buffer).unwrap();
        }
        stream.write_all(b"!").unwrap();
    });
    let took = from.run(move || {
        let connect = || TcpStream::connect_timeout(&target, PATIENCE).ok();
        let mut stream = support::wait_for("a connection", 20 * PATIENCE, connect);
        let started = std::time::Instant::now();
        stream.write_all(&vec![7; bytes]).unwrap();
        stream.read_exact(&mut [0]).unwrap();
        started.elapsed()
    });
    receiving.join().unwrap();
    took
}

/// The links of a slot that have a token bucket.
fn limited_links(slot: &Slot) -> Vec<String> {
    use rtnetlink::packet_route::tc::TcAttribute;
    Net::of(slot).run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_all().build().unwrap();
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().unwrap();
            let driver = tokio::spawn(connection);
            let mut limited = Vec::new();
            for name in [TAP, "veth0"] {
                let link = index(&handle, name).await as i32;
                let mut queues = handle.qdisc().get().index(link).execute();
                while let Some(queue) = queues.try_next().await.unwrap() {
                    let is_bucket =
                        |a: &TcAttribute| matches!(a, TcAttribute::Kind(kind) if kind == "tbf");
                    if queue.header.index == link && queue.attributes.iter().any(is_bucket) {
                        limited.push(name.to_owned());
                    }
                }
            }
            driver.abort();
            limited
        })
    })
}

#[test]
fn bandwidth_of_one_sandbox_is_limited_both_ways_and_no_longer() {
    if !is_root("bandwidth_of_one_sandbox_is_limited_both_ways_and_no_longer") {
        return;
    }
    // At 1 MB/s. Bucket and queue take 116 KiB at once; of the rest, no kernel sends more.
    const KBIT_S: u64 = 8000;
    const BYTES: usize = 1_500_000;
    const AT_LEAST: Duration = Duration::from_millis(1300);
    let (host, outside) = host_and_outside();
    let (slots, built) = build(&host, "neti", egress(true), 1);
    let slot = &built[0];
    let guest = guest_in(slot);
    assert_eq!(limited_links(slot), Vec::<String>::new());
    let out = SocketAddr::from((OUTSIDE, 7003));
    let inward = SocketAddr::from((slot.address, 7004));

    let limits = |egress_kbit_s, ingress_kbit_s| NetworkPolicy {
        egress_kbit_s,
        ingress_kbit_s,
        ..NetworkPolicy::default()
    };
    set_policy(&host, &slots, slot, limits(Some(KBIT_S), None));
    assert_eq!(limited_links(slot), ["veth0"]);
    let took = transfer(&guest, &outside, OUTSIDE, out, BYTES);
    assert!(took >= AT_LEAST, "sent in {took:?}");

    set_policy(&host, &slots, slot, limits(None, Some(KBIT_S)));
    assert_eq!(limited_links(slot), [TAP]);
    let took = transfer(&host, &guest, GUEST, inward, BYTES);
    assert!(took >= AT_LEAST, "received in {took:?}");

    // Ten times as much, by a replaced limit, in the time of the first.
    set_policy(
        &host,
        &slots,
        slot,
        limits(Some(10 * KBIT_S), Some(10 * KBIT_S)),
    );
    assert_eq!(limited_links(slot), [TAP, "veth0"]);
    let took = transfer(&guest, &outside, OUTSIDE, out, 10 * BYTES);
    assert!(took >= AT_LEAST, "sent in {took:?}");

    set_policy(&host, &slots, slot, NetworkPolicy::default());
    assert_eq!(limited_links(slot), Vec::<String>::new());
    transfer(&guest, &outside, OUTSIDE, out, BYTES);
    end(&host, slots, &built);
}

#[test]
fn limits_of_a_new_sandbox_are_there_and_its_successor_has_none() {
    if !is_root("limits_of_a_new_sandbox_are_there_and_its_successor_has_none") {
        return;
    }
    let (host, _outside) = host_and_outside();
    let (slots, _) = build(&host, "netj", egress(true), 0);
    slots.keep_ready(1, []);
    wait_for_slots("netj", &[0]);
    let limited = NetworkPolicy {
        ingress_kbit_s: Some(64),
        ..NetworkPolicy::default()
    };
    // The first waits in the pool, the second is built for it.
    for number in [0, 5] {
        let (one, policy) = (slots.clone(), limited.clone());
        ask(&host, move || async move {
            drop(one.take(SlotIndex(number), policy).await.unwrap());
        });
        let slot = Slot {
            index: SlotIndex(number),
            namespace: namespace::path(&format!("netj-{number}")),
            address: slots.pool().sandbox_end(SlotIndex(number)),
        };
        assert_eq!(limited_links(&slot), [TAP], "slot {number}");
        let one = slots.clone();
        ask(&host, move || async move {
            one.give_back(SlotIndex(number)).await.unwrap();
        });
        if built_slots("netj").contains(&number) {
            assert_eq!(limited_links(&slot), Vec::<String>::new(), "slot {number}");
        }
    }
    end(&host, slots, &[]);
}

#[test]
fn no_packet_of_an_old_connection_reaches_the_next_guest() {
    if !is_root("no_packet_of_an_old_connection_reaches_the_next_guest") {
        return;
    }
    const PORT: u16 = 7005;
    let (host, outside) = host_and_outside();
    let (slots, _) = build(&host, "netk", egress(true), 0);
    slots.keep_ready(1, []);
    wait_for_slots("netk", &[0]);
    let take = |slots: &Slots| {
        let one = slots.clone();
        ask(&host, || async move {
            drop(
                one.take(SlotIndex(0), NetworkPolicy::default())
                    .await
                    .unwrap(),
            );
        });
    };
    take(&slots);
    let slot = Slot {
        index: SlotIndex(0),
        namespace: namespace::path("netk-0"),
        address: slots.pool().sandbox_end(SlotIndex(0)),
    };
    let guest = guest_in(&slot);
    let peer = outside.run(|| UdpSocket::bind((OUTSIDE, PORT)).unwrap());
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    let inside = guest.run(|| {
        let socket = UdpSocket::bind((GUEST, PORT)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    });
    let back = support::wait_for("a packet of the guest", 20 * PATIENCE, || {
        inside.send_to(b"out", (OUTSIDE, PORT)).unwrap();
        peer.recv_from(&mut [0; 8]).ok()
    });
    while peer.recv(&mut [0; 8]).is_ok() {}
    let answered = || {
        peer.send_to(b"in", back.1).unwrap();
        inside.recv(&mut [0; 8]).ok()
    };
    assert_eq!(answered(), Some(2), "while it runs");

    let one = slots.clone();
    ask(&host, || async move {
        one.give_back(SlotIndex(0)).await.unwrap();
        one.release(SlotIndex(0));
    });
    take(&slots);
    assert_eq!(
        answered(),
        None,
        "a packet for the last guest reached the next one"
    );
    end(&host, slots, &[]);
}

#[test]
fn there_is_no_ipv6_in_a_slot() {
    if !is_root("there_is_no_ipv6_in_a_slot") {
        return;
    }
    let (host, _outside) = host_and_outside();
    let (slots, built) = build(&host, "netl", egress(true), 1);
    let _guest = guest_in(&built[0]);
    Net::of(&built[0]).run(|| {
        let off = |link: &str| {
            let path = format!("/proc/sys/net/ipv6/conf/{link}/disable_ipv6");
            std::fs::read_to_string(path).map_or(true, |text| text.trim() == "1")
        };
        for link in ["all", "default", "lo", "veth0", TAP] {
            assert!(off(link), "{link}");
        }
        let addresses = std::fs::read_to_string("/proc/thread-self/net/if_inet6");
        assert_eq!(addresses.unwrap_or_default(), "");
    });
    end(&host, slots, &built);
}

#[test]
fn a_pool_that_the_host_uses_is_refused_with_the_route_and_the_key() {
    use appliance::network::range;
    if !is_root("a_pool_that_the_host_uses_is_refused_with_the_route_and_the_key") {
        return;
    }
    let (host, _outside) = host_and_outside();
    let (slots, built) = build(&host, "netm", egress(true), 1);
    let check = |instance: &'static str, pool: &'static str| {
        host.run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build().unwrap();
            let checked = runtime.block_on(range::check(pool.parse().unwrap(), instance));
            checked.map_err(|error| error.to_string())
        })
    };
    // Its own slots, and the host's default route, are no reason.
    check("netm", "10.231.0.0/16").unwrap();
    check("netm", "10.99.0.0/16").unwrap();
    let error = check("netn", "10.231.0.0/16").unwrap_err();
    assert!(error.contains("by netm0"), "{error}");
    let error = check("netm", "198.51.100.128/25").unwrap_err();
    for part in [
        "network.pool",
        "198.51.100.128/25",
        "198.51.100.0/24",
        "up0",
    ] {
        assert!(error.contains(part), "no {part}: {error}");
    }
    end(&host, slots, &built);
}
