//! Routed messages: messages between two nodes that may not be neighbors, forwarded over control
//! connections by the nodes between them.
//!
//! A routed message is sent once and may be lost: with a connection, with a node on its path, or
//! because no path exists. A sender that needs an answer sends again. The receiver checks the
//! sender's signature and accepts each message at most once: a message that was sent before one
//! that has arrived is dropped. A message is for one start of its receiver and names that
//! incarnation. After a restart the receiver has forgotten which messages have arrived, but
//! messages recorded before it are no longer valid.
//!
//! On the wire, with big-endian integers: [`ROUTED_FORMAT`], hops (u8), kind (u8), from and to
//! (u16 each), the sender's incarnation, number, and the receiver's incarnation (u64 each), the
//! signature (64 bytes), then the body. The signature covers everything except the format, the hops
//! and itself, after the label `overnode parcel v2`.

use std::time::Instant;

use super::sign::{self, Signature};
use super::{Action, Gossip};
use overnode_types::NodeId;

/// Version of the wire format.
pub const ROUTED_FORMAT: u8 = 2;
/// Maximum length of the body in bytes.
pub const MAX_BODY: usize = 16 * 1024;
/// Maximum number of connections that a message travels. Longer than any path between nodes that
/// know the same links, and a bound for loops.
pub const MAX_HOPS: u8 = 16;
/// Length in bytes of everything but the body.
const HEAD: usize = 2 + SIGNED_HEAD + 64;
/// Length in bytes of the signed part of the header.
const SIGNED_HEAD: usize = 29;
const SIGNED: &[u8] = b"overnode parcel v2";

/// The kind of a message that asks a node whether it objects to another record of itself: a
/// [`super::Message::Delta`] with that record.
pub const KIND_CLASH: u8 = 0;
/// The kind of messages between the address allocations of two nodes.
pub const KIND_ALLOCATION: u8 = 1;

/// A message from one node to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoutedMessage {
    /// The sender.
    pub from: NodeId,
    /// The receiver.
    pub to: NodeId,
    /// Number of connections that it may still travel, 1 to [`MAX_HOPS`].
    pub hops: u8,
    /// The part of the node that it is for: [`KIND_ALLOCATION`] or [`KIND_CLASH`].
    pub kind: u8,
    /// The sender's incarnation, and the number of the message in it. A greater pair is later.
    pub serial: (u64, u64),
    /// The receiver's incarnation, as the sender knows it.
    pub receiver: u64,
    /// The sender's signature.
    pub signature: Signature,
    /// The content, at most [`MAX_BODY`] bytes.
    pub body: Vec<u8>,
}

/// Bytes that are not a valid routed message. The connection that they came from should be closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRoutedMessage {
    /// There are too few bytes.
    #[error("a truncated routed message")]
    Short,
    /// The message is in another version of the format.
    #[error(
        "a routed message in format {0}, but this build reads format {ROUTED_FORMAT}; upgrade \
         overnode on the older host"
    )]
    Format(u8),
    /// The number of hops is 0 or beyond [`MAX_HOPS`].
    #[error("a routed message with {0} hops left, outside of 1 to {MAX_HOPS}")]
    Hops(u8),
    /// The node ID is 0 or beyond 4095.
    #[error("a routed message with the invalid node ID {0}")]
    Id(u16),
    /// The message is from a node to itself.
    #[error("a routed message from a node to itself")]
    Circle,
    /// The body has more than [`MAX_BODY`] bytes.
    #[error("a routed message with a body of {0} bytes, more than {MAX_BODY}")]
    Body(usize),
    /// The neighbor sends more than an honest node does.
    #[error("{}", super::BadMessage::Flood)]
    Flood,
}

/// Why a routed message was not sent, forwarded or accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Undelivered {
    /// There is no path to the node now.
    #[error("node {0} is not reachable, either directly or through other nodes")]
    NoPath(NodeId),
    /// The message has used up its hops.
    #[error("it did not arrive within {MAX_HOPS} hops")]
    TooFar,
    /// The message is for this node itself.
    #[error("it is addressed to its own sender")]
    ToMyself,
    /// The body has more than [`MAX_BODY`] bytes.
    #[error("its body has {0} bytes, more than {MAX_BODY}")]
    TooLong(usize),
    /// Too much was forwarded to the next node lately.
    #[error("too much is being sent to node {0} already")]
    Busy(NodeId),
    /// The message has arrived, but is not signed with the sender's key as this node knows it.
    #[error("it is not signed with the key that this node knows of node {0}")]
    Unsigned(NodeId),
    /// The message has arrived, but is for an earlier or later start of this node.
    #[error("node {0} sent it to an earlier or later start of this node")]
    OtherStart(NodeId),
    /// The message has arrived before, or after one that was sent later.
    #[error("node {0} sent it no later than one that has already arrived")]
    Late(NodeId),
}

