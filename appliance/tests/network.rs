//! Who can reach whom, in real namespaces: see [`support::net`].

mod support;

use std::net::{IpAddr, Ipv4Addr, UdpSocket};

use appliance::network::address::{GATEWAY, GUEST};
use appliance::network::{SlotIndex, namespace, nftables};
use http_api::wire::NetworkPolicy;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use support::net::{
    HOST, MANAGEMENT, METADATA, OUTSIDE, PATIENCE, guest_in, host_and_outside, is_root, up,
};
use support::slots::{Pool, built_slots, egress};

#[test]
fn guests_reach_the_outside_and_nothing_else() {
    if !is_root("guests_reach_the_outside_and_nothing_else") {
        return;
    }
    let (host, outside) = host_and_outside();
    let pool = Pool::build(&host, "neta", egress(true), 2);
    let (one, other) = (guest_in(&pool.built[0]), guest_in(&pool.built[1]));
    let addresses = [pool.built[0].address, pool.built[1].address];
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
    pool.end();
}

#[test]
fn names_are_looked_up_through_the_gateway() {
    if !is_root("names_are_looked_up_through_the_gateway") {
        return;
    }
    let (host, outside) = host_and_outside();
    let pool = Pool::build(&host, "netb", egress(true), 1);
    let guest = guest_in(&pool.built[0]);
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
    pool.end();
}

#[test]
fn a_guest_in_anothers_name_is_not_heard() {
    if !is_root("a_guest_in_anothers_name_is_not_heard") {
        return;
    }
    const FORGED: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
    let (host, outside) = host_and_outside();
    let pool = Pool::build(&host, "netc", egress(true), 1);
    let guest = guest_in(&pool.built[0]);
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
    pool.end();
}

#[test]
fn a_guest_without_internet_reaches_nothing_and_is_reached_by_the_host() {
    if !is_root("a_guest_without_internet_reaches_nothing_and_is_reached_by_the_host") {
        return;
    }
    let (host, outside) = host_and_outside();
    let pool = Pool::build(&host, "netd", egress(false), 1);
    let guest = guest_in(&pool.built[0]);
    guest.listen(GUEST, 80);
    outside.listen(OUTSIDE, 7000);
    host.reaches_soon(pool.built[0].address, 80);
    assert_eq!(guest.reaches(OUTSIDE, 7000), None);
    pool.end();
}

#[test]
fn slots_are_built_ahead_kept_for_their_sandbox_and_cleaned_for_the_next() {
    if !is_root("slots_are_built_ahead_kept_for_their_sandbox_and_cleaned_for_the_next") {
        return;
    }
    let (host, outside) = host_and_outside();
    outside.listen(OUTSIDE, 7000);
    let pool = Pool::build(&host, "netg", egress(true), 0);
    pool.slots.keep_ready(2, [SlotIndex(1)]);
    pool.wait_for_slots(&[0, 2]);

    // One that is cut off takes the first; its successor in the same slot is not.
    let cut_off = NetworkPolicy {
        allow_internet_access: false,
        ..NetworkPolicy::default()
    };
    pool.take(0, cut_off);
    pool.wait_for_slots(&[0, 2, 3]);
    let slot = pool.slot(0);
    let guest = guest_in(&slot);
    guest.listen(GUEST, 80);
    host.reaches_soon(slot.address, 80);
    assert_eq!(guest.reaches(OUTSIDE, 7000), None);
    pool.release(0);
    // The highest free one is one too many.
    pool.wait_for_slots(&[0, 2]);
    pool.take(0, NetworkPolicy::default());
    assert_eq!(guest.reaches_soon(OUTSIDE, 7000), IpAddr::V4(HOST));

    // A paused sandbox's slot waits for it, beside the free ones.
    pool.give_back(0);
    pool.wait_for_slots(&[0, 2, 3]);
    pool.end();
    assert!(built_slots("netg").is_empty(), "nothing is left at the end");
}

#[test]
fn ten_thousand_sandboxes_in_turn_leak_nothing() {
    const CYCLES: u32 = 10_000;
    if !is_root("ten_thousand_sandboxes_in_turn_leak_nothing") {
        return;
    }
    let (host, _outside) = host_and_outside();
    let pool = Pool::build(&host, "neth", egress(true), 0);
    pool.slots.keep_ready(2, []);
    pool.wait_until_ready(&[0, 1]);
    let links = || host.link_names().len();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = (links(), descriptors());
    pool.ask(|slots| async move {
        for cycle in 0..CYCLES {
            let index = SlotIndex(cycle % 2);
            drop(slots.take(index, NetworkPolicy::default()).await.unwrap());
            slots.give_back(index).await.unwrap();
            slots.release(index);
        }
    });
    pool.wait_until_ready(&[0, 1]);
    // A third slot may have been built while another was taken. Its links go after its name: the
    // kernel takes a namespace down in the background.
    support::wait_for("the links of before", 50 * PATIENCE, || {
        (links() == before.0).then_some(())
    });
    let after = (links(), descriptors());
    assert!(
        after.1 <= before.1,
        "descriptors: {before:?}, then {after:?}"
    );
    pool.end();
    assert!(built_slots("neth").is_empty());
}

