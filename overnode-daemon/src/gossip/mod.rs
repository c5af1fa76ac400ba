//! Gossip: how every node learns what every other says of itself. Deterministic; no I/O, no clock.
//!
//! Each node owns one [`Record`], signs it and makes new versions of it, which it sends to its
//! neighbours. They offer it to those of theirs that have no link with its owner nor with the
//! neighbour it came from, as far as the records tell; who lacks it asks one of those that offer
//! it, so that it travels to everybody once. In a full mesh nobody passes on anything, in a chain
//! everybody does. What that misses is found by comparing: neighbours exchange digests when they
//! connect, and every [`COMPARE_INTERVAL`] a hash with one neighbour chosen at random.
//!
//! A record about this node that it did not make is answered by a newer one. A node that leaves
//! puts up a tombstone, which is kept: whoever comes back from a long separation must not revive
//! the dead.
//!
//! From the links that both ends report follow the shortest paths, on which [parcels](parcel) go
//! from any node to any other.
//!
//! # What a member can do that lies
//!
//! Whoever has the token is a member, and may be as many nodes as there are free IDs. It **can**
//! * say of itself what it likes: addresses where it is not, ranges and claims, which
//!   [`routing`](crate::routing) checks, links, of which only those count that the other end
//!   reports too;
//! * take the ID of a node that is not reached, as any host can that is launched with it; keep
//!   quiet of what it should pass on, or offer what it then does not send, for which others are
//!   asked after [`ASK_AGAIN`]; repeat what others said before, which is recognised as old;
//! * raise the alarm that an ID is used twice, by claiming it, once every [`CLASH_INTERVAL`];
//! * make others remember a record of every ID there is, within the [`budget`]; until it ends,
//!   honest records that become longer than their room wait;
//! * keep others busy with its news: at most [`limit::SIGNATURES_PER_SECOND`] signatures a second
//!   of all neighbours together; honest news among them may wait until records are compared.
//!
//! It **cannot**
//! * change, extend, age or revoke what another node said, or say that it has left: that takes the
//!   other's key, and what is not signed ends the connection that it came by
//!   ([`BadMessage::Signature`]);
//! * take the ID of a node that is reached and objects within [`OBJECTION`], unless all paths to it
//!   lead through the liar; nor of one that is connected with whoever is to believe it;
//! * put another node's X25519 key into a record, or one identity under two IDs;
//! * claim an ID in a way that its true owner cannot outbid ([`SKEW_MS`]), as long as their clocks
//!   agree: an owner whose clock is behind those of others by some time is outbid for as long;
//! * send parcels in another's name, or the same one twice, also not after a restart of the
//!   receiver;
//! * use more of a neighbour than an honest node does at the start of a cluster of a thousand: it
//!   is cut off ([`BadMessage::Flood`]).
//!
//! Inputs: [`Gossip::handle_connected`], [`Gossip::handle_disconnected`],
//! [`Gossip::handle_message`], [`Gossip::handle_parcel`], [`Gossip::send_parcel`],
//! [`Gossip::update_own`], [`Gossip::leave`], [`Gossip::handle_timeout`]. Outputs:
//! [`Gossip::poll_action`], [`Gossip::poll_timeout`].

pub mod budget;
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

use budget::Budget;
use dispute::Contender;
pub use dispute::{CLASH_INTERVAL, DEFEND_INTERVAL, OBJECTION};
pub use exchange::ASK_AGAIN;
use exchange::{STAMP_BYTES, Wanted, size};
use limit::{Allowance, BYTES_PER_SECOND, Signatures};
pub use message::{
    BadMessage, FORMAT, MAX_ADDRESSES, MAX_CLAIMS, MAX_DELTA, MAX_NAMES, MAX_RANGES, MAX_STAMP,
    Message, NAME_BYTES, Named, Record, Stamp,
};
pub use parcel::{BadParcel, Parcel, Undelivered};
pub use sign::{Signature, Signer, Verified};
pub use topology::Path;

use crate::types::{NodeId, VerifyingKey};

/// How often a node compares what it knows with one neighbour. Jittered by a quarter each way.
pub const COMPARE_INTERVAL: Duration = Duration::from_secs(30);
/// News wait this long for more, so that a burst of changes travels as one.
pub const COLLECT: Duration = Duration::from_millis(50);
/// A node publishes changes of itself no more often than every so much per neighbour: at a cold
/// start of a thousand nodes, each gains links for seconds, and tells all others of each.
pub const PACE: Duration = Duration::from_millis(2);

