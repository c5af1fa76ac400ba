//! Limits on the memory and disk space for the records of other nodes.
//!
//! A host with the token can take as many IDs as are free, and a record can be long. So the total
//! size of all records is limited: [`RESERVED_BYTES`] for each ID, and [`SHARED_BYTES`] for records
//! that exceed it. An honest record exceeds it only with more than about 100 names. At most
//! [`MAX_UNREACHED`] records with at most [`MAX_UNREACHED_BYTES`] in total are kept of nodes that
//! were never reached, directly or through other nodes.
//!
//! A version that does not fit is refused, and the older one stays. A version that is no larger
//! than the older one always fits. So does a tombstone, which is short. Tombstones are never
//! dropped, since they keep nodes that have left from coming back.
//!
//! With 4095 IDs, all records take 64 MiB, and the copies for DNS names and address allocation take
//! about as much again. On disk they are more compact: at most 64 MiB, twice while they are
//! written.

use std::collections::BTreeMap;

use super::message::Record;
use overnode_types::NodeId;

/// Bytes reserved for the record of each node.
pub const RESERVED_BYTES: usize = 8 << 10;
/// Bytes excess [`RESERVED_BYTES`] that all records share.
pub const SHARED_BYTES: usize = 32 << 20;
/// Maximum number of nodes that were never reached.
pub const MAX_UNREACHED: usize = 256;
/// Maximum total size in bytes of the records of nodes that were never reached.
pub const MAX_UNREACHED_BYTES: usize = 2 << 20;

/// The memory that the records of other nodes take.
#[derive(Clone, Debug, Default)]
pub(super) struct Budget {
    shared: usize,
    /// Nodes that were never reached, as far as is known, with the sizes of their records.
    unreached: BTreeMap<NodeId, usize>,
    unreached_bytes: usize,
}

impl Budget {
    /// Returns true if the record may replace the known one.
    pub(super) fn fits(&self, record: &Record, known: Option<&Record>) -> bool {
        let (new, old) = (weight(record), known.map_or(0, weight));
        record.left
            || new <= old
            || self.shared - excess(old) + excess(new) <= SHARED_BYTES
            || excess(new) == 0
    }

    /// Like [`Self::fits`], for a node that was never reached.
    pub(super) fn fits_unreached(&self, record: &Record) -> bool {
        let (new, old) = (weight(record), self.unreached.get(&record.id).copied());
        let is_one_more = old.is_none();
        let old = old.unwrap_or_default();
        record.left
            || (new <= old || self.unreached_bytes - old + new <= MAX_UNREACHED_BYTES)
                && (!is_one_more || self.unreached.len() < MAX_UNREACHED)
    }

    /// Records that `record` has replaced `before`, if any.
    pub(super) fn note(&mut self, record: &Record, before: Option<&Record>) {
        self.shared += excess(weight(record));
        self.shared -= before.map_or(0, |before| excess(weight(before)));
        if self.unreached.contains_key(&record.id) {
            self.mark_reached(record.id);
            self.add_unreached(record);
        }
    }

    /// Counts a node as never reached.
    pub(super) fn add_unreached(&mut self, record: &Record) {
        if !record.left && !self.unreached.contains_key(&record.id) {
            self.unreached_bytes += weight(record);
            self.unreached.insert(record.id, weight(record));
        }
    }

    /// Counts a node as reached.
    pub(super) fn mark_reached(&mut self, id: NodeId) {
        if let Some(bytes) = self.unreached.remove(&id) {
            self.unreached_bytes -= bytes;
        }
    }

    #[cfg(test)]
    pub(super) fn shared(&self) -> usize {
        self.shared
    }

    pub(super) fn is_unreached(&self, id: NodeId) -> bool {
        self.unreached.contains_key(&id)
    }

    pub(super) fn has_unreached(&self) -> bool {
        !self.unreached.is_empty()
    }
}

/// Returns the approximate memory size of a record in bytes.
pub fn weight(record: &Record) -> usize {
    const STRING: usize = 32;
    let names = record.names.iter().map(|named| size_of_val(named) + STRING + named.name.len());
    size_of::<Record>()
        + record.nickname.len()
        + size_of_val(&record.addresses[..])
        + size_of_val(&record.links[..])
        + size_of_val(&record.no_direct_path[..])
        + size_of_val(&record.ranges[..])
        + size_of_val(&record.claims[..])
        + names.sum::<usize>()
}

fn excess(weight: usize) -> usize {
    weight.saturating_sub(RESERVED_BYTES)
}
