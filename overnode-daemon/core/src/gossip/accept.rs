//! Decides which received records this node accepts, and stores them.

use std::collections::BTreeSet;
use std::time::Instant;

use super::exchange::STAMP_BYTES;
use super::{Action, BadMessage, Gossip, Message, Record, SKEW_MS, Stamp, sign};
use overnode_types::NodeId;

impl Gossip {
    /// Restores the records that were known before a restart. Each comes with the value of
    /// [`Self::was_reached`] for its node.
    pub fn restore(&mut self, records: impl IntoIterator<Item = (Record, bool)>) {
        for (record, was_reached) in records {
            let is_good =
                record.id != self.own && record.check().is_ok() && self.is_signed(&record);
            if !is_good || self.has_identity_of_another(&record) || !self.budget.fits(&record, None)
            {
                continue;
            }
            if !was_reached && !self.budget.fits_unreached(&record) {
                continue;
            }
            let id = record.id;
            self.put(record);
            if was_reached {
                self.budget.mark_reached(id);
            }
        }
    }

    pub(super) fn handle_delta(
        &mut self,
        peer: NodeId,
        records: Vec<Record>,
        now: Instant,
    ) -> Result<(), BadMessage> {
        let records: Vec<_> = records.into_iter().map(|record| (record.stamp(), record)).collect();
        // Verifying a signature costs more than everything else, and most received records are
        // already known.
        let mut news = Vec::new();
        for (stamp, record) in records {
            self.finish_request(peer, record.id, stamp);
            if !self.is_news(peer, &record, stamp) {
                self.note_holder(peer, record.id, stamp);
            } else if self.is_timely(record.incarnation, now) && self.may_verify(now) {
                if !self.is_signed(&record) {
                    return Err(BadMessage::Signature(record.id));
                }
                news.push(record);
            }
            // Comparing finds the records that are left out here.
        }
        for record in news {
            if record.id == self.own {
                self.handle_own_rival(record, now);
            } else if self.has_identity_of_another(&record) || !self.has_room_for(&record, now) {
                tracing::debug!("ignored a record of node {}", record.id);
            } else if self.is_disputed(&record) {
                self.handle_contender(peer, record, now);
            } else {
                self.take(peer, record, now);
            }
        }
        Ok(())
    }

    /// Returns true if the record is newer than the known one, or if a neighbor itself contradicts
    /// what others said about it.
    pub(super) fn is_news(&self, peer: NodeId, record: &Record, stamp: Stamp) -> bool {
        let Some(known) = self.records.get(&record.id) else { return true };
        let key = record.verifying_key;
        let is_first_hand =
            peer == record.id && self.proven.get(&peer) == Some(&key) && known.verifying_key != key;
        is_first_hand || self.stamps[&record.id] < stamp
    }

    pub(super) fn take(&mut self, peer: NodeId, record: Record, now: Instant) {
        let id = record.id;
        self.actions.push_back(if record.left { Action::Removed(id) } else { Action::Changed(id) });
        self.news.insert(id, BTreeSet::from([peer]));
        self.flush_soon(now);
        let before = self.put(record);
        self.resolve_dispute(id, now);
        let lost_links = before.map(|before| before.links).unwrap_or_default();
        // A neighbor that lost its link with `id` may have missed messages from `id`.
        for cut in lost_links {
            let is_lost = self.records[&id].links.binary_search(&cut).is_err();
            // This counts against the limit for that neighbor, because links that never existed can
            // be lost again and again.
            if is_lost
                && cut != peer
                && self.neighbors.contains(&cut)
                && self.may_forward(cut, STAMP_BYTES, now)
            {
                self.send(cut, Message::Summary(self.summary()));
            }
        }
    }

    pub(super) fn is_signed(&self, record: &Record) -> bool {
        self.verified
            .as_ref()
            .map_or_else(|| sign::is_signed(record), |verified| verified.is_signed(record))
    }

    /// Returns false for an incarnation so far in the future that the owner of the ID could not
    /// outbid it.
    pub(super) fn is_timely(&self, incarnation: u64, now: Instant) -> bool {
        let (then, at) = self.clock;
        let passed =
            u64::try_from(now.saturating_duration_since(at).as_millis()).unwrap_or(u64::MAX);
        incarnation <= then.saturating_add(passed).saturating_add(SKEW_MS)
    }

    pub(super) fn may_verify(&mut self, now: Instant) -> bool {
        self.signatures.take(now)
    }

    /// Returns true if the record's identity belongs to another ID. No honest host has the identity
    /// of another one, because each launch creates a new one.
    pub(super) fn has_identity_of_another(&self, record: &Record) -> bool {
        self.identities.get(&record.verifying_key).is_some_and(|id| *id != record.id)
    }

    pub(super) fn has_room_for(&mut self, record: &Record, now: Instant) -> bool {
        let fits = self.budget.fits(record, self.records.get(&record.id)) && {
            let stays_unreached = self.stays_unreached(record);
            !stays_unreached || self.budget.fits_unreached(record) || {
                // Some known nodes may have become reachable, and with them the node of this
                // record.
                self.mark_reached_nodes();
                !self.stays_unreached(record) || self.budget.fits_unreached(record)
            }
        };
        if !fits {
            self.refused_at = Some(now);
        }
        fits
    }

    /// Returns true if a node was never reached and does not become reachable with this record, as
    /// far as that can be decided without a search of all links.
    pub(super) fn stays_unreached(&self, record: &Record) -> bool {
        if self.proven.contains_key(&record.id) {
            return false;
        }
        if self.records.contains_key(&record.id) {
            return self.budget.is_unreached(record.id);
        }
        let links_back = |other: &NodeId| {
            let is_known = *other == self.own || !self.budget.is_unreached(*other);
            let links =
                self.records.get(other).filter(|it| is_known && !it.left).map(|it| &it.links);
            links.is_some_and(|links| links.binary_search(&record.id).is_ok())
        };
        !record.links.iter().any(links_back)
    }

    pub(super) fn mark_reached_nodes(&mut self) {
        if self.budget.has_unreached() {
            let reached: Vec<_> = self.paths().keys().copied().collect();
            reached.into_iter().for_each(|id| self.budget.mark_reached(id));
        }
    }

    pub(super) fn put(&mut self, record: Record) -> Option<Record> {
        let id = record.id;
        self.stamps.insert(id, record.stamp());
        if id != self.own {
            if !self.records.contains_key(&id) && self.stays_unreached(&record) {
                self.budget.add_unreached(&record);
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
}
