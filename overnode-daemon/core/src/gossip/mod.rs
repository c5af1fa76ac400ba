//! Gossip: distributes the records of all nodes to all nodes. Deterministic, without I/O or a
//! clock.
//!
//! Each node owns one [`Record`], signs it, and sends each new version to its neighbors. A neighbor
//! offers the record to those of its own neighbors that, by their records, have no link with the
//! owner or with the node that the record came from. A node that lacks the record requests it from
//! one of the nodes that offer it, so each record reaches every node once. In a full mesh no node
//! forwards anything, in a chain every node does. Comparing finds records that this misses:
//! neighbors exchange digests when they connect, and every [`COMPARE_INTERVAL`] a node sends a hash
//! to a random neighbor.
//!
//! A node that hears a record about itself which it did not make answers with a newer one. A node
//! that leaves publishes a tombstone, which is kept. Otherwise a node that comes back after a long
//! separation would bring back records of nodes that have left.
//!
//! Shortest paths are computed from the links that both ends report. On these paths, [routed
//! messages](routed) travel from any node to any other.
//!
//! # Capabilities of a malicious member
//!
//! A host with the token is a member, and it can take as many IDs as are free. It **can**
//! * announce anything about itself: addresses of other hosts, ranges and claims, which
//!   [`routing`](crate::routing) checks, and links, which count only if the other end reports them
//!   as well;
//! * take the ID of an unreachable node, like any host that is launched with that ID;
//! * withhold records that it should forward, or offer records that it does not send. Other
//!   neighbors are asked for those after [`ASK_AGAIN`];
//! * replay old records of other nodes, which are recognized as old;
//! * cause reports that an ID is used twice, by claiming the ID, once every [`CLASH_INTERVAL`];
//! * make other nodes store a record for every ID, within the [`budget`]. Honest records that
//!   outgrow their reserved room are refused until it stops;
//! * keep other nodes busy with its records. All neighbors together cost a node at most
//!   `limit::SIGNATURES_PER_SECOND` signatures per second. Honest records among them may be
//!   delayed until records are compared.
//!
//! It **cannot**
//! * change, extend, age or revoke the record of another node, or announce that it has left. That
//!   takes the other node's key, and a record without a valid signature ends the connection that it
//!   came from ([`BadMessage::Signature`]);
//! * take the ID of a reachable node that objects within [`OBJECTION`], unless all paths to that
//!   node lead through the liar;
//! * take the ID of a node in the eyes of that node's neighbors;
//! * put another node's X25519 key into a record, or use one identity under two IDs;
//! * claim an ID with an incarnation that the true owner cannot outbid ([`SKEW_MS`]), if their
//!   clocks agree. An owner whose clock is behind stays outbid for as long as its clock is behind;
//! * send routed messages in another node's name, or replay a routed message, even after a restart
//!   of the receiver;
//! * cost a neighbor more than an honest node does at the cold start of a cluster of 1000 nodes.
//!   Such a member is disconnected ([`BadMessage::Flood`]).
//!
//! Inputs: [`Gossip::handle_connected`], [`Gossip::handle_disconnected`],
//! [`Gossip::handle_message`], [`Gossip::handle_routed`], [`Gossip::send_routed`],
//! [`Gossip::update_own`], [`Gossip::leave`], [`Gossip::handle_timeout`]. Outputs:
//! [`Gossip::poll_action`], [`Gossip::poll_timeout`].

mod accept;
pub mod budget;
mod dispute;
mod exchange;
mod limit;
mod message;
mod own;
pub mod routed;
mod sign;
mod topology;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;

use budget::Budget;
use dispute::DisputedRecord;
pub use dispute::{CLASH_INTERVAL, DEFEND_INTERVAL, OBJECTION};
pub use exchange::ASK_AGAIN;
use exchange::Wanted;
use limit::{Allowance, Signatures};
pub use message::{
    BadMessage, GOSSIP_FORMAT, MAX_ADDRESSES, MAX_CLAIMS, MAX_DELTA, MAX_NAMES, MAX_RANGES,
    MAX_STAMP, Message, NAME_BYTES, Record, Stamp,
};
pub use routed::{BadRoutedMessage, RoutedMessage, Undelivered};
pub use sign::{Signature, Signer, Verified};
pub use topology::Path;

