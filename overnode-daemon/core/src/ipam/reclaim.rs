//! Taking back the space of a node that is gone for good.
//!
//! Only nodes 1 to 4 take back space, since only they lend. All other known nodes have to agree, so
//! neither side of a partition can do it alone. If two nodes try, the one with the lower ID
//! succeeds. That also holds if they take back the space of different nodes, since one of these may
//! lend the quarter of the other. A node that agrees takes nothing more from the node that is gone,
//! and reports what it holds. The half of a quarter that is never lent stays with the ID. Its next
//! launch needs no consent to use it.

use std::collections::BTreeMap;
use std::time::Instant;

use ipnet::IpNet;

use super::consent::Promise;
use super::fact::{Fact, Key};
use super::layout::quarters;
use super::message::{Loan, Message, Objection, Round, Title};
use super::tombstone::Tombstone;
use super::{Action, Ipam, IpamError, Peer, Question, Retry};
use overnode_types::NodeId;

#[derive(Clone, Debug, Default)]
pub(super) struct Reclaiming {
    pub(super) tombstones: BTreeMap<NodeId, Tombstone>,
    /// By the node that may be gone and the claimant that takes its space back.
    pub(super) promises: BTreeMap<(NodeId, NodeId), Promise>,
    pub(super) claims: BTreeMap<NodeId, Claim>,
}

#[derive(Clone, Debug)]
pub(super) struct Claim {
    pub(super) incarnation: u64,
    asked: BTreeMap<NodeId, Question>,
    acks: BTreeMap<NodeId, Ack>,
    /// The latest known title serial of each quarter, in order, when the acks were last checked.
    serials: [u64; 4],
    settled: Instant,
    wake: Option<Instant>,
}

impl Claim {
    /// Returns the latest title of the quarter at `index` in the order: the one `known` here, or
    /// one that an ack reported.
    fn latest(&self, index: usize, known: Title) -> Title {
        let reported = self.acks.values().map(|ack| ack.titles[index]);
        reported.chain([known]).max_by_key(|title| title.serial).unwrap_or(known)
    }
}

#[derive(Clone, Debug)]
pub(super) struct Ack {
    pub(super) loan: Loan,
    pub(super) titles: [Title; 4],
    pub(super) lends: [bool; 4],
    pub(super) rivals: Vec<NodeId>,
    /// False once the node has been unreachable since it agreed.
    pub(super) is_fresh: bool,
}

impl Reclaiming {
    pub(super) fn mark_unsure(&mut self, id: NodeId) {
        for ack in self.claims.values_mut().filter_map(|claim| claim.acks.get_mut(&id)) {
            ack.is_fresh = false;
        }
    }

    pub(super) fn restart_claims(&mut self, settled: Instant) {
        for claim in self.claims.values_mut() {
            claim.acks.clear();
            claim.asked.clear();
            claim.settled = settled;
        }
    }

    pub(super) fn retry_now(&mut self, id: NodeId, now: Instant) {
        for question in self.claims.values_mut().filter_map(|claim| claim.asked.get_mut(&id)) {
            question.retry = Retry::new(now);
        }
        for (_, promise) in self.promises.iter_mut().filter(|((of, by), _)| *of == id || *by == id)
        {
            promise.retry = Retry::new(now);
        }
        let unconfirmed =
            self.tombstones.values_mut().filter_map(|tombstone| tombstone.unconfirmed.as_mut());
        for retries in unconfirmed {
            if let Some(retry) = retries.get_mut(&id) {
                *retry = Retry::new(now);
            }
        }
    }

    pub(super) fn is_settled(&self) -> bool {
        self.claims.is_empty()
            && self
                .tombstones
                .values()
                .all(|tombstone| tombstone.unconfirmed.as_ref().is_none_or(BTreeMap::is_empty))
    }
}

