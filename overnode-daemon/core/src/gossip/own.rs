//! The node's own record: its changes, and when they are signed and published.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::exchange::size;
use super::limit::BYTES_PER_SECOND;
use super::{COLLECT, Gossip, MAX_STAMP, Message, PACE, Record};

impl Gossip {
    /// Changes the own record. Changes to the ID, stamp, keys, links, tombstone flag and signature
    /// are discarded; all other fields may be changed.
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

    /// Raises the node's incarnation to at least `least`, so that other nodes treat it as
    /// restarted.
    pub fn raise_incarnation(&mut self, least: u64, now: Instant) {
        if self.draft.incarnation < least && !self.draft.left && self.is_timely(least, now) {
            self.draft.incarnation = least.min(MAX_STAMP);
            self.draft.version = 0;
            self.note_own_change(now);
        }
    }

    /// Leaves the cluster: queues the tombstone for all neighbors and ignores all further messages.
    pub fn leave(&mut self) {
        self.draft = self.draft.clone().into_tombstone();
        self.raise_version();
        self.sign();
        self.put(self.draft.clone());
        self.publish_at = None;
        self.rival = None;
        self.flush_at = None;
        self.paths.take();
        for peer in std::mem::take(&mut self.neighbors) {
            self.send(peer, Message::Delta(vec![self.draft.clone()]));
        }
    }

    pub(super) fn note_own_change(&mut self, now: Instant) {
        if !self.draft.left {
            // A record with many names is long, and the number of bytes that a neighbor accepts per
            // second is limited.
            let weight = Duration::from_secs(1)
                * u32::try_from(size(&self.draft)).unwrap_or(u32::MAX)
                / (BYTES_PER_SECOND / 2) as u32;
            let pace = weight.max(PACE * u32::try_from(self.neighbors.len()).unwrap_or(u32::MAX));
            let earliest = self.published.map_or(now, |last| last + pace);
            self.publish_at.get_or_insert(earliest.max(now + COLLECT));
        }
    }

    pub(super) fn publish_own(&mut self, now: Instant) {
        self.publish_at = None;
        self.published = Some(now);
        self.flush_at = Some(now);
        self.draft.links = self.neighbors.iter().copied().collect();
        self.raise_version();
        self.sign();
        self.put(self.draft.clone());
        self.news.insert(self.own, BTreeSet::new());
    }

    pub(super) fn raise_version(&mut self) {
        if self.draft.version < MAX_STAMP {
            self.draft.version += 1;
        } else {
            self.draft.incarnation = self.draft.incarnation.saturating_add(1).min(MAX_STAMP);
            self.draft.version = 1;
        }
    }

    pub(super) fn sign(&mut self) {
        self.signer.sign(&mut self.draft);
        if let Some(verified) = &self.verified {
            verified.trust(&self.draft);
        }
    }
}