use overnode_types::{NodeId, VerifyingKey};

/// Interval at which a node compares its records with one neighbor. Jittered by a quarter in both
/// directions.
pub const COMPARE_INTERVAL: Duration = Duration::from_secs(30);
/// Delay before records are forwarded, so that a burst of changes travels as one message.
pub const COLLECT: Duration = Duration::from_millis(50);
/// Minimum interval between two published versions of the own record, per neighbor. At a cold start
/// of 1000 nodes, each node gains links for seconds and announces each of them to all others.
pub const PACE: Duration = Duration::from_millis(2);

/// How far the incarnation of a record may be ahead of this node's clock, in milliseconds: 139
/// years.
///
/// An incarnation is the time of a launch in milliseconds since 1970, plus the number of starts
/// since. If another host claims an ID, the greater incarnation wins. So the true owner must always
/// have a greater one that other nodes accept. A fixed maximum would break that, because a liar
/// would claim it. This bound moves with the clock: an incarnation that was the greatest a
/// millisecond ago can be outbid now. The bound is this large so that hosts whose clocks show any
/// date from 1970 on can join, and can be joined.
pub const SKEW_MS: u64 = 1 << 42;
/// How long [`Gossip::is_full`] returns true after a record found no room.
pub const FULL_INTERVAL: Duration = Duration::from_secs(60);

/// An effect that the caller carries out, or an event that it must know about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a message to a neighbor.
    Send {
        /// The receiver.
        to: NodeId,
        /// The message.
        message: Message,
    },
    /// Send a routed message of this node, or one that it forwards, to a neighbor.
    SendRouted {
        /// The neighbor.
        to: NodeId,
        /// The routed message.
        routed: RoutedMessage,
    },
    /// A routed message for this node has arrived.
    Deliver(RoutedMessage),
    /// There is a newer record of a member. An even newer one may exist by the time this action is
    /// polled. If that is a tombstone, it has its own action.
    Changed(NodeId),
    /// A node has left the cluster for good.
    Removed(NodeId),
    /// Another record of this node exists, under other keys or from a host with the same keys: a
    /// second host has its ID or a copy of its disk.
    Contested(Box<Record>),
    /// A record under other keys claims the ID of a node that has just outbid it: two hosts have
    /// one ID. The record is not believed.
    Clash {
        /// The record that was outbid.
        record: Box<Record>,
        /// The nickname of the node that keeps the ID.
        holder: String,
    },
}

/// The gossip state of one node.
#[derive(Debug)]
pub struct Gossip {
    own: NodeId,
    signer: Signer,
    verified: Option<Verified>,
    rng: StdRng,
    /// The time in milliseconds since 1970, and the instant at which it was that.
    clock: (u64, Instant),
    /// The own record as it will be published next. `records` has the last published version.
    draft: Record,
    records: BTreeMap<NodeId, Record>,
    stamps: BTreeMap<NodeId, Stamp>,
    /// The node that each identity belongs to.
    identities: BTreeMap<VerifyingKey, NodeId>,
    budget: Budget,
    /// When a record last found no room.
    refused_at: Option<Instant>,
    signatures: Signatures,
    neighbors: BTreeSet<NodeId>,
    /// What each present or former neighbor may still send.
    allowances: BTreeMap<NodeId, Allowance>,
    /// What may still be forwarded to each neighbor.
    send_limits: BTreeMap<NodeId, Allowance>,
    /// The identities that the neighbors have proven.
    proven: BTreeMap<NodeId, VerifyingKey>,
    /// Records to forward, with the neighbors that are known to have them.
    news: BTreeMap<NodeId, BTreeSet<NodeId>>,
    /// Records that neighbors were asked for.
    wanted: BTreeMap<NodeId, Wanted>,
    /// When to check whether they have arrived.
    ask_again_at: Option<Instant>,
    /// When to publish the draft.
    publish_at: Option<Instant>,
    published: Option<Instant>,
    /// The record that the own one must outbid.
    rival: Option<Record>,
    outbid_at: Option<Instant>,
    disputed: BTreeMap<NodeId, DisputedRecord>,
    /// When a second host with an ID was last reported.
    clashes: BTreeMap<NodeId, Instant>,
    flush_at: Option<Instant>,
    compare_at: Instant,
    routed_sent: u64,
    /// The last routed message that arrived from each node, and the key that it was signed with.
    last_routed_from: BTreeMap<NodeId, (VerifyingKey, (u64, u64))>,
    actions: VecDeque<Action>,
    /// Computed on demand and discarded when a link changes.
    paths: OnceLock<BTreeMap<NodeId, Path>>,
}

