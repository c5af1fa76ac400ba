//! Gossip: how every node learns what every other says of itself. Deterministic; no I/O, no clock.
//!
//! Each node owns one [`Record`], signs it and makes new versions of it, which it sends to its neighbours. They offer it to those of
//! theirs that have no link with its owner nor with the neighbour it came from, as
//! far as the records tell; who lacks it asks one of those that offer it, so that it travels to everybody once.
//! In a full mesh nobody passes on anything, in a chain everybody does. What that misses is found
//! by comparing: neighbours exchange digests when they connect, and every [`COMPARE_INTERVAL`] a hash
//! with one neighbour chosen at random.
//!
//! A record about this node that it did not make is answered by a newer one. A node that leaves puts up a tombstone, which is
//! kept: whoever comes back from a long separation must not revive the dead.
//!
//! From the links that both ends report follow the shortest paths, on which [parcels](parcel) go from any node to any other.
//!
//! # What a member can do that lies
//!
//! Whoever has the token is a member, and may be as many nodes as there are free IDs. It **can**
//! * say of itself what it likes: addresses where it is not, ranges and claims that others check before they route to it, links, of which
//!   only those count that the other end reports too;
//! * take the ID of a node that is not reached, as any host can that is launched with it; keep quiet of what it should pass on, or offer what it
//!   then does not send, for which others are asked after [`ASK_AGAIN`]; repeat what others said before, which is recognised as old;
//! * raise the alarm that an ID is used twice, by claiming it, once every [`CLASH_INTERVAL`];
//! * make others remember a record of every ID there is, of 30 KiB at most.
//!
//! It **cannot**
//! * change, extend, age or revoke what another node said, or say that it has left: that takes the other's key, and what is not signed
//!   ends the connection that it came by ([`BadMessage::Signature`]);
//! * take the ID of a node that is reached and objects within [`OBJECTION`], unless all paths to it lead through the liar; nor of one that is
//!   connected with whoever is to believe it;
//! * send parcels in another's name, or the same one twice;
//! * use more of a neighbour than an honest node does at the start of a cluster of a thousand: it is cut off ([`BadMessage::Flood`]).
//!
//! Inputs: [`Gossip::handle_connected`], [`Gossip::handle_disconnected`], [`Gossip::handle_message`],
//! [`Gossip::handle_parcel`], [`Gossip::send_parcel`], [`Gossip::update_own`], [`Gossip::leave`], [`Gossip::handle_timeout`]. Outputs: [`Gossip::poll_action`],
//! [`Gossip::poll_timeout`].

mod dispute;
mod exchange;
mod limit;
mod message;
pub mod parcel;
mod sign;
mod topology;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;

use dispute::Contender;
pub use dispute::{CLASH_INTERVAL, DEFEND_INTERVAL, OBJECTION};
pub use exchange::ASK_AGAIN;
use exchange::Wanted;
use limit::Allowance;
pub use message::{
    BadMessage, FORMAT, MAX_ADDRESSES, MAX_CLAIMS, MAX_RANGES, MAX_STAMP, Message, Record, Stamp,
};
pub use parcel::{BadParcel, Parcel, Undelivered};
pub use sign::{Keys, Signature, Signer, Verified};
pub use topology::Path;

use crate::types::{NodeId, VerifyingKey};

/// How often a node compares what it knows with one neighbour. Jittered by a quarter each way.
pub const COMPARE_INTERVAL: Duration = Duration::from_secs(30);
/// News wait this long for more, so that a burst of changes travels as one.
pub const COLLECT: Duration = Duration::from_millis(50);
/// A node publishes changes of itself no more often than every so much per neighbour: at a cold start of a thousand nodes, each
/// gains links for seconds, and tells all others of each.
pub const PACE: Duration = Duration::from_millis(2);

/// What the node must do or know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a message to a neighbour.
    Send {
        /// The neighbour.
        to: NodeId,
        /// What to send.
        message: Message,
    },
    /// Send a parcel to a neighbour: one of this node's, or one that it passes on.
    SendParcel {
        /// The neighbour.
        to: NodeId,
        /// What to send.
        parcel: Parcel,
    },
    /// A parcel for this node has arrived.
    Deliver(Parcel),
    /// There is a newer record of a node that is part of the cluster. By the time this is polled there may be one newer still, even a
    /// tombstone, which has an action of its own.
    Changed(NodeId),
    /// A node has left the cluster for good.
    Removed(NodeId),
    /// There is another record of this node, under other keys or by a host that has the same: a second host with its ID, or one with a
    /// copy of its disk.
    Contested(Box<Record>),
    /// There is another record of a node that has just outbid it, under other keys: two hosts have one ID. It is not believed.
    Clash {
        /// The other record.
        record: Box<Record>,
        /// The nickname of the node that stays.
        holder: String,
    },
}

