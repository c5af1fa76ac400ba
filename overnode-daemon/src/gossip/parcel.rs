//! Parcels: what one node sends another that may be no neighbour, over control connections, passed
//! on by those between.
//!
//! A parcel is sent once and may be lost: with a connection, with a node on its way, or because
//! there is no way. Who needs an answer asks again. What arrives was signed by its sender and
//! arrives once: a parcel that was sent before one that has arrived is dropped. A parcel is for one
//! start of its receiver, whose incarnation it names: what was recorded is worth nothing after the
//! receiver has forgotten, by a restart, what has arrived.
//!
//! On the wire, integers big-endian: [`FORMAT`], hops (u8), kind (u8), from and to (u16 each), the
//! sender's incarnation, number, and the receiver's incarnation (u64 each), the signature (64
//! bytes), then the body. Signed is all but the format and the hops, after the name
//! `overnode parcel v2`.

use std::time::Instant;

use super::sign::{self, Signature};
use super::{Action, Gossip};
use crate::types::NodeId;

/// The version of the wire format.
pub const FORMAT: u8 = 2;
/// Longest body, in bytes.
pub const MAX_BODY: usize = 16 * 1024;
/// A parcel may be passed on so often: more than any path between nodes that know the same links,
/// and an end to going in circles.
pub const MAX_HOPS: u8 = 16;
/// Bytes of all but the body.
const HEAD: usize = 2 + SIGNED_HEAD + 64;
/// Those of them that are signed.
const SIGNED_HEAD: usize = 29;
const SIGNED: &[u8] = b"overnode parcel v2";

/// The kind of what asks a node whether it objects to another record of itself: a
/// [`super::Message::Delta`] with that record.
pub const KIND_CLASH: u8 = 0;
/// The kind of what the address allocations of two nodes tell each other.
pub const KIND_ALLOCATION: u8 = 1;

/// A message from node to node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parcel {
    /// Who sent it.
    pub from: NodeId,
    /// Whom it is for.
    pub to: NodeId,
    /// How many connections it may still travel.
    pub hops: u8,
    /// Which part of the node it is for: [`KIND_ALLOCATION`].
    pub kind: u8,
    /// The sender's incarnation, and which of the parcels it is that the sender has sent in it:
    /// greater is later.
    pub serial: (u64, u64),
    /// The receiver's incarnation, as the sender knows it.
    pub receiver: u64,
    /// The sender's.
    pub signature: Signature,
    /// What that part has to say; at most [`MAX_BODY`] bytes.
    pub body: Vec<u8>,
}

/// Bytes that are no parcel. The connection that they came by should be closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadParcel {
    /// Too few bytes.
    #[error("a parcel that is cut short")]
    Short,
    /// Another format.
    #[error(
        "a parcel in format {0}, where this build reads {FORMAT}; upgrade overnode on the older host"
    )]
    Format(u8),
    /// Hops beyond [`MAX_HOPS`], or none at all.
    #[error("a parcel with {0} hops left, where 1 to {MAX_HOPS} may be")]
    Hops(u8),
    /// 0, or beyond 4095.
    #[error("a parcel with the impossible node ID {0}")]
    Id(u16),
    /// From a node to itself.
    #[error("a parcel of a node to itself")]
    Circle,
    /// More than [`MAX_BODY`] bytes.
    #[error("a parcel with a body of {0} bytes, where {MAX_BODY} are the most")]
    Body(usize),
    /// More than an honest node sends.
    #[error("{}", super::BadMessage::Flood)]
    Flood,
}

/// Why a parcel was not sent, or not passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Undelivered {
    /// There is no way to the node now.
    #[error("node {0} is not reached, neither directly nor through others")]
    NoWay(NodeId),
    /// It has travelled too far.
    #[error("it came over {MAX_HOPS} connections and was not there yet")]
    TooFar,
    /// For this node itself.
    #[error("it is for the node that sends it")]
    ToMyself,
    /// More than [`MAX_BODY`] bytes.
    #[error("its body has {0} bytes, where {MAX_BODY} are the most")]
    TooLong(usize),
    /// Too much was passed on to the next node lately.
    #[error("node {0} is sent too much already")]
    Busy(NodeId),
    /// It has come, and its sender has not signed it as far as this node knows the sender's key.
    #[error("it is not signed by node {0} as this node knows it")]
    Unsigned(NodeId),
    /// It has come, and is for an earlier or a later start of this node.
    #[error("node {0} has sent it to another start of this node")]
    OtherStart(NodeId),
    /// It has come before, or after one that was sent later.
    #[error("node {0} has sent it before one that has arrived already")]
    Late(NodeId),
}

