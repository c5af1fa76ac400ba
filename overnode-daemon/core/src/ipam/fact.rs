//! The state of a node's address allocation that is kept on disk.

use std::fmt;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::message::{Loan, Round, Title};
use overnode_types::NodeId;

/// A piece of state that must survive a crash. A fact replaces the earlier one with the same
/// [`Key`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fact {
    /// Distinguishes this node's launches: the incarnation of the first start.
    Epoch(u64),
    /// A block that this node may allocate addresses from.
    Held {
        /// The block.
        block: IpNet,
        /// True if another node has the block now. No more addresses are allocated from it.
        lost: bool,
    },
    /// The lender of a quarter, as far as this node has heard.
    Heard {
        /// The quarter, named by the ID of its birth owner.
        quarter: NodeId,
        /// The lender and the serial of its title.
        title: Title,
    },
    /// The latest title that this node has taken of a quarter. It may have handed the quarter on
    /// since.
    Taken {
        /// The quarter.
        quarter: NodeId,
        /// The serial of the title.
        serial: u64,
    },
    /// A ledger: this node lends the quarter.
    Ledger {
        /// The quarter.
        quarter: NodeId,
        /// The serial of the title.
        serial: u64,
        /// The node that the quarter is being handed to, if any. Nothing is lent any more.
        successor: Option<Successor>,
    },
    /// The blocks of one borrower in a quarter that this node lends.
    Loan {
        /// The quarter.
        quarter: NodeId,
        /// The borrower.
        borrower: NodeId,
        /// The borrower's blocks.
        loan: Loan,
        /// The last request that was answered.
        round: Round,
    },
    /// A tombstone: an operator has declared a node gone for good.
    Tombstone {
        /// The node.
        id: NodeId,
        /// Its last known incarnation. A later incarnation counts as another node.
        incarnation: u64,
        /// The node that took its space back.
        by: NodeId,
    },
    /// This node has promised another one to take nothing more from a node that may be gone.
    Promise {
        /// The node that may be gone.
        of: NodeId,
        /// The promise covers incarnations up to this one.
        incarnation: u64,
        /// The node that takes the space back.
        by: NodeId,
        /// The question that was answered.
        round: Round,
    },
    /// This node is taking back the space of another node and waits until all others agree.
    Claim {
        /// The node that is gone.
        of: NodeId,
        /// The claim covers incarnations up to this one.
        incarnation: u64,
    },
    /// A part of a ledger that is being handed to this node.
    LenderRole {
        /// The quarter.
        quarter: NodeId,
        /// The serial of the title.
        serial: u64,
        /// The index of the part, from 0.
        part: u16,
        /// Number of parts.
        parts: u16,
        /// The loans in this part.
        loans: Vec<(NodeId, Loan)>,
    },
    /// A title that its holder told this node of while another node vouched for it.
    Confirmed {
        /// The quarter.
        quarter: NodeId,
        /// The holder and the serial of the title.
        title: Title,
    },
}

/// The node that a quarter is handed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Successor {
    /// The node.
    pub id: NodeId,
    /// The launch that may take the quarter. A later launch must not take it: the node might take
    /// it twice.
    pub epoch: u64,
}

/// Identifies what a fact is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of the facts")]
pub enum Key {
    Epoch,
    Held(IpNet),
    Heard(NodeId),
    Taken(NodeId),
    Ledger(NodeId),
    Loan(NodeId, NodeId),
    Tombstone(NodeId),
    Promise(NodeId, NodeId),
    Claim(NodeId),
    LenderRole(NodeId, u16),
    Confirmed(NodeId),
}

impl Fact {
    /// Returns the key of the fact.
    pub fn key(&self) -> Key {
        match self {
            Self::Epoch(_) => Key::Epoch,
            Self::Held { block, .. } => Key::Held(*block),
            Self::Heard { quarter, .. } => Key::Heard(*quarter),
            Self::Taken { quarter, .. } => Key::Taken(*quarter),
            Self::Ledger { quarter, .. } => Key::Ledger(*quarter),
            Self::Loan { quarter, borrower, .. } => Key::Loan(*quarter, *borrower),
            Self::Tombstone { id, .. } => Key::Tombstone(*id),
            Self::Promise { of, by, .. } => Key::Promise(*of, *by),
            Self::Claim { of, .. } => Key::Claim(*of),
            Self::LenderRole { quarter, part, .. } => Key::LenderRole(*quarter, *part),
            Self::Confirmed { quarter, .. } => Key::Confirmed(*quarter),
        }
    }
}

/// A change of the state on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Store this fact.
    Put(Fact),
    /// Delete the fact with this key. There may be none.
    Forget(Key),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Epoch => f.write_str("epoch"),
            Self::Held(block) => write!(f, "held {block}"),
            Self::Heard(quarter) => write!(f, "heard {quarter}"),
            Self::Taken(quarter) => write!(f, "taken {quarter}"),
            Self::Ledger(quarter) => write!(f, "book {quarter}"),
            Self::Loan(quarter, borrower) => write!(f, "loan {quarter} {borrower}"),
            Self::Tombstone(id) => write!(f, "grave {id}"),
            Self::Promise(of, by) => write!(f, "pledge {of} {by}"),
            Self::Claim(of) => write!(f, "claim {of}"),
            Self::LenderRole(quarter, part) => write!(f, "part {quarter} {part}"),
            Self::Confirmed(quarter) => write!(f, "confirmed {quarter}"),
        }
    }
}
