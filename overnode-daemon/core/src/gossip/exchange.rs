//! Exchange of records: offers, requests and replies, and comparison between neighbors.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rand::Rng;
use ring::digest::{SHA256, digest};

use super::limit::Allowance;
use super::message::{self, Message, Record, Stamp};
use super::{Action, Gossip};
use overnode_types::NodeId;
use overnode_types::name::Named;

/// Timeout of a request for a record. Then another neighbor that has the record is asked.
pub const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Approximate size in bytes of the offer of one record.
pub(super) const STAMP_BYTES: usize = 20;

/// A record that was requested from a neighbor.
#[derive(Debug)]
pub(super) struct Wanted {
    stamp: Stamp,
    /// The neighbor that was asked.
    from: NodeId,
    asked: Instant,
    /// Other neighbors that have the record.
    others: BTreeSet<NodeId>,
}

impl Gossip {
    pub(super) fn handle_summary(&mut self, peer: NodeId, hash: [u8; 16]) {
        if hash != self.summary() {
            self.offer(peer, true, self.stamps());
        }
    }

    pub(super) fn handle_digest(
        &mut self,
        peer: NodeId,
        ask: bool,
        theirs: Vec<(NodeId, Stamp)>,
        now: Instant,
    ) {
        let stamps: Vec<_> = if ask {
            let known: BTreeMap<_, _> = theirs.iter().copied().collect();
            let is_news =
                |(id, stamp): &(&NodeId, &Stamp)| known.get(id).is_none_or(|known| known < *stamp);
            self.stamps.iter().filter(is_news).map(|(id, stamp)| (*id, *stamp)).collect()
        } else {
            let newer = |(id, theirs): &(NodeId, Stamp)| {
                self.stamps.get(id).filter(|stamp| *stamp > theirs)
            };
            theirs.iter().filter_map(|offer| newer(offer).map(|stamp| (offer.0, *stamp))).collect()
        };
        if !stamps.is_empty() {
            self.offer(peer, false, stamps);
        }
        let lacking = theirs.into_iter().filter(|(id, stamp)| self.lacks(peer, *id, *stamp, now));
        let wanted: Vec<_> = lacking.map(|(id, _)| id).collect();
        if !wanted.is_empty() {
            self.send(peer, Message::Request(wanted));
        }
    }

    /// Records that a neighbor has this version. Returns true if it should be requested from that
    /// neighbor now.
    fn lacks(&mut self, peer: NodeId, id: NodeId, stamp: Stamp, now: Instant) -> bool {
        if self.stamps.get(&id).is_some_and(|known| *known >= stamp) {
            self.note_holder(peer, id, stamp);
            return false;
        }
        if !self.is_timely(stamp.incarnation, now) {
            return false;
        }
        match self.wanted.get_mut(&id) {
            Some(wanted) if wanted.stamp == stamp => {
                if wanted.from != peer {
                    wanted.others.insert(peer);
                }
                false
            }
            // The neighbor that offered the newer version may never send it.
            Some(wanted) if wanted.stamp > stamp => true,
            _ => {
                let wanted = Wanted { stamp, from: peer, asked: now, others: BTreeSet::new() };
                self.wanted.insert(id, wanted);
                self.ask_again_at.get_or_insert(now + ASK_AGAIN);
                true
            }
        }
    }

    /// Records that a neighbor already has this version, if it is the one to be forwarded.
    pub(super) fn note_holder(&mut self, peer: NodeId, id: NodeId, stamp: Stamp) {
        if self.stamps.get(&id) == Some(&stamp)
            && let Some(have) = self.news.get_mut(&id)
        {
            have.insert(peer);
        }
    }

    /// Handles the arrival of a record: the request for it is done.
    pub(super) fn finish_request(&mut self, peer: NodeId, id: NodeId, stamp: Stamp) {
        if self.wanted.get(&id).is_some_and(|wanted| wanted.from == peer || wanted.stamp <= stamp) {
            self.wanted.remove(&id);
        }
    }

    /// Asks other neighbors for requested records that have not arrived in time.
    pub(super) fn ask_again(&mut self, now: Instant) {
        self.reassign_requests(|wanted| wanted.asked + ASK_AGAIN <= now, now);
        self.ask_again_at = self.wanted.values().map(|wanted| wanted.asked + ASK_AGAIN).min();
    }

    /// Asks other neighbors for the records that were requested from `peer`.
    pub(super) fn ask_others(&mut self, peer: NodeId, now: Instant) {
        self.wanted.values_mut().for_each(|wanted| {
            wanted.others.remove(&peer);
        });
        self.reassign_requests(|wanted| wanted.from == peer, now);
    }

