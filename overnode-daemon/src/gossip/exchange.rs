//! How records travel: they are offered, asked for and sent, and neighbours compare what they have.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rand::Rng;
use ring::digest::{SHA256, digest};

use super::limit::Allowance;
use super::message::{self, Message, Named, Record, Stamp};
use super::{Action, Gossip};
use crate::types::NodeId;

/// So long after it was asked for, a record should be here; then another neighbour that has it is
/// asked.
pub const ASK_AGAIN: Duration = Duration::from_secs(1);
/// About how many bytes an offer of one record takes.
pub(super) const STAMP_BYTES: usize = 20;

/// A record that a neighbour was asked for.
#[derive(Debug)]
pub(super) struct Wanted {
    stamp: Stamp,
    /// Who was asked.
    from: NodeId,
    asked: Instant,
    /// Who else has it.
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

    /// A neighbour has this version. True if it should be asked for it now.
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
            // Who promises more need not keep it.
            Some(wanted) if wanted.stamp > stamp => true,
            _ => {
                let wanted = Wanted { stamp, from: peer, asked: now, others: BTreeSet::new() };
                self.wanted.insert(id, wanted);
                self.ask_again_at.get_or_insert(now + ASK_AGAIN);
                true
            }
        }
    }

    /// If this is the version that is to be passed on, this neighbour has it already.
    pub(super) fn note_holder(&mut self, peer: NodeId, id: NodeId, stamp: Stamp) {
        if self.stamps.get(&id) == Some(&stamp)
            && let Some(have) = self.news.get_mut(&id)
        {
            have.insert(peer);
        }
    }

    /// A record has come.
    pub(super) fn want_no_more(&mut self, peer: NodeId, id: NodeId, stamp: Stamp) {
        if self.wanted.get(&id).is_some_and(|wanted| wanted.from == peer || wanted.stamp <= stamp) {
            self.wanted.remove(&id);
        }
    }

    /// What was asked for and has not come in time is asked of others.
    pub(super) fn ask_again(&mut self, now: Instant) {
        self.ask_instead(|wanted| wanted.asked + ASK_AGAIN <= now, now);
        self.ask_again_at = self.wanted.values().map(|wanted| wanted.asked + ASK_AGAIN).min();
    }

    /// What `peer` was asked for is asked of others.
    pub(super) fn ask_others(&mut self, peer: NodeId, now: Instant) {
        self.wanted.values_mut().for_each(|wanted| {
            wanted.others.remove(&peer);
        });
        self.ask_instead(|wanted| wanted.from == peer, now);
    }

    fn ask_instead(&mut self, is_due: impl Fn(&Wanted) -> bool, now: Instant) {
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

    /// Sends what this node says of itself, and offers what others say.
    pub(super) fn pass_on(&mut self, now: Instant) {
        let news = std::mem::take(&mut self.news);
        let mut offers: BTreeMap<NodeId, Vec<(NodeId, Stamp)>> = BTreeMap::new();
        for (id, have) in &news {
            if *id == self.own {
                continue;
            }
            let stamp = self.stamps[id];
            for &peer in &self.neighbours {
                let told_by_another = self.is_linked(*id, peer)
                    || have.iter().any(|&source| self.is_linked(source, peer));
                if peer != *id && !have.contains(&peer) && !told_by_another {
                    offers.entry(peer).or_default().push((*id, stamp));
                }
            }
        }
        if let Some(have) = news.get(&self.own) {
            let own = self.records[&self.own].clone();
            for peer in self.neighbours.difference(have).copied().collect::<Vec<_>>() {
                // What is left out here is found by comparing.
                if self.may_pass(peer, size(&own), now) {
                    self.send(peer, Message::Delta(vec![own.clone()]));
                }
            }
        }
        for (peer, stamps) in offers {
            if self.may_pass(peer, STAMP_BYTES * stamps.len(), now) {
                self.send(peer, Message::Digest { ask: false, stamps });
            }
        }
    }

    /// True if a neighbour takes more of what this node says unasked.
    pub(super) fn may_pass(&mut self, peer: NodeId, bytes: usize, now: Instant) -> bool {
        self.burdens.entry(peer).or_insert_with(|| Allowance::of_ours(now)).pass(bytes, now)
    }

    /// Answers with a digest, which counts as if the neighbour had sent it.
    fn offer(&mut self, peer: NodeId, ask: bool, stamps: Vec<(NodeId, Stamp)>) {
        self.charge(peer, STAMP_BYTES * stamps.len());
        self.send(peer, Message::Digest { ask, stamps });
    }

    fn charge(&mut self, peer: NodeId, bytes: usize) {
        if let Some(allowance) = self.allowances.get_mut(&peer) {
            allowance.answer(bytes);
        }
    }

    fn records_of(&self, ids: &[NodeId]) -> impl Iterator<Item = &Record> {
        ids.iter().filter_map(|id| self.records.get(id))
    }

    /// True if both ends say that they are linked.
    pub(super) fn is_linked(&self, one: NodeId, other: NodeId) -> bool {
        let says = |a, b| {
            self.records.get(&a).is_some_and(|record| record.links.binary_search(&b).is_ok())
        };
        says(one, other) && says(other, one)
    }

    pub(super) fn compare(&mut self) {
        if self.neighbours.is_empty() {
            return;
        }
        let chosen = self.rng.random_range(0..self.neighbours.len());
        let Some(&peer) = self.neighbours.iter().nth(chosen) else { return };
        self.send(peer, Message::Summary(self.summary()));
    }

    pub(super) fn answer(&mut self, peer: NodeId, ids: &[NodeId]) {
        let bytes = self.records_of(ids).map(size).sum();
        self.charge(peer, bytes);
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

/// About how many bytes a record takes on the wire; rather too many.
pub(super) fn size(record: &Record) -> usize {
    let names = record.names.iter().map(Named::size).sum::<usize>();
    message::RECORD_BYTES
        + 2 * record.links.len()
        + 18 * (record.ranges.len() + record.claims.len())
        + names
}
