//! What the allocations of two nodes say to each other, and its bounds.
//!
//! On the wire: the format's version (one byte, [`FORMAT`]), then a [`Message`] in postcard. Any
//! message may be lost, repeated, overtaken, or arrive after days.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::layout::{Layout, bounds};
use crate::gossip::MAX_STAMP;
use crate::types::NodeId;

/// Greatest incarnation, epoch, serial and count: as in gossip, there is room beyond for a node to
/// outbid what it hears.
const MAX_NUMBER: u64 = MAX_STAMP;
/// The version of the wire format.
pub const FORMAT: u8 = 2;
/// The longest message, in bytes.
pub const MAX_MESSAGE: usize = 16 * 1024;
/// Most blocks in a list.
pub const MAX_BLOCKS: usize = 256;
/// Most parts of a ledger.
pub const MAX_PARTS: u16 = 1024;
/// Most other claimants that an answer names: only nodes 1 to 4 take back space, or lend it.
pub const MAX_RIVALS: usize = 4;

/// Names one request of a node. It is never used for another, because each start of the node has an
/// incarnation of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Round {
    /// The node's incarnation.
    pub incarnation: u64,
    /// Counts its requests.
    pub count: u64,
}

/// Who lends a quarter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Title {
    /// Counts the changes of hands; 0 by birth.
    pub serial: u64,
    /// The node.
    pub holder: NodeId,
}

/// What a node has of a quarter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loan {
    /// The launch of the node.
    pub epoch: u64,
    /// In ascending order, none overlapping.
    pub blocks: Vec<IpNet>,
}

/// What a node that is asked by the birth owner of a quarter has to do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    /// It only borrows, or not even that.
    None,
    /// It lends the quarter, and will hand it over.
    Lends,
}

/// Why a node does not agree that the space of another is taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Objection {
    /// It reaches that node.
    Alive,
    /// It knows a later incarnation of that node.
    Newer(u64),
    /// It takes space back itself, of this node or of another, and has the lower ID.
    Mine,
}

/// What a node says to another one that asks for a static address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// It neither has the address nor asks for it any more.
    Free,
    /// It has the address.
    Taken,
    /// It asks for the address itself, and has the lower ID.
    Wanted,
}

/// A message between the allocations of two nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// To the lender of a quarter: all that the sender holds of it, and what it needs. What it does
    /// not name it has given back.
    Request {
        /// The quarter.
        quarter: NodeId,
        /// The lender's title; a lender with another one answers by [`Message::Poke`].
        serial: u64,
        /// The sender's launch.
        epoch: u64,
        /// Later requests exceed earlier ones.
        round: Round,
        /// Addresses that are waited for.
        need: u32,
        /// Addresses that would be welcome.
        want: u32,
        /// What it holds, in ascending order.
        holds: Vec<IpNet>,
    },
    /// The answer: all that the receiver has from now on.
    Grant {
        /// As asked.
        quarter: NodeId,
        /// As asked.
        serial: u64,
        /// As asked.
        round: Round,
        /// In ascending order.
        blocks: Vec<IpNet>,
        /// True if less was left than needed.
        exhausted: bool,
    },
    /// From the lender of a quarter: send a request, so that both know the same.
    Poke {
        /// The quarter.
        quarter: NodeId,
        /// The lender's title.
        serial: u64,
    },
    /// From the lender of a quarter: does the receiver know anything against that?
    Hold {
        /// The quarter.
        quarter: NodeId,
        /// The sender's title.
        serial: u64,
        /// The sender's launch.
        epoch: u64,
        /// To tell answers to earlier questions.
        round: Round,
        /// The sender is sure of its title, of which the receiver may take notice.
        sure: bool,
    },
    /// The answer: no. The sender has not agreed that the receiver's space be taken back.
    Vouch {
        /// The quarter.
        quarter: NodeId,
        /// As asked.
        serial: u64,
        /// As asked.
        round: Round,
        /// True if the holder told the sender of this title while another node vouched for it.
        heard: bool,
    },
    /// Who lends a quarter, as far as the sender has heard.
    Title {
        /// The quarter.
        quarter: NodeId,
        /// Who.
        title: Title,
    },
    /// From the birth owner of a quarter, which does not lend it: what do you know of it?
    Ask {
        /// The sender's launch.
        epoch: u64,
        /// To tell answers to earlier questions.
        round: Round,
    },
    /// The answer. From here on the sender takes nothing that was lent under an earlier title.
    Answer {
        /// As asked.
        round: Round,
        /// The sender's launch.
        epoch: u64,
        /// The latest title that it has heard of.
        title: Title,
        /// What it has to do with the quarter.
        part: Part,
        /// What it holds of the quarter.
        holds: Vec<IpNet>,
        /// Nodes that are about to take the birth owner's space back, as far as the sender has
        /// heard.
        rivals: Vec<NodeId>,
    },
    /// A quarter changes hands, with all that is lent of it.
    Transfer {
        /// The quarter.
        quarter: NodeId,
        /// The title of the receiver.
        serial: u64,
        /// The launch of the receiver that is meant.
        epoch: u64,
        /// Which part of the ledger.
        part: u16,
        /// Of how many.
        parts: u16,
        /// Who has what.
        loans: Vec<(NodeId, Loan)>,
    },
    /// A part is on disk.
    TransferAck {
        /// The quarter.
        quarter: NodeId,
        /// The title.
        serial: u64,
        /// Which part.
        part: u16,
        /// False if a later launch of the node was asked, which does not take it.
        taken: bool,
    },
    /// A person says that a node is gone for good: the sender wants its space.
    Reclaim {
        /// The node.
        of: NodeId,
        /// Its last incarnation that the sender knows.
        incarnation: u64,
        /// To tell answers to earlier questions.
        round: Round,
    },
    /// Agreed: from here on the sender takes nothing from that node.
    ReclaimAck {
        /// The node.
        of: NodeId,
        /// As asked.
        round: Round,
        /// The sender's launch.
        epoch: u64,
        /// The latest titles that it has heard of, of the quarters in order.
        titles: [Title; 4],
        /// Those that it lends itself.
        lends: [bool; 4],
        /// What it holds, of all quarters.
        holds: Vec<IpNet>,
        /// Others that it agreed with before, about this node or about others.
        rivals: Vec<NodeId>,
    },
    /// Not agreed.
    ReclaimRefused {
        /// The node.
        of: NodeId,
        /// As asked.
        round: Round,
        /// Why.
        why: Objection,
    },
    /// The sender has agreed, long ago: is it still wanted?
    Pledged {
        /// The node.
        of: NodeId,
        /// Up to this incarnation.
        incarnation: u64,
        /// The question that was answered.
        round: Round,
    },
    /// The sender does not want the space of that node any more.
    ReclaimOver {
        /// The node.
        of: NodeId,
        /// What was agreed to questions before this.
        round: Round,
    },
    /// The space of a node was taken back; up to this incarnation it is gone for good.
    Buried {
        /// The node.
        of: NodeId,
        /// Its last incarnation.
        incarnation: u64,
        /// The node that took it back.
        by: NodeId,
        /// The latest titles, of the quarters in order.
        titles: [Title; 4],
    },
    /// Understood, and on disk.
    BuriedAck {
        /// The node.
        of: NodeId,
        /// As told.
        incarnation: u64,
    },
    /// The sender asks for a static address: does the receiver have it, or ask for it, too?
    Claim {
        /// The address.
        address: IpAddr,
        /// To tell answers to earlier questions.
        round: Round,
    },
    /// The answer.
    ClaimAnswer {
        /// As asked.
        address: IpAddr,
        /// As asked.
        round: Round,
        /// What the sender has to do with the address.
        verdict: Verdict,
    },
}

