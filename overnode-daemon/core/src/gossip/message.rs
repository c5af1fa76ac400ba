//! Messages between neighbors, and their bounds.
//!
//! On the wire: the version of the format (one byte, [`GOSSIP_FORMAT`]), then a [`Message`] in
//! postcard.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use super::limit::{BYTES_PER_SECOND, MESSAGES_PER_SECOND};
use super::sign::Signature;
use crate::control::hello::{MAX_NICKNAME, clean};
use overnode_types::name::Named;
use overnode_types::name::is_relative;
use overnode_types::{NodeId, PublicKey, VerifyingKey};

/// Version of the wire format.
pub const GOSSIP_FORMAT: u8 = 4;
/// Maximum number of control addresses in a record.
pub const MAX_ADDRESSES: usize = 16;
/// Maximum number of ranges in a record.
pub const MAX_RANGES: usize = 256;
/// Maximum number of static claims in a record.
pub const MAX_CLAIMS: usize = 1024;
/// Maximum number of names in a record. A name with several addresses counts once per address.
pub const MAX_NAMES: usize = 2000;
/// Maximum size of all names in a record in bytes, by [`Named::size`].
pub const NAME_BYTES: usize = 64 * 1024;
/// Greatest incarnation and version in a record. The limit for accepted incarnations is much lower,
/// see [`super::SKEW_MS`].
pub const MAX_STAMP: u64 = 1 << 62;
/// Size in bytes at which a delta is split. A message exceeds it by at most one record.
pub(crate) const DELTA_BYTES: usize = 256 * 1024;

/// Maximum number of records in a delta. Honest nodes split deltas before that. Each record may
/// have to be verified before anything else is done.
pub const MAX_DELTA: usize = DELTA_BYTES / RECORD_BYTES + 1;
/// Lower bound for the size of a record, by the rough measure that deltas are split by.
pub(super) const RECORD_BYTES: usize = 256;

/// What a node announces about itself. Only the owner makes new versions.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Record {
    /// The node that owns the record.
    pub id: NodeId,
    /// Time of the launch in milliseconds since 1970, plus the number of starts since. A greater
    /// value is later.
    pub incarnation: u64,
    /// Counts the changes within one incarnation.
    pub version: u64,
    /// True once the node has left the cluster for good (`overnode reset`). All other content is
    /// then empty or ignored.
    pub left: bool,
    /// A display name for operators.
    pub nickname: String,
    /// The node's X25519 key for control connections and for the data plane, derived from
    /// [`Self::verifying_key`].
    pub public_key: PublicKey,
    /// Addresses at which the node accepts control connections.
    pub addresses: Vec<SocketAddr>,
    /// Nodes that it has a control connection with, in ascending order.
    pub links: Vec<NodeId>,
    /// Those of [`Self::links`] that it has no direct path to, in ascending order. Other nodes do
    /// not relay packets through such a pair.
    pub no_direct_path: Vec<NodeId>,
    /// The address space that the node announces.
    pub ranges: Vec<IpNet>,
    /// The node's static addresses, which are outside of all ranges.
    pub claims: Vec<IpAddr>,
    /// Names of its containers and names that were added manually on it, in ascending order.
    pub names: Vec<Named>,
    /// The node's identity, which the record is signed with.
    pub verifying_key: VerifyingKey,
    /// Signature over all fields above.
    pub signature: Signature,
}

impl Record {
    /// Returns a record of a node that announces nothing yet. It is not signed.
    pub fn blank(id: NodeId, incarnation: u64, nickname: String, public_key: PublicKey) -> Self {
        Self {
            id,
            incarnation,
            version: 0,
            left: false,
            nickname,
            public_key,
            addresses: Vec::new(),
            links: Vec::new(),
            no_direct_path: Vec::new(),
            ranges: Vec::new(),
            claims: Vec::new(),
            names: Vec::new(),
            verifying_key: VerifyingKey::default(),
            signature: Signature::default(),
        }
    }
}

/// The version of a record for comparison: a greater stamp is newer. Two records of one version
/// differ only if a node lies or a disk was copied. The hash then makes all nodes prefer the same
/// record, and comparing finds the difference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Stamp {
    /// See [`Record::incarnation`].
    pub incarnation: u64,
    /// See [`Record::version`].
    pub version: u64,
    /// The first bytes of the SHA-256 hash of the record in postcard. Not part of the record.
    pub hash: [u8; 4],
}

/// A message between neighbors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// A hash of all stamps that the sender knows. A receiver with a different hash answers with a
    /// [`Message::Digest`].
    Summary([u8; 16]),
    /// Offers records. The receiver requests those that it lacks and offers newer ones that it has.
    Digest {
        /// True if these are all records that the sender knows. The receiver then offers those that
        /// are missing here.
        ask: bool,
        /// The offered records, in ascending order of IDs.
        stamps: Vec<(NodeId, Stamp)>,
    },
    /// Requests these records.
    Request(Vec<NodeId>),
    /// Records that may be new to the receiver.
    Delta(Vec<Record>),
}

/// Bytes that are not a valid message. The connection that they came from should be closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadMessage {
    /// The message is empty.
    #[error("an empty message")]
    Empty,
    /// The message is in another version of the format.
    #[error(
        "a message in format {0}, but this build reads format {GOSSIP_FORMAT}; upgrade overnode \
         on the older host"
    )]
    Format(u8),
    /// The message cannot be decoded.
    #[error("a malformed message")]
    Unreadable,
    /// A record or list is out of bounds.
    #[error("a message with {0}")]
    Bounds(&'static str),
    /// The neighbor sends more than an honest node does.
    #[error(
        "more than an honest node sends: {MESSAGES_PER_SECOND} messages and {} KiB a second",
        BYTES_PER_SECOND >> 10
    )]
    Flood,
    /// A record is not signed with the key that it names.
    #[error("a forged record of node {0}, which that node did not sign")]
    Signature(NodeId),
}

