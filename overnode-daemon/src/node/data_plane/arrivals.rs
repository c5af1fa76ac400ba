//! Filters datagrams on UDP port 6784 before they are queued for the node. A separate thread judges
//! each one, so a flood costs only that thread's time.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use overnode_ebpf::wire::{Relay, TYPE_RELAY};
use tokio::sync::mpsc;

use crate::net::known::Known;
use crate::net::udp::{Received, Reception, UdpSockets};
use overnode_core::handshake::gate::{Gate, Judgment, Priority};
use overnode_core::handshake::{Counters, PeerAddress, Transmit};
use overnode_types::NodeId;

/// Queue length for datagrams from addresses where nodes are expected.
const HIGH: usize = 1024;
/// Queue length for datagrams from other addresses.
const LOW: usize = 64;
/// Queue length for cookie replies that the node sends through relays.
const REPLIES: usize = 64;

/// Datagrams queued for the node.
pub(in crate::node) struct Arrivals {
    pub(in crate::node) high: mpsc::Receiver<Received>,
    pub(in crate::node) low: mpsc::Receiver<Received>,
    pub(in crate::node) replies: mpsc::Receiver<Transmit>,
    counters: Arc<Mutex<Counters>>,
    _reception: Reception,
}

impl Arrivals {
    /// Starts receiving.
    pub(in crate::node) fn start(
        sockets: &UdpSockets,
        gate: Gate,
        own: NodeId,
        known: Known,
    ) -> io::Result<Self> {
        let counters = gate.counters();
        let (high, high_end) = mpsc::channel(HIGH);
        let (low, low_end) = mpsc::channel(LOW);
        let (replies, replies_end) = mpsc::channel(REPLIES);
        let mut intake = Intake { gate, own, known, high, low, replies };
        let _reception = sockets.receive(move |now, datagram| intake.handle(now, datagram))?;
        Ok(Self { high: high_end, low: low_end, replies: replies_end, counters, _reception })
    }