/// The gossip of one node.
#[derive(Debug)]
pub struct Gossip {
    own: NodeId,
    signer: Signer,
    verified: Option<Verified>,
    rng: StdRng,
    /// The own record as it will be published next; `records` has it as it was published last.
    draft: Record,
    records: BTreeMap<NodeId, Record>,
    stamps: BTreeMap<NodeId, Stamp>,
    neighbours: BTreeSet<NodeId>,
    /// What each that ever was a neighbour may still say.
    allowances: BTreeMap<NodeId, Allowance>,
    /// What may still be passed on to each.
    burdens: BTreeMap<NodeId, Allowance>,
    /// What the neighbours have proven themselves with.
    proven: BTreeMap<NodeId, Keys>,
    /// Records to pass on, with the neighbours that are known to have them.
    news: BTreeMap<NodeId, BTreeSet<NodeId>>,
    /// Records that neighbours were asked for.
    wanted: BTreeMap<NodeId, Wanted>,
    /// When to look whether they have come.
    ask_again_at: Option<Instant>,
    /// When to publish the draft, if it differs from what was published last.
    publish_at: Option<Instant>,
    published: Option<Instant>,
    /// The record that the own one must outbid.
    defence: Option<Record>,
    defended: Option<Instant>,
    contenders: BTreeMap<NodeId, Contender>,
    /// When a second host with an ID was reported last.
    clashes: BTreeMap<NodeId, Instant>,
    flush_at: Option<Instant>,
    compare_at: Instant,
    parcels_sent: u64,
    /// Of each node the last parcel that has arrived, and under which key.
    parcels_heard: BTreeMap<NodeId, (VerifyingKey, (u64, u64))>,
    actions: VecDeque<Action>,
    /// Made when asked for, and forgotten with the next change of a link.
    paths: OnceLock<BTreeMap<NodeId, Path>>,
}