impl Gossip {
    /// Creates the gossip state of the node that `own` describes. The links in `own` are replaced
    /// by the neighbors, and its signature by the signer's.
    pub fn new(mut own: Record, signer: Signer, rng: StdRng, now: Instant) -> Self {
        own.links.clear();
        own.left = false;
        own.fit();
        signer.sign(&mut own);
        let mut gossip = Self {
            own: own.id,
            signer,
            verified: None,
            rng,
            clock: (own.incarnation, now),
            identities: BTreeMap::from([(own.verifying_key, own.id)]),
            budget: Budget::default(),
            refused_at: None,
            signatures: Signatures::new(now),
            draft: own.clone(),
            stamps: BTreeMap::from([(own.id, own.stamp())]),
            records: BTreeMap::from([(own.id, own)]),
            neighbors: BTreeSet::new(),
            allowances: BTreeMap::new(),
            send_limits: BTreeMap::new(),
            proven: BTreeMap::new(),
            news: BTreeMap::new(),
            wanted: BTreeMap::new(),
            ask_again_at: None,
            publish_at: None,
            published: None,
            rival: None,
            outbid_at: None,
            disputed: BTreeMap::new(),
            clashes: BTreeMap::new(),
            flush_at: None,
            compare_at: now,
            routed_sent: 0,
            last_routed_from: BTreeMap::new(),
            actions: VecDeque::new(),
            paths: OnceLock::new(),
        };
        gossip.compare_at = now + gossip.jittered(COMPARE_INTERVAL);
        gossip
    }

    /// Sets the current time in milliseconds since 1970. Until this is called, the incarnation of
    /// the own record serves as the time.
    pub fn set_clock(&mut self, unix_milliseconds: u64, now: Instant) {
        self.clock = (unix_milliseconds, now);
    }

    /// Returns true if a node was ever reached, directly or through other nodes.
    pub fn was_reached(&mut self, id: NodeId) -> bool {
        self.mark_reached_nodes();
        !self.budget.is_unreached(id)
    }

    /// Returns true if a record was refused within the last [`FULL_INTERVAL`] because other records
    /// take all room.
    pub fn is_full(&self, now: Instant) -> bool {
        self.refused_at.is_some_and(|at| now < at + FULL_INTERVAL)
    }

    /// Shares the set of records with verified signatures with other nodes of this process.
    pub fn share_verified(&mut self, verified: Verified) {
        self.verified = Some(verified);
    }

    /// Returns the node's own record with the changes that are not published yet. Its links are the
    /// last published ones.
    pub fn own(&self) -> &Record {
        &self.draft
    }

    /// Returns all records, including those of nodes that left, and this node's as it was last
    /// published; [`Self::own`] has later changes.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    /// Returns the record of one node.
    pub fn record(&self, id: NodeId) -> Option<&Record> {
        self.records.get(&id)
    }

    /// Returns the shortest path to every other node that is reachable, directly or through other
    /// nodes. The paths are computed again only after a link has changed.
    pub fn paths(&self) -> &BTreeMap<NodeId, Path> {
        self.paths.get_or_init(|| topology::paths(self.own, &self.neighbors, &self.records))
    }

    /// Returns the neighbor on the shortest path to a node, or `None` if the node is unreachable.
    pub fn next_hop(&self, to: NodeId) -> Option<NodeId> {
        self.paths().get(&to).map(|path| path.via)
    }

    /// Returns the other nodes that are reachable, directly or through other nodes.
    pub fn reachable(&self) -> BTreeSet<NodeId> {
        self.paths().keys().copied().collect()
    }