    /// Returns the counters of datagrams that were judged by the gate.
    pub(in crate::node) fn counters(&self) -> Counters {
        *self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sending ends of the queues, used by the receiving thread.
struct Intake {
    gate: Gate,
    own: NodeId,
    known: Known,
    high: mpsc::Sender<Received>,
    low: mpsc::Sender<Received>,
    replies: mpsc::Sender<Transmit>,
}

impl Intake {
    /// Judges a datagram and queues it if it is admitted. Returns a reply to send back at once, if
    /// any.
    fn handle(&mut self, now: Instant, datagram: &Received<&[u8]>) -> Option<Vec<u8>> {
        if datagram.bytes.first() == Some(&TYPE_RELAY) {
            self.handle_relayed(now, datagram);
            return None;
        }
        let is_known = || self.known.has(datagram.from.ip());
        match self.gate.judge(now, datagram.from.into(), datagram.bytes, is_known) {
            Judgment::Admit(priority) => self.queue(datagram, priority),
            Judgment::Reply(reply) => return Some(reply),
            Judgment::Drop(_) => {}
        }
        None
    }

    /// Judges a message with a relay header. Relays are nodes, so a relay's address must be known.
    fn handle_relayed(&mut self, now: Instant, datagram: &Received<&[u8]>) {
        let relayed =
            Relay::split(datagram.bytes).filter(|(relay, _)| relay.destination == self.own.get());
        let source =
            relayed.and_then(|(relay, message)| Some((NodeId::new(relay.source).ok()?, message)));
        let Some((source, message)) = source.filter(|_| self.known.has(datagram.from.ip())) else {
            return self.gate.refused_relay();
        };
        let from = PeerAddress::Relayed(source);
        match self.gate.judge(now, from, message, || true) {
            Judgment::Admit(priority) => self.queue(datagram, priority),
            Judgment::Reply(bytes) => {
                // A reply that finds the queue full is lost. The peer retries.
                let _ = self.replies.try_send(Transmit { to: from, peer: None, bytes });
            }
            Judgment::Drop(_) => {}
        }
    }

    fn queue(&mut self, datagram: &Received<&[u8]>, priority: Priority) {
        let queue = match priority {
            Priority::High => &self.high,
            Priority::Low => &self.low,
        };
        if queue.try_send(datagram.to_owned()).is_err() {
            self.gate.overflowed();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;
    use overnode_core::handshake::{Handshakes, Initiate, PeerConfig};
    use overnode_types::{InterfaceIndex, PeerIndex, Secret};

    const OWN: u16 = 2;

    struct World {
        intake: Intake,
        high: mpsc::Receiver<Received>,
        low: mpsc::Receiver<Received>,
        replies: mpsc::Receiver<Transmit>,
        initiation: Vec<u8>,
        now: Instant,
    }

    fn world() -> World {
        let now = Instant::now();
        let here = Handshakes::new(Secret([2; 32]), StdRng::seed_from_u64(2));
        let mut there = Handshakes::new(Secret([1; 32]), StdRng::seed_from_u64(1));
        let config = PeerConfig {
            public_key: here.public_key(),
            preshared_key: Secret([0; 32]),
            endpoint: Some(from(1)),
            initiate: Initiate::AtOnce,
            persistent_keepalive: None,
        };
        there.upsert_peer(PeerIndex(1), config, now);
        there.handle_timeout(now, std::time::SystemTime::now());
        let initiation = there.poll_transmit().expect("an initiation").bytes;
        let known = Known::default();
        known.set([from(1).ip()].into());
        let (high, high_end) = mpsc::channel(4);
        let (low, low_end) = mpsc::channel(2);
        let (replies, replies_end) = mpsc::channel(4);
        let gate = here.gate(StdRng::seed_from_u64(3));
        let intake = Intake { gate, own: NodeId::new(OWN).unwrap(), known, high, low, replies };
        World { intake, high: high_end, low: low_end, replies: replies_end, initiation, now }
    }

    fn from(last: u8) -> SocketAddr {
        ([192, 0, 2, last], 6784).into()
    }

    impl World {
        fn handle(&mut self, from: SocketAddr, bytes: &[u8]) -> Option<Vec<u8>> {
            let to = [192, 0, 2, 77].into();
            self.intake
                .handle(self.now, &Received { from, to, ifindex: InterfaceIndex::new(1), bytes })
        }

        fn counters(&self) -> Counters {
            *self.intake.gate.counters().lock().unwrap()
        }
    }

    #[test]
    fn a_full_queue_of_strangers_leaves_room_for_nodes() {
        let mut world = world();
        let initiation = world.initiation.clone();
        for last in 2..10 {
            assert_eq!(world.handle(from(last), &initiation), None);
        }
        assert_eq!((world.low.len(), world.high.len(), world.counters().limited), (2, 0, 6));
        assert_eq!(world.handle(from(1), &initiation), None);
        assert_eq!(world.high.try_recv().unwrap().bytes, initiation);
    }

    #[test]
    fn relayed_handshakes_are_accepted_only_from_nodes() {
        let mut world = world();
        let relayed = |destination: u16, message: &[u8]| {
            let relay = Relay { hops: 1, destination, source: 3, previous: 1 };
            [&relay.to_bytes()[..], message].concat()
        };
        let initiation = world.initiation.clone();
        world.handle(from(2), &relayed(OWN, &initiation));
        world.handle(from(1), &relayed(OWN + 1, &initiation));
        world.handle(from(1), &[TYPE_RELAY]);
        assert_eq!((world.counters().foreign_relay, world.high.len()), (3, 0));
        world.handle(from(1), &relayed(OWN, &[0; 148]));
        assert_eq!((world.counters().malformed, world.high.len()), (1, 0));
        world.handle(from(1), &relayed(OWN, &initiation));
        assert_eq!((world.high.len(), world.low.len()), (1, 0));
    }

    #[test]
    fn cookie_replies_are_sent_at_once_or_by_the_node_if_relayed() {
        let mut world = world();
        let initiation = world.initiation.clone();
        for _ in 0..500 {
            world.handle(from(1), &initiation);
        }
        assert!(world.handle(from(1), &initiation).is_some_and(|reply| reply.len() == 64));
        let relay = Relay { hops: 1, destination: OWN, source: 3, previous: 1 };
        assert_eq!(world.handle(from(1), &[&relay.to_bytes()[..], &initiation].concat()), None);
        let reply = world.replies.try_recv().unwrap();
        let source = NodeId::new(3).unwrap();
        assert_eq!((reply.to, reply.bytes.len()), (PeerAddress::Relayed(source), 64));
    }
}
