//! Taking back the space of a node that is gone for good.
//!
//! Only nodes 1 to 4 take back space, since only they lend. All other known nodes have to agree, so
//! neither side of a partition can do it alone. If two nodes try, the one with the lower ID
//! succeeds. That also holds if they take back the space of different nodes, since one of these may
//! lend the quarter of the other. A node that agrees takes nothing more from the node that is gone,
//! and reports what it holds. The half of a quarter that is never lent stays with the ID. Its next
//! launch needs no consent to use it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use ipnet::IpNet;

use super::fact::{Fact, Key};
use super::layout::quarters;
use super::message::{Loan, MAX_RIVALS, Message, Objection, Round, Title};
use super::{Action, Ipam, IpamError, Peer, Problem, Question, Retry};
use overnode_types::NodeId;

#[derive(Clone, Debug, Default)]
pub(super) struct Reclaiming {
    tombstones: BTreeMap<NodeId, Tombstone>,
    /// By the node that may be gone and the claimant that takes its space back.
    pub(super) promises: BTreeMap<(NodeId, NodeId), Promise>,
    claims: BTreeMap<NodeId, Claim>,
}

/// A promise to take nothing more from a node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Promise {
    incarnation: u64,
    round: Round,
    /// When to ask whether the promise is still needed: the message that ends it may have been
    /// lost.
    retry: Retry,
}

#[derive(Clone, Debug)]
struct Tombstone {
    incarnation: u64,
    by: NodeId,
    /// Nodes that were not told yet. `None` if it is not up to this node to tell them.
    untold: Option<BTreeMap<NodeId, Retry>>,
    told: BTreeSet<NodeId>,
}