#[test]
fn policy_of_one_sandbox_is_replaced_while_it_runs() {
    if !is_root("policy_of_one_sandbox_is_replaced_while_it_runs") {
        return;
    }
    let (host, outside) = host_and_outside();
    let pool = Pool::build(&host, "netf", egress(true), 2);
    let (one, other) = (guest_in(&pool.built[0]), guest_in(&pool.built[1]));
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

    pool.set_policy(
        &pool.built[0],
        policy(true, vec![], network("198.51.100.0/24")),
    );
    assert_eq!(one.reaches(OUTSIDE, 7000), None, "denied");
    other.reaches_soon(OUTSIDE, 7000);
    let allowed = policy(true, network("198.51.100.2/32"), network("198.51.100.0/24"));
    pool.set_policy(&pool.built[0], allowed);
    one.reaches_soon(OUTSIDE, 7000);
    pool.set_policy(&pool.built[0], policy(false, vec![], vec![]));
    assert_eq!(one.reaches(OUTSIDE, 7000), None, "cut off");
    host.reaches_soon(pool.built[0].address, 80);
    pool.set_policy(
        &pool.built[0],
        policy(false, network("198.51.100.2/32"), vec![]),
    );
    one.reaches_soon(OUTSIDE, 7000);
    // What the host has closed, no sandbox opens.
    pool.set_policy(&pool.built[0], policy(false, network("0.0.0.0/0"), vec![]));
    one.reaches_soon(OUTSIDE, 7000);
    assert_eq!(one.reaches(MANAGEMENT, 7000), None, "closed by the host");
    assert_eq!(
        one.reaches(pool.built[1].address, 80),
        None,
        "another guest"
    );
    pool.end();
}

#[test]
fn slots_leave_nothing_and_another_instance_is_not_touched() {
    if !is_root("slots_leave_nothing_and_another_instance_is_not_touched") {
        return;
    }
    let (host, _outside) = host_and_outside();
    // Its links begin like the other instance's.
    let others = Pool::start(&host, "netex", "10.232.7.0/24", egress(true));
    let pool = Pool::build(&host, "nete", egress(true), 3);
    let links = || {
        let names = host.link_names();
        names.iter().filter(|name| name.starts_with("nete")).count()
    };
    assert_eq!(links(), 3);
    for slot in &pool.built {
        pool.take_down(slot.index);
        // A second time does no harm.
        pool.take_down(slot.index);
    }
    pool.ask(|slots| async move {
        slots.end().await.unwrap();
        assert_eq!(nftables::tables().unwrap(), ["thaw-netex"]);
    });
    others.end();
    assert_eq!(links(), 0);
    assert_eq!(namespace::list("nete").unwrap(), Vec::<String>::new());
}

#[test]
fn a_namespace_goes_also_when_ip_netns_has_been_used_meanwhile() {
    if !is_root("a_namespace_goes_also_when_ip_netns_has_been_used_meanwhile") {
        return;
    }
    // In mounts of its own, where /run/netns is nobody's yet.
    let tried = std::thread::spawn(|| {
        let none: Option<&str> = None;
        let mount = |source, target, kind, flags| mount(source, target, kind, flags, none);
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE).unwrap();
        mount(Some("none"), "/run", Some("tmpfs"), MsFlags::empty()).unwrap();
        namespace::create("before", || Ok(())).unwrap();
        // What `ip netns add` does first.
        let (directory, recursive) = ("/run/netns", MsFlags::MS_REC);
        let share = || mount(none, directory, none, MsFlags::MS_SHARED | recursive);
        if share().is_err() {
            let flags = MsFlags::MS_BIND | recursive;
            mount(Some(directory), directory, none, flags).unwrap();
            share().unwrap();
        }
        namespace::create("after", || Ok(())).unwrap();
        for name in ["before", "after"] {
            namespace::remove(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        assert_eq!(namespace::list("").unwrap(), [""; 0]);
    });
    tried.join().unwrap();
}
