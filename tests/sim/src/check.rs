//! Checks of the state in which the simulation ends.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use overnode_core::ipam::quarters;
use overnode_types::NodeId;

use crate::world::World;

impl World {
    /// Checks that all nodes see the same state, each address has one holder, and nothing is
    /// pending.
    pub(crate) fn converged(&self) -> Result<(), String> {
        let living: BTreeSet<NodeId> =
            self.hosts.iter().filter(|(_, host)| !host.is_dead).map(|(id, _)| *id).collect();
        for id in &living {
            let Some(node) = &self.hosts[id].node else {
                return Err(format!("{id} is not running"));
            };
            for other in living.iter().filter(|other| *other != id) {
                let truth = self.hosts[other].node.as_ref().map(|other| other.gossip.own());
                if node.gossip.record(*other) != truth {
                    return Err(format!("{id} does not have the latest record of {other}"));
                }
                if !node.paths.contains_key(other) {
                    return Err(format!("{id} does not reach {other}"));
                }
            }
            // Lenders no longer listen to a borrower that lied about its requests. That harms only
            // the borrower.
            let is_liars = |what: &&str| {
                self.liar.is_some() && *what == "borrowers have not reported what they hold"
            };
            if !self.is_liar(*id) && !node.ipam.pending().iter().all(is_liars) {
                return Err(format!("{id} has pending work: {:?}", node.ipam.pending()));
            }
        }
        self.check_statics(&living)?;
        self.check_ledgers(&living)
    }

    fn check_ledgers(&self, living: &BTreeSet<NodeId>) -> Result<(), String> {
        let mut lent: BTreeMap<NodeId, BTreeSet<IpNet>> = BTreeMap::new();
        for quarter in quarters() {
            let lenders: Vec<_> = living
                .iter()
                .filter(|id| {
                    self.hosts[id]
                        .node
                        .as_ref()
                        .is_some_and(|node| node.ipam.lends(quarter).is_some())
                })
                .collect();
            let is_unknown = |id: &NodeId| {
                self.hosts[id]
                    .node
                    .as_ref()
                    .is_none_or(|node| node.gossip.record(quarter).is_none())
            };
            if lenders.is_empty() && self.hosts[&quarter].is_dead && living.iter().all(is_unknown) {
                // The quarter was never used as far as the others know.
                continue;
            }
            let [lender] = lenders[..] else {
                return Err(format!("the lenders of quarter {quarter} are {lenders:?}"));
            };
            let Some(node) = &self.hosts[lender].node else { continue };
            for (_, loans) in node.ipam.ledger().filter(|(of, _)| *of == quarter) {
                for (borrower, blocks) in loans {
                    if !living.contains(&borrower) {
                        return Err(format!(
                            "{lender} still lends {blocks:?} to {borrower}, which is gone"
                        ));
                    }
                    lent.entry(borrower).or_default().extend(blocks);
                }
            }
        }
        for id in living.iter().filter(|id| !self.is_liar(**id)) {
            let Some(node) = &self.hosts[id].node else { continue };
            let held: BTreeSet<IpNet> = node.ipam.held().collect();
            let lent = lent.remove(id).unwrap_or_default();
            if held != lent {
                return Err(format!("{id} holds {held:?} but was lent {lent:?}"));
            }
            if node.ipam.lost().next().is_some() {
                return Err(format!(
                    "{id} has lost blocks: {:?}",
                    node.ipam.lost().collect::<Vec<_>>()
                ));
            }
        }
        Ok(())
    }
}