impl Ipam {
    /// Takes back the space of a node that is gone for good. The answer is [`Action::Reclaimed`]
    /// when all other nodes have agreed, or [`Action::ReclaimFailed`].
    ///
    /// # Errors
    /// [`IpamError::Leaving`] if this node leaves the cluster. [`IpamError::Reclaim`] if this node
    /// is not one of the nodes 1 to 4, if `of` is this node, is unknown or was reachable until
    /// recently, or if a reachable node with a lower ID already takes back space.
    pub fn reclaim(&mut self, of: NodeId, now: Instant) -> Result<(), IpamError> {
        let refuse = |why: String| Err(IpamError::Reclaim { of, why });
        if self.leaving.is_some() {
            return Err(IpamError::Leaving { id: self.id });
        }
        if !self.id.has_initial_quarter() {
            return refuse(
                "only nodes 1 to 4 lend address space, so only they can reclaim it; run the \
                 command on one of them"
                    .into(),
            );
        }
        if of == self.id {
            return refuse(
                "that is this node itself; `overnode reset` gives back what it has".into(),
            );
        }
        let Some(peer) = self.peers.get(&of) else {
            return refuse("no node with that ID is known here".into());
        };
        let incarnation = peer.incarnation;
        if !self.is_long_gone(of, now) {
            return refuse(
                "it is reachable, or was a few seconds ago; run `overnode reset` on its host \
                 instead, or try again soon if it is gone"
                    .into(),
            );
        }
        // Records of nodes that are gone for good themselves do not count.
        let is_there =
            |id: NodeId, peer: &Peer| !peer.left && !self.is_reclaimed(id, peer.incarnation);
        let is_lent = |half: &IpNet| {
            let mut lenders = self.peers.iter().filter(|(id, _)| id.has_initial_quarter());
            lenders.any(|(id, peer)| is_there(*id, peer) && peer.ranges.contains(half))
        };
        let half = self.layout.lendable(of);
        let has_lender =
            half.is_none_or(|half| is_lent(&half) || self.lending.ledgers.contains_key(&of));
        if self.is_reclaimed(of, incarnation) && has_lender {
            self.effects.push(Action::Reclaimed(of));
            self.finish(now);
            return Ok(());
        }
        let mut promises = self.reclaiming.promises.keys();
        // The claimant with the lowest ID wins in any case.
        let other = promises
            .find(|(_, by)| *by < self.id && self.reachable.contains(by) && !self.has_left(*by))
            .map(|(_, by)| *by);
        if let Some(by) = other {
            return refuse(already_reclaiming(by));
        }
        if !self.reclaiming.claims.contains_key(&of) {
            self.put(Fact::Claim { of, incarnation });
            self.restore_claim(of, incarnation, now);
        }
        self.finish(now);
        Ok(())
    }

    /// Returns the nodes whose space this node takes back, with the nodes that have not agreed yet.
    pub fn reclaims(&self) -> BTreeMap<NodeId, Vec<NodeId>> {
        let missing = |of: NodeId, claim: &Claim| {
            let required = self.must_agree(of, claim).into_iter();
            required.filter(|id| !claim.acks.contains_key(id)).collect()
        };
        self.reclaiming.claims.iter().map(|(of, claim)| (*of, missing(*of, claim))).collect()
    }

    pub(super) fn restore_claim(&mut self, of: NodeId, incarnation: u64, now: Instant) {
        let settled = now + self.timing.settle;
        let (asked, acks) = (BTreeMap::new(), BTreeMap::new());
        let claim = Claim { incarnation, asked, acks, serials: [0; 4], settled, wake: None };
        self.reclaiming.claims.insert(of, claim);
    }

    pub(super) fn claims_space_of(&self, id: NodeId) -> bool {
        self.reclaiming.claims.contains_key(&id)
    }

    pub(super) fn drive_reclaim(&mut self, now: Instant) {
        for of in self.reclaiming.claims.keys().copied().collect::<Vec<_>>() {
            if self.reachable.contains(&of) {
                self.abandon_claim(of);
                self.fail(of, "it is reachable again".into());
            }
        }
        let claims: Vec<_> = self.reclaiming.claims.keys().copied().collect();
        let mut complete = true;
        for of in &claims {
            complete &= self.drive_claim(*of, now);
        }
        // All claims complete at once: the dead nodes were not asked about each other, and each may
        // have held blocks that another one lent.
        if complete {
            let claims = std::mem::take(&mut self.reclaiming.claims);
            for (&of, claim) in &claims {
                self.forget(Key::Claim(of));
                self.add_tombstone(of, claim, now);
            }
            for (of, claim) in claims {
                self.take_over(of, claim, now);
            }
        }
        self.send_tombstones(now);
        self.drop_promises(now);
    }

