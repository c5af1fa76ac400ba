//! What neighbours send each other, and its bounds.
//!
//! On the wire: the format's version (one byte, [`FORMAT`]), then a [`Message`] in postcard.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use super::limit::{BYTES_PER_SECOND, MESSAGES_PER_SECOND};
use super::sign::Signature;
use crate::control::hello::{MAX_NICKNAME, clean};
use crate::dns::name::is_relative;
use crate::types::{NodeId, PublicKey, VerifyingKey};

/// The version of the wire format.
pub const FORMAT: u8 = 4;
/// Most control addresses in a record.
pub const MAX_ADDRESSES: usize = 16;
/// Most ranges in a record.
pub const MAX_RANGES: usize = 256;
/// Most static claims in a record.
pub const MAX_CLAIMS: usize = 1024;
/// Most names in a record; one that has several addresses counts several times.
pub const MAX_NAMES: usize = 2000;
/// Most bytes that the names in a record take, by [`Named::size`].
pub const NAME_BYTES: usize = 64 * 1024;
/// Greatest incarnation and version in a record. Of incarnations, much less is believed: see
/// [`super::SKEW_MS`].
pub const MAX_STAMP: u64 = 1 << 62;
/// A delta is cut so that no message exceeds this, in bytes, by more than one record.
pub const DELTA_BYTES: usize = 256 * 1024;

/// Most records in a delta: what an honest node sends is cut before. Each may have to be verified
/// before anything else is done.
pub const MAX_DELTA: usize = DELTA_BYTES / RECORD_BYTES + 1;
/// No record takes less on the wire by the rough measure that deltas are cut by.
pub(super) const RECORD_BYTES: usize = 256;

/// A name and an address that it stands for. The name is as [`dns::name`](crate::dns::name) wants
/// it: relative to the domain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Named {
    /// Without the domain.
    pub name: String,
    /// What it stands for.
    pub address: IpAddr,
}

/// What a node says of itself. Only its owner makes new versions of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Record {
    /// Whose record it is.
    pub id: NodeId,
    /// Counts the node's starts; greater is later.
    pub incarnation: u64,
    /// Counts the changes within one incarnation.
    pub version: u64,
    /// True once the node has left the cluster for good (`overnode reset`): nothing else counts any
    /// more.
    pub left: bool,
    /// For people.
    pub nickname: String,
    /// The node's X25519 key, for control connections and for the data plane: that of
    /// [`Self::verifying_key`].
    pub public_key: PublicKey,
    /// Where its control connections are accepted.
    pub addresses: Vec<SocketAddr>,
    /// Nodes that it has a connection with, in ascending order.
    pub links: Vec<NodeId>,
    /// Those of them that it cannot exchange packets with directly, in ascending order: others do
    /// not relay through such a pair.
    pub dark: Vec<NodeId>,
    /// The address space that it gives out.
    pub ranges: Vec<IpNet>,
    /// Single addresses outside of all ranges that are attached to it.
    pub claims: Vec<IpAddr>,
    /// Names of its containers, and those that were added by hand on it, in ascending order.
    #[serde(default)]
    pub names: Vec<Named>,
    /// The node's identity, which the record is signed by.
    #[serde(default)]
    pub verifying_key: VerifyingKey,
    /// Over everything above.
    #[serde(default)]
    pub signature: Signature,
}

/// How new a record is: the greater is the newer. Two records of one version differ only if
/// somebody lies or a disk was copied; the hash makes all nodes prefer the same one, and comparing
/// finds them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Stamp {
    /// See [`Record::incarnation`].
    pub incarnation: u64,
    /// See [`Record::version`].
    pub version: u64,
    /// The first bytes of the SHA-256 of the record in postcard. Not part of the record.
    pub hash: [u8; 4],
}