impl RoutedMessage {
    /// Encodes the message for the wire.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + self.body.len());
        bytes.extend([ROUTED_FORMAT, self.hops]);
        bytes.extend(self.head());
        bytes.extend(self.signature.0);
        bytes.extend_from_slice(&self.body);
        bytes
    }

    /// Decodes a message and checks all bounds.
    ///
    /// # Errors
    /// [`BadRoutedMessage`] if the bytes are not a valid message.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadRoutedMessage> {
        let &format = bytes.first().ok_or(BadRoutedMessage::Short)?;
        if format != ROUTED_FORMAT {
            return Err(BadRoutedMessage::Format(format));
        }
        let mut rest = &bytes[1..];
        let [hops, kind] = take(&mut rest)?;
        if hops == 0 || hops > MAX_HOPS {
            return Err(BadRoutedMessage::Hops(hops));
        }
        let mut id = || {
            let id = u16::from_be_bytes(take(&mut rest)?);
            NodeId::new(id).map_err(|_| BadRoutedMessage::Id(id))
        };
        let (from, to) = (id()?, id()?);
        if from == to {
            return Err(BadRoutedMessage::Circle);
        }
        let serial = (u64::from_be_bytes(take(&mut rest)?), u64::from_be_bytes(take(&mut rest)?));
        let receiver = u64::from_be_bytes(take(&mut rest)?);
        let signature = Signature(take(&mut rest)?);
        if rest.len() > MAX_BODY {
            return Err(BadRoutedMessage::Body(rest.len()));
        }
        Ok(Self { from, to, hops, kind, serial, receiver, signature, body: rest.to_vec() })
    }

    fn head(&self) -> [u8; SIGNED_HEAD] {
        let mut head = [0; SIGNED_HEAD];
        head[0] = self.kind;
        head[1..3].copy_from_slice(&self.from.get().to_be_bytes());
        head[3..5].copy_from_slice(&self.to.get().to_be_bytes());
        head[5..13].copy_from_slice(&self.serial.0.to_be_bytes());
        head[13..21].copy_from_slice(&self.serial.1.to_be_bytes());
        head[21..].copy_from_slice(&self.receiver.to_be_bytes());
        head
    }

    fn signed_part(&self) -> Vec<u8> {
        [SIGNED, &self.head(), &self.body].concat()
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], BadRoutedMessage> {
    let (first, rest) = bytes.split_first_chunk().ok_or(BadRoutedMessage::Short)?;
    *bytes = rest;
    Ok(*first)
}

impl Gossip {
    /// Sends a routed message to a node, directly or through other nodes.
    ///
    /// # Errors
    /// [`Undelivered`] if the message cannot be sent now. Success does not mean that it arrives.
    pub fn send_routed(&mut self, to: NodeId, kind: u8, body: Vec<u8>) -> Result<(), Undelivered> {
        if to == self.own {
            return Err(Undelivered::ToMyself);
        }
        if body.len() > MAX_BODY {
            return Err(Undelivered::TooLong(body.len()));
        }
        let next = self.next_hop_of_routed(to).ok_or(Undelivered::NoPath(to))?;
        let receiver = self.records.get(&to).ok_or(Undelivered::NoPath(to))?.incarnation;
        self.routed_sent += 1;
        let serial = (self.draft.incarnation, self.routed_sent);
        let signature = Signature::default();
        let mut routed = RoutedMessage {
            from: self.own,
            to,
            hops: MAX_HOPS,
            kind,
            serial,
            receiver,
            signature,
            body,
        };
        routed.signature = self.signer.sign_bytes(&routed.signed_part());
        self.actions.push_back(Action::SendRouted { to: next, routed });
        Ok(())
    }

    /// Handles a routed message from `peer`: delivers it ([`Action::Deliver`]), forwards it
    /// ([`Action::SendRouted`]) or drops it. Messages from nodes that are not neighbors are
    /// ignored.
    ///
    /// # Errors
    /// [`BadRoutedMessage`] if the message violates the protocol or exceeds the peer's allowance.
    /// The connection should be closed.
    pub fn handle_routed(
        &mut self,
        peer: NodeId,
        bytes: &[u8],
        now: Instant,
    ) -> Result<Option<Undelivered>, BadRoutedMessage> {
        if !self.neighbors.contains(&peer) {
            return Ok(None);
        }
        if !self.charge_received(peer, bytes.len(), now) {
            return Err(BadRoutedMessage::Flood);
        }
        let mut routed = RoutedMessage::decode(bytes)?;
        if routed.from == self.own {
            return Ok(None);
        }
        if routed.to == self.own && routed.kind == KIND_CLASH {
            self.handle_challenge(&routed.body, now);
            return Ok(None);
        }
        if routed.to == self.own {
            return Ok(self.accept(routed).err());
        }
        routed.hops -= 1;
        if routed.hops == 0 {
            return Ok(Some(Undelivered::TooFar));
        }
        // The message is not sent back to the node that it came from. The two nodes know different
        // links and would bounce it back and forth.
        match self.next_hop_of_routed(routed.to).filter(|next| *next != peer) {
            Some(next) if self.may_forward(next, HEAD + routed.body.len(), now) => {
                self.actions.push_back(Action::SendRouted { to: next, routed });
            }
            Some(next) => return Ok(Some(Undelivered::Busy(next))),
            None => return Ok(Some(Undelivered::NoPath(routed.to))),
        }
        Ok(None)
    }

    fn accept(&mut self, routed: RoutedMessage) -> Result<(), Undelivered> {
        let from = routed.from;
        if ![self.records[&self.own].incarnation, self.draft.incarnation].contains(&routed.receiver)
        {
            return Err(Undelivered::OtherStart(from));
        }
        let known = self.records.get(&from).map(|record| record.verifying_key);
        let key = self.proven.get(&from).copied().or(known).ok_or(Undelivered::Unsigned(from))?;
        if !sign::is_signature(&key, &routed.signed_part(), &routed.signature) {
            return Err(Undelivered::Unsigned(from));
        }
        if self
            .last_routed_from
            .get(&from)
            .is_some_and(|(of, last)| *of == key && routed.serial <= *last)
        {
            return Err(Undelivered::Late(from));
        }
        self.last_routed_from.insert(from, (key, routed.serial));
        self.actions.push_back(Action::Deliver(routed));
        Ok(())
    }

    /// Returns the next hop to a node. A neighbor is reachable even if no record of it is known.
    pub(super) fn next_hop_of_routed(&self, to: NodeId) -> Option<NodeId> {
        if self.neighbors.contains(&to) { Some(to) } else { self.next_hop(to) }
    }
}