    pub(super) fn next_reclaim(&self) -> Option<Instant> {
        let asked = self.reclaiming.claims.values().flat_map(|claim| &claim.asked);
        let asked = asked
            .filter(|(id, _)| self.reachable.contains(id))
            .map(|(_, question)| question.retry.at);
        let unconfirmed = self
            .reclaiming
            .tombstones
            .values()
            .filter_map(|tombstone| tombstone.unconfirmed.as_ref())
            .flatten();
        let unconfirmed = unconfirmed.filter(|(id, _)| self.reachable.contains(id));
        let promises =
            self.reclaiming.promises.iter().filter(|((_, by), _)| self.reachable.contains(by));
        let promises = promises.map(|(_, promise)| promise.retry.at);
        let wakes = self.reclaiming.claims.values().filter_map(|claim| claim.wake);
        asked.chain(unconfirmed.map(|(_, retry)| retry.at)).chain(wakes).chain(promises).min()
    }

    /// Returns the nodes that have to agree: all known members and the nodes that they name.
    fn must_agree(&self, of: NodeId, claim: &Claim) -> Vec<NodeId> {
        let is_dead = |id: NodeId| id == of || self.reclaiming.claims.contains_key(&id);
        let mut ids: Vec<_> = self.members().filter(|id| !is_dead(*id)).collect();
        for rival in claim.acks.values().flat_map(|ack| &ack.rivals).copied() {
            if rival != self.id && !is_dead(rival) && !self.has_left(rival) && !ids.contains(&rival)
            {
                ids.push(rival);
            }
        }
        ids
    }

    /// Drops the ack of a node that got a quarter after it had agreed, so that it is asked once
    /// more. Its answer would differ now.
    fn drop_stale_acks(&mut self, of: NodeId) {
        let known = self.titles();
        let Some(claim) = self.reclaiming.claims.get_mut(&of) else { return };
        for (index, known) in known.into_iter().enumerate() {
            let latest = claim.latest(index, known);
            if latest.serial <= claim.serials[index] {
                continue;
            }
            claim.serials[index] = latest.serial;
            let is_stale = |ack: &Ack| ack.titles[index].serial < latest.serial;
            if claim.acks.get(&latest.holder).is_some_and(is_stale) {
                claim.acks.remove(&latest.holder);
                claim.asked.remove(&latest.holder);
            }
        }
    }

    /// Asks the nodes that have not agreed yet. Returns true if all have.
    fn drive_claim(&mut self, of: NodeId, now: Instant) -> bool {
        self.drop_stale_acks(of);
        let Some(claim) = self.reclaiming.claims.get(&of) else { return false };
        let required = self.must_agree(of, claim);
        let (our, mut count) = (self.incarnation, self.rounds);
        let Some(claim) = self.reclaiming.claims.get_mut(&of) else { return false };
        claim.wake = (claim.settled > now).then_some(claim.settled);
        if claim.settled > now {
            return false;
        }
        claim.asked.retain(|id, _| required.contains(id));
        let incarnation = claim.incarnation;
        let mut ask = Vec::new();
        let mut complete = true;
        for id in required {
            if claim.acks.contains_key(&id) {
                claim.asked.remove(&id);
                continue;
            }
            complete = false;
            let question = claim.asked.entry(id).or_insert_with(|| {
                count += 1;
                Question { round: Round { incarnation: our, count }, retry: Retry::new(now) }
            });
            if self.reachable.contains(&id) && question.retry.take(now, &self.timing) {
                ask.push((id, question.round));
            }
        }
        self.rounds = count;
        for (id, round) in ask {
            self.send(id, &Message::Reclaim { of, incarnation, round });
        }
        complete
    }

