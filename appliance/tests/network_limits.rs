//! What a slot holds back: bandwidth, what is left of old connections, IPv6, and addresses that the
//! host uses itself. In real namespaces: see [`support::net`].

mod support;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use appliance::network::address::{GUEST, TAP};
use appliance::network::{Slot, SlotIndex, nftables};
use futures_util::TryStreamExt;
use http_api::wire::NetworkPolicy;
use support::net::{Net, OUTSIDE, PATIENCE, guest_in, host_and_outside, index, is_root};
use support::slots::{Pool, egress};

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
    let is_bucket = |a: &TcAttribute| matches!(a, TcAttribute::Kind(kind) if kind == "tbf");
    Net::of(slot).links(move |handle| async move {
        let mut limited = Vec::new();
        for name in [TAP, "veth0"] {
            let link = index(&handle, name).await as i32;
            let mut queues = handle.qdisc().get().index(link).execute();
            while let Some(queue) = queues.try_next().await.unwrap() {
                if queue.header.index == link && queue.attributes.iter().any(is_bucket) {
                    limited.push(name.to_owned());
                }
            }
        }
        limited
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
    let pool = Pool::build(&host, "neti", egress(true), 1);
    let slot = &pool.built[0];
    let guest = guest_in(slot);
    assert_eq!(limited_links(slot), Vec::<String>::new());
    let out = SocketAddr::from((OUTSIDE, 7003));
    let inward = SocketAddr::from((slot.address, 7004));

    let limits = |egress_kbit_s, ingress_kbit_s| NetworkPolicy {
        egress_kbit_s,
        ingress_kbit_s,
        ..NetworkPolicy::default()
    };
    pool.set_policy(slot, limits(Some(KBIT_S), None));
    assert_eq!(limited_links(slot), ["veth0"]);
    let took = transfer(&guest, &outside, OUTSIDE, out, BYTES);
    assert!(took >= AT_LEAST, "sent in {took:?}");

    pool.set_policy(slot, limits(None, Some(KBIT_S)));
    assert_eq!(limited_links(slot), [TAP]);
    let took = transfer(&host, &guest, GUEST, inward, BYTES);
    assert!(took >= AT_LEAST, "received in {took:?}");

    // Ten times as much, by a replaced limit, in the time of the first.
    pool.set_policy(slot, limits(Some(10 * KBIT_S), Some(10 * KBIT_S)));
    assert_eq!(limited_links(slot), [TAP, "veth0"]);
    let took = transfer(&guest, &outside, OUTSIDE, out, 10 * BYTES);
    assert!(took >= AT_LEAST, "sent in {took:?}");

    pool.set_policy(slot, NetworkPolicy::default());
    assert_eq!(limited_links(slot), Vec::<String>::new());
    transfer(&guest, &outside, OUTSIDE, out, BYTES);
    pool.end();
}

#[test]
fn limits_of_a_new_sandbox_are_there_and_its_successor_has_none() {
    if !is_root("limits_of_a_new_sandbox_are_there_and_its_successor_has_none") {
        return;
    }
    let (host, _outside) = host_and_outside();
    let pool = Pool::build(&host, "netj", egress(true), 0);
    pool.slots.keep_ready(1, []);
    pool.wait_for_slots(&[0]);
    let limited = NetworkPolicy {
        ingress_kbit_s: Some(64),
        ..NetworkPolicy::default()
    };
    // The first waits in the pool, the second is built for it.
    for number in [0, 5] {
        pool.take(number, limited.clone());
        let slot = pool.slot(number);
        assert_eq!(limited_links(&slot), [TAP], "slot {number}");
        pool.give_back(number);
        if pool.indexes().contains(&number) {
            assert_eq!(limited_links(&slot), Vec::<String>::new(), "slot {number}");
        }
    }
    pool.end();
}

#[test]
fn a_slot_of_an_earlier_daemon_is_taken_over_with_its_policy() {
    if !is_root("a_slot_of_an_earlier_daemon_is_taken_over_with_its_policy") {
        return;
    }
    let (host, outside) = host_and_outside();
    outside.listen(OUTSIDE, 7000);
    let earlier = Pool::build(&host, "netp", egress(true), 1);
    let guest = guest_in(&earlier.built[0]);
    guest.reaches_soon(OUTSIDE, 7000);
    let limited = |egress_kbit_s, ingress_kbit_s, allow_internet_access| NetworkPolicy {
        egress_kbit_s,
        ingress_kbit_s,
        allow_internet_access,
        ..NetworkPolicy::default()
    };
    earlier.set_policy(&earlier.built[0], limited(Some(64), None, true));
    assert_eq!(limited_links(&earlier.built[0]), ["veth0"]);
    let built = earlier.built.clone();
    drop(earlier);

    // It knows nothing of what was in force.
    let mut pool = Pool::follow(&host, "netp", egress(true));
    pool.built.push(pool.slots.adopt(SlotIndex(0)));
    assert_eq!(pool.built, built);
    assert!(pool.slots.is_in_use(SlotIndex(0)));
    pool.slots.keep_ready(1, [SlotIndex(0)]);
    pool.wait_for_slots(&[0, 1]);
    for (policy, links) in [
        (limited(None, Some(64), false), vec![TAP]),
        (limited(Some(64), Some(64), true), vec![TAP, "veth0"]),
        (limited(None, None, true), vec![]),
    ] {
        let wanted = policy.clone();
        pool.ask(|slots| async move { slots.enforce(SlotIndex(0), wanted).await.unwrap() });
        assert_eq!(limited_links(&pool.built[0]), links);
        let reached = guest.reaches(OUTSIDE, 7000).is_some();
        assert_eq!(reached, policy.allow_internet_access, "{policy:?}");
    }
    // As any other from now on.
    pool.release(0);
    pool.end();
}

#[test]
fn no_packet_of_an_old_connection_reaches_the_next_guest() {
    if !is_root("no_packet_of_an_old_connection_reaches_the_next_guest") {
        return;
    }
    const PORT: u16 = 7005;
    let (host, outside) = host_and_outside();
    let mut pool = Pool::build(&host, "netk", egress(true), 0);
    pool.slots.keep_ready(1, []);
    pool.wait_for_slots(&[0]);
    let slot = pool.take(0, NetworkPolicy::default());
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

    pool.release(0);
    pool.built.push(pool.take(0, NetworkPolicy::default()));
    assert_eq!(
        answered(),
        None,
        "a packet for the last guest reached the next one"
    );
    pool.end();
}

/// As kernels want it that don't delete by a filter.
#[test]
fn connections_of_one_guest_are_forgotten_one_by_one() {
    if !is_root("connections_of_one_guest_are_forgotten_one_by_one") {
        return;
    }
    const PORT: u16 = 7006;
    let (host, outside) = host_and_outside();
    let pool = Pool::build(&host, "neto", egress(true), 2);
    let guests: Vec<_> = pool.built.iter().map(guest_in).collect();
    let peer = outside.run(|| UdpSocket::bind((OUTSIDE, PORT)).unwrap());
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    let flows: Vec<_> = guests
        .iter()
        .map(|guest| {
            let inside = guest.run(|| UdpSocket::bind((GUEST, PORT)).unwrap());
            inside.set_read_timeout(Some(PATIENCE)).unwrap();
            let (_, back) = support::wait_for("a packet of the guest", 20 * PATIENCE, || {
                inside.send_to(b"out", (OUTSIDE, PORT)).unwrap();
                peer.recv_from(&mut [0; 8]).ok()
            });
            while peer.recv(&mut [0; 8]).is_ok() {}
            (inside, back)
        })
        .collect();
    let answered = |(inside, back): &(UdpSocket, SocketAddr)| {
        peer.send_to(b"in", back).unwrap();
        inside.recv(&mut [0; 8]).ok()
    };
    assert_eq!(
        flows.iter().map(answered).collect::<Vec<_>>(),
        [Some(2), Some(2)]
    );
    let address = pool.built[0].address;
    let forget = move || nftables::forget_one_by_one(address).unwrap();
    host.run(forget);
    assert_eq!(
        flows.iter().map(answered).collect::<Vec<_>>(),
        [None, Some(2)]
    );
    // Nothing of it is there any more.
    host.run(forget);
    pool.end();
}

#[test]
fn there_is_no_ipv6_in_a_slot() {
    if !is_root("there_is_no_ipv6_in_a_slot") {
        return;
    }
    let (host, _outside) = host_and_outside();
    let pool = Pool::build(&host, "netl", egress(true), 1);
    let _guest = guest_in(&pool.built[0]);
    Net::of(&pool.built[0]).run(|| {
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
    pool.end();
}

#[test]
fn a_pool_that_the_host_uses_is_refused_with_the_route_and_the_key() {
    use appliance::network::range;
    if !is_root("a_pool_that_the_host_uses_is_refused_with_the_route_and_the_key") {
        return;
    }
    let (host, _outside) = host_and_outside();
    let pool = Pool::build(&host, "netm", egress(true), 1);
    let check = |instance: &'static str, pool: &'static str| {
        host.block_on(move || async move {
            let checked = range::check(pool.parse().unwrap(), instance).await;
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
    pool.end();
}
