//! Handing over a quarter when its holder leaves, or gives it back to its birth owner.
//!
//! The old holder stops lending for good before it sends anything. The successor lends once it has
//! the whole ledger on disk. So two nodes never lend at the same time. Only the intended launch of
//! the successor can take the quarter.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::fact::{Fact, Key, Successor};
use super::message::{Loan, Message, Title};
use super::{Action, Ipam, IpamError, Retry};
use overnode_types::NodeId;

/// Target size of a part in bytes, so that no message is too long.
const PART_BYTES: usize = 8 * 1024;

/// A ledger that arrives in parts.
#[derive(Clone, Debug, Default)]
pub(super) struct IncomingLedger {
    pub(super) serial: u64,
    pub(super) parts: u16,
    pub(super) loans: BTreeMap<u16, Vec<(NodeId, Loan)>>,
}

/// The state of a node that was asked to leave.
#[derive(Clone, Debug)]
pub(super) struct Leaving {
    deadline: Instant,
    is_done: bool,
}

impl Ipam {
    /// Prepares to leave the cluster: hands back borrowed blocks, and hands the ledgers of what it
    /// has lent to another node. The answer is [`Action::MayLeave`] or [`Action::CannotLeave`]. No
    /// container should be attached any more.
    pub fn leave(&mut self, now: Instant) {
        self.leaving = Some(Leaving { deadline: now + self.timing.leave, is_done: false });
        self.abandon_claims("this node leaves the cluster");
        let unused = self.allocation.blocks.iter().filter(|(_, block)| block.used == 0);
        for block in unused.map(|(net, _)| *net).collect::<Vec<_>>() {
            self.give_back(block);
        }
        for quarter in self.lending.ledgers.keys().copied().collect::<Vec<_>>() {
            if self.lending.ledgers[&quarter].successor.is_none() {
                self.enter_own(quarter);
            }
        }
        self.finish(now);
    }

    /// Returns true if another node has to take over a quarter. The birth owner can forget a
    /// quarter of which nothing is lent.
    fn needs_successor(&self, quarter: NodeId) -> bool {
        quarter != self.id
            || self
                .lending
                .of(quarter)
                .any(|(id, lent)| id != self.id && !lent.loan.blocks.is_empty())
    }

    fn choose_successor(&self, quarter: NodeId) -> Option<Successor> {
        let rank = |id: &NodeId| (*id != quarter, *id);
        let may = |id: &NodeId| {
            let is_there =
                id.has_initial_quarter() && self.reachable.contains(id) && !self.has_promised(*id);
            is_there && self.has_confirmed_tombstones(*id)
        };
        let id = self.members().filter(|id| self.may_lend(quarter) && may(id)).min_by_key(rank)?;
        Some(Successor { id, epoch: self.peers.get(&id)?.incarnation })
    }

    pub(super) fn begin_transfer(&mut self, quarter: NodeId, successor: Successor, now: Instant) {
        let Some(ledger) = self.lending.ledgers.get_mut(&quarter) else { return };
        ledger.serial += 1;
        ledger.successor = Some(successor);
        ledger.acked.clear();
        ledger.retry = Retry::new(now);
        let serial = ledger.serial;
        self.put(Fact::Ledger { quarter, serial, successor: Some(successor) });
    }

    pub(super) fn drive_transfers(&mut self, now: Instant) {
        for quarter in self.lending.ledgers.keys().copied().collect::<Vec<_>>() {
            let successor = self.lending.ledgers[&quarter].successor;
            match successor {
                Some(successor) if self.is_gone(successor.id, successor.epoch) => {
                    self.drop_title(quarter)
                }
                Some(successor) => self.send_parts(quarter, successor, now),
                None if self.leaving.as_ref().is_some_and(|it| !it.is_done)
                    && self.needs_successor(quarter) =>
                {
                    if let Some(successor) = self.choose_successor(quarter) {
                        self.begin_transfer(quarter, successor, now);
                        self.send_parts(quarter, successor, now);
                    }
                }
                None => {}
            }
        }
        let Some(leaving) = &self.leaving else { return };
        if leaving.is_done {
            return;
        }
        let kept: Vec<_> = self
            .lending
            .ledgers
            .iter()
            .filter(|(quarter, ledger)| {
                ledger.successor.is_some() || self.needs_successor(**quarter)
            })
            .map(|(quarter, _)| *quarter)
            .collect();
        if kept.is_empty() {
            self.leaving = Some(Leaving { is_done: true, ..leaving.clone() });
            self.effects.push(Action::MayLeave);
        } else if leaving.deadline <= now {
            self.leaving = None;
            let error = self.no_successor(&kept);
            self.effects.push(Action::CannotLeave(error));
        }
    }

    pub(super) fn next_transfer(&self) -> Option<Instant> {
        let reachable = |successor: Option<Successor>| {
            successor.is_some_and(|successor| self.reachable.contains(&successor.id))
        };
        let retry = self
            .lending
            .ledgers
            .values()
            .filter(|it| reachable(it.successor))
            .map(|it| it.retry.at)
            .min();
        let deadline = self.leaving.as_ref().filter(|it| !it.is_done).map(|it| it.deadline);
        [retry, deadline].into_iter().flatten().min()
    }