impl Record {
    /// Returns the stamp of the record.
    pub fn stamp(&self) -> Stamp {
        let bytes = postcard::to_allocvec(self).expect("plain data always encodes");
        let mut hash = [0; 4];
        hash.copy_from_slice(&digest(&SHA256, &bytes).as_ref()[..4]);
        Stamp { incarnation: self.incarnation, version: self.version, hash }
    }

    /// Clears everything that is not kept for a node that has left.
    pub(super) fn into_tombstone(self) -> Self {
        Self {
            version: self.version,
            left: true,
            verifying_key: self.verifying_key,
            signature: self.signature,
            ..Self::blank(self.id, self.incarnation, self.nickname, self.public_key)
        }
    }

    /// Returns whether it announces anything, as no tombstone does.
    fn has_content(&self) -> bool {
        // Naming all fields makes the compiler ask about a new one.
        let Self {
            id: _,
            incarnation: _,
            version: _,
            left: _,
            nickname: _,
            public_key: _,
            addresses,
            links,
            no_direct_path,
            ranges,
            claims,
            names,
            verifying_key: _,
            signature: _,
        } = self;
        !(addresses.is_empty()
            && links.is_empty()
            && no_direct_path.is_empty()
            && ranges.is_empty()
            && claims.is_empty()
            && names.is_empty())
    }

    pub(super) fn check(&self) -> Result<(), BadMessage> {
        let bounds = [
            (self.nickname.len() > MAX_NICKNAME, "too long a nickname"),
            (clean(&self.nickname) != self.nickname, "control characters in a nickname"),
            (self.addresses.len() > MAX_ADDRESSES, "too many addresses"),
            (self.ranges.len() > MAX_RANGES, "too many ranges"),
            (self.claims.len() > MAX_CLAIMS, "too many claims"),
            (self.names.len() > MAX_NAMES, "too many names"),
            (
                self.names.iter().map(Named::size).sum::<usize>() > NAME_BYTES,
                "names that are too long in total",
            ),
            (!is_ascending_by(&self.names, |named| named), "names out of order"),
            (!self.names.iter().all(|named| is_relative(&named.name)), "an invalid name"),
            (self.left && self.has_content(), "a tombstone that is not empty"),
            (self.incarnation > MAX_STAMP || self.version > MAX_STAMP, "a version out of range"),
            (!is_ascending(&self.links), "links out of order"),
            (self.links.binary_search(&self.id).is_ok(), "a link from a node to itself"),
            (!is_ascending(&self.no_direct_path), "nodes without a direct path out of order"),
        ];
        match bounds.iter().find(|(broken, _)| *broken) {
            Some((_, what)) => Err(BadMessage::Bounds(what)),
            None => Ok(()),
        }
    }

    /// Brings an own record within the bounds that other nodes check.
    pub(super) fn fit(&mut self) {
        self.nickname = clean(&self.nickname);
        self.addresses.truncate(MAX_ADDRESSES);
        self.ranges.truncate(MAX_RANGES);
        self.claims.truncate(MAX_CLAIMS);
        self.names.retain(|named| is_relative(&named.name));
        self.names.sort();
        self.names.dedup();
        self.names.truncate(MAX_NAMES);
        while self.names.iter().map(Named::size).sum::<usize>() > NAME_BYTES {
            self.names.pop();
        }
    }
}

impl Message {
    /// Encodes the message for the wire.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, vec![GOSSIP_FORMAT]).expect("plain data always encodes")
    }

    /// Decodes a message and checks all bounds.
    ///
    /// # Errors
    /// [`BadMessage`] if the bytes are not a valid message.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadMessage> {
        let (&format, body) = bytes.split_first().ok_or(BadMessage::Empty)?;
        if format != GOSSIP_FORMAT {
            return Err(BadMessage::Format(format));
        }
        let (message, rest) =
            postcard::take_from_bytes(body).map_err(|_| BadMessage::Unreadable)?;
        if !rest.is_empty() {
            return Err(BadMessage::Unreadable);
        }
        match &message {
            Self::Summary(_) => {}
            Self::Digest { stamps, .. } if !is_ascending_by(stamps, |(id, _)| *id) => {
                return Err(BadMessage::Bounds("a digest out of order"));
            }
            Self::Digest { .. } => {}
            Self::Request(ids) if !is_ascending(ids) => {
                return Err(BadMessage::Bounds("a request out of order"));
            }
            Self::Request(_) => {}
            Self::Delta(records) if records.len() > MAX_DELTA => {
                return Err(BadMessage::Bounds("too many records"));
            }
            Self::Delta(records) if !is_ascending_by(records, |record| record.id) => {
                return Err(BadMessage::Bounds("a delta out of order"));
            }
            Self::Delta(records) => records.iter().try_for_each(Record::check)?,
        }
        Ok(message)
    }
}

/// Returns true if the list is strictly ascending. It then has no duplicates, and so no more
/// entries than there are IDs.
fn is_ascending<T: Ord + Copy>(list: &[T]) -> bool {
    is_ascending_by(list, |item| *item)
}

fn is_ascending_by<'a, T, K: Ord>(list: &'a [T], key: impl Fn(&'a T) -> K) -> bool {
    list.windows(2).all(|pair| matches!(pair, [a, b] if key(a) < key(b)))
}