/// A message that no node of overnode sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
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
    /// Something beyond its bounds.
    #[error("a message with {0}")]
    Bounds(&'static str),
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
    pub fn decode(bytes: &[u8], layout: &Layout) -> Result<Self, BadMessage> {
        if bytes.len() > MAX_MESSAGE {
            return Err(BadMessage::Bounds("too many bytes"));
        }
        let (&format, body) = bytes.split_first().ok_or(BadMessage::Empty)?;
        if format != FORMAT {
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

    /// All that counts launches, changes of hands or requests.
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
            Self::Poke { serial, .. } | Self::TransferAck { serial, .. } => vec![*serial],
            Self::Title { title, .. } => vec![title.serial],
            Self::Ask { epoch, round } => [vec![*epoch], of_round(round).to_vec()].concat(),
            Self::Answer { round, epoch, title, .. } => {
                [vec![*epoch, title.serial], of_round(round).to_vec()].concat()
            }
            Self::Transfer { serial, epoch, loans, .. } => {
                let epochs = loans.iter().map(|(_, loan)| loan.epoch);
                [*serial, *epoch].into_iter().chain(epochs).collect()
            }
            Self::Reclaim { incarnation, round, .. } | Self::Pledged { incarnation, round, .. } => {
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
            Self::Buried { incarnation, titles, .. } => {
                [vec![*incarnation], titles.map(|title| title.serial).to_vec()].concat()
            }
            Self::BuriedAck { incarnation, .. } => vec![*incarnation],
            Self::Claim { round, .. } | Self::ClaimAnswer { round, .. } => of_round(round).to_vec(),
        }
    }

    fn check(&self, layout: &Layout) -> Result<(), BadMessage> {
        let in_quarter = |quarter: NodeId, blocks: &[IpNet]| {
            if !quarter.owns_a_quarter() {
                return Err(BadMessage::Bounds("a quarter that does not exist"));
            }
            check_blocks(blocks, |block| layout.quarter_of(block) == Some(quarter))
        };
        if self.numbers().into_iter().any(|number| number > MAX_NUMBER) {
            return Err(BadMessage::Bounds("an impossible number"));
        }
        match self {
            Self::Request { quarter, holds: blocks, .. } | Self::Grant { quarter, blocks, .. } => {
                in_quarter(*quarter, blocks)
            }
            Self::Poke { quarter, .. }
            | Self::Hold { quarter, .. }
            | Self::Vouch { quarter, .. }
            | Self::Title { quarter, .. }
            | Self::TransferAck { quarter, .. } => in_quarter(*quarter, &[]),
            Self::Answer { holds, rivals, .. } | Self::ReclaimAck { holds, rivals, .. } => {
                let is_possible =
                    rivals.len() <= MAX_RIVALS && rivals.iter().all(|id| id.owns_a_quarter());
                if !is_possible {
                    return Err(BadMessage::Bounds("impossible claimants"));
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
            | Self::Pledged { .. }
            | Self::Reclaim { .. }
            | Self::ReclaimRefused { .. }
            | Self::ReclaimOver { .. }
            | Self::Buried { .. }
            | Self::BuriedAck { .. } => Ok(()),
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
        return Err(BadMessage::Bounds("a block that is not lent"));
    }
    Ok(())
}
