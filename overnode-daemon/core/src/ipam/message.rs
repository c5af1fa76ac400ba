//! Messages between the address allocations of two nodes, and their bounds.
//!
//! On the wire: the version of the format (one byte, [`ALLOCATION_FORMAT`]), then a [`Message`] in
//! postcard.
//! Any message may be lost, repeated, reordered, or arrive days late.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::layout::{Layout, bounds};
use crate::gossip::MAX_STAMP;
use overnode_types::NodeId;

/// Greatest incarnation, epoch, serial and count. As in gossip, the values beyond leave room for a
/// node to outbid what it hears.
const MAX_NUMBER: u64 = MAX_STAMP;
/// Version of the wire format.
pub(crate) const ALLOCATION_FORMAT: u8 = 2;
/// Maximum length of a message in bytes.
pub const MAX_MESSAGE: usize = 16 * 1024;
/// Maximum number of blocks in a list.
pub(crate) const MAX_BLOCKS: usize = 256;
/// Maximum number of parts of a ledger.
pub(crate) const MAX_PARTS: u16 = 1024;
/// Maximum number of other claimants in an answer: only nodes 1 to 4 take back space or lend it.
pub(crate) const MAX_RIVALS: usize = 4;

/// Identifies one request of a node. A round is never reused, because each start of a node has its
/// own incarnation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Round {
    /// The node's incarnation.
    pub incarnation: u64,
    /// Number of the request in this incarnation.
    pub count: u64,
}

/// The lender of a quarter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Title {
    /// Serial of the title, which grows with each change of hands. 0 by birth.
    pub serial: u64,
    /// The node that lends the quarter.
    pub holder: NodeId,
}

/// The blocks that a node has of a quarter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loan {
    /// The epoch of the node's launch.
    pub epoch: u64,
    /// The blocks, in ascending order and without overlaps.
    pub blocks: Vec<IpNet>,
}

/// The relation of a node to a quarter whose birth owner asks about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LenderRole {
    /// The node does not lend the quarter. It may borrow from it.
    None,
    /// The node lends the quarter and will hand it over.
    Lends,
}

/// Why a node does not agree that the space of another node is taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Objection {
    /// It reaches that node.
    Alive,
    /// It knows this later incarnation of that node.
    Newer(u64),
    /// It takes back space itself, from that node or another one, and has the lower ID.
    Mine,
}

/// A node's answer to a claim for a static address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// It does not have the address, and no longer asks for it itself.
    Free,
    /// It has the address.
    Taken,
    /// It asks for the address itself, and has the lower ID.
    Wanted,
}