impl Gossip {
    /// Gossip of the node that `own` describes. Its links are those of the neighbours, and its signature is the signer's, whatever `own`
    /// says.
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
            draft: own.clone(),
            stamps: BTreeMap::from([(own.id, own.stamp())]),
            records: BTreeMap::from([(own.id, own)]),
            neighbours: BTreeSet::new(),
            allowances: BTreeMap::new(),
            burdens: BTreeMap::new(),
            proven: BTreeMap::new(),
            news: BTreeMap::new(),
            wanted: BTreeMap::new(),
            ask_again_at: None,
            publish_at: None,
            published: None,
            defence: None,
            defended: None,
            contenders: BTreeMap::new(),
            clashes: BTreeMap::new(),
            flush_at: None,
            compare_at: now,
            parcels_sent: 0,
            parcels_heard: BTreeMap::new(),
            actions: VecDeque::new(),
            paths: OnceLock::new(),
        };
        gossip.compare_at = now + gossip.jittered(COMPARE_INTERVAL);
        gossip
    }

    /// Takes up what was known before a restart.
    pub fn restore(&mut self, records: impl IntoIterator<Item = Record>) {
        for record in records {
            if record.id != self.own && record.check().is_ok() && self.is_signed(&record) {
                self.put(record);
            }
        }
    }

    /// Shares with other nodes of this process what is known to be signed.
    pub fn share_verified(&mut self, verified: Verified) {
        self.verified = Some(verified);
    }

    fn sign(&mut self) {
        self.signer.sign(&mut self.draft);
        if let Some(verified) = &self.verified {
            verified.trust(&self.draft);
        }
    }

    fn is_signed(&self, record: &Record) -> bool {
        self.verified.as_ref().map_or_else(|| sign::is_signed(record), |verified| verified.is_signed(record))
    }

    /// The node's own record, with changes that are not published yet; its links are those last published.
    pub fn own(&self) -> &Record {
        &self.draft
    }

    /// Every record, this node's and those of nodes that left included.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    /// The record of one node.
    pub fn record(&self, id: NodeId) -> Option<&Record> {
        self.records.get(&id)
    }

    /// The shortest path to every other node that is reached, directly or through others. Computed anew only if a link has changed
    /// since it was asked for last.
    pub fn paths(&self) -> &BTreeMap<NodeId, Path> {
        self.paths.get_or_init(|| topology::paths(self.own, &self.neighbours, &self.records))
    }

    /// The neighbour through which the shortest path to a node leads; none if it is not reached.
    pub fn next_hop(&self, to: NodeId) -> Option<NodeId> {
        self.paths().get(&to).map(|path| path.via)
    }

    /// The other nodes that are reached, directly or through others.
    pub fn reachable(&self) -> BTreeSet<NodeId> {
        self.paths().keys().copied().collect()
    }

    /// The neighbours to which this node passes on what `source` tells everybody: its children in the tree of shortest paths from
    /// `source`.
    pub fn branches(&self, source: NodeId) -> Vec<NodeId> {
        topology::branches(source, self.own, &self.neighbours, &self.records)
    }

    /// The records of the other nodes that are reached.
    pub fn living(&self) -> impl Iterator<Item = &Record> {
        self.paths().keys().filter_map(|id| self.records.get(id))
    }

    /// A connection with `peer` was established, which has proven to have `keys`.
    pub fn handle_connected(&mut self, peer: NodeId, keys: Keys, now: Instant) {
        if peer == self.own || !self.neighbours.insert(peer) {
            return;
        }
        self.proven.insert(peer, keys);
        self.paths.take();
        self.note_own_change(now);
        self.send(peer, Message::Digest { ask: false, stamps: self.stamps() });
    }

    /// One of several connections with `peer` was closed or replaced: what was sent over it may be lost.
    pub fn resync(&mut self, peer: NodeId) {
        if self.neighbours.contains(&peer) {
            self.send(peer, Message::Digest { ask: true, stamps: self.stamps() });
        }
    }

    /// The last connection with `peer` ended.
    pub fn handle_disconnected(&mut self, peer: NodeId, now: Instant) {
        if self.neighbours.remove(&peer) {
            self.proven.remove(&peer);
            self.paths.take();
            self.ask_others(peer, now);
            self.note_own_change(now);
        }
    }

    /// Changes the own record. Links, stamp, ID and key are not the caller's to change.
    pub fn update_own(&mut self, change: impl FnOnce(&mut Record), now: Instant) {
        let before = self.draft.clone();
        change(&mut self.draft);
        self.draft.fit();
        self.draft = Record {
            id: before.id,
            incarnation: before.incarnation,
            version: before.version,
            left: before.left,
            public_key: before.public_key,
            links: before.links.clone(),
            verifying_key: before.verifying_key,
            signature: before.signature,
            ..self.draft.clone()
        };
        if self.draft != before {
            self.note_own_change(now);
        }
    }

    /// Leaves the cluster: the tombstone is ready to be sent at once, and nothing is listened to any more.
    pub fn leave(&mut self) {
        self.draft = self.draft.clone().into_tombstone();
        self.raise_version();
        self.sign();
        self.put(self.draft.clone());
        self.publish_at = None;
        self.defence = None;
        self.flush_at = None;
        self.paths.take();
        for peer in std::mem::take(&mut self.neighbours) {
            self.send(peer, Message::Delta(vec![self.draft.clone()]));
        }
    }

    /// A message came from `peer`. Messages of nodes that are no neighbours are ignored.
    ///
    /// # Errors
    /// [`BadMessage`] if it breaks the protocol, or is one too many: nothing of it was taken, and the connection should be closed.
    pub fn handle_message(&mut self, peer: NodeId, bytes: &[u8], now: Instant) -> Result<(), BadMessage> {
        if !self.neighbours.contains(&peer) {
            return Ok(());
        }
        if !self.hear(peer, bytes.len(), now) {
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

    /// False if the neighbour says too much.
    fn hear(&mut self, peer: NodeId, bytes: usize, now: Instant) -> bool {
        self.allowances.entry(peer).or_insert_with(|| Allowance::new(now)).hear(bytes, now)
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.defence.is_some() && self.may_defend(now) {
            self.defend(now);
        }
        self.admit_contenders(now);
        if self.publish_at.is_some_and(|at| at <= now) {
            self.publish_own(now);
        }
        if self.flush_at.is_some_and(|at| at <= now) {
            self.flush_at = None;
            self.pass_on(now);
        }
        if self.ask_again_at.is_some_and(|at| at <= now) {
            self.ask_again(now);
        }
        if self.compare_at <= now {
            self.compare_at = now + self.jittered(COMPARE_INTERVAL);
            self.compare();
        }
    }

    /// When to call [`Self::handle_timeout`] next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let defend_at = self.defence.as_ref().and(self.defended).map(|last| last + DEFEND_INTERVAL);
        let admit_at = self.next_admission();
        [self.publish_at, self.flush_at, defend_at, admit_at, self.ask_again_at, Some(self.compare_at)]
            .into_iter()
            .flatten()
            .min()
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    fn handle_delta(&mut self, peer: NodeId, records: Vec<Record>, now: Instant) -> Result<(), BadMessage> {
        let records: Vec<_> = records.into_iter().map(|record| (record.stamp(), record)).collect();
        // A signature costs more than all the rest, and most of what comes by is known.
        for (stamp, record) in &records {
            if self.is_news(peer, record, *stamp) && !self.is_signed(record) {
                return Err(BadMessage::Signature(record.id));
            }
        }
        for (stamp, record) in records {
            self.want_no_more(peer, record.id, stamp);
            if !self.is_news(peer, &record, stamp) {
                self.note_holder(peer, record.id, stamp);
            } else if record.id == self.own {
                self.handle_word_about_self(record, now);
            } else if self.is_disputed(&record) {
                self.handle_contender(peer, record, now);
            } else {
                self.take(peer, record, now);
            }
        }
        Ok(())
    }

    /// True if it is newer than what is known, or a neighbour's own word against what others said of it.
    fn is_news(&self, peer: NodeId, record: &Record, stamp: Stamp) -> bool {
        let Some(known) = self.records.get(&record.id) else { return true };
        let keys = record.keys();
        let is_first_hand =
            peer == record.id && self.proven.get(&peer) == Some(&keys) && known.keys() != keys;
        is_first_hand || self.stamps[&record.id] < stamp
    }

    fn take(&mut self, peer: NodeId, record: Record, now: Instant) {
        let id = record.id;
        self.actions.push_back(if record.left { Action::Removed(id) } else { Action::Changed(id) });
        self.news.insert(id, BTreeSet::from([peer]));
        self.flush_soon(now);
        let before = self.put(record);
        self.settle(id, now);
        let lost_links = before.map(|before| before.links).unwrap_or_default();
        // A neighbour that lost its link with `id` may have lost what `id` would have told it.
        for cut in lost_links {
            let is_lost = self.records[&id].links.binary_search(&cut).is_err();
            if is_lost && cut != peer && self.neighbours.contains(&cut) {
                self.send(cut, Message::Summary(self.summary()));
            }
        }
    }

    fn put(&mut self, record: Record) -> Option<Record> {
        let id = record.id;
        self.stamps.insert(id, record.stamp());
        let before = self.records.insert(id, record);
        let now = &self.records[&id];
        if before.as_ref().is_none_or(|before| before.links != now.links || before.left != now.left) {
            self.paths.take();
        }
        before
    }

    fn raise_version(&mut self) {
        if self.draft.version < MAX_STAMP {
            self.draft.version += 1;
        } else {
            self.draft.incarnation = self.draft.incarnation.saturating_add(1).min(MAX_STAMP);
            self.draft.version = 1;
        }
    }

    fn note_own_change(&mut self, now: Instant) {
        if !self.draft.left {
            let pace = PACE * u32::try_from(self.neighbours.len()).unwrap_or(u32::MAX);
            let earliest = self.published.map_or(now, |last| last + pace);
            self.publish_at.get_or_insert(earliest.max(now + COLLECT));
        }
    }

    fn flush_soon(&mut self, now: Instant) {
        self.flush_at.get_or_insert(now + COLLECT);
    }

    fn publish_own(&mut self, now: Instant) {
        self.publish_at = None;
        self.published = Some(now);
        self.flush_at = Some(now);
        self.draft.links = self.neighbours.iter().copied().collect();
        self.raise_version();
        self.sign();
        self.put(self.draft.clone());
        self.news.insert(self.own, BTreeSet::new());
    }

    fn jittered(&mut self, time: Duration) -> Duration {
        time.mul_f64(self.rng.random_range(0.75..1.25))
    }
}
