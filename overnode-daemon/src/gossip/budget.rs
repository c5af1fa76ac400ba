//! How much memory and disk the records of others take.
//!
//! Whoever has the token may be as many nodes as there are free IDs, and a record may be long. So
//! there is an end to what is kept of all of them together: [`ROOM`] for each ID, and [`SHARED`]
//! for what is longer. An honest record is longer only with more than about a hundred names. Of
//! nodes that were never reached, directly or through others, there are no more than [`STRANGERS`],
//! with no more than [`STRANGER_BYTES`].
//!
//! A version that does not fit is not taken; the older one stays. One that takes no more than that
//! one always fits, and so does a tombstone, which is short: what keeps the dead from being revived
//! is never dropped.
//!
//! All of it, with 4095 IDs, is 64 MiB, and about as much in the copies that the names of DNS and
//! the allocation of addresses take. The disk has it in a shorter form: at most 64 MiB, twice while
//! it is written.

use std::collections::BTreeMap;

use super::message::Record;
use crate::types::NodeId;

/// Bytes that the record of each node may take in any case.
pub const ROOM: usize = 8 << 10;
/// Bytes beyond [`ROOM`], of all records together.
pub const SHARED: usize = 32 << 20;
/// Most nodes that were never reached.
pub const STRANGERS: usize = 256;
/// Bytes of the records of nodes that were never reached.
pub const STRANGER_BYTES: usize = 2 << 20;

/// What the records of others take.
#[derive(Clone, Debug, Default)]
pub(super) struct Budget {
    shared: usize,
    /// Nodes that were never reached as far as is known, with what their records take.
    strangers: BTreeMap<NodeId, usize>,
    stranger_bytes: usize,
}

impl Budget {
    /// True if the record may take the place of the one that is known.
    pub(super) fn fits(&self, record: &Record, known: Option<&Record>) -> bool {
        let (new, old) = (weight(record), known.map_or(0, weight));
        record.left
            || new <= old
            || self.shared - beyond(old) + beyond(new) <= SHARED
            || beyond(new) == 0
    }

    /// As [`Self::fits`], for a node that was never reached.
    pub(super) fn fits_stranger(&self, record: &Record) -> bool {
        let (new, old) = (weight(record), self.strangers.get(&record.id).copied());
        let is_one_more = old.is_none();
        let old = old.unwrap_or_default();
        record.left
            || (new <= old || self.stranger_bytes - old + new <= STRANGER_BYTES)
                && (!is_one_more || self.strangers.len() < STRANGERS)
    }

    /// A record has taken the place of another one, if there was one.
    pub(super) fn note(&mut self, record: &Record, before: Option<&Record>) {
        self.shared += beyond(weight(record));
        self.shared -= before.map_or(0, |before| beyond(weight(before)));
        if self.strangers.contains_key(&record.id) {
            self.meet(record.id);
            self.add_stranger(record);
        }
    }

    /// A node was never reached.
    pub(super) fn add_stranger(&mut self, record: &Record) {
        if !record.left && !self.strangers.contains_key(&record.id) {
            self.stranger_bytes += weight(record);
            self.strangers.insert(record.id, weight(record));
        }
    }

    /// A node is reached.
    pub(super) fn meet(&mut self, id: NodeId) {
        if let Some(bytes) = self.strangers.remove(&id) {
            self.stranger_bytes -= bytes;
        }
    }

    #[cfg(test)]
    pub(super) fn shared(&self) -> usize {
        self.shared
    }

    pub(super) fn is_stranger(&self, id: NodeId) -> bool {
        self.strangers.contains_key(&id)
    }

    pub(super) fn has_strangers(&self) -> bool {
        !self.strangers.is_empty()
    }
}

/// About how many bytes of memory a record takes.
pub fn weight(record: &Record) -> usize {
    const STRING: usize = 32;
    let names = record.names.iter().map(|named| size_of_val(named) + STRING + named.name.len());
    size_of::<Record>()
        + record.nickname.len()
        + size_of_val(&record.addresses[..])
        + size_of_val(&record.links[..])
        + size_of_val(&record.dark[..])
        + size_of_val(&record.ranges[..])
        + size_of_val(&record.claims[..])
        + names.sum::<usize>()
}

fn beyond(weight: usize) -> usize {
    weight.saturating_sub(ROOM)
}
