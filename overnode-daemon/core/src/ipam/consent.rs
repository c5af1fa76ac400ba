//! Consent to taking back the space of a node that is gone for good: the promise to take nothing
//! more from that node.

use std::collections::BTreeSet;
use std::time::Instant;

use super::fact::{Fact, Key};
use super::layout::quarters;
use super::message::{MAX_RIVALS, Message, Objection, Round, Title};
use super::reclaim::already_reclaiming;
use super::{Ipam, Retry};
use overnode_types::NodeId;

/// A promise to take nothing more from a node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Promise {
    pub(super) incarnation: u64,
    round: Round,
    /// When to ask whether the promise is still needed: the message that ends it may have been
    /// lost.
    pub(super) retry: Retry,
}

impl Ipam {
    pub(super) fn promise(
        &mut self,
        of: NodeId,
        by: NodeId,
        incarnation: u64,
        round: Round,
        now: Instant,
    ) {
        let retry = Retry { at: now + self.timing.retry_cap, tries: 8 };
        self.reclaiming.promises.insert((of, by), Promise { incarnation, round, retry });
    }

    /// Returns true if this node has promised to take nothing from `id`.
    pub(super) fn has_promised(&self, id: NodeId) -> bool {
        self.reclaiming.promises.keys().any(|(of, _)| *of == id)
    }

    pub(super) fn handle_reclaim(
        &mut self,
        from: NodeId,
        of: NodeId,
        incarnation: u64,
        round: Round,
        now: Instant,
    ) {
        let refuse = |why| Message::ReclaimRefused { of, round, why };
        if !from.has_initial_quarter() {
            return;
        }
        let known = self.peers.get(&of).map_or(0, |peer| peer.incarnation);
        let objection = if of == self.id || self.reachable.contains(&of) {
            Some(Objection::Alive)
        } else if known > incarnation {
            Some(Objection::Newer(known))
        } else if !self.reclaiming.claims.is_empty() && self.id < from {
            Some(Objection::Mine)
        } else {
            None
        };
        if let Some(why) = objection {
            self.send(from, &refuse(why));
            return;
        }
        // This node cannot confirm that a node is gone if it has not heard of that incarnation, and
        // a lender may still consider itself a lender for a while. The claimant asks again.
        if known < incarnation || !self.is_long_gone(of, now) {
            return;
        }
        self.abandon_claims(&already_reclaiming(from));
        let by_others = self.reclaiming.promises.keys().map(|(_, by)| *by).filter(|by| *by != from);
        let rivals: BTreeSet<_> = by_others.collect();
        let rivals = rivals.into_iter().take(MAX_RIVALS).collect();
        self.promise(of, from, incarnation, round, now);
        self.put(Fact::Promise { of, incarnation, by: from, round });
        // From now on this node takes nothing that it had asked of the dead node.
        let asked = self.borrowing.requests.iter().filter(|(_, request)| request.to == of);
        for quarter in asked.map(|(quarter, _)| *quarter).collect::<Vec<_>>() {
            self.void_requests(quarter);
        }
        let titles = self.titles();
        let mut lends = [false; 4];
        for (lends, quarter) in lends.iter_mut().zip(quarters()) {
            let successor = self
                .lending
                .ledgers
                .get(&quarter)
                .map(|ledger| ledger.successor.map(|successor| successor.id));
            *lends = successor.is_some_and(|successor| successor != Some(of));
        }
        let holds = self.held().collect();
        self.send(
            from,
            &Message::ReclaimAck { of, round, epoch: self.epoch, titles, lends, holds, rivals },
        );
    }

    /// Returns the latest title of each quarter that this node knows of.
    pub(super) fn titles(&self) -> [Title; 4] {
        let mut titles = [Title { serial: 0, holder: self.id }; 4];
        for (title, quarter) in titles.iter_mut().zip(quarters()) {
            *title = match self
                .lending
                .ledgers
                .get(&quarter)
                .map(|ledger| (ledger.serial, ledger.successor))
            {
                Some((serial, Some(successor))) => Title { serial, holder: successor.id },
                Some((serial, None)) => Title { serial, holder: self.id },
                None => self.title_of(quarter),
            };
        }
        titles
    }

    pub(super) fn handle_reclaim_over(&mut self, from: NodeId, of: NodeId, round: Round) {
        if self.reclaiming.promises.get(&(of, from)).is_some_and(|promise| promise.round <= round) {
            self.drop_promise(of, from);
        }
    }

    /// Drops promises to nodes that have left or are gone for good, and asks the other claimants
    /// whether theirs are still needed.
    pub(super) fn drop_promises(&mut self, now: Instant) {
        let promises = self.reclaiming.promises.keys().copied();
        let void: Vec<_> = promises.filter(|(_, by)| self.has_left(*by)).collect();
        for (of, by) in void {
            // The claimant may have completed the reclaim before it left. This node cannot vouch
            // for what the other node lent then.
            self.forget_titles_of(of);
            self.drop_promise(of, by);
        }
        let mut ask = Vec::new();
        for (&(of, by), promise) in &mut self.reclaiming.promises {
            if self.reachable.contains(&by) && promise.retry.take(now, &self.timing) {
                let Promise { incarnation, round, .. } = *promise;
                ask.push((by, Message::Promised { of, incarnation, round }));
            }
        }
        for (by, message) in ask {
            self.send(by, &message);
        }
    }

    /// Drops a promise. This node may borrow from `of` again unless another promise forbids it.
    pub(super) fn drop_promise(&mut self, of: NodeId, by: NodeId) {
        self.reclaiming.promises.remove(&(of, by));
        self.forget(Key::Promise(of, by));
        self.find_lenders();
    }

    fn forget_titles_of(&mut self, holder: NodeId) {
        let known = self.lending.known_titles.iter().filter(|(_, title)| title.holder == holder);
        for quarter in known.map(|(quarter, _)| *quarter).collect::<Vec<_>>() {
            self.lending.known_titles.remove(&quarter);
            self.forget(Key::Heard(quarter));
        }
        self.forget_confirmed(|title| title.holder == holder);
    }
}
