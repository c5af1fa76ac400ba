//! Everything that the node waits for: its sockets, queues and timers.

use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use tokio::sync::mpsc;

use super::bulk::BulkPath;
use super::data_plane::arrivals::Arrivals;
use crate::bulk::control::FromWorkers;
use crate::datapath::{Drops, LinkEvent, Probe, Probes};
use crate::docker::{Event, Incoming};
use crate::monitor::decode::Seen;
use crate::net::mesh::{Mesh, MeshEvent};
use crate::net::udp::Received;
use overnode_core::handshake::Transmit;

/// Time after which a turn takes no further input from the same source. A turn with work from all
/// sources takes some tens of milliseconds.
pub(super) const SHARE_TIME: Duration = Duration::from_millis(5);
/// Maximum number of inputs from each source in one turn.
pub(super) const SHARES: [(Source, usize); 10] = [
    (Source::Mesh, 64),
    (Source::Refused, 8),
    // Each may cost 0.3 ms.
    (Source::High, 16),
    (Source::Low, 4),
    (Source::Replies, 16),
    (Source::Links, 1),
    (Source::Probes, 256),
    (Source::Docker, 1),
    (Source::Bulk, 16),
    (Source::Drops, 1),
];

/// The sources of inputs other than timeouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Mesh,
    /// Incoming connections that were refused.
    Refused,
    /// Datagrams from addresses where nodes are expected.
    High,
    /// Datagrams from other addresses.
    Low,
    /// Cookie replies to send through relays.
    Replies,
    Links,
    Probes,
    Docker,
    Bulk,
    Drops,
}

/// An input of the node.
pub(super) enum Input {
    /// An event of the control connections.
    Mesh(MeshEvent),
    /// A handshake message that the gate has admitted.
    Datagram(Received),
    /// A cookie reply to send through a relay.
    Reply(Transmit),
    /// A probe, or the answer to one, that came through the tunnel.
    Probe(Probe),
    /// Records of dropped packets.
    Drops(Vec<Seen>),
    /// An interface, an address or a route of the host has changed.
    Interfaces(LinkEvent),
    /// An event of the Docker engine.
    Docker(Event),
    /// A message of the bulk workers. `None`: the workers are gone.
    Bulk(Option<FromWorkers>),
    Timeout,
}

/// The sockets, queues and timers.
pub(super) struct Inputs {
    pub(super) mesh: Mesh,
    pub(super) mesh_events: mpsc::Receiver<MeshEvent>,
    pub(super) arrivals: Arrivals,
    pub(super) probes: Probes,
    pub(super) interfaces: mpsc::Receiver<LinkEvent>,
    pub(super) docker: Option<Incoming>,
    pub(super) drops: Drops,
    /// When the maps are read next.
    pub(super) next_tick: Instant,
    /// When interfaces and addresses without an owner are removed next.
    pub(super) next_reconcile: Instant,
}

impl Inputs {
    /// Waits for the next input, until `deadline`. Cancel-safe.
    pub(super) async fn next(&mut self, deadline: Instant, bulk: &BulkPath) -> Input {
        tokio::select! {
            () = tokio::time::sleep_until(deadline.into()) => Input::Timeout,
            Some(event) = self.mesh_events.recv() => Input::Mesh(event),
            Some(refused) = self.mesh.refused() => Input::Mesh(refused),
            Some(event) = self.interfaces.recv() => Input::Interfaces(event),
            Some(datagram) = self.arrivals.high.recv() => Input::Datagram(datagram),
            Some(datagram) = self.arrivals.low.recv() => Input::Datagram(datagram),
            Some(reply) = self.arrivals.replies.recv() => Input::Reply(reply),
            Ok(probe) = self.probes.recv() => Input::Probe(probe),
            event = from(&mut self.docker) => Input::Docker(event),
            message = bulk.next() => Input::Bulk(message),
            Ok(drops) = self.drops.recv() => Input::Drops(drops),
        }
    }

    /// Returns the next queued input of a source, if any.
    pub(super) fn queued(&mut self, source: Source, bulk: &BulkPath) -> Option<Input> {
        match source {
            Source::Mesh => self.mesh_events.try_recv().ok().map(Input::Mesh),
            Source::Refused => self.mesh.refused().now_or_never().flatten().map(Input::Mesh),
            Source::High => self.arrivals.high.try_recv().ok().map(Input::Datagram),
            Source::Low => self.arrivals.low.try_recv().ok().map(Input::Datagram),
            Source::Replies => self.arrivals.replies.try_recv().ok().map(Input::Reply),
            Source::Links => self.interfaces.try_recv().ok().map(Input::Interfaces),
            Source::Probes => self.probes.recv().now_or_never()?.ok().map(Input::Probe),
            Source::Docker => from(&mut self.docker).now_or_never().map(Input::Docker),
            Source::Bulk => bulk.next().now_or_never().map(Input::Bulk),
            Source::Drops => self.drops.recv().now_or_never()?.ok().map(Input::Drops),
        }
    }
}

/// Returns the engine's next event. Waits forever if no engine is served.
async fn from(docker: &mut Option<Incoming>) -> Event {
    match docker {
        Some(incoming) => incoming.next().await,
        None => std::future::pending().await,
    }
}
