//! What two nodes tell each other first, and why they may refuse each other.

use std::io;

use serde::{Deserialize, Serialize};

use super::frame::BadFrame;
use super::key;
use crate::text::is_harmless;
use crate::types::{Network, NodeId, PublicKey, VerifyingKey};

/// The oldest control protocol that this build speaks.
pub const OLDEST_VERSION: u16 = 3;
/// The newest control protocol that this build speaks.
pub const NEWEST_VERSION: u16 = 3;
/// Longest nickname, in bytes.
pub const MAX_NICKNAME: usize = 64;

/// A node, as it introduces itself. Travels inside the handshake, so only holders of the token read
/// it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest and newest control protocol that the node speaks.
    pub versions: (u16, u16),
    /// The node's ID.
    pub id: NodeId,
    /// Counts the node's starts; greater is later.
    pub incarnation: u64,
    /// For people.
    pub nickname: String,
    /// The cluster's addresses, as this node was told.
    pub network: Network,
    /// Its identity, which its records are signed by.
    pub verifying_key: VerifyingKey,
    /// Drawn when the daemon starts: tells it from another that runs with a copy of its disk.
    pub process: u64,
    /// Never sent: proven by the handshake, and follows from the identity.
    pub public_key: PublicKey,
}

/// Why a connection was refused or ended. The words are for people: what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The other node derives another key from its token.
    #[error(
        "the token differs: the two nodes were launched with different tokens; on the one that has the wrong token run \
         `overnode reset`, then launch it with the cluster's token"
    )]
    Token,
    /// No protocol version in common.
    #[error(
        "no common protocol version: this node speaks {} to {}, the other {} to {}; upgrade overnode on {}",
        ours.0, ours.1, theirs.0, theirs.1, if ours.1 < theirs.0 { "this host" } else { "the other host" }
    )]
    Version {
        /// This node's oldest and newest.
        ours: (u16, u16),
        /// The other's.
        theirs: (u16, u16),
    },
    /// Another subnet or range.
    #[error(
        "the addresses of the cluster differ: this node has subnet {} and range {}, {peer} has subnet {} and range {}; \
         run `overnode reset` on the wrong one, then launch it with the right --subnet and --range",
        ours.subnet, ours.range, theirs.subnet, theirs.range
    )]
    Network {
        /// This node's.
        ours: Network,
        /// The other's.
        theirs: Network,
        /// The other node: its ID and nickname.
        peer: String,
    },
    /// Two living hosts have the same ID.
    #[error(
        "ID {id} is used twice: by {holder} and by {newcomer}; run `overnode reset` on one of them, then launch it with an \
         ID of its own"
    )]
    IdClash {
        /// The ID.
        id: NodeId,
        /// The nickname of the one that had it first, as far as this node knows.
        holder: String,
        /// The nickname of the other.
        newcomer: String,
    },
    /// The other host has this one's disk.
    #[error(
        "another host runs with a copy of this node's disk (node {0}); stop one of the two, run `overnode reset --force` there, and          launch it with an ID of its own"
    )]
    Copy(NodeId),
    /// The connection leads back to this node.
    #[error("this address is the node's own; it needs no connection to itself")]
    Myself,
    /// The handshake took longer than it may, or the other side fell silent.
    #[error(
        "no answer within {0} s: check that a node runs there, that both hosts see each other, and that TCP and UDP ports \
         6783 and 6784 are open"
    )]
    TimedOut(u64),
    /// The connection failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The other side closed the connection.
    #[error("the other side closed the connection")]
    Closed,
    /// Not the protocol of overnode.
    #[error("the other end is no overnode node ({0}); check the address and the port")]
    Garbage(&'static str),
    /// A frame that breaks the protocol's rules.
    #[error("the other side broke the protocol ({0}); check that both hosts run the same overnode")]
    Frame(#[from] BadFrame),
    /// The other side broke the rules of what travels in frames.
    #[error(
        "it was cut off because it sent {0}; check that it is a node of yours and runs the same overnode"
    )]
    CutOff(String),
    /// The other side gave a reason that this build does not know.
    #[error(
        "the other side refused for a reason that this version does not know; upgrade overnode on this host"
    )]
    Unknown,
}

impl Refusal {
    /// True if trying the same address again is pointless: it is this node.
    pub const fn is_myself(&self) -> bool {
        matches!(self, Self::Myself)
    }

    /// True if the other side did what no honest node does.
    pub const fn is_misconduct(&self) -> bool {
        matches!(self, Self::Garbage(_) | Self::Frame(_) | Self::CutOff(_))
    }
}

/// A refusal as one side tells it to the other. New reasons go to the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// None: the peer is taken.
    Welcome,
    /// See [`Refusal::Version`].
    Version,
    /// See [`Refusal::Network`].
    Network,
    /// See [`Refusal::IdClash`].
    IdClash {
        /// The ID.
        id: NodeId,
        /// Who had it first.
        holder: String,
        /// Who came later.
        newcomer: String,
    },
    /// See [`Refusal::Myself`].
    Myself,
    /// Anything else.
    Other,
    /// See [`Refusal::Copy`].
    Copy,
}