    fn no_successor(&self, kept: &[NodeId]) -> IpamError {
        let borrowers: std::collections::BTreeSet<_> = kept
            .iter()
            .flat_map(|quarter| self.lending.of(*quarter))
            .filter(|(id, lent)| *id != self.id && !lent.loan.blocks.is_empty())
            .map(|(id, _)| id)
            .collect();
        let successors: std::collections::BTreeSet<_> = kept
            .iter()
            .filter_map(|quarter| self.lending.ledgers[quarter].successor)
            .map(|successor| successor.id)
            .collect();
        let list = |ids: &std::collections::BTreeSet<NodeId>| {
            ids.iter().map(|id| format!("node {id}")).collect::<Vec<_>>().join(", ")
        };
        let is_reached = self.reachable.iter().any(|id| id.has_initial_quarter());
        let successor = match (successors.is_empty(), is_reached) {
            (false, _) => format!("{} did not confirm", list(&successors)),
            (true, false) => "none of nodes 1 to 4 is reachable".to_owned(),
            (true, true) => "no reachable node is ready".to_owned(),
        };
        let borrowers =
            if borrowers.is_empty() { "other nodes".to_owned() } else { list(&borrowers) };
        IpamError::NoSuccessor { id: self.id, borrowers, successor }
    }

    fn send_parts(&mut self, quarter: NodeId, successor: Successor, now: Instant) {
        let Some(ledger) = self.lending.ledgers.get_mut(&quarter) else { return };
        if !self.reachable.contains(&successor.id) || !ledger.retry.take(now, &self.timing) {
            return;
        }
        let (serial, acked) = (ledger.serial, ledger.acked.clone());
        let parts = self.parts(quarter);
        let count = u16::try_from(parts.len()).unwrap_or(u16::MAX);
        for (part, loans) in (0..count).zip(parts).filter(|(part, _)| !acked.contains(part)) {
            let epoch = successor.epoch;
            self.send(
                successor.id,
                &Message::Transfer { quarter, serial, epoch, part, parts: count, loans },
            );
        }
    }

    /// Returns the ledger in parts, at least one. The ledger no longer changes, so the parts are
    /// the same each time.
    fn parts(&self, quarter: NodeId) -> Vec<Vec<(NodeId, Loan)>> {
        let mut parts = vec![Vec::new()];
        let mut bytes = 0;
        for (id, lent) in self.lending.of(quarter).filter(|(_, lent)| !lent.loan.blocks.is_empty())
        {
            let length = 16 + 20 * lent.loan.blocks.len();
            if bytes > 0 && bytes + length > PART_BYTES {
                parts.push(Vec::new());
                bytes = 0;
            }
            bytes += length;
            if let Some(part) = parts.last_mut() {
                part.push((id, lent.loan.clone()));
            }
        }
        parts
    }

    pub(super) fn handle_transfer(
        &mut self,
        from: NodeId,
        quarter: NodeId,
        (serial, epoch): (u64, u64),
        (part, parts): (u16, u16),
        loans: Vec<(NodeId, Loan)>,
        now: Instant,
    ) {
        let ack = |taken| Message::TransferAck { quarter, serial, part, taken };
        let is_possible = from.has_initial_quarter() && self.id.has_initial_quarter();
        if !is_possible || self.has_promised(from) || self.has_left(from) {
            return;
        }
        if self.epoch > epoch {
            self.send(from, &ack(false));
            return;
        }
        let has_it = self.lending.taken.get(&quarter).is_some_and(|taken| *taken >= serial);
        if has_it || self.title_of(quarter).serial > serial {
            self.send(from, &ack(true));
            return;
        }
        if self.leaving.is_some() || self.lending.ledgers.contains_key(&quarter) {
            return;
        }
        let incoming = self.incoming.entry(quarter).or_default();
        if incoming.serial > serial || (incoming.serial == serial && incoming.parts != parts) {
            return;
        }
        if incoming.serial < serial {
            let old = std::mem::replace(
                incoming,
                IncomingLedger { serial, parts, loans: BTreeMap::new() },
            );
            for part in old.loans.into_keys() {
                self.forget(Key::LenderRole(quarter, part));
            }
        }
        let incoming = self.incoming.entry(quarter).or_default();
        incoming.loans.insert(part, loans.clone());
        let is_complete = incoming.loans.len() == usize::from(parts);
        self.put(Fact::LenderRole { quarter, serial, part, parts, loans });
        if is_complete && let Some(incoming) = self.incoming.remove(&quarter) {
            for part in 0..parts {
                self.forget(Key::LenderRole(quarter, part));
            }
            let loans = incoming.loans.into_values().flatten().collect();
            self.take_title(quarter, serial, loans, &BTreeSet::from([from]), now);
        }
        self.send(from, &ack(true));
    }

    pub(super) fn handle_transfer_ack(
        &mut self,
        from: NodeId,
        quarter: NodeId,
        serial: u64,
        part: u16,
        taken: bool,
        now: Instant,
    ) {
        let Some(ledger) = self.lending.ledgers.get_mut(&quarter) else { return };
        if ledger.serial != serial || ledger.successor.is_none_or(|successor| successor.id != from)
        {
            return;
        }
        if !taken {
            // An earlier launch of the successor may have taken the quarter. The birth owner finds
            // out by asking all nodes.
            self.drop_title(quarter);
            if self.leaving.take_if(|leaving| !leaving.is_done).is_some() {
                let successor = format!("node {from} restarted while taking it over");
                let error = IpamError::NoSuccessor {
                    id: self.id,
                    borrowers: "other nodes".into(),
                    successor,
                };
                self.effects.push(Action::CannotLeave(error));
            }
            return;
        }
        ledger.acked.insert(part);
        ledger.retry = Retry { at: now.max(ledger.retry.at), ..ledger.retry };
        let acked = ledger.acked.len();
        if acked == self.parts(quarter).len() {
            self.drop_title(quarter);
            self.learn_title(quarter, Title { serial, holder: from });
        }
    }
}