/// A message between neighbours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// A hash of everything the sender knows. Who knows something else answers with a
    /// [`Message::Digest`].
    Summary([u8; 16]),
    /// Offers records: who lacks one requests it, and who has a newer one offers that.
    Digest {
        /// If these are all that the sender knows, and it wants to be offered what it does not
        /// name.
        ask: bool,
        /// In ascending order of IDs.
        stamps: Vec<(NodeId, Stamp)>,
    },
    /// Asks for these records.
    Request(Vec<NodeId>),
    /// Records that may be news.
    Delta(Vec<Record>),
}

/// A message that no node of overnode sends. The connection that it came by should be closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadMessage {
    /// No bytes.
    #[error("an empty message")]
    Empty,
    /// Another format.
    #[error(
        "a message in format {0}, where this build reads {FORMAT}; upgrade overnode on the older host"
    )]
    Format(u8),
    /// Not a message.
    #[error("a message that cannot be read")]
    Unreadable,
    /// A record or list beyond its bounds.
    #[error("a message with {0}")]
    Bounds(&'static str),
    /// More than an honest node sends.
    #[error("more than any node has to say: {MESSAGES_PER_SECOND} messages and {} KiB a second", BYTES_PER_SECOND >> 10)]
    Flood,
    /// A record that the key it names has not signed.
    #[error("a false record of node {0}, which that node has not signed")]
    Signature(NodeId),
}

impl Named {
    /// About how many bytes it takes in a record.
    pub fn size(&self) -> usize {
        2 + self.name.len() + if self.address.is_ipv4() { 5 } else { 17 }
    }
}

impl Record {
    /// How new it is.
    pub fn stamp(&self) -> Stamp {
        let bytes = postcard::to_allocvec(self).expect("plain data always encodes");
        let mut hash = [0; 4];
        hash.copy_from_slice(&digest(&SHA256, &bytes).as_ref()[..4]);
        Stamp { incarnation: self.incarnation, version: self.version, hash }
    }

    /// What is kept of a node that has left.
    pub(super) fn into_tombstone(mut self) -> Self {
        self.left = true;
        self.addresses.clear();
        self.links.clear();
        self.dark.clear();
        self.ranges.clear();
        self.claims.clear();
        self.names.clear();
        self
    }

    fn has_content(&self) -> bool {
        !(self.addresses.is_empty()
            && self.links.is_empty()
            && self.dark.is_empty()
            && self.ranges.is_empty()
            && self.claims.is_empty()
            && self.names.is_empty())
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
                "names that are too long together",
            ),
            (!is_ascending_by(&self.names, |named| named), "names out of order"),
            (!self.names.iter().all(|named| is_relative(&named.name)), "a name that cannot be one"),
            (self.left && self.has_content(), "a tombstone that is not empty"),
            (self.incarnation > MAX_STAMP || self.version > MAX_STAMP, "an impossible version"),
            (!is_ascending(&self.links), "links out of order"),
            (self.links.binary_search(&self.id).is_ok(), "a link of a node to itself"),
            (!is_ascending(&self.dark), "dark links out of order"),
        ];
        match bounds.iter().find(|(broken, _)| *broken) {
            Some((_, what)) => Err(BadMessage::Bounds(what)),
            None => Ok(()),
        }
    }

    /// Brings an own record within the bounds that others check.
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
    /// The bytes that travel.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, vec![FORMAT]).expect("plain data always encodes")
    }

    /// Reads a message and checks every bound.
    ///
    /// # Errors
    /// [`BadMessage`].
    pub fn decode(bytes: &[u8]) -> Result<Self, BadMessage> {
        let (&format, body) = bytes.split_first().ok_or(BadMessage::Empty)?;
        if format != FORMAT {
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

/// Strictly ascending: without duplicates, so never more than there are IDs.
fn is_ascending<T: Ord + Copy>(list: &[T]) -> bool {
    is_ascending_by(list, |item| *item)
}

fn is_ascending_by<'a, T, K: Ord>(list: &'a [T], key: impl Fn(&'a T) -> K) -> bool {
    list.windows(2).all(|pair| matches!(pair, [a, b] if key(a) < key(b)))
}