impl Parcel {
    /// The bytes that travel.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + self.body.len());
        bytes.extend([FORMAT, self.hops]);
        bytes.extend(self.head());
        bytes.extend(self.signature.0);
        bytes.extend_from_slice(&self.body);
        bytes
    }

    /// Reads a parcel and checks every bound.
    ///
    /// # Errors
    /// [`BadParcel`].
    pub fn decode(bytes: &[u8]) -> Result<Self, BadParcel> {
        let &format = bytes.first().ok_or(BadParcel::Short)?;
        if format != FORMAT {
            return Err(BadParcel::Format(format));
        }
        let mut rest = &bytes[1..];
        let [hops, kind] = take(&mut rest)?;
        if hops == 0 || hops > MAX_HOPS {
            return Err(BadParcel::Hops(hops));
        }
        let mut id = || {
            let id = u16::from_be_bytes(take(&mut rest)?);
            NodeId::new(id).map_err(|_| BadParcel::Id(id))
        };
        let (from, to) = (id()?, id()?);
        if from == to {
            return Err(BadParcel::Circle);
        }
        let serial = (u64::from_be_bytes(take(&mut rest)?), u64::from_be_bytes(take(&mut rest)?));
        let receiver = u64::from_be_bytes(take(&mut rest)?);
        let signature = Signature(take(&mut rest)?);
        if rest.len() > MAX_BODY {
            return Err(BadParcel::Body(rest.len()));
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

fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], BadParcel> {
    let (first, rest) = bytes.split_first_chunk().ok_or(BadParcel::Short)?;
    *bytes = rest;
    Ok(*first)
}

impl Gossip {
    /// Sends something to a node, directly or through others.
    ///
    /// # Errors
    /// [`Undelivered`] if that cannot be now. That there is no error does not mean that it arrives.
    pub fn send_parcel(&mut self, to: NodeId, kind: u8, body: Vec<u8>) -> Result<(), Undelivered> {
        if to == self.own {
            return Err(Undelivered::ToMyself);
        }
        if body.len() > MAX_BODY {
            return Err(Undelivered::TooLong(body.len()));
        }
        let next = self.parcel_hop(to).ok_or(Undelivered::NoWay(to))?;
        let receiver = self.records.get(&to).ok_or(Undelivered::NoWay(to))?.incarnation;
        self.parcels_sent += 1;
        let serial = (self.draft.incarnation, self.parcels_sent);
        let signature = Signature::default();
        let mut parcel =
            Parcel { from: self.own, to, hops: MAX_HOPS, kind, serial, receiver, signature, body };
        parcel.signature = self.signer.sign_bytes(&parcel.signed_part());
        self.actions.push_back(Action::SendParcel { to: next, parcel });
        Ok(())
    }

    /// A parcel came from `peer`: it is for this node ([`Action::Deliver`]), or passed on
    /// ([`Action::SendParcel`]), or dropped. Parcels of nodes that are no neighbours are ignored.
    ///
    /// # Errors
    /// [`BadParcel`] if it breaks the protocol: the connection should be closed.
    pub fn handle_parcel(
        &mut self,
        peer: NodeId,
        bytes: &[u8],
        now: Instant,
    ) -> Result<Option<Undelivered>, BadParcel> {
        if !self.neighbours.contains(&peer) {
            return Ok(None);
        }
        if !self.hear(peer, bytes.len(), now) {
            return Err(BadParcel::Flood);
        }
        let mut parcel = Parcel::decode(bytes)?;
        if parcel.from == self.own {
            return Ok(None);
        }
        if parcel.to == self.own && parcel.kind == KIND_CLASH {
            self.handle_challenge(&parcel.body, now);
            return Ok(None);
        }
        if parcel.to == self.own {
            return Ok(self.accept(parcel).err());
        }
        parcel.hops -= 1;
        if parcel.hops == 0 {
            return Ok(Some(Undelivered::TooFar));
        }
        // Back to where it came from: the two nodes know different links, and would toss it to and
        // fro.
        match self.parcel_hop(parcel.to).filter(|next| *next != peer) {
            Some(next) if self.may_pass(next, HEAD + parcel.body.len(), now) => {
                self.actions.push_back(Action::SendParcel { to: next, parcel });
            }
            Some(next) => return Ok(Some(Undelivered::Busy(next))),
            None => return Ok(Some(Undelivered::NoWay(parcel.to))),
        }
        Ok(None)
    }

    fn accept(&mut self, parcel: Parcel) -> Result<(), Undelivered> {
        let from = parcel.from;
        if ![self.records[&self.own].incarnation, self.draft.incarnation].contains(&parcel.receiver)
        {
            return Err(Undelivered::OtherStart(from));
        }
        let known = self.records.get(&from).map(|record| record.verifying_key);
        let key = self.proven.get(&from).copied().or(known).ok_or(Undelivered::Unsigned(from))?;
        if !sign::is_signature(&key, &parcel.signed_part(), &parcel.signature) {
            return Err(Undelivered::Unsigned(from));
        }
        if self
            .parcels_heard
            .get(&from)
            .is_some_and(|(of, last)| *of == key && parcel.serial <= *last)
        {
            return Err(Undelivered::Late(from));
        }
        self.parcels_heard.insert(from, (key, parcel.serial));
        self.actions.push_back(Action::Deliver(parcel));
        Ok(())
    }

    /// A neighbour needs no word of its own to be reached.
    pub(super) fn parcel_hop(&self, to: NodeId) -> Option<NodeId> {
        if self.neighbours.contains(&to) { Some(to) } else { self.next_hop(to) }
    }
}
