//! Disputes between two hosts with one ID.
//!
//! An ID changes hands only with the consent of its holder. A record under other keys than those of
//! a reachable node waits for [`OBJECTION`], and the holder is asked with a [routed
//! message](super::routed::KIND_CLASH). A live holder objects with a record that outbids the other
//! ([`Action::Contested`]). Then the other record is dropped and reported ([`Action::Clash`]). A
//! holder that is gone does not answer, and the new record is believed. A connected neighbor cannot
//! be replaced at all, and keys never change within one incarnation.

use std::time::{Duration, Instant};

use super::exchange::size;
use super::message::{MAX_STAMP, Message, Record};
use super::routed::{KIND_CLASH, MAX_BODY, MAX_HOPS};
use super::{Action, Gossip};
use overnode_types::NodeId;

/// Time that a reachable node has to object: to hear of the other record, to outbid it, and to be
/// heard.
pub const OBJECTION: Duration = Duration::from_secs(5);
/// After an objection, other claims to the same ID are ignored for this long.
pub const CLASH_INTERVAL: Duration = Duration::from_secs(30);
/// Minimum interval between two answers to a contested own record.
pub const DEFEND_INTERVAL: Duration = Duration::from_secs(1);

/// Maximum number of records that wait at a time. Each one makes other nodes work.
const MAX_CONTENDERS: usize = 64;

/// A record that waits for an objection of the node that holds its ID.
#[derive(Debug)]
pub(super) struct DisputedRecord {
    record: Record,
    /// The neighbor that the record came from.
    from: NodeId,
    is_announced: bool,
    /// Earliest time at which the record may be announced to others.
    announce_at: Instant,
    until: Instant,
}

impl Gossip {
    /// Returns true if the ID of this record belongs to a node with other keys, as far as this node
    /// can tell.
    pub(super) fn is_disputed(&self, record: &Record) -> bool {
        let key = record.verifying_key;
        if let Some(proven) = self.proven.get(&record.id) {
            return *proven != key;
        }
        let Some(known) = self.records.get(&record.id).filter(|known| known.verifying_key != key)
        else {
            return false;
        };
        !known.left
            && (known.incarnation == record.incarnation || self.paths().contains_key(&known.id))
    }

    /// Makes a disputed record wait, and forwards it.
    pub(super) fn handle_contender(&mut self, peer: NodeId, record: Record, now: Instant) {
        let id = record.id;
        // The holder must be able to receive the record and to outbid it.
        let challenge = Message::Delta(vec![record.clone()]).encode().len();
        let is_far = self.paths().get(&id).is_some_and(|path| path.hops > MAX_HOPS.into());
        if challenge > MAX_BODY || is_far {
            return;
        }
        let was_heard = self.clashes.get(&id).is_some_and(|last| now < *last + CLASH_INTERVAL);
        let is_full = self.disputed.len() >= MAX_CONTENDERS;
        match self.disputed.get_mut(&id) {
            _ if was_heard => {}
            Some(waiting) if record.stamp() <= waiting.record.stamp() => {}
            Some(waiting) => {
                if waiting.record.verifying_key != record.verifying_key {
                    waiting.until = now + OBJECTION;
                }
                (waiting.record, waiting.from, waiting.is_announced) = (record, peer, false);
            }
            None if is_full => {}
            None => {
                let until = now + OBJECTION;
                let new = DisputedRecord {
                    record,
                    from: peer,
                    is_announced: false,
                    announce_at: now,
                    until,
                };
                self.disputed.insert(id, new);
            }
        }
        self.announce_contenders(now);
    }

    /// Asks the holders and announces the waiting records to neighbors. For each ID this happens no
    /// more often than the holder may answer.
    fn announce_contenders(&mut self, now: Instant) {
        let due = self.disputed.iter().filter(|(_, it)| !it.is_announced && it.announce_at <= now);
        for id in due.map(|(id, _)| *id).collect::<Vec<_>>() {
            let Some(waiting) = self.disputed.get_mut(&id) else { continue };
            (waiting.is_announced, waiting.announce_at) = (true, now + DEFEND_INTERVAL);
            let (peer, record) = (waiting.from, waiting.record.clone());
            let delta = Message::Delta(vec![record.clone()]);
            // Fails only if the holder is no longer reachable.
            let _ = self.send_routed(id, KIND_CLASH, delta.encode());
            let has_not =
                |next: &&NodeId| **next != peer && **next != id && !self.is_linked(peer, **next);
            for next in self.neighbors.iter().filter(has_not).copied().collect::<Vec<_>>() {
                if self.may_forward(next, size(&record), now) {
                    self.send(next, delta.clone());
                }
            }
        }
    }

