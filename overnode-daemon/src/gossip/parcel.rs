//! Parcels: what one node sends another that may be no neighbour, over control connections, passed on by those between.
//!
//! A parcel is sent once and may be lost: with a connection, with a node on its way, or because there is no way. Who needs an answer asks
//! again. What arrives is not necessarily in order.
//!
//! On the wire: [`FORMAT`], hops (u8), kind (u8), from and to (u16, big-endian), then the body.

use std::time::Instant;

use super::{Action, Gossip};
use crate::types::NodeId;

/// The version of the wire format.
pub const FORMAT: u8 = 1;
/// Longest body, in bytes.
pub const MAX_BODY: usize = 16 * 1024;
/// A parcel may be passed on so often: more than any path between nodes that know the same links, and an end to going in circles.
pub const MAX_HOPS: u8 = 16;
/// The kind of what asks a node whether it objects to another record of itself: a [`super::Message::Delta`] with that record.
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
    #[error("a parcel in format {0}, where this build reads {FORMAT}; upgrade overnode on the older host")]
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
}

impl Parcel {
    /// The bytes that travel.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(7 + self.body.len());
        bytes.extend([FORMAT, self.hops, self.kind]);
        bytes.extend(self.from.get().to_be_bytes());
        bytes.extend(self.to.get().to_be_bytes());
        bytes.extend_from_slice(&self.body);
        bytes
    }

    /// Reads a parcel and checks every bound.
    ///
    /// # Errors
    /// [`BadParcel`].
    pub fn decode(bytes: &[u8]) -> Result<Self, BadParcel> {
        let Some((&[format, hops, kind, a, b, c, d], body)) = bytes.split_first_chunk() else {
            return Err(BadParcel::Short);
        };
        if format != FORMAT {
            return Err(BadParcel::Format(format));
        }
        if hops == 0 || hops > MAX_HOPS {
            return Err(BadParcel::Hops(hops));
        }
        let id = |bytes| {
            let id = u16::from_be_bytes(bytes);
            NodeId::new(id).map_err(|_| BadParcel::Id(id))
        };
        let (from, to) = (id([a, b])?, id([c, d])?);
        if from == to {
            return Err(BadParcel::Circle);
        }
        if body.len() > MAX_BODY {
            return Err(BadParcel::Body(body.len()));
        }
        Ok(Self { from, to, hops, kind, body: body.to_vec() })
    }
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
        let parcel = Parcel { from: self.own, to, hops: MAX_HOPS, kind, body };
        self.actions.push_back(Action::SendParcel { to: next, parcel });
        Ok(())
    }

    /// A parcel came from `peer`: it is for this node ([`Action::Deliver`]), or passed on ([`Action::SendParcel`]), or dropped. Parcels of
    /// nodes that are no neighbours are ignored.
    ///
    /// # Errors
    /// [`BadParcel`] if it breaks the protocol: the connection should be closed.
    pub fn handle_parcel(
        &mut self,
        peer: NodeId,
        bytes: &[u8],
        now: Instant,
    ) -> Result<Option<Undelivered>, BadParcel> {
        let mut parcel = Parcel::decode(bytes)?;
        if !self.neighbours.contains(&peer) || parcel.from == self.own {
            return Ok(None);
        }
        if parcel.to == self.own && parcel.kind == KIND_CLASH {
            self.handle_challenge(&parcel.body, now);
            return Ok(None);
        }
        if parcel.to == self.own {
            self.actions.push_back(Action::Deliver(parcel));
            return Ok(None);
        }
        parcel.hops -= 1;
        if parcel.hops == 0 {
            return Ok(Some(Undelivered::TooFar));
        }
        // Back to where it came from: the two nodes know different links, and would toss it to and fro.
        match self.parcel_hop(parcel.to).filter(|next| *next != peer) {
            Some(next) => self.actions.push_back(Action::SendParcel { to: next, parcel }),
            None => return Ok(Some(Undelivered::NoWay(parcel.to))),
        }
        Ok(None)
    }

    /// A neighbour needs no word of its own to be reached.
    pub(super) fn parcel_hop(&self, to: NodeId) -> Option<NodeId> {
        if self.neighbours.contains(&to) { Some(to) } else { self.next_hop(to) }
    }
}