/// How far the incarnation of a record may lie ahead of this node's clock, in milliseconds: 139
/// years.
///
/// An incarnation is the time of a launch in milliseconds since 1970, and some starts. Where it
/// counts, for an ID that another host claims, the greater one wins; so the true owner must always
/// have a greater one that others still take. They would not if there were a greatest one, for a
/// liar would claim that. This bound moves on: what was the greatest a millisecond ago can be
/// outbid now. It is this large so that hosts whose clocks are wrong by any date from 1970 on can
/// join, and join others.
pub const SKEW_MS: u64 = 1 << 42;
/// So long after a record found no room, [`Gossip::is_full`] says so.
pub const FULL_INTERVAL: Duration = Duration::from_secs(60);

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
    /// There is a newer record of a node that is part of the cluster. By the time this is polled
    /// there may be one newer still, even a tombstone, which has an action of its own.
    Changed(NodeId),
    /// A node has left the cluster for good.
    Removed(NodeId),
    /// There is another record of this node, under other keys or by a host that has the same: a
    /// second host with its ID, or one with a copy of its disk.
    Contested(Box<Record>),
    /// There is another record of a node that has just outbid it, under other keys: two hosts have
    /// one ID. It is not believed.
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
    /// Milliseconds since 1970 at some time.
    clock: (u64, Instant),
    /// The own record as it will be published next; `records` has it as it was published last.
    draft: Record,
    records: BTreeMap<NodeId, Record>,
    stamps: BTreeMap<NodeId, Stamp>,
    /// Whose identity is whose.
    identities: BTreeMap<VerifyingKey, NodeId>,
    budget: Budget,
    /// When a record found no room last.
    refused_at: Option<Instant>,
    signatures: Signatures,
    neighbours: BTreeSet<NodeId>,
    /// What each that ever was a neighbour may still say.
    allowances: BTreeMap<NodeId, Allowance>,
    /// What may still be passed on to each.
    burdens: BTreeMap<NodeId, Allowance>,
    /// The identities that the neighbours have proven.
    proven: BTreeMap<NodeId, VerifyingKey>,
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
    /// Gossip of the node that `own` describes. Its links are those of the neighbours, and its
    /// signature is the signer's, whatever `own` says.
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

    /// Takes up what was known before a restart: records, and whether their nodes were ever reached
    /// ([`Self::was_reached`]).
    pub fn restore(&mut self, records: impl IntoIterator<Item = (Record, bool)>) {
        for (record, was_reached) in records {
            let is_good =
                record.id != self.own && record.check().is_ok() && self.is_signed(&record);
            if !is_good || self.has_identity_of_another(&record) || !self.budget.fits(&record, None)
            {
                continue;
            }
            if !was_reached && !self.budget.fits_stranger(&record) {
                continue;
            }
            let id = record.id;
            self.put(record);
            if was_reached {
                self.budget.meet(id);
            }
        }
    }

    /// Tells what time it is, in milliseconds since 1970. Without it, the node takes it to be its
    /// own incarnation.
    pub fn set_clock(&mut self, unix_milliseconds: u64, now: Instant) {
        self.clock = (unix_milliseconds, now);
    }

    /// True if a node was ever reached, directly or through others.
    pub fn was_reached(&mut self, id: NodeId) -> bool {
        self.meet_reached();
        !self.budget.is_stranger(id)
    }

    /// True if a record was refused lately because others take all the room that there is.
    pub fn is_full(&self, now: Instant) -> bool {
        self.refused_at.is_some_and(|at| now < at + FULL_INTERVAL)
    }

    /// Raises the node's incarnation to this at least: others must take it for one that was started
    /// again.
    pub fn raise_incarnation(&mut self, least: u64, now: Instant) {
        if self.draft.incarnation < least && !self.draft.left && self.is_timely(least, now) {
            self.draft.incarnation = least.min(MAX_STAMP);
            self.draft.version = 0;
            self.note_own_change(now);
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
        self.verified
            .as_ref()
            .map_or_else(|| sign::is_signed(record), |verified| verified.is_signed(record))
    }

    /// The node's own record, with changes that are not published yet; its links are those last
    /// published.
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

    /// The shortest path to every other node that is reached, directly or through others. Computed
    /// anew only if a link has changed since it was asked for last.
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

    /// The neighbours to which this node passes on what `source` tells everybody: its children in
    /// the tree of shortest paths from `source`.
    pub fn branches(&self, source: NodeId) -> Vec<NodeId> {
        topology::branches(source, self.own, &self.neighbours, &self.records)
    }

    /// The records of the other nodes that are reached.
    pub fn living(&self) -> impl Iterator<Item = &Record> {
        self.paths().keys().filter_map(|id| self.records.get(id))
    }

    /// A connection with `peer` was established, which has proven to have this identity.
    pub fn handle_connected(&mut self, peer: NodeId, identity: VerifyingKey, now: Instant) {
        if peer == self.own || !self.neighbours.insert(peer) {
            return;
        }
        self.proven.insert(peer, identity);
        self.budget.meet(peer);
        self.paths.take();
        self.note_own_change(now);
        self.send(peer, Message::Digest { ask: false, stamps: self.stamps() });
    }

    /// One of several connections with `peer` was closed or replaced: what was sent over it may be
    /// lost.
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

    /// Leaves the cluster: the tombstone is ready to be sent at once, and nothing is listened to
    /// any more.
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
    /// [`BadMessage`] if it breaks the protocol, or is one too many: nothing of it was taken, and
    /// the connection should be closed.
    pub fn handle_message(
        &mut self,
        peer: NodeId,
        bytes: &[u8],
        now: Instant,
    ) -> Result<(), BadMessage> {
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

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    fn handle_delta(
        &mut self,
        peer: NodeId,
        records: Vec<Record>,
        now: Instant,
    ) -> Result<(), BadMessage> {
        let records: Vec<_> = records.into_iter().map(|record| (record.stamp(), record)).collect();
        // A signature costs more than all the rest, and most of what comes by is known.
        let mut news = Vec::new();
        for (stamp, record) in records {
            self.want_no_more(peer, record.id, stamp);
            if !self.is_news(peer, &record, stamp) {
                self.note_holder(peer, record.id, stamp);
            } else if self.is_timely(record.incarnation, now) && self.may_verify(now) {
                if !self.is_signed(&record) {
                    return Err(BadMessage::Signature(record.id));
                }
                news.push(record);
            }
            // What is left out here is found by comparing.
        }
        for record in news {
            if record.id == self.own {
                self.handle_word_about_self(record, now);
            } else if self.has_identity_of_another(&record) || !self.has_room_for(&record, now) {
                tracing::debug!("a record of node {} is not taken", record.id);
            } else if self.is_disputed(&record) {
                self.handle_contender(peer, record, now);
            } else {
                self.take(peer, record, now);
            }
        }
        Ok(())
    }

    /// True if it is newer than what is known, or a neighbour's own word against what others said
    /// of it.
    fn is_news(&self, peer: NodeId, record: &Record, stamp: Stamp) -> bool {
        let Some(known) = self.records.get(&record.id) else { return true };
        let key = record.verifying_key;
        let is_first_hand =
            peer == record.id && self.proven.get(&peer) == Some(&key) && known.verifying_key != key;
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
            // Within what that neighbour takes: links that were never there can be lost again and
            // again.
            if is_lost
                && cut != peer
                && self.neighbours.contains(&cut)
                && self.may_pass(cut, STAMP_BYTES, now)
            {
                self.send(cut, Message::Summary(self.summary()));
            }
        }
    }

    /// False if so far in the future that its owner could not outbid it.
    fn is_timely(&self, incarnation: u64, now: Instant) -> bool {
        let (then, at) = self.clock;
        let passed =
            u64::try_from(now.saturating_duration_since(at).as_millis()).unwrap_or(u64::MAX);
        incarnation <= then.saturating_add(passed).saturating_add(SKEW_MS)
    }

    fn may_verify(&mut self, now: Instant) -> bool {
        self.signatures.take(now)
    }

    /// One identity, one ID. No honest host has the identity of another one: each launch makes a
    /// new one.
    fn has_identity_of_another(&self, record: &Record) -> bool {
        self.identities.get(&record.verifying_key).is_some_and(|id| *id != record.id)
    }

    fn has_room_for(&mut self, record: &Record, now: Instant) -> bool {
        let fits = self.budget.fits(record, self.records.get(&record.id)) && {
            let is_stranger = self.is_stranger(record);
            !is_stranger || self.budget.fits_stranger(record) || {
                // Some of those that are known may be reached by now, or this one through one of
                // them.
                self.meet_reached();
                !self.is_stranger(record) || self.budget.fits_stranger(record)
            }
        };
        if !fits {
            self.refused_at = Some(now);
        }
        fits
    }

    /// True if a node was never reached, and is not with this record, as far as can be said without
    /// looking at everybody's links.
    fn is_stranger(&self, record: &Record) -> bool {
        if self.proven.contains_key(&record.id) {
            return false;
        }
        if self.records.contains_key(&record.id) {
            return self.budget.is_stranger(record.id);
        }
        let links_back = |other: &NodeId| {
            let is_known = *other == self.own || !self.budget.is_stranger(*other);
            let links =
                self.records.get(other).filter(|it| is_known && !it.left).map(|it| &it.links);
            links.is_some_and(|links| links.binary_search(&record.id).is_ok())
        };
        !record.links.iter().any(links_back)
    }

    fn meet_reached(&mut self) {
        if self.budget.has_strangers() {
            let reached: Vec<_> = self.paths().keys().copied().collect();
            reached.into_iter().for_each(|id| self.budget.meet(id));
        }
    }

    fn put(&mut self, record: Record) -> Option<Record> {
        let id = record.id;
        self.stamps.insert(id, record.stamp());
        if id != self.own {
            if !self.records.contains_key(&id) && self.is_stranger(&record) {
                self.budget.add_stranger(&record);
            }
            self.budget.note(&record, self.records.get(&id));
        }
        let identity = record.verifying_key;
        let before = self.records.insert(id, record);
        if let Some(before) = before.as_ref().filter(|before| before.verifying_key != identity) {
            self.identities.remove(&before.verifying_key);
        }
        self.identities.insert(identity, id);
        let now = &self.records[&id];
        if before.as_ref().is_none_or(|before| before.links != now.links || before.left != now.left)
        {
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
            // A record with many names is long, and what each neighbour takes in a second is
            // limited.
            let weight = Duration::from_secs(1)
                * u32::try_from(size(&self.draft)).unwrap_or(u32::MAX)
                / (BYTES_PER_SECOND / 2) as u32;
            let pace = weight.max(PACE * u32::try_from(self.neighbours.len()).unwrap_or(u32::MAX));
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
