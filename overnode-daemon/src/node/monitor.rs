//! Feeds `overnode monitor`: reports dropped packets and events of peers, paths and containers.

use std::collections::BTreeMap;
use std::net::IpAddr;

use overnode_ebpf::reason::Reason;

use super::data_plane::DataPeer;
use super::view::View;
use crate::api::{Container, DroppedPacket, EventKind, Headers, Program};
use crate::datapath::Drops;
use crate::monitor::decode::Seen;
use crate::monitor::hub;
use crate::monitor::{Hub, drop_reasons};
use overnode_core::attachment::Attachment;
use overnode_types::{NodeId, PeerIndex, SessionIndex};

/// Maximum number of dropped packets shown per second and reason. All of them fit into the ring
/// buffer of the eBPF programs.
pub(super) const SHOWN: u32 = 32;

const _: () = {
    // The kernel adds an 8-byte header to each record.
    let record = size_of::<overnode_ebpf::map::Dropped>() + 8;
    assert!(Reason::ALL.len() * SHOWN as usize * record < overnode_ebpf::map::DROPS_LEN as usize);
};

/// The node's state of its monitors.
pub(super) struct Monitor {
    hub: Hub,
    /// Counts by reason, while a monitor is attached.
    tallies: Option<BTreeMap<&'static str, Tally>>,
}

/// Packets dropped for one reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    /// Value of the counter when the first monitor attached.
    before: u64,
    /// Number of packets shown since then.
    shown: u64,
    /// Number of packets reported as not shown since then.
    reported: u64,
}

impl Tally {
    /// Returns how many further packets are not shown, given the value of the counter.
    fn not_shown(&mut self, counter: u64) -> u64 {
        let more = counter.saturating_sub(self.before).saturating_sub(self.shown + self.reported);
        self.reported += more;
        more
    }
}

/// The attachments of this node, by address.
struct Attached(BTreeMap<IpAddr, Attachment>);

impl Attached {
    fn new(attachments: Vec<Attachment>) -> Self {
        Self(attachments.into_iter().map(|it| (it.address, it)).collect())
    }

    /// Returns the names of the containers whose addresses occur in the headers.
    fn names(&self, headers: &Headers) -> BTreeMap<IpAddr, String> {
        let inner = headers.inner.iter().flat_map(|it| [it.source, it.destination]);
        let arp = headers.arp.iter().flat_map(|it| [it.sender, it.target]);
        let known = inner.chain(arp).filter_map(|address| self.0.get(&address));
        known.map(|it| (it.address, it.name.as_ref().unwrap_or(&it.target).clone())).collect()
    }
}

impl Monitor {
    pub(super) fn new(hub: Hub) -> Self {
        Self { hub, tallies: None }
    }
}

impl Monitor {
    /// Sends an event to the monitors, if any is attached.
    pub(super) fn report(&self, event: impl FnOnce() -> EventKind) {
        if self.hub.is_watched() {
            self.hub.tell(event());
        }
    }

    /// Runs once a second and when a monitor attaches: reports how many packets were not shown.
    /// Returns how many packets of each reason the programs may record until the next time, if that
    /// has to be set.
    pub(super) fn watch_drops(&mut self, queue: &mut Drops, view: View<'_>) -> Option<u32> {
        let is_watched = self.hub.is_watched();
        if !is_watched && self.tallies.is_none() {
            return None;
        }
        // Read the counters before taking queued records. Otherwise packets that are counted but
        // not yet recorded would be reported as not shown.
        let counters = match view.data.datapath.counters() {
            Ok(counters) => counters,
            Err(error) => {
                tracing::warn!("dropped packets cannot be shown: {error:#}");
                return None;
            }
        };
        loop {
            let batch = queue.try_recv();
            if batch.is_empty() {
                break;
            }
            self.handle_drops(batch, view);
        }
        if !is_watched {
            self.tallies = None;
            return Some(0);
        }
        let drops = drop_reasons();
        let counter = |reason: &str| counters.get(reason).copied().unwrap_or(0);
        match &mut self.tallies {
            None => {
                let tally =
                    |reason| (reason, Tally { before: counter(reason), ..Tally::default() });
                self.tallies = Some(drops.map(tally).collect());
            }
            Some(tallies) => {
                for (reason, tally) in tallies {
                    let count = tally.not_shown(counter(reason));
                    if count > 0 {
                        let reason = (*reason).to_owned();
                        self.hub.tell(EventKind::DropsNotShown { reason, count });
                    }
                }
            }
        }
        Some(SHOWN)
    }

    /// Whether a monitor was attached at the last look.
    pub(super) fn is_counting(&self) -> bool {
        self.tallies.is_some()
    }

