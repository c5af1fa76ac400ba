//! Defines the greeting that two nodes exchange first, and why they may refuse each other.

use std::io;

use serde::{Deserialize, Serialize};

use super::frame::BadFrame;
use super::key;
use overnode_types::text::is_harmless;
use overnode_types::{Network, NodeId, PublicKey, Secret, VerifyingKey};

/// A node's identity and keys for handshakes.
#[derive(Clone, Debug)]
pub struct LocalIdentity {
    /// X25519 secret of the node. Its public half must be the public key in `hello`.
    pub static_secret: Secret,
    /// Key derived from the token.
    pub cluster_key: Secret,
    /// Greeting of the node.
    pub hello: Hello,
}

/// The oldest control protocol version that this build supports.
pub const OLDEST_VERSION: u16 = 3;
/// The newest control protocol version that this build supports.
pub const NEWEST_VERSION: u16 = 3;
/// Longest nickname, in bytes.
pub const MAX_NICKNAME: usize = 64;

/// A node's introduction of itself. It travels inside the handshake, so only holders of the token
/// can read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest and newest control protocol version that the node supports.
    pub versions: (u16, u16),
    /// The node's ID.
    pub id: NodeId,
    /// Counts the node's starts. A greater value is later.
    pub incarnation: u64,
    /// Name of the node, for display only.
    pub nickname: String,
    /// The cluster's addresses as configured on this node.
    pub network: Network,
    /// The node's identity key, which its records are signed with.
    pub verifying_key: VerifyingKey,
    /// Random number drawn when the daemon starts. It distinguishes this daemon from one that runs
    /// with a copy of its disk.
    pub process: u64,
    /// X25519 key. It is never sent: the handshake proves it, and it follows from `verifying_key`.
    pub public_key: PublicKey,
}

/// Why a connection was refused or ended. The messages are for operators and say what is wrong and
/// what to do.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The other node derives a different key from its token.
    #[error(
        "the token differs: the two nodes were launched with different tokens; run \
         `overnode reset` on the node with the wrong token, then launch it with the cluster's token"
    )]
    Token,
    /// The two nodes have no protocol version in common.
    #[error(
        "no common protocol version: this node supports {} to {}, the other node {} to {}; upgrade \
         overnode on {}",
        ours.0, ours.1, theirs.0, theirs.1,
        if ours.1 < theirs.0 { "this host" } else { "the other host" }
    )]
    Version {
        /// Oldest and newest version of this node.
        ours: (u16, u16),
        /// Oldest and newest version of the other node.
        theirs: (u16, u16),
    },
    /// The subnet or the range differs.
    #[error(
        "the addresses of the cluster differ: this node has subnet {} and range {}, {peer} has \
         subnet {} and range {}; run `overnode reset` on the node with the wrong ones, then launch \
         it with the right --subnet and --range",
        ours.subnet, ours.range, theirs.subnet, theirs.range
    )]
    Network {
        /// Addresses on this node.
        ours: Network,
        /// Addresses on the other node.
        theirs: Network,
        /// ID and nickname of the other node.
        peer: String,
    },
    /// Two running hosts have the same ID.
    #[error(
        "ID {id} is used twice: by {holder} and by {newcomer}; run `overnode reset` on one of \
         them, then launch it with an ID of its own"
    )]
    IdClash {
        /// The ID.
        id: NodeId,
        /// Nickname of the node that had the ID first, as far as this node knows.
        holder: String,
        /// Nickname of the other node.
        newcomer: String,
    },
    /// The other host runs with a copy of this node's disk.
    #[error(
        "another host runs with a copy of this node's disk (node {0}); stop one of the two, run \
         `overnode reset --force` there, and launch it with an ID of its own"
    )]
    Copy(NodeId),
    /// The connection leads back to this node.
    #[error("this address is the node's own; a node needs no connection to itself")]
    Myself,
    /// The handshake exceeded its time limit, or the other side stopped sending. Holds the limit in
    /// seconds.
    #[error(
        "no answer within {0} s: check that a node runs there, that the two hosts can reach each \
         other, and that TCP and UDP ports 6783 and 6784 are open"
    )]
    TimedOut(u64),
    /// The connection failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The other side closed the connection.
    #[error("the other side closed the connection")]
    Closed,
    /// The other end does not follow overnode's protocol.
    #[error("the other end is not an overnode node ({0}); check the address and the port")]
    Garbage(&'static str),
    /// A frame violated the protocol.
    #[error(
        "the other side violated the protocol ({0}); check that both hosts run the same version of \
         overnode"
    )]
    Frame(#[from] BadFrame),
    /// The content of a frame violated the protocol.
    #[error(
        "it was disconnected because it sent {0}; check that it is one of your nodes and runs the \
         same version of overnode"
    )]
    Misconduct(String),
    /// The other side gave a reason that this build does not know.
    #[error(
        "the other side refused the connection for a reason that this version does not know; \
         upgrade overnode on this host"
    )]
    Unknown,
}

