//! Reports changes of the host's network, using the multicast groups of rtnetlink.

use std::io;
use std::time::Duration;

use anyhow::{Context as _, Result};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkAttribute;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tracing::{debug, warn};

use super::Datapath;
use super::endpoint::is_host_interface;

/// Time to collect changes after the first one, because they come in bursts.
const SETTLE: Duration = Duration::from_millis(100);

/// A change of the host's network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// The host-side end with this name is gone, so its container is detached.
    Vanished(String),
    /// Addresses were added or removed.
    AddressesChanged,
    /// Routes or interfaces changed.
    RoutesChanged,
}

#[derive(Debug, Default)]
struct Seen {
    vanished: Vec<String>,
    addresses: bool,
    routes: bool,
}

impl Datapath {
    /// Returns a receiver of events from now on. Dropping the receiver ends the watch. If the
    /// kernel drops events, addresses and routes are reported as changed, but containers that
    /// vanished are not. Only the next [`Datapath::reconcile`], which the node runs every minute,
    /// finds those.
    ///
    /// # Errors
    /// Fails if no netlink socket can be opened.
    pub fn watch(&self) -> Result<mpsc::Receiver<LinkEvent>> {
        let socket = open().context("changes of interfaces cannot be monitored")?;
        let (events, receiver) = mpsc::channel(64);
        tokio::spawn(async move {
            if let Err(error) = run(&socket, &events).await {
                warn!(%error, "changes of interfaces are no longer monitored");
            }
        });
        Ok(receiver)
    }
}

fn open() -> io::Result<AsyncFd<Socket>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.set_non_blocking(true)?;
    socket.bind(&SocketAddr::new(0, 0))?;
    for group in [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
    ] {
        socket.add_membership(group as u32)?;
    }
    // SAFETY: the socket owns its descriptor and never changes it.
    unsafe { AsyncFd::register(socket) }.map_err(Into::into)
}

async fn run(socket: &AsyncFd<Socket>, events: &mpsc::Sender<LinkEvent>) -> io::Result<()> {
    loop {
        let mut seen = Seen::default();
        tokio::select! {
            () = events.closed() => return Ok(()),
            received = receive(socket, &mut seen) => received?,
        }
        let settled = Instant::now() + SETTLE;
        while let Ok(received) = timeout_at(settled, receive(socket, &mut seen)).await {
            received?;
        }
        let changes = seen.vanished.into_iter().map(LinkEvent::Vanished);
        let changes = changes.chain(seen.addresses.then_some(LinkEvent::AddressesChanged));
        for event in changes.chain(seen.routes.then_some(LinkEvent::RoutesChanged)) {
            if events.send(event).await.is_err() {
                return Ok(());
            }
        }
    }
}

async fn receive(socket: &AsyncFd<Socket>, seen: &mut Seen) -> io::Result<()> {
    let bytes = loop {
        let mut ready = socket.readable().await?;
        match ready.try_io(|socket| socket.get_ref().recv_from_full()) {
            Ok(Ok((bytes, _))) => break bytes,
            Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                seen.addresses = true;
                seen.routes = true;
                return Ok(());
            }
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    };
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let message = match NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest) {
            Ok(message) => message,
            Err(error) => {
                debug!(%error, "a netlink message cannot be read");
                seen.addresses = true;
                seen.routes = true;
                return Ok(());
            }
        };
        let len = (message.header.length as usize).next_multiple_of(4);
        seen.take(message.payload);
        rest = rest.get(len.max(16)..).unwrap_or_default();
    }
    Ok(())
}

impl Seen {
    fn take(&mut self, payload: NetlinkPayload<RouteNetlinkMessage>) {
        let NetlinkPayload::InnerMessage(message) = payload else { return };
        match message {
            RouteNetlinkMessage::DelLink(link) => {
                // A deletion of the family AF_BRIDGE also reports a bridge port that leaves its
                // bridge.
                let name = link.attributes.into_iter().find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name),
                    _ => None,
                });
                match name {
                    Some(name) if is_host_interface(&name) => self.vanished.push(name),
                    Some(_) | None => self.routes = true,
                }
            }
            RouteNetlinkMessage::NewLink(_)
            | RouteNetlinkMessage::NewRoute(_)
            | RouteNetlinkMessage::DelRoute(_) => self.routes = true,
            RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => {
                self.addresses = true
            }
            _ => {}
        }
    }
}