    /// Reports dropped packets.
    pub(super) fn handle_drops(&mut self, batch: Vec<Seen>, view: View<'_>) {
        if !self.hub.is_watched() {
            return;
        }
        let attachments = Attached::new(view.store.attachments().unwrap_or_default());
        let now = hub::now();
        for seen in batch {
            let tallies = self.tallies.as_mut();
            if let Some(tally) = tallies.and_then(|it| it.get_mut(seen.reason.as_str())) {
                tally.shown += 1;
            }
            let at = now.saturating_sub(view.data.datapath.milliseconds_since(seen.time));
            let dropped = view.dropped(seen, &attachments);
            self.hub.tell_of(at, EventKind::Drop(Box::new(dropped)));
        }
    }
}

impl View<'_> {
    /// Finds the container and the peer that a packet belongs to.
    fn dropped(&self, seen: Seen, attached: &Attached) -> DroppedPacket {
        let Seen { reason, program, ifindex, len, headers, .. } = seen;
        let interface = ifindex.and_then(|ifindex| self.data.datapath.interface_name(ifindex));
        let at = |address: Option<IpAddr>| attached.0.get(&address?);
        let inner = headers.inner.as_ref();
        let (container, peer) = match program {
            Program::FromContainer | Program::Seal => {
                let sender = attached.0.values().find(|it| Some(&*it.host_interface) == interface);
                let sender = sender.or_else(|| at(inner.map(|inner| inner.source)));
                (sender, inner.and_then(|inner| self.owner(inner.destination)))
            }
            Program::ToContainer => {
                let receiver =
                    attached.0.values().find(|it| Some(&*it.host_interface) == interface);
                (receiver, None)
            }
            Program::FromBulk => (
                at(inner.map(|inner| inner.destination)),
                inner.and_then(|inner| self.owner(inner.source)),
            ),
            Program::FromUnderlay | Program::FromUnderlayXdp => {
                let session = headers.message.as_ref().and_then(|it| self.session_of(it.receiver));
                let relayed =
                    || NodeId::new(headers.relay.as_ref()?.source).ok().map(NodeId::peer_index);
                let outer = || {
                    let outer = headers.outer.as_ref()?;
                    self.peer_at(outer.source, outer.source_port)
                };
                let peer = session.or_else(relayed).or_else(outer);
                (at(inner.map(|inner| inner.destination)), peer)
            }
        };
        DroppedPacket {
            reason: reason.as_str().to_owned(),
            program,
            interface: interface.map(str::to_owned),
            bytes: len,
            container: container.map(container_of),
            peer: peer.map(|peer| self.peer_ref(peer)),
            names: attached.names(&headers),
            headers,
        }
    }

    /// Returns the peer that an address of the container network belongs to.
    fn owner(&self, address: IpAddr) -> Option<PeerIndex> {
        let routes = self
            .data
            .peers()
            .iter()
            .flat_map(|(index, peer)| peer.routes.iter().map(move |it| (it, index)));
        let leads_there = routes.filter(|(route, _)| route.contains(&address));
        leads_there.max_by_key(|(route, _)| route.prefix_len()).map(|(_, index)| *index)
    }

    fn session_of(&self, receiver: SessionIndex) -> Option<PeerIndex> {
        let has = |peer: &&DataPeer| {
            peer.state
                .as_ref()
                .is_some_and(|it| it.sessions.iter().any(|it| it.local_index == receiver))
        };
        self.data.peers().iter().find(|(_, peer)| has(peer)).map(|(index, _)| *index)
    }

    /// Returns the peer at an address and port. If no peer uses that port, returns a peer at the
    /// address.
    fn peer_at(&self, address: IpAddr, port: Option<u16>) -> Option<PeerIndex> {
        let at = |peer: &DataPeer| {
            let endpoint = peer.state.as_ref()?.endpoint.or_else(|| peer.endpoint())?;
            (endpoint.ip() == address).then_some(Some(endpoint.port()) == port)
        };
        let candidates =
            self.data.peers().iter().filter_map(|(index, peer)| Some((at(peer)?, *index)));
        candidates
            .max_by_key(|(same_port, index)| (*same_port, std::cmp::Reverse(*index)))
            .map(|(_, index)| index)
    }
}

/// Returns the names of a container.
pub(super) fn container_of(attachment: &Attachment) -> Container {
    Container {
        address: attachment.address,
        target: attachment.target.clone(),
        name: attachment.name.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_that_are_not_shown_are_reported_once() {
        let mut tally = Tally { before: 100, ..Tally::default() };
        assert_eq!(tally.not_shown(100), 0);
        tally.shown = 30;
        assert_eq!(tally.not_shown(1130), 1000);
        assert_eq!(tally.not_shown(1130), 0);
        // A packet recorded shortly after it was counted is reported as not shown once, and then
        // compensated for.
        assert_eq!(tally.not_shown(1131), 1);
        tally.shown += 1;
        assert_eq!(tally.not_shown(1131), 0);
        assert_eq!(tally.not_shown(1132), 0);
        tally.shown += 1;
        assert_eq!(tally.not_shown(1134), 1);
        // The maps were recreated, so the counter restarted.
        assert_eq!(tally.not_shown(5), 0);
    }
}
