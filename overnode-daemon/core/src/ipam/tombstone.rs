//! Tombstones: the records that the space of a node was taken back.
//!
//! The claimant sends its tombstone to all members, and to the node itself if that comes back. Each
//! of the nodes 1 to 4 that hears of a tombstone sends it on.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::fact::{Fact, Key};
use super::layout::quarters;
use super::message::{Message, Title};
use super::reclaim::{Claim, Reclaiming};
use super::{Action, Ipam, Problem, Retry};
use overnode_types::NodeId;

#[derive(Clone, Debug)]
pub(super) struct Tombstone {
    incarnation: u64,
    by: NodeId,
    /// Members that have not confirmed the tombstone yet. `None` if other nodes send it.
    pub(super) unconfirmed: Option<BTreeMap<NodeId, Retry>>,
    confirmed: BTreeSet<NodeId>,
}

impl Reclaiming {
    pub(super) fn restore_tombstone(
        &mut self,
        id: NodeId,
        incarnation: u64,
        by: NodeId,
        sends: bool,
    ) {
        let unconfirmed = sends.then(BTreeMap::new);
        self.tombstones
            .insert(id, Tombstone { incarnation, by, unconfirmed, confirmed: BTreeSet::new() });
    }
}

impl Ipam {
    /// Returns the nodes that are gone for good, with their last incarnation and the node that took
    /// their space back.
    pub fn reclaimed(&self) -> impl Iterator<Item = (NodeId, u64, NodeId)> {
        self.reclaiming
            .tombstones
            .iter()
            .map(|(id, tombstone)| (*id, tombstone.incarnation, tombstone.by))
    }

    /// Returns true if the node is gone for good: its space was reclaimed, and it has not been
    /// launched again.
    pub fn is_gone_for_good(&self, id: NodeId) -> bool {
        self.peers.get(&id).is_some_and(|peer| self.is_reclaimed(id, peer.incarnation))
    }

    pub(super) fn is_reclaimed(&self, id: NodeId, incarnation: u64) -> bool {
        self.reclaiming
            .tombstones
            .get(&id)
            .is_some_and(|tombstone| incarnation <= tombstone.incarnation)
    }

    pub(super) fn has_left(&self, id: NodeId) -> bool {
        self.peers.get(&id).is_some_and(|peer| peer.left || self.is_reclaimed(id, peer.incarnation))
    }

    pub(super) fn add_tombstone(&mut self, of: NodeId, claim: &Claim, now: Instant) {
        let (id, incarnation) = (self.id, claim.incarnation);
        self.put(Fact::Tombstone { id: of, incarnation, by: id });
        let unconfirmed =
            self.members().filter(|member| *member != of).map(|it| (it, Retry::new(now))).collect();
        let tombstone = Tombstone {
            incarnation,
            by: id,
            unconfirmed: Some(unconfirmed),
            confirmed: BTreeSet::new(),
        };
        self.reclaiming.tombstones.insert(of, tombstone);
        self.free_left(of, incarnation);
    }

    pub(super) fn send_tombstones(&mut self, now: Instant) {
        if self.reclaiming.tombstones.values().all(|tombstone| tombstone.unconfirmed.is_none()) {
            return;
        }
        let members: BTreeSet<_> = self.members().collect();
        let mut messages = Vec::new();
        let titles = self.titles();
        for (&of, tombstone) in &mut self.reclaiming.tombstones {
            let Some(unconfirmed) = &mut tombstone.unconfirmed else { continue };
            // If the node itself comes back with its old state, it has to hear of this before
            // anything else.
            let itself = Some(of).filter(|of| self.reachable.contains(of));
            for member in
                members.iter().chain(&itself).filter(|member| !tombstone.confirmed.contains(member))
            {
                unconfirmed.entry(*member).or_insert_with(|| Retry::new(now));
            }
            unconfirmed.retain(|id, _| members.contains(id) || itself == Some(*id));
            for (&to, retry) in unconfirmed.iter_mut() {
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
        let tombstones: Vec<_> =
            tombstones.map(|(of, tombstone)| (*of, tombstone.incarnation, tombstone.by)).collect();
        for (of, incarnation, by) in tombstones {
            self.send(to, &Message::Reclaimed { of, incarnation, by, titles });
        }
    }

    pub(super) fn send_reclaimed(&mut self, id: NodeId, epoch: u64) {
        if let Some(tombstone) =
            self.reclaiming.tombstones.get(&id).filter(|tombstone| epoch <= tombstone.incarnation)
        {
            let (incarnation, by, titles) = (tombstone.incarnation, tombstone.by, self.titles());
            self.send(id, &Message::Reclaimed { of: id, incarnation, by, titles });
        }
    }

    /// Returns true if a node has confirmed all tombstones that this node knows of. Only such a
    /// node may be handed a title. If the node itself was declared gone for good, it would no
    /// longer believe that once this node vouches for its title. And once this node has left, no
    /// other one of the nodes 1 to 4 may know of the tombstones.
    pub(super) fn has_confirmed_tombstones(&self, id: NodeId) -> bool {
        self.reclaiming.tombstones.values().all(|tombstone| tombstone.confirmed.contains(&id))
    }

    /// Sends tombstones again to a node that restarted, perhaps without its disk: it may not know
    /// which nodes are gone.
    pub(super) fn resend_tombstones(&mut self, id: NodeId) {
        for tombstone in self.reclaiming.tombstones.values_mut() {
            tombstone.confirmed.remove(&id);
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
            let unconfirmed = self.id.has_initial_quarter().then(BTreeMap::new);
            let tombstone =
                Tombstone { incarnation, by, unconfirmed, confirmed: BTreeSet::from([from]) };
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
            tombstone.confirmed.insert(from);
            if let Some(unconfirmed) = &mut tombstone.unconfirmed {
                unconfirmed.remove(&from);
            }
        }
    }

    /// Returns true if this node may have completed a reclaim of this incarnation. Its tombstone
    /// may have been replaced by a later one of another node.
    pub(super) fn may_have_reclaimed(&self, of: NodeId, incarnation: u64) -> bool {
        self.reclaiming.tombstones.get(&of).is_some_and(|tombstone| {
            incarnation < tombstone.incarnation
                || (incarnation == tombstone.incarnation && tombstone.by == self.id)
        })
    }
}
