//! Problems that need an operator. They are computed from the current state, so each one ends when
//! its cause ends.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use ipnet::IpNet;

use super::Ipam;
use overnode_types::NodeId;

/// Maximum number of contradictions that are kept, since borrowers may lie.
const MAX_CONTRADICTIONS: usize = 256;

/// A problem that needs an operator. Connections between nodes stay up, and the problem does not
/// spread.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Problem {
    /// An address is in use on two nodes.
    #[error("the address {address} is in use here and on node {node}: detach one of the two")]
    Clash {
        /// The address.
        address: IpAddr,
        /// The other node.
        node: NodeId,
    },
    /// A static address is in use here and on another node, and the other node keeps it.
    #[error(
        "{address} is in use by {owner} here and on node {node}, which keeps it: other hosts \
         cannot reach {owner}; detach {owner} (`overnode detach {owner}`, or stop the container) \
         and give it another address, or detach the container that has the address on node {node}"
    )]
    Yielded {
        /// The address.
        address: IpAddr,
        /// The container that has the address here.
        owner: String,
        /// The node that keeps it.
        node: NodeId,
    },
    /// A static address is in use here, and another node announces it without a right to it.
    #[error(
        "{address} is in use by {owner} here, and node {node} announces it too, although this node \
         keeps it; detach the container that has the address on node {node}, or {owner} here \
         (`overnode detach {owner}`, or stop the container)"
    )]
    Contested {
        /// The address.
        address: IpAddr,
        /// The container that has the address here.
        owner: String,
        /// The other node.
        node: NodeId,
    },
    /// A block that this node had borrowed is lost.
    #[error(
        "the block {block}, which this node had borrowed, now belongs to other nodes, as node \
         {lender} reports; no more addresses are allocated from it: detach the containers with an \
         address in it (`overnode status --endpoints`) and attach them again"
    )]
    Lost {
        /// The block.
        block: IpNet,
        /// The lender of the quarter.
        lender: NodeId,
    },
    /// Another node lends a quarter that this node used to lend.
    #[error(
        "node {holder} now lends the quarter of node {quarter}, and this node has stopped lending \
         it; clashing addresses are reported one by one, and this finding lasts for ten minutes"
    )]
    Superseded {
        /// The quarter.
        quarter: NodeId,
        /// The node that lends it now.
        holder: NodeId,
    },
    /// The other nodes were told that this node is gone for good.
    #[error(
        "node {by} has reclaimed the address space of this node, which was declared gone for good; \
         this node has requested it again: clashing addresses are reported one by one, and this \
         finding lasts for ten minutes"
    )]
    Reclaimed {
        /// The node that took the space back.
        by: NodeId,
    },
    /// A borrower says that it holds a block that the ledger has for another node.
    #[error(
        "node {borrower} uses the block {block}, which was lent to another node: detach the \
         containers with an address in it on node {borrower}"
    )]
    Contradiction {
        /// The borrower.
        borrower: NodeId,
        /// The block.
        block: IpNet,
    },
}

impl Problem {
    /// Returns true for problems that report a past event.
    pub fn is_past(&self) -> bool {
        matches!(self, Self::Reclaimed { .. } | Self::Superseded { .. })
    }

    /// Returns the address that the problem is about, if any.
    pub fn address(&self) -> Option<IpAddr> {
        match self {
            Self::Clash { address, .. }
            | Self::Yielded { address, .. }
            | Self::Contested { address, .. } => Some(*address),
            Self::Lost { .. }
            | Self::Superseded { .. }
            | Self::Reclaimed { .. }
            | Self::Contradiction { .. } => None,
        }
    }
}

/// Reported problems that cannot be computed from the rest of the state.
#[derive(Clone, Debug, Default)]
pub(super) struct Reported {
    /// Reported while the current input is handled.
    new: Vec<Problem>,
    /// By quarter: the node that took its title from this node, and when.
    superseded: BTreeMap<NodeId, (NodeId, Instant)>,
    /// The node that took this node's space back, and when this node heard of it.
    reclaimed: Option<(NodeId, Instant)>,
    /// Blocks that borrowers say they hold although they were lent to other nodes.
    contradictions: BTreeSet<(NodeId, IpNet)>,
}

impl Reported {
    pub(super) fn add(&mut self, problem: &Problem) {
        self.new.push(problem.clone());
    }

    /// Forgets the contradictions of a borrower in one half, because it says again what it holds.
    pub(super) fn forget_contradictions(&mut self, borrower: NodeId, half: Option<IpNet>) {
        let is_in = |block: &IpNet| half.is_some_and(|half| half.contains(block));
        self.contradictions.retain(|(id, block)| *id != borrower || !is_in(block));
    }
}

impl Ipam {
    /// Returns all address problems that need an operator now, in order and without duplicates.
    pub fn problems(&self, now: Instant) -> BTreeSet<Problem> {
        let mut problems: BTreeSet<Problem> = self.clashes(now).collect();
        problems.extend(self.shared_blocks());
        let lost = self.lost().filter(|block| self.addresses_in(*block).next().is_some());
        problems.extend(lost.filter_map(|block| {
            let lender = self.title_of(self.layout.quarter_of(block)?).holder;
            Some(Problem::Lost { block, lender })
        }));
        let contradictions = self.reported.contradictions.iter().filter(|(borrower, block)| {
            let quarter =
                self.layout.quarter_of(*block).filter(|quarter| self.lends(*quarter).is_some());
            let is_lent = |quarter| self.is_lent_to_another(quarter, *borrower, *block);
            self.counts(*borrower) && quarter.is_some_and(is_lent)
        });
        problems.extend(
            contradictions.map(|&(borrower, block)| Problem::Contradiction { borrower, block }),
        );
        let is_recent = |at: Instant| now < at + self.timing.past_problem;
        let superseded = self.reported.superseded.iter().filter(|(quarter, (holder, at))| {
            is_recent(*at)
                && self.lends(**quarter).is_none()
                && self.title_of(**quarter).holder == *holder
        });
        problems.extend(
            superseded.map(|(&quarter, &(holder, _))| Problem::Superseded { quarter, holder }),
        );
        let reclaimed = self.reported.reclaimed.filter(|(_, at)| is_recent(*at));
        problems.extend(reclaimed.map(|(by, _)| Problem::Reclaimed { by }));
        problems
    }

    /// Stores the reported problems that cannot be computed.
    pub(super) fn keep_reported(&mut self, now: Instant) {
        for problem in std::mem::take(&mut self.reported.new) {
            match problem {
                Problem::Superseded { quarter, holder } => {
                    self.reported.superseded.insert(quarter, (holder, now));
                }
                Problem::Reclaimed { by } => self.reported.reclaimed = Some((by, now)),
                Problem::Contradiction { borrower, block } => {
                    if self.reported.contradictions.len() < MAX_CONTRADICTIONS {
                        self.reported.contradictions.insert((borrower, block));
                    }
                }
                Problem::Clash { .. }
                | Problem::Yielded { .. }
                | Problem::Contested { .. }
                | Problem::Lost { .. } => {}
            }
        }
    }
}