    fn reassign_requests(&mut self, is_due: impl Fn(&Wanted) -> bool, now: Instant) {
        let mut requests: BTreeMap<NodeId, Vec<NodeId>> = BTreeMap::new();
        self.wanted.retain(|id, wanted| {
            if !is_due(wanted) {
                return true;
            }
            let Some(next) = wanted.others.pop_first() else { return false };
            (wanted.from, wanted.asked) = (next, now);
            requests.entry(next).or_default().push(*id);
            true
        });
        for (peer, ids) in requests {
            self.send(peer, Message::Request(ids));
        }
    }

    /// Sends this node's own record, and offers the records of other nodes.
    pub(super) fn forward_news(&mut self, now: Instant) {
        let news = std::mem::take(&mut self.news);
        let mut offers: BTreeMap<NodeId, Vec<(NodeId, Stamp)>> = BTreeMap::new();
        for (id, have) in &news {
            if *id == self.own {
                continue;
            }
            let stamp = self.stamps[id];
            for &peer in &self.neighbors {
                let is_offered_by_another = self.is_linked(*id, peer)
                    || have.iter().any(|&source| self.is_linked(source, peer));
                if peer != *id && !have.contains(&peer) && !is_offered_by_another {
                    offers.entry(peer).or_default().push((*id, stamp));
                }
            }
        }
        if let Some(have) = news.get(&self.own) {
            let own = self.records[&self.own].clone();
            for peer in self.neighbors.difference(have).copied().collect::<Vec<_>>() {
                // Comparing finds the records that are left out here.
                if self.may_forward(peer, size(&own), now) {
                    self.send(peer, Message::Delta(vec![own.clone()]));
                }
            }
        }
        for (peer, stamps) in offers {
            if self.may_forward(peer, STAMP_BYTES * stamps.len(), now) {
                self.send(peer, Message::Digest { ask: false, stamps });
            }
        }
    }

    /// Charges an unsolicited message to the limit for a neighbor. Returns false if the message
    /// must not be sent.
    pub(super) fn may_forward(&mut self, peer: NodeId, bytes: usize, now: Instant) -> bool {
        self.send_limits
            .entry(peer)
            .or_insert_with(|| Allowance::for_forwarding(now))
            .try_charge(bytes, now)
    }

    /// Answers with a digest, which counts as if the neighbor had sent it.
    fn offer(&mut self, peer: NodeId, ask: bool, stamps: Vec<(NodeId, Stamp)>) {
        self.charge_reply(peer, STAMP_BYTES * stamps.len());
        self.send(peer, Message::Digest { ask, stamps });
    }

    fn charge_reply(&mut self, peer: NodeId, bytes: usize) {
        if let Some(allowance) = self.allowances.get_mut(&peer) {
            allowance.charge_reply(bytes);
        }
    }

    fn records_of(&self, ids: &[NodeId]) -> impl Iterator<Item = &Record> {
        ids.iter().filter_map(|id| self.records.get(id))
    }

    /// Returns true if both ends report the link.
    pub(super) fn is_linked(&self, one: NodeId, other: NodeId) -> bool {
        let reports_link = |a, b| {
            self.records.get(&a).is_some_and(|record| record.links.binary_search(&b).is_ok())
        };
        reports_link(one, other) && reports_link(other, one)
    }

    pub(super) fn compare(&mut self) {
        if self.neighbors.is_empty() {
            return;
        }
        let chosen = self.rng.random_range(0..self.neighbors.len());
        let Some(&peer) = self.neighbors.iter().nth(chosen) else { return };
        self.send(peer, Message::Summary(self.summary()));
    }

    pub(super) fn answer(&mut self, peer: NodeId, ids: &[NodeId]) {
        let bytes = self.records_of(ids).map(size).sum();
        self.charge_reply(peer, bytes);
        let (mut deltas, mut bytes) = (vec![Vec::new()], 0);
        for record in self.records_of(ids) {
            if bytes >= message::DELTA_BYTES {
                deltas.push(Vec::new());
                bytes = 0;
            }
            bytes += size(record);
            deltas.last_mut().expect("it begins with one").push(record.clone());
        }
        for delta in deltas.into_iter().filter(|delta| !delta.is_empty()) {
            self.send(peer, Message::Delta(delta));
        }
    }

    pub(super) fn send(&mut self, to: NodeId, message: Message) {
        self.actions.push_back(Action::Send { to, message });
    }

    pub(super) fn stamps(&self) -> Vec<(NodeId, Stamp)> {
        self.stamps.iter().map(|(id, stamp)| (*id, *stamp)).collect()
    }

    pub(super) fn summary(&self) -> [u8; 16] {
        let bytes = postcard::to_allocvec(&self.stamps()).expect("plain data always encodes");
        let mut hash = [0; 16];
        hash.copy_from_slice(&digest(&SHA256, &bytes).as_ref()[..16]);
        hash
    }
}

/// Returns the approximate size of a record on the wire, rather too large than too small.
pub(super) fn size(record: &Record) -> usize {
    let names = record.names.iter().map(Named::size).sum::<usize>();
    message::RECORD_BYTES
        + 2 * record.links.len()
        + 18 * (record.ranges.len() + record.claims.len())
        + names
}