    /// Returns the neighbors to which this node forwards a broadcast of `source`: its children in
    /// the tree of shortest paths from `source`.
    pub fn branches(&self, source: NodeId) -> Vec<NodeId> {
        topology::branches(source, self.own, &self.neighbors, &self.records)
    }

    /// Returns the records of the other nodes that are reachable.
    pub fn living(&self) -> impl Iterator<Item = &Record> {
        self.paths().keys().filter_map(|id| self.records.get(id))
    }

    /// Handles a new connection with `peer`, which has proven that it has `identity`.
    pub fn handle_connected(&mut self, peer: NodeId, identity: VerifyingKey, now: Instant) {
        if peer == self.own || !self.neighbors.insert(peer) {
            return;
        }
        self.proven.insert(peer, identity);
        self.budget.mark_reached(peer);
        self.paths.take();
        self.note_own_change(now);
        self.send(peer, Message::Digest { ask: false, stamps: self.stamps() });
    }

    /// Synchronizes with `peer` after one of several connections with it was closed or replaced.
    /// Messages sent over that connection may be lost.
    pub fn resync(&mut self, peer: NodeId) {
        if self.neighbors.contains(&peer) {
            self.send(peer, Message::Digest { ask: true, stamps: self.stamps() });
        }
    }

    /// Handles the end of the last connection with `peer`.
    pub fn handle_disconnected(&mut self, peer: NodeId, now: Instant) {
        if self.neighbors.remove(&peer) {
            self.proven.remove(&peer);
            self.paths.take();
            self.ask_others(peer, now);
            self.note_own_change(now);
        }
    }

    /// Handles a message from `peer`. Messages from nodes that are not neighbors are ignored.
    ///
    /// # Errors
    /// [`BadMessage`] if the message violates the protocol or exceeds the peer's allowance. Nothing
    /// of it is applied, and the connection should be closed.
    pub fn handle_message(
        &mut self,
        peer: NodeId,
        bytes: &[u8],
        now: Instant,
    ) -> Result<(), BadMessage> {
        if !self.neighbors.contains(&peer) {
            return Ok(());
        }
        if !self.charge_received(peer, bytes.len(), now) {
            return Err(BadMessage::Flood);
        }
        match Message::decode(bytes)? {
            Message::Summary(hash) => self.handle_summary(peer, hash),
            Message::Digest { ask, stamps } => self.handle_digest(peer, ask, stamps, now),
            Message::Request(ids) => self.answer(peer, &ids),
            Message::Delta(records) => return self.handle_delta(peer, records, now),
        }
        Ok(())
    }

    /// Charges a message to the neighbor's allowance. Returns false if the neighbor exceeds it.
    fn charge_received(&mut self, peer: NodeId, bytes: usize, now: Instant) -> bool {
        self.allowances.entry(peer).or_insert_with(|| Allowance::new(now)).charge(bytes, now)
    }

    /// Handles everything that is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.rival.is_some() && self.may_defend(now) {
            self.outbid(now);
        }
        self.admit_contenders(now);
        if self.publish_at.is_some_and(|at| at <= now) {
            self.publish_own(now);
        }
        if self.flush_at.is_some_and(|at| at <= now) {
            self.flush_at = None;
            self.forward_news(now);
        }
        if self.ask_again_at.is_some_and(|at| at <= now) {
            self.ask_again(now);
        }
        if self.compare_at <= now {
            self.compare_at = now + self.jittered(COMPARE_INTERVAL);
            self.compare();
        }
    }

    /// Returns when to call [`Self::handle_timeout`] next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let defend_at = self.rival.as_ref().and(self.outbid_at).map(|last| last + DEFEND_INTERVAL);
        let admit_at = self.next_admission();
        [
            self.publish_at,
            self.flush_at,
            defend_at,
            admit_at,
            self.ask_again_at,
            Some(self.compare_at),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Returns the next action.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    fn flush_soon(&mut self, now: Instant) {
        self.flush_at.get_or_insert(now + COLLECT);
    }

    fn jittered(&mut self, time: Duration) -> Duration {
        time.mul_f64(self.rng.random_range(0.75..1.25))
    }
}