impl Verdict {
    pub(super) fn of(checked: &Result<(), Refusal>) -> Self {
        match checked {
            Ok(()) => Self::Welcome,
            Err(Refusal::Version { .. }) => Self::Version,
            Err(Refusal::Network { .. }) => Self::Network,
            Err(Refusal::IdClash { id, holder, newcomer }) => {
                Self::IdClash { id: *id, holder: clip(holder), newcomer: clip(newcomer) }
            }
            Err(Refusal::Myself) => Self::Myself,
            Err(Refusal::Copy(_)) => Self::Copy,
            Err(
                Refusal::Token
                | Refusal::TimedOut(_)
                | Refusal::Io(_)
                | Refusal::Closed
                | Refusal::Garbage(_)
                | Refusal::Frame(_)
                | Refusal::CutOff(_)
                | Refusal::Unknown,
            ) => Self::Other,
        }
    }

    pub(super) fn into_result(self, me: &Hello, peer: &Hello) -> Result<(), Refusal> {
        match self {
            Self::Welcome => Ok(()),
            Self::Version => Err(Refusal::Version { ours: me.versions, theirs: peer.versions }),
            Self::Network => Err(network(me, peer)),
            Self::IdClash { id, holder, newcomer } => {
                Err(Refusal::IdClash { id, holder, newcomer })
            }
            Self::Myself => Err(Refusal::Myself),
            Self::Other => Err(Refusal::Unknown),
            Self::Copy => Err(Refusal::Copy(me.id)),
        }
    }

    /// The bytes that travel: postcard.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_allocvec(self).expect("plain data of bounded size")
    }

    /// Reads what a peer says.
    ///
    /// # Errors
    /// [`Refusal::Unknown`] for what this build cannot read.
    pub fn decode(bytes: &[u8]) -> Result<Self, Refusal> {
        // A reason added by a later version has an unknown number.
        let verdict: Self = postcard::from_bytes(bytes).map_err(|_| Refusal::Unknown)?;
        match verdict {
            Self::IdClash { id, holder, newcomer } => {
                Ok(Self::IdClash { id, holder: clean(&holder), newcomer: clean(&newcomer) })
            }
            other => Ok(other),
        }
    }
}

impl Hello {
    /// The bytes that travel: oldest and newest version (u16 little-endian each), then postcard.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = [self.versions.0.to_le_bytes(), self.versions.1.to_le_bytes()].concat();
        let body = Body {
            id: self.id,
            incarnation: self.incarnation,
            nickname: clip(&self.nickname),
            network: self.network,
            verifying_key: self.verifying_key,
            process: self.process,
        };
        bytes.extend(postcard::to_allocvec(&body).expect("plain data of bounded size"));
        bytes
    }

    /// Reads what another node wrote, of which the handshake has proven the X25519 key; later
    /// versions may append to it. So its identity is proven, too.
    ///
    /// # Errors
    /// [`Refusal::Garbage`], also if the identity has another X25519 key, or [`Refusal::Version`]
    /// if no version is common with `ours`.
    pub fn decode(bytes: &[u8], public_key: PublicKey, ours: (u16, u16)) -> Result<Self, Refusal> {
        let Some((&[a, b, c, d], body)) = bytes.split_first_chunk() else {
            return Err(Refusal::Garbage("its greeting is too short"));
        };
        let theirs = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
        if theirs.0 > theirs.1 {
            return Err(Refusal::Garbage("its greeting has an impossible version"));
        }
        if common_version(ours, theirs).is_none() {
            return Err(Refusal::Version { ours, theirs });
        }
        let (body, _later) = postcard::take_from_bytes::<Body>(body)
            .map_err(|_| Refusal::Garbage("its greeting cannot be read"))?;
        if key::exchange_key(&body.verifying_key) != Some(public_key) {
            return Err(Refusal::Garbage("its greeting names the identity of another node"));
        }
        Ok(Self {
            versions: theirs,
            id: body.id,
            incarnation: body.incarnation,
            nickname: clean(&body.nickname),
            network: body.network,
            verifying_key: body.verifying_key,
            process: body.process,
            public_key,
        })
    }

    /// Whether this node and another fit together, as far as the two greetings tell.
    ///
    /// # Errors
    /// The [`Refusal`] that applies.
    pub fn check(&self, peer: &Self) -> Result<(), Refusal> {
        if self.public_key == peer.public_key && self.id == peer.id && self.process == peer.process
        {
            return Err(Refusal::Myself);
        }
        if common_version(self.versions, peer.versions).is_none() {
            return Err(Refusal::Version { ours: self.versions, theirs: peer.versions });
        }
        if self.network != peer.network {
            return Err(network(self, peer));
        }
        if self.public_key == peer.public_key {
            return Err(Refusal::Copy(self.id));
        }
        if self.id == peer.id {
            return Err(Refusal::IdClash {
                id: self.id,
                holder: self.nickname.clone(),
                newcomer: peer.nickname.clone(),
            });
        }
        Ok(())
    }
}

/// The newest version that both speak.
pub fn common_version(ours: (u16, u16), theirs: (u16, u16)) -> Option<u16> {
    let newest = ours.1.min(theirs.1);
    (newest >= ours.0.max(theirs.0)).then_some(newest)
}

/// At most [`MAX_NICKNAME`] bytes of printable text: what peers say ends up on terminals.
pub fn clean(text: &str) -> String {
    clip(&text.chars().filter(|c| is_harmless(*c)).collect::<String>())
}

#[derive(Serialize, Deserialize)]
struct Body {
    id: NodeId,
    incarnation: u64,
    nickname: String,
    network: Network,
    verifying_key: VerifyingKey,
    process: u64,
}

fn network(me: &Hello, peer: &Hello) -> Refusal {
    Refusal::Network {
        ours: me.network,
        theirs: peer.network,
        peer: format!("node {} ({})", peer.id, peer.nickname),
    }
}

fn clip(text: &str) -> String {
    let mut end = text.len().min(MAX_NICKNAME);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}