    /// Handles a record that was accepted: if it outbids a waiting record under other keys, two
    /// hosts have the ID.
    pub(super) fn resolve_dispute(&mut self, id: NodeId, now: Instant) {
        let Some(contender) = self.disputed.get(&id) else { return };
        let Some(known) = self.records.get(&id) else { return };
        if contender.record.stamp() > known.stamp() {
            return;
        }
        let is_rival = contender.record.verifying_key != known.verifying_key
            && !contender.record.left
            && !known.left;
        let holder = known.nickname.clone();
        let Some(DisputedRecord { record, .. }) = self.disputed.remove(&id) else { return };
        if is_rival {
            self.clashes.insert(id, now);
            self.actions.push_back(Action::Clash { record: Box::new(record), holder });
        }
    }

    /// Accepts the waiting records that no holder has objected to.
    pub(super) fn admit_contenders(&mut self, now: Instant) {
        self.announce_contenders(now);
        let due: Vec<_> =
            self.disputed.iter().filter(|(_, it)| it.until <= now).map(|(id, _)| *id).collect();
        for id in due {
            let Some(mut contender) = self.disputed.remove(&id) else { continue };
            let key = contender.record.verifying_key;
            if self.proven.get(&id).is_some_and(|proven| *proven != key) {
                contender.until = now + OBJECTION;
                self.disputed.insert(id, contender);
            } else if self.records.get(&id).is_none_or(|known| {
                known.incarnation < contender.record.incarnation
                    || (known.verifying_key == key && known.stamp() < contender.record.stamp())
            }) {
                self.take(contender.from, contender.record, now);
            }
        }
    }

    pub(super) fn next_admission(&self) -> Option<Instant> {
        let next = |it: &DisputedRecord| {
            if it.is_announced { it.until } else { it.until.min(it.announce_at) }
        };
        self.disputed.values().map(next).min()
    }

    /// Handles a record of this node that is newer than its own one.
    pub(super) fn handle_own_rival(&mut self, record: Record, now: Instant) {
        if self.draft.left {
            return;
        }
        if self.rival.as_ref().is_none_or(|worst| worst.stamp() < record.stamp()) {
            self.rival = Some(record);
        }
        if self.may_defend(now) {
            self.outbid(now);
        }
    }

    /// Answers a node that asks whether this node objects to a record with its ID.
    pub(super) fn handle_challenge(&mut self, bytes: &[u8], now: Instant) {
        let Ok(Message::Delta(records)) = Message::decode(bytes) else { return };
        for record in records {
            let is_newer = record.id == self.own && record.stamp() > self.stamps[&self.own];
            if is_newer
                && self.is_timely(record.incarnation, now)
                && self.may_verify(now)
                && self.is_signed(&record)
            {
                self.handle_own_rival(record, now);
            }
        }
    }

    pub(super) fn may_defend(&self, now: Instant) -> bool {
        self.outbid_at.is_none_or(|last| last + DEFEND_INTERVAL <= now)
    }

    /// Outbids the other record and schedules the own one for publication.
    pub(super) fn outbid(&mut self, now: Instant) {
        let Some(rival) = self.rival.take() else { return };
        let is_other = rival.verifying_key != self.draft.verifying_key;
        if rival.incarnation > self.draft.incarnation || is_other {
            self.draft.incarnation = rival.incarnation.saturating_add(1).min(MAX_STAMP);
            self.draft.version = 0;
        } else {
            self.draft.version = self.draft.version.max(rival.version);
        }
        // A tombstone is from an earlier life of this host. A record under its own keys may be as
        // well, but only once: from a restored disk.
        if !rival.left && (is_other || self.outbid_at.is_some()) {
            self.actions.push_back(Action::Contested(Box::new(rival)));
        }
        self.outbid_at = Some(now);
        self.note_own_change(now);
    }
}