/// A message between the allocations of two nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// To the lender of a quarter: everything that the sender holds of it, and what it needs. The
    /// sender has given back all that it does not list.
    Request {
        /// The quarter.
        quarter: NodeId,
        /// The serial of the lender's title. A lender with another one answers with
        /// [`Message::Query`].
        serial: u64,
        /// The epoch of the sender's launch.
        epoch: u64,
        /// The round of the request. A later request has a greater one.
        round: Round,
        /// Number of addresses that containers wait for.
        need: u32,
        /// Number of addresses that would be useful, `need` included.
        want: u32,
        /// The blocks that the sender holds, in ascending order.
        holds: Vec<IpNet>,
    },
    /// The answer to [`Message::Request`]: everything that the receiver has from now on.
    Grant {
        /// As in the request.
        quarter: NodeId,
        /// As in the request.
        serial: u64,
        /// As in the request.
        round: Round,
        /// The blocks, in ascending order.
        blocks: Vec<IpNet>,
        /// True if fewer addresses were left than needed.
        exhausted: bool,
    },
    /// A query from the lender of a quarter: the receiver sends a request, so that both have the
    /// same state.
    Query {
        /// The quarter.
        quarter: NodeId,
        /// The serial of the lender's title.
        serial: u64,
    },
    /// From the lender of a quarter: asks whether the receiver knows anything against the title.
    Hold {
        /// The quarter.
        quarter: NodeId,
        /// The serial of the sender's title.
        serial: u64,
        /// The epoch of the sender's launch.
        epoch: u64,
        /// Distinguishes the answer from answers to earlier questions.
        round: Round,
        /// True if the sender is sure of its title. The receiver may then record it.
        sure: bool,
    },
    /// The answer to [`Message::Hold`]: the sender knows nothing against the title, and has not
    /// agreed that the receiver's space is taken back.
    Vouch {
        /// The quarter.
        quarter: NodeId,
        /// As in the question.
        serial: u64,
        /// As in the question.
        round: Round,
        /// True if the holder told the sender of this title while another node vouched for it.
        heard: bool,
    },
    /// The lender of a quarter, as far as the sender has heard.
    Title {
        /// The quarter.
        quarter: NodeId,
        /// The lender and the serial of its title.
        title: Title,
    },
    /// From the birth owner of a quarter that does not lend it yet: asks what the receiver knows
    /// about it.
    Ask {
        /// The epoch of the sender's launch.
        epoch: u64,
        /// Distinguishes the answer from answers to earlier questions.
        round: Round,
    },
    /// The answer to [`Message::Ask`]. From now on the sender takes nothing that was lent under an
    /// earlier title.
    Answer {
        /// As in the question.
        round: Round,
        /// The epoch of the sender's launch.
        epoch: u64,
        /// The latest title that the sender has heard of.
        title: Title,
        /// The sender's relation to the quarter.
        part: LenderRole,
        /// The blocks that the sender holds of the quarter.
        holds: Vec<IpNet>,
        /// Other nodes that may lend the quarter, or that take back the birth owner's space, as far
        /// as the sender has heard.
        rivals: Vec<NodeId>,
    },
    /// Hands a quarter over, with everything that is lent of it.
    Transfer {
        /// The quarter.
        quarter: NodeId,
        /// The serial of the receiver's title.
        serial: u64,
        /// The epoch of the receiver's launch that the quarter is meant for.
        epoch: u64,
        /// The index of this part of the ledger, from 0.
        part: u16,
        /// Number of parts.
        parts: u16,
        /// The blocks of each borrower.
        loans: Vec<(NodeId, Loan)>,
    },
    /// A part is on disk.
    TransferAck {
        /// The quarter.
        quarter: NodeId,
        /// The serial of the title.
        serial: u64,
        /// The index of the part.
        part: u16,
        /// False if a later launch of the sender received the part. It does not take the quarter.
        taken: bool,
    },
    /// An operator has declared a node gone for good, and the sender wants to take back its space.
    Reclaim {
        /// The node.
        of: NodeId,
        /// The last incarnation that the sender knows.
        incarnation: u64,
        /// Distinguishes the answer from answers to earlier questions.
        round: Round,
    },
    /// The sender agrees. From now on it takes nothing from that node.
    ReclaimAck {
        /// The node.
        of: NodeId,
        /// As in the question.
        round: Round,
        /// The epoch of the sender's launch.
        epoch: u64,
        /// The latest titles that the sender has heard of, in the order of the quarters.
        titles: [Title; 4],
        /// True for each quarter that the sender lends itself.
        lends: [bool; 4],
        /// The blocks that the sender holds, of all quarters.
        holds: Vec<IpNet>,
        /// Other claimants that the sender agreed with before, about this node or another one.
        rivals: Vec<NodeId>,
    },
    /// The sender does not agree.
    ReclaimRefused {
        /// The node.
        of: NodeId,
        /// As in the question.
        round: Round,
        /// The objection.
        why: Objection,
    },
    /// The sender agreed long ago and asks whether its promise is still needed.
    Promised {
        /// The node.
        of: NodeId,
        /// The promise covers incarnations up to this one.
        incarnation: u64,
        /// The question that was answered.
        round: Round,
    },
    /// The sender no longer wants the space of that node.
    ReclaimOver {
        /// The node.
        of: NodeId,
        /// Ends all promises that answered a question up to this round.
        round: Round,
    },
    /// The space of a node was taken back. Its incarnations up to this one are gone for good.
    Reclaimed {
        /// The node.
        of: NodeId,
        /// The node's last incarnation.
        incarnation: u64,
        /// The node that took it back.
        by: NodeId,
        /// The latest titles, in the order of the quarters.
        titles: [Title; 4],
    },
    /// The tombstone is on disk, or does not concern the sender.
    ReclaimedAck {
        /// The node.
        of: NodeId,
        /// As announced.
        incarnation: u64,
    },
    /// The sender asks for a static address. The receiver answers whether it has it or asks for it
    /// as well.
    Claim {
        /// The address.
        address: IpAddr,
        /// Distinguishes the answer from answers to earlier questions.
        round: Round,
    },
    /// The answer to [`Message::Claim`].
    ClaimAnswer {
        /// As in the claim.
        address: IpAddr,
        /// As in the claim.
        round: Round,
        /// The sender's relation to the address.
        verdict: Verdict,
    },
}

