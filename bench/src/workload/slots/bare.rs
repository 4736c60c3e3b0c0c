//! The floor of building a slot: the same messages, in the same order, sent and acknowledged one
//! after the other on a blocking socket by the calling thread. No runtime, no thread to ask, and
//! none of the appliance's code but what makes the namespace, the tap, and the bytes of the rules.

use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use appliance::network::address::{
    GATEWAY, GATEWAY_MAC, GUEST_PREFIX, INNER_LINK, TAP, namespace as namespace_name, outer_link,
};
use appliance::network::{Pool, SlotIndex, namespace, nftables, rules};
use appliance::sys::tap;
use http_api::wire::NetworkPolicy;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute, LinkMessage};
use rtnetlink::{
    AddressMessageBuilder, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
};

/// Builds slots plainly.
pub(super) struct Bare {
    instance: &'static str,
    pool: Pool,
}

impl Bare {
    pub(super) fn new(instance: &'static str, pool: Pool) -> Result<Self> {
        // Of a run that was killed; their links went with its namespace.
        for name in namespace::list(&format!("{instance}-"))? {
            namespace::remove(&name)?;
        }
        Ok(Self { instance, pool })
    }

    pub(super) fn build(&self, index: SlotIndex) -> Result<()> {
        let outer = outer_link(self.instance, index);
        let home = File::open("/proc/thread-self/ns/net")?;
        namespace::create(&namespace_name(self.instance, index), || {
            tap::create_persistent(TAP)?;
            fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
            fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")?;
            self.links(&outer, &home, index)?;
            let policy = NetworkPolicy::default();
            nftables::apply(rules::slot_rules(self.pool, &super::egress(), &policy))
        })
        .context("Building plainly")?;
        let mut route = Route::open()?;
        let link = route.find(&outer)?;
        route.address(link, self.pool.host_end(index), 31)?;
        route.up(link, None)?;
        Ok(())
    }

    fn links(&self, outer: &str, home: &File, index: SlotIndex) -> io::Result<()> {
        let mut route = Route::open()?;
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(outer)
            .setns_by_fd(home.as_raw_fd())
            .build();
        let veth = LinkMessageBuilder::<LinkVeth>::new(INNER_LINK, outer)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build();
        route.change(RouteNetlinkMessage::NewLink(veth))?;
        let lo = route.find("lo")?;
        route.up(lo, None)?;
        let inner = route.find(INNER_LINK)?;
        route.address(inner, self.pool.sandbox_end(index), 31)?;
        route.up(inner, None)?;
        let tap = route.find(TAP)?;
        route.address(tap, GATEWAY, GUEST_PREFIX)?;
        route.up(tap, Some(GATEWAY_MAC))?;
        let gateway = RouteMessageBuilder::<Ipv4Addr>::new()
            .gateway(self.pool.host_end(index))
            .build();
        route.change(RouteNetlinkMessage::NewRoute(gateway))
    }

    pub(super) fn take_down(&self, index: SlotIndex) -> Result<()> {
        let mut route = Route::open()?;
        let link = route.find(&outer_link(self.instance, index))?;
        let mut message = LinkMessage::default();
        message.header.index = link;
        // What makes something new means something else with what goes.
        route.order(
            RouteNetlinkMessage::DelLink(message),
            NLM_F_REQUEST | NLM_F_ACK,
        )?;
        namespace::remove(&namespace_name(self.instance, index))?;
        Ok(())
    }
}

/// A blocking socket to the kernel's links and routes.
struct Route(Socket);

impl Route {
    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        Ok(Self(socket))
    }

    fn find(&mut self, name: &str) -> io::Result<u32> {
        let mut message = LinkMessage::default();
        let name = LinkAttribute::IfName(name.to_owned());
        message.attributes.push(name);
        match self.ask(RouteNetlinkMessage::GetLink(message), NLM_F_REQUEST)? {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
                Ok(link.header.index)
            }
            other => Err(io::Error::other(format!("{other:?}"))),
        }
    }

    fn up(&mut self, link: u32, mac: Option<[u8; 6]>) -> io::Result<()> {
        let mut change = LinkMessageBuilder::<LinkUnspec>::new().index(link).up();
        if let Some(mac) = mac {
            change = change.address(mac.to_vec());
        }
        self.change(RouteNetlinkMessage::SetLink(change.build()))
    }

    fn address(&mut self, link: u32, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        let message = AddressMessageBuilder::<Ipv4Addr>::new()
            .index(link)
            .address(address, prefix)
            .build();
        self.change(RouteNetlinkMessage::NewAddress(message))
    }

    fn change(&mut self, message: RouteNetlinkMessage) -> io::Result<()> {
        let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_EXCL | NLM_F_CREATE;
        self.order(message, flags)
    }

    fn order(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        match self.ask(message, flags)? {
            NetlinkPayload::Error(answer) if answer.code.is_none() => Ok(()),
            other => Err(io::Error::other(format!("{other:?}"))),
        }
    }

    /// One message, one answer.
    fn ask(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<NetlinkPayload<RouteNetlinkMessage>> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = flags;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.0.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        let (answer, _) = self.0.recv_from_full()?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer);
        Ok(answer.map_err(io::Error::other)?.payload)
    }
}