    fn take_over(&mut self, of: NodeId, claim: Claim, now: Instant) {
        for (index, quarter) in quarters().enumerate() {
            let latest = claim.latest(index, self.title_of(quarter));
            let is_lent = claim.acks.values().any(|ack| ack.lends[index]);
            let ledger = self.lending.ledgers.get(&quarter);
            let is_mine = ledger
                .is_some_and(|ledger| ledger.successor.is_none_or(|successor| successor.id != of));
            if is_lent || is_mine || (latest.holder != of && quarter != of) {
                continue;
            }
            let half = self.layout.lendable(quarter);
            let in_half = |loan: &Loan| Loan {
                epoch: loan.epoch,
                blocks: loan
                    .blocks
                    .iter()
                    .copied()
                    .filter(|net| half.is_some_and(|half| half.contains(net)))
                    .collect(),
            };
            let loans =
                claim.acks.iter().map(|(member, ack)| (*member, in_half(&ack.loan))).collect();
            let fresh =
                claim.acks.iter().filter(|(_, ack)| ack.is_fresh).map(|(member, _)| *member);
            // The serial exceeds any title that the dead node may have taken by birth with no node
            // left that has heard of it. It also exceeds any title that the dead node may have
            // begun to hand to another node. That node must not take it any more.
            let serial = latest.serial.max(claim.incarnation).saturating_add(2);
            self.take_title(quarter, serial, loans, &fresh.collect(), now);
        }
        self.effects.push(Action::Reclaimed(of));
    }

    pub(super) fn handle_promised(
        &mut self,
        from: NodeId,
        of: NodeId,
        incarnation: u64,
        round: Round,
    ) {
        if self.reclaiming.claims.contains_key(&of) {
            return;
        }
        if self.is_reclaimed(of, incarnation) {
            self.send_tombstones_of(from, Some(of));
        }
        // If this node completed the reclaim, the promise must not end before the sender knows of
        // it. If another node did, the sender may not believe the tombstone, and could not reclaim
        // the dead node itself while the promise lasts.
        if !self.may_have_reclaimed(of, incarnation) {
            self.send(from, &Message::ReclaimOver { of, round });
        }
    }

    pub(super) fn abandon_claim(&mut self, of: NodeId) {
        if self.reclaiming.claims.remove(&of).is_some() {
            self.forget(Key::Claim(of));
            let round = self.next_round();
            for member in self.members().collect::<Vec<_>>() {
                self.send(member, &Message::ReclaimOver { of, round });
            }
        }
    }

    pub(super) fn abandon_claims(&mut self, why: &str) {
        for of in self.reclaiming.claims.keys().copied().collect::<Vec<_>>() {
            self.abandon_claim(of);
            self.fail(of, why.to_owned());
        }
    }

    pub(super) fn fail(&mut self, of: NodeId, why: String) {
        self.effects.push(Action::ReclaimFailed(IpamError::Reclaim { of, why }));
    }

    pub(super) fn handle_reclaim_ack(
        &mut self,
        from: NodeId,
        of: NodeId,
        round: Round,
        mut ack: Ack,
    ) {
        ack.loan.epoch = self.bounded_epoch(from, ack.loan.epoch);
        if !from.has_initial_quarter() {
            // The sender never lends, and it may have made up the titles that it reports.
            (ack.titles, ack.lends) = ([Title { serial: 0, holder: from }; 4], [false; 4]);
        }
        if let Some(claim) = self.reclaiming.claims.get_mut(&of)
            && claim.asked.get(&from).is_some_and(|question| question.round == round)
        {
            claim.acks.insert(from, ack);
        }
    }

    pub(super) fn handle_refusal(
        &mut self,
        from: NodeId,
        of: NodeId,
        round: Round,
        why: Objection,
    ) {
        let question = self.reclaiming.claims.get(&of).and_then(|claim| claim.asked.get(&from));
        if question.is_none_or(|question| question.round != round) {
            return;
        }
        self.abandon_claim(of);
        let why = match why {
            Objection::Alive => {
                format!("node {from} can reach it; run `overnode reset` on its host instead")
            }
            Objection::Newer(_) => format!(
                "node {from} has seen it more recently than this node; if it has gone for good \
                 since then, try again in a minute"
            ),
            Objection::Mine => already_reclaiming(from),
        };
        self.fail(of, why);
    }
}

/// Describes why a node gives way to another claimant.
pub(super) fn already_reclaiming(by: NodeId) -> String {
    format!(
        "node {by} is already reclaiming address space, and only one node can at a time: \
         `overnode status --ipam` there shows what it waits for; run the command there as well, or \
         here when that is done"
    )
}