impl Refusal {
    /// Whether the address is this node's own, so that dialing it again is pointless.
    pub const fn is_myself(&self) -> bool {
        matches!(self, Self::Myself)
    }

    /// Whether the other side ended an established connection. Its host is up then, whatever became
    /// of its daemon.
    pub fn is_closed_by_peer(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        match self {
            Self::Closed => true,
            Self::Io(error) => {
                matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
            }
            _ => false,
        }
    }

    /// Whether the other side did something that no honest node does.
    pub const fn is_misconduct(&self) -> bool {
        matches!(self, Self::Garbage(_) | Self::Frame(_) | Self::Misconduct(_))
    }
}

/// A refusal in the form that one side sends to the other. Add new reasons at the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// The peer is accepted.
    Welcome,
    /// See [`Refusal::Version`].
    Version,
    /// See [`Refusal::Network`].
    Network,
    /// See [`Refusal::IdClash`].
    IdClash {
        /// The ID.
        id: NodeId,
        /// Nickname of the node that had the ID first.
        holder: String,
        /// Nickname of the other node.
        newcomer: String,
    },
    /// See [`Refusal::Myself`].
    Myself,
    /// Any other reason.
    Other,
    /// See [`Refusal::Copy`].
    Copy,
}

impl Verdict {
    /// Returns what the other side is told about the result of a check.
    pub fn of(checked: &Result<(), Refusal>) -> Self {
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
                | Refusal::Misconduct(_)
                | Refusal::Unknown,
            ) => Self::Other,
        }
    }

    /// Returns why the other side refuses this node, as this node reports it.
    ///
    /// # Errors
    /// Returns the refusal, if it is one.
    pub fn into_result(self, me: &Hello, peer: &Hello) -> Result<(), Refusal> {
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

    /// Returns the bytes that are sent, in postcard encoding.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_allocvec(self).expect("plain data of bounded size always encodes")
    }

    /// Decodes a peer's verdict.
    ///
    /// # Errors
    /// [`Refusal::Unknown`] if this build cannot decode it.
    pub fn decode(bytes: &[u8]) -> Result<Self, Refusal> {
        // A later version may add reasons, whose numbers are unknown here.
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
    /// Returns the bytes that are sent: oldest and newest version (u16 little-endian each), then
    /// postcard.
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
        bytes.extend(
            postcard::to_allocvec(&body).expect("plain data of bounded size always encodes"),
        );
        bytes
    }

    /// Decodes another node's greeting. The handshake has proven the node's X25519 key, so a match
    /// also proves its identity. Later versions may append fields.
    ///
    /// # Errors
    /// [`Refusal::Garbage`] if the greeting is malformed or its identity belongs to another X25519
    /// key. [`Refusal::Version`] if it has no version in common with `ours`.
    pub fn decode(bytes: &[u8], public_key: PublicKey, ours: (u16, u16)) -> Result<Self, Refusal> {
        let Some((&[a, b, c, d], body)) = bytes.split_first_chunk() else {
            return Err(Refusal::Garbage("its greeting is too short"));
        };
        let theirs = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
        if theirs.0 > theirs.1 {
            return Err(Refusal::Garbage("its greeting has an invalid range of versions"));
        }
        if common_version(ours, theirs).is_none() {
            return Err(Refusal::Version { ours, theirs });
        }
        let (body, _later) = postcard::take_from_bytes::<Body>(body)
            .map_err(|_| Refusal::Garbage("its greeting is malformed"))?;
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

    /// Checks whether this node and another are compatible, according to their greetings.
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

/// Returns the newest version that both sides support.
pub fn common_version(ours: (u16, u16), theirs: (u16, u16)) -> Option<u16> {
    let newest = ours.1.min(theirs.1);
    (newest >= ours.0.max(theirs.0)).then_some(newest)
}

/// Returns at most [`MAX_NICKNAME`] bytes of printable text. Text from peers is displayed on
/// terminals.
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
