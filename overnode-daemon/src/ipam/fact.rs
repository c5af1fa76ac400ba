//! What a node's address allocation keeps on disk.

use std::fmt;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::message::{Loan, Round, Title};
use crate::types::NodeId;

/// One thing that must survive a crash. A fact replaces the earlier one with the same [`Key`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fact {
    /// Tells this node's launches apart: the incarnation of the first start.
    Epoch(u64),
    /// A block that this node may give addresses from.
    Held {
        /// The block.
        block: IpNet,
        /// True if another node has it by now: nothing more is given from it.
        lost: bool,
    },
    /// Who lends a quarter, as far as this node has heard.
    Heard {
        /// The quarter, by the ID that owns it by birth.
        quarter: NodeId,
        /// Who, and since which change of hands.
        title: Title,
    },
    /// The last change of hands by which this node came to lend a quarter, which it may have handed
    /// on since.
    Taken {
        /// The quarter.
        quarter: NodeId,
        /// The change of hands.
        serial: u64,
    },
    /// This node lends a quarter.
    Book {
        /// The quarter.
        quarter: NodeId,
        /// Counts the changes of hands.
        serial: u64,
        /// To whom the quarter is being handed. Nothing is lent any more.
        heir: Option<Heir>,
    },
    /// What one node has of a quarter that this node lends.
    Loan {
        /// The quarter.
        quarter: NodeId,
        /// The node.
        borrower: NodeId,
        /// Its blocks.
        loan: Loan,
        /// The last request that was answered.
        round: Round,
    },
    /// A node that is gone for good, by the word of a person.
    Grave {
        /// The node.
        id: NodeId,
        /// Its last incarnation that is known; a later one is another node.
        incarnation: u64,
        /// The node that has its space.
        by: NodeId,
    },
    /// This node has promised another to take nothing more from one that may be gone.
    Pledge {
        /// The node that may be gone.
        of: NodeId,
        /// Up to this incarnation.
        incarnation: u64,
        /// Who takes its space back.
        by: NodeId,
        /// The question that was answered.
        round: Round,
    },
    /// This node takes the space of another back, and waits for all others to agree.
    Claim {
        /// The node that is gone.
        of: NodeId,
        /// Up to this incarnation.
        incarnation: u64,
    },
    /// A part of the ledger of a quarter that is being handed to this node.
    Part {
        /// The quarter.
        quarter: NodeId,
        /// The change of hands.
        serial: u64,
        /// Which part, from 0.
        part: u16,
        /// How many there are.
        parts: u16,
        /// What it says.
        loans: Vec<(NodeId, Loan)>,
    },
    /// A title that its holder told this node of while another node vouched for it.
    Confirmed {
        /// The quarter.
        quarter: NodeId,
        /// Its holder, and since which change of hands.
        title: Title,
    },
}

/// Who gets a quarter next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heir {
    /// The node.
    pub id: NodeId,
    /// A later launch of it must not take the quarter: it could do so twice.
    pub epoch: u64,
}

/// What a fact is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of the facts")]
pub enum Key {
    Epoch,
    Held(IpNet),
    Heard(NodeId),
    Taken(NodeId),
    Book(NodeId),
    Loan(NodeId, NodeId),
    Grave(NodeId),
    Pledge(NodeId, NodeId),
    Claim(NodeId),
    Part(NodeId, u16),
    Confirmed(NodeId),
}

impl Fact {
    /// What it is about.
    pub fn key(&self) -> Key {
        match self {
            Self::Epoch(_) => Key::Epoch,
            Self::Held { block, .. } => Key::Held(*block),
            Self::Heard { quarter, .. } => Key::Heard(*quarter),
            Self::Taken { quarter, .. } => Key::Taken(*quarter),
            Self::Book { quarter, .. } => Key::Book(*quarter),
            Self::Loan { quarter, borrower, .. } => Key::Loan(*quarter, *borrower),
            Self::Grave { id, .. } => Key::Grave(*id),
            Self::Pledge { of, by, .. } => Key::Pledge(*of, *by),
            Self::Claim { of, .. } => Key::Claim(*of),
            Self::Part { quarter, part, .. } => Key::Part(*quarter, *part),
            Self::Confirmed { quarter, .. } => Key::Confirmed(*quarter),
        }
    }
}

/// A change of what is on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Keep this.
    Put(Fact),
    /// Forget what is kept under this key; nothing may be.
    Forget(Key),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Epoch => f.write_str("epoch"),
            Self::Held(block) => write!(f, "held {block}"),
            Self::Heard(quarter) => write!(f, "heard {quarter}"),
            Self::Taken(quarter) => write!(f, "taken {quarter}"),
            Self::Book(quarter) => write!(f, "book {quarter}"),
            Self::Loan(quarter, borrower) => write!(f, "loan {quarter} {borrower}"),
            Self::Grave(id) => write!(f, "grave {id}"),
            Self::Pledge(of, by) => write!(f, "pledge {of} {by}"),
            Self::Claim(of) => write!(f, "claim {of}"),
            Self::Part(quarter, part) => write!(f, "part {quarter} {part}"),
            Self::Confirmed(quarter) => write!(f, "confirmed {quarter}"),
        }
    }
}