/// Bytes that are not a valid message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadMessage {
    /// The message is empty.
    #[error("an empty message")]
    Empty,
    /// The message is in another version of the format.
    #[error(
        "a message in format {0}, but this build reads format {ALLOCATION_FORMAT}; upgrade \
         overnode on the older host"
    )]
    Format(u8),
    /// The message cannot be decoded.
    #[error("a malformed message")]
    Unreadable,
    /// A field is out of bounds.
    #[error("a message with {0}")]
    Bounds(&'static str),
}

impl Message {
    /// Encodes the message for the wire.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, vec![ALLOCATION_FORMAT]).expect("plain data always encodes")
    }

    /// Decodes a message and checks all bounds.
    ///
    /// # Errors
    /// [`BadMessage`] if the bytes are not a valid message.
    pub fn decode(bytes: &[u8], layout: &Layout) -> Result<Self, BadMessage> {
        if bytes.len() > MAX_MESSAGE {
            return Err(BadMessage::Bounds("too many bytes"));
        }
        let (&format, body) = bytes.split_first().ok_or(BadMessage::Empty)?;
        if format != ALLOCATION_FORMAT {
            return Err(BadMessage::Format(format));
        }
        let (message, rest) =
            postcard::take_from_bytes::<Self>(body).map_err(|_| BadMessage::Unreadable)?;
        if !rest.is_empty() {
            return Err(BadMessage::Unreadable);
        }
        message.check(layout)?;
        Ok(message)
    }

    /// Returns all incarnations, epochs, serials and counts in the message.
    fn numbers(&self) -> Vec<u64> {
        let of_round = |round: &Round| [round.incarnation, round.count];
        match self {
            Self::Request { serial, epoch, round, .. }
            | Self::Hold { serial, epoch, round, .. } => {
                [vec![*serial, *epoch], of_round(round).to_vec()].concat()
            }
            Self::Grant { serial, round, .. } | Self::Vouch { serial, round, .. } => {
                [vec![*serial], of_round(round).to_vec()].concat()
            }
            Self::Query { serial, .. } | Self::TransferAck { serial, .. } => vec![*serial],
            Self::Title { title, .. } => vec![title.serial],
            Self::Ask { epoch, round } => [vec![*epoch], of_round(round).to_vec()].concat(),
            Self::Answer { round, epoch, title, .. } => {
                [vec![*epoch, title.serial], of_round(round).to_vec()].concat()
            }
            Self::Transfer { serial, epoch, loans, .. } => {
                let epochs = loans.iter().map(|(_, loan)| loan.epoch);
                [*serial, *epoch].into_iter().chain(epochs).collect()
            }
            Self::Reclaim { incarnation, round, .. }
            | Self::Promised { incarnation, round, .. } => {
                [vec![*incarnation], of_round(round).to_vec()].concat()
            }
            Self::ReclaimAck { round, epoch, titles, .. } => {
                [vec![*epoch], of_round(round).to_vec(), titles.map(|it| it.serial).to_vec()]
                    .concat()
            }
            Self::ReclaimRefused { round, why, .. } => match why {
                Objection::Newer(incarnation) => {
                    [vec![*incarnation], of_round(round).to_vec()].concat()
                }
                Objection::Alive | Objection::Mine => of_round(round).to_vec(),
            },
            Self::ReclaimOver { round, .. } => of_round(round).to_vec(),
            Self::Reclaimed { incarnation, titles, .. } => {
                [vec![*incarnation], titles.map(|title| title.serial).to_vec()].concat()
            }
            Self::ReclaimedAck { incarnation, .. } => vec![*incarnation],
            Self::Claim { round, .. } | Self::ClaimAnswer { round, .. } => of_round(round).to_vec(),
        }
    }

    fn check(&self, layout: &Layout) -> Result<(), BadMessage> {
        let in_quarter = |quarter: NodeId, blocks: &[IpNet]| {
            if !quarter.has_initial_quarter() {
                return Err(BadMessage::Bounds("a quarter that does not exist"));
            }
            check_blocks(blocks, |block| layout.quarter_of(block) == Some(quarter))
        };
        if self.numbers().into_iter().any(|number| number > MAX_NUMBER) {
            return Err(BadMessage::Bounds("a number out of range"));
        }
        match self {
            Self::Request { quarter, holds: blocks, .. } | Self::Grant { quarter, blocks, .. } => {
                in_quarter(*quarter, blocks)
            }
            Self::Query { quarter, .. }
            | Self::Hold { quarter, .. }
            | Self::Vouch { quarter, .. }
            | Self::Title { quarter, .. }
            | Self::TransferAck { quarter, .. } => in_quarter(*quarter, &[]),
            Self::Answer { holds, rivals, .. } | Self::ReclaimAck { holds, rivals, .. } => {
                let is_possible =
                    rivals.len() <= MAX_RIVALS && rivals.iter().all(|id| id.has_initial_quarter());
                if !is_possible {
                    return Err(BadMessage::Bounds("invalid claimants"));
                }
                check_blocks(holds, |block| layout.quarter_of(block).is_some())
            }
            Self::Transfer { quarter, part, parts, loans, .. } => {
                if part >= parts || *parts > MAX_PARTS {
                    return Err(BadMessage::Bounds("a part that does not exist"));
                }
                if !loans.windows(2).all(|pair| matches!(pair, [a, b] if a.0 < b.0)) {
                    return Err(BadMessage::Bounds("loans out of order"));
                }
                in_quarter(*quarter, &[])?;
                loans.iter().try_for_each(|(_, loan)| in_quarter(*quarter, &loan.blocks))
            }
            Self::Claim { address, .. } | Self::ClaimAnswer { address, .. } => layout
                .check_static(*address)
                .map_err(|_| BadMessage::Bounds("an address that is not static")),
            Self::Ask { .. }
            | Self::Promised { .. }
            | Self::Reclaim { .. }
            | Self::ReclaimRefused { .. }
            | Self::ReclaimOver { .. }
            | Self::Reclaimed { .. }
            | Self::ReclaimedAck { .. } => Ok(()),
        }
    }
}

fn check_blocks(blocks: &[IpNet], is_allowed: impl Fn(IpNet) -> bool) -> Result<(), BadMessage> {
    if blocks.len() > MAX_BLOCKS {
        return Err(BadMessage::Bounds("too many blocks"));
    }
    if !blocks.windows(2).all(|pair| matches!(pair, [a, b] if bounds(*a).1 < bounds(*b).0)) {
        return Err(BadMessage::Bounds("blocks out of order"));
    }
    if !blocks.iter().all(|block| block.trunc() == *block && is_allowed(*block)) {
        return Err(BadMessage::Bounds("a block that cannot be lent"));
    }
    Ok(())
}