#[derive(Clone, Debug)]
struct Claim {
    incarnation: u64,
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
        let told = self.acks.values().map(|ack| ack.titles[index]);
        told.chain([known]).max_by_key(|title| title.serial).unwrap_or(known)
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
    pub(super) fn restore_tombstone(
        &mut self,
        id: NodeId,
        incarnation: u64,
        by: NodeId,
        tells: bool,
    ) {
        let untold = tells.then(BTreeMap::new);
        self.tombstones.insert(id, Tombstone { incarnation, by, untold, told: BTreeSet::new() });
    }

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
        let untold = self.tombstones.values_mut().filter_map(|tombstone| tombstone.untold.as_mut());
        for retries in untold {
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
                .all(|tombstone| tombstone.untold.as_ref().is_none_or(BTreeMap::is_empty))
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
            return refuse(doing_that(by));
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

    /// Returns the nodes that are gone for good, with their last incarnation and the node that took
    /// their space back.
    pub fn reclaimed(&self) -> impl Iterator<Item = (NodeId, u64, NodeId)> {
        self.reclaiming
            .tombstones
            .iter()
            .map(|(id, tombstone)| (*id, tombstone.incarnation, tombstone.by))
    }

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

    pub(super) fn restore_claim(&mut self, of: NodeId, incarnation: u64, now: Instant) {
        let settled = now + self.timing.settle;
        let (asked, acks) = (BTreeMap::new(), BTreeMap::new());
        let claim = Claim { incarnation, asked, acks, serials: [0; 4], settled, wake: None };
        self.reclaiming.claims.insert(of, claim);
    }

    pub(super) fn is_reclaimed(&self, id: NodeId, incarnation: u64) -> bool {
        self.reclaiming
            .tombstones
            .get(&id)
            .is_some_and(|tombstone| incarnation <= tombstone.incarnation)
    }

    pub(super) fn claims_space_of(&self, id: NodeId) -> bool {
        self.reclaiming.claims.contains_key(&id)
    }

    pub(super) fn has_left(&self, id: NodeId) -> bool {
        self.peers.get(&id).is_some_and(|peer| peer.left || self.is_reclaimed(id, peer.incarnation))
    }

    pub(super) fn send_reclaimed(&mut self, id: NodeId, epoch: u64) {
        if let Some(tombstone) =
            self.reclaiming.tombstones.get(&id).filter(|tombstone| epoch <= tombstone.incarnation)
        {
            let (incarnation, by, titles) = (tombstone.incarnation, tombstone.by, self.titles());
            self.send(id, &Message::Reclaimed { of: id, incarnation, by, titles });
        }
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
        let untold = self
            .reclaiming
            .tombstones
            .values()
            .filter_map(|tombstone| tombstone.untold.as_ref())
            .flatten();
        let untold = untold.filter(|(id, _)| self.reachable.contains(id));
        let promises =
            self.reclaiming.promises.iter().filter(|((_, by), _)| self.reachable.contains(by));
        let promises = promises.map(|(_, promise)| promise.retry.at);
        let wakes = self.reclaiming.claims.values().filter_map(|claim| claim.wake);
        asked.chain(untold.map(|(_, retry)| retry.at)).chain(wakes).chain(promises).min()
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

    fn add_tombstone(&mut self, of: NodeId, claim: &Claim, now: Instant) {
        let (id, incarnation) = (self.id, claim.incarnation);
        self.put(Fact::Tombstone { id: of, incarnation, by: id });
        let untold =
            self.members().filter(|member| *member != of).map(|it| (it, Retry::new(now))).collect();
        let tombstone =
            Tombstone { incarnation, by: id, untold: Some(untold), told: BTreeSet::new() };
        self.reclaiming.tombstones.insert(of, tombstone);
        self.free_left(of, incarnation);
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

    fn send_tombstones(&mut self, now: Instant) {
        if self.reclaiming.tombstones.values().all(|tombstone| tombstone.untold.is_none()) {
            return;
        }
        let members: BTreeSet<_> = self.members().collect();
        let mut messages = Vec::new();
        let titles = self.titles();
        for (&of, tombstone) in &mut self.reclaiming.tombstones {
            let Some(untold) = &mut tombstone.untold else { continue };
            // If the node itself comes back with its old state, it has to hear of this before
            // anything else.
            let itself = Some(of).filter(|of| self.reachable.contains(of));
            for member in
                members.iter().chain(&itself).filter(|member| !tombstone.told.contains(member))
            {
                untold.entry(*member).or_insert_with(|| Retry::new(now));
            }
            untold.retain(|id, _| members.contains(id) || itself == Some(*id));
            for (&to, retry) in untold.iter_mut() {
                if self.reachable.contains(&to) && retry.take(now, &self.timing) {
                    let (incarnation, by) = (tombstone.incarnation, tombstone.by);
                    messages.push((to, Message::Reclaimed { of, incarnation, by, titles }));
                }
            }
        }
        for (to, message) in messages {
            self.send(to, &message);
        }
    }

    /// Sends all tombstones to a node, or only the tombstone of `only`.
    pub(super) fn send_tombstones_of(&mut self, to: NodeId, only: Option<NodeId>) {
        let titles = self.titles();
        let tombstones = self
            .reclaiming
            .tombstones
            .iter()
            .filter(|(of, _)| only.is_none_or(|only| only == **of));
        let told: Vec<_> =
            tombstones.map(|(of, tombstone)| (*of, tombstone.incarnation, tombstone.by)).collect();
        for (of, incarnation, by) in told {
            self.send(to, &Message::Reclaimed { of, incarnation, by, titles });
        }
    }

    /// Returns true if a node has confirmed all tombstones that this node knows of. Only such a
    /// node may be handed a title. If the node itself was declared gone for good, it would no
    /// longer believe that once this node vouches for its title. And once this node has left, no
    /// other one of the nodes 1 to 4 may know of the tombstones.
    pub(super) fn has_confirmed_tombstones(&self, id: NodeId) -> bool {
        self.reclaiming.tombstones.values().all(|tombstone| tombstone.told.contains(&id))
    }

    /// Sends tombstones again to a node that restarted, perhaps without its disk: it may not know
    /// which nodes are gone.
    pub(super) fn tell_again(&mut self, id: NodeId) {
        for tombstone in self.reclaiming.tombstones.values_mut() {
            tombstone.told.remove(&id);
        }
    }

    /// Drops promises to nodes that have left or are gone for good, and asks the other claimants
    /// whether theirs are still needed.
    fn drop_promises(&mut self, now: Instant) {
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
    fn drop_promise(&mut self, of: NodeId, by: NodeId) {
        self.reclaiming.promises.remove(&(of, by));
        self.forget(Key::Promise(of, by));
        self.find_lenders();
    }

    fn forget_titles_of(&mut self, holder: NodeId) {
        let heard = self.lending.heard.iter().filter(|(_, title)| title.holder == holder);
        for quarter in heard.map(|(quarter, _)| *quarter).collect::<Vec<_>>() {
            self.lending.heard.remove(&quarter);
            self.forget(Key::Heard(quarter));
        }
        self.forget_confirmed(|title| title.holder == holder);
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

    /// Returns true if this node may have completed a reclaim of this incarnation. Its tombstone
    /// may have been replaced by a later one of another node.
    fn may_have_reclaimed(&self, of: NodeId, incarnation: u64) -> bool {
        self.reclaiming.tombstones.get(&of).is_some_and(|tombstone| {
            incarnation < tombstone.incarnation
                || (incarnation == tombstone.incarnation && tombstone.by == self.id)
        })
    }

    /// Returns true if this node has promised to take nothing from `id`.
    pub(super) fn has_promised(&self, id: NodeId) -> bool {
        self.reclaiming.promises.keys().any(|(of, _)| *of == id)
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

    fn fail(&mut self, of: NodeId, why: String) {
        self.effects.push(Action::ReclaimFailed(IpamError::Reclaim { of, why }));
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
        self.abandon_claims(&doing_that(from));
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
    fn titles(&self) -> [Title; 4] {
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
            Objection::Mine => doing_that(from),
        };
        self.fail(of, why);
    }

    pub(super) fn handle_reclaim_over(&mut self, from: NodeId, of: NodeId, round: Round) {
        if self.reclaiming.promises.get(&(of, from)).is_some_and(|promise| promise.round <= round) {
            self.drop_promise(of, from);
        }
    }

    pub(super) fn handle_reclaimed(
        &mut self,
        from: NodeId,
        of: NodeId,
        incarnation: u64,
        by: NodeId,
        titles: [Title; 4],
        now: Instant,
    ) {
        if !from.has_initial_quarter() || !by.has_initial_quarter() {
            return;
        }
        if of == self.id && self.epoch > incarnation {
            // The tombstone is of an earlier launch of this node.
            return self.send(from, &Message::ReclaimedAck { of, incarnation });
        }
        if of == self.id {
            if !self.handle_own_reclaim(incarnation, by) {
                return;
            }
        } else if self
            .reclaiming
            .tombstones
            .get(&of)
            .is_none_or(|tombstone| tombstone.incarnation < incarnation)
        {
            if !self.believes_reclaim(from, of, incarnation, by) {
                let is_back =
                    self.peers.get(&of).is_some_and(|peer| peer.incarnation > incarnation);
                if is_back && self.reachable.contains(&of) {
                    // The node is back in a later incarnation, so the tombstone no longer matters.
                    self.send(from, &Message::ReclaimedAck { of, incarnation });
                }
                return;
            }
            self.put(Fact::Tombstone { id: of, incarnation, by });
            let untold = self.id.has_initial_quarter().then(BTreeMap::new);
            let tombstone = Tombstone { incarnation, by, untold, told: BTreeSet::from([from]) };
            self.reclaiming.tombstones.insert(of, tombstone);
            self.free_left(of, incarnation);
            let promises =
                self.reclaiming.promises.iter().filter(|((gone, _), promise)| {
                    *gone == of && promise.incarnation <= incarnation
                });
            for (gone, by) in promises.map(|(key, _)| *key).collect::<Vec<_>>() {
                self.drop_promise(gone, by);
            }
            if self.reclaiming.claims.get(&of).is_some_and(|claim| claim.incarnation <= incarnation)
            {
                self.reclaiming.claims.remove(&of);
                self.forget(Key::Claim(of));
                self.fail(of, format!("node {by} has already reclaimed it"));
            }
            self.find_lenders();
        } else if self
            .reclaiming
            .promises
            .get(&(of, from))
            .is_some_and(|it| it.incarnation <= incarnation)
        {
            // This node has heard before that another node completed the reclaim.
            self.drop_promise(of, from);
        }
        for (quarter, title) in quarters().zip(titles) {
            if title.holder != self.id && title.serial > self.title_of(quarter).serial {
                self.handle_title(from, quarter, title, now);
            }
        }
        self.send(from, &Message::ReclaimedAck { of, incarnation });
    }

    /// Returns true if this node believes `from` that the space of another node was taken back. The
    /// proof is that the claimant `by` asked this node and this node agreed. A node that was not
    /// asked, because it joined later, believes a node 1 to 4 unless it has lent something to the
    /// dead node. In that case its own operator has to reclaim that node there.
    fn believes_reclaim(&self, from: NodeId, of: NodeId, incarnation: u64, by: NodeId) -> bool {
        let agreed = self.reclaiming.promises.get(&(of, by)).filter(|_| from == by);
        if agreed.is_some_and(|promise| incarnation <= promise.incarnation) {
            return true;
        }
        let Some(known) = self.peers.get(&of).map(|peer| peer.incarnation) else { return false };
        let has_lent = self.lending.loans.iter().any(|((_, borrower), lent)| {
            *borrower == of && lent.loan.epoch <= incarnation && !lent.loan.blocks.is_empty()
        });
        incarnation <= known && !self.reachable.contains(&of) && !has_lent
    }

    /// Handles the message that this node was declared gone for good and that others have its
    /// space. Returns false if that cannot be true: most of the reachable nodes vouch for this
    /// node, or the message names a launch that never was. A few vouching nodes are not enough,
    /// because nodes that were declared gone together vouch for each other.
    fn handle_own_reclaim(&mut self, incarnation: u64, by: NodeId) -> bool {
        if incarnation > self.incarnation
            || self.lending.ledgers.keys().any(|quarter| self.is_vouched_for_by_most(*quarter))
        {
            return false;
        }
        self.report(Problem::Reclaimed { by });
        self.incarnation = self.incarnation.max(incarnation.saturating_add(1));
        self.epoch = self.incarnation;
        self.put(Fact::Epoch(self.epoch));
        self.effects.push(Action::Renewed(self.incarnation));
        for quarter in self.lending.ledgers.keys().copied().collect::<Vec<_>>() {
            self.drop_title(quarter);
        }
        for quarter in quarters() {
            self.void_requests(quarter);
        }
        // The titles of other lenders may have been taken back without this node's consent.
        self.forget_confirmed(|_| true);
        let held: Vec<_> = self.held().collect();
        for block in held {
            // The lender may let this node keep the block when it is asked.
            self.lose(block, by);
            self.borrowing.dirty.extend(self.layout.quarter_of(block));
        }
        true
    }

    pub(super) fn handle_reclaimed_ack(&mut self, from: NodeId, of: NodeId, incarnation: u64) {
        if let Some(tombstone) =
            self.reclaiming.tombstones.get_mut(&of).filter(|it| it.incarnation == incarnation)
        {
            tombstone.told.insert(from);
            if let Some(untold) = &mut tombstone.untold {
                untold.remove(&from);
            }
        }
    }
}

/// Describes why a node gives way to another claimant.
fn doing_that(by: NodeId) -> String {
    format!(
        "node {by} is already reclaiming address space, and only one node can at a time: \
         `overnode status --ipam` there shows what it waits for; run the command there as well, or \
         here when that is done"
    )
}
