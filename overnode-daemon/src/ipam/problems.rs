//! What needs an operator, computed from what is the case now: so it ends when its cause ends.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use ipnet::IpNet;

use super::{Ipam, Problem};
use crate::types::NodeId;

/// Borrowers may lie: no more contradictions are kept than these.
const MAX_CONTRADICTIONS: usize = 256;

/// What was reported and cannot be computed from the rest.
#[derive(Clone, Debug, Default)]
pub(super) struct Reported {
    /// Reported by the input that is being handled.
    new: Vec<Problem>,
    /// Nodes that took the title of a quarter from this one, by quarter, and when.
    superseded: BTreeMap<NodeId, (NodeId, Instant)>,
    /// The node that took this node's space back, and when that was heard.
    buried: Option<(NodeId, Instant)>,
    /// Blocks that borrowers said they hold, and which were lent to others.
    contradictions: BTreeSet<(NodeId, IpNet)>,
}

impl Reported {
    pub(super) fn add(&mut self, problem: &Problem) {
        self.new.push(problem.clone());
    }

    /// A borrower says anew what it holds.
    pub(super) fn forget_contradictions(&mut self, borrower: NodeId, half: Option<IpNet>) {
        let is_in = |block: &IpNet| half.is_some_and(|half| half.contains(block));
        self.contradictions.retain(|(id, block)| *id != borrower || !is_in(block));
    }
}

impl Ipam {
    /// Everything about addresses that needs an operator now, in order and each once.
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
        let buried = self.reported.buried.filter(|(_, at)| is_recent(*at));
        problems.extend(buried.map(|(by, _)| Problem::Buried { by }));
        problems
    }

    /// Remembers what cannot be computed.
    pub(super) fn keep_reported(&mut self, now: Instant) {
        for problem in std::mem::take(&mut self.reported.new) {
            match problem {
                Problem::Superseded { quarter, holder } => {
                    self.reported.superseded.insert(quarter, (holder, now));
                }
                Problem::Buried { by } => self.reported.buried = Some((by, now)),
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
