//! Problems that need an operator. They are computed from the current state, so each one ends when
//! its cause ends.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use ipnet::IpNet;

use super::{Ipam, Problem};
use overnode_types::NodeId;

/// Maximum number of contradictions that are kept, since borrowers may lie.
const MAX_CONTRADICTIONS: usize = 256;

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
        let is_recent = |at: Instant| now < at + self.timing.news;
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
