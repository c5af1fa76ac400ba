//! Static addresses. If several nodes ask for an address at the same time, one gets it. If several
//! nodes have an address, one keeps it.
//!
//! The claimant asks every node that it reaches. Each node answers from the addresses that it has
//! or asks for itself. If two nodes ask at the same moment, the one with the lower ID takes
//! precedence. Nodes that do not answer in time count as unreachable: a conflict with their
//! addresses is found when their records arrive. Then the node with the lower ID keeps the address,
//! unless it must have known of the other node's claim ([`Timing::propagation`]). The node that
//! does not keep the address stops announcing it. It gets the address back when the keeper releases
//! it and no other node announces it. `docs/internals/addresses.md` has the reasons.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use super::message::{Message, Round, Verdict};
use super::{Action, Ipam, IpamError, Peer, Problem, RequestId, Retry, Timing};
use overnode_types::NodeId;

/// Maximum number of claims that wait for answers at a time. Each one remembers up to one entry per
/// node of the cluster.
pub const MAX_CLAIMS: usize = 256;
/// Maximum number of static addresses of a node: as many as it can announce.
pub const MAX_STATIC: usize = 1024;

#[derive(Clone, Debug, Default)]
pub(super) struct Statics {
    claims: BTreeMap<RequestId, Claim>,
    /// Static addresses in use here, and since when this daemon has announced them. The time runs
    /// as well while another node keeps the address.
    since: BTreeMap<IpAddr, Instant>,
    /// Since when each node has been reachable without an interruption or a restart of that node.
    contacts: BTreeMap<NodeId, Instant>,
    /// Other nodes that announce an address that is in use here.
    rivals: BTreeMap<(IpAddr, NodeId), Rival>,
}

/// A claim that waits for answers.
#[derive(Clone, Debug)]
struct Claim {
    address: IpAddr,
    owner: String,
    round: Round,
    /// Nodes that have answered that they do not have the address.
    agreed: BTreeSet<NodeId>,
    /// Nodes that have not answered by this time do not count.
    deadline: Instant,
    retry: Retry,
}

/// Another node's claim to an address that is in use here.
#[derive(Clone, Copy, Debug)]
struct Rival {
    since: Instant,
    /// True if the other node must have known, when it made the claim, that the address is in use.
    is_late: bool,
    /// True if the claim existed when this node could have announced the address again. The other
    /// node then keeps the address regardless of its ID, because it treats a later claim of this
    /// node as late.
    is_first: bool,
}

#[cfg(test)]
impl Statics {
    /// Returns the addresses that are asked for.
    pub(super) fn wanted(&self) -> impl Iterator<Item = IpAddr> {
        self.claims.values().map(|claim| claim.address)
    }
}

impl Ipam {
    /// Requests a static address for `owner`. The answer is [`Action::Granted`] or
    /// [`Action::Failed`]. It comes at once if no other node is reachable or the address is not
    /// available, and otherwise within [`Timing::claim`].
    pub fn claim(&mut self, address: IpAddr, owner: &str, now: Instant) -> RequestId {
        let request = self.next_request_id();
        match self.check_claim(address) {
            Err(error) => self.effects.push(Action::Failed { request, error }),
            Ok(()) => {
                let claim = Claim {
                    address,
                    owner: owner.to_owned(),
                    round: self.next_round(),
                    agreed: BTreeSet::new(),
                    deadline: now + self.timing.claim,
                    retry: Retry::new(now),
                };
                self.statics.claims.insert(request, claim);
            }
        }
        self.finish(now);
        request
    }

    /// Returns the static addresses that this node announces in addition to its ranges.
    pub fn claims(&self) -> Vec<IpAddr> {
        self.statics
            .since
            .keys()
            .copied()
            .filter(|address| self.keeper(*address).is_none())
            .collect()
    }

    /// Returns the other node that keeps a static address which is in use here as well, if any.
    pub fn keeper(&self, address: IpAddr) -> Option<NodeId> {
        let rivals = self.rivals_of(address);
        let keeps =
            |(node, rival): &(NodeId, Rival)| !rival.is_late && (*node < self.id || rival.is_first);
        rivals.filter(keeps).map(|(node, _)| node).min()
    }

    pub(super) fn cancel_claim(&mut self, request: RequestId) -> bool {
        self.statics.claims.remove(&request).is_some()
    }

    pub(super) fn pending_claims(&self) -> usize {
        self.statics.claims.len()
    }

    fn rivals_of(&self, address: IpAddr) -> impl Iterator<Item = (NodeId, Rival)> {
        let all = self.statics.rivals.range((address, NodeId::FIRST)..);
        let of_it = all.take_while(move |((of, _), _)| *of == address);
        of_it.map(|((_, node), rival)| (*node, *rival))
    }

    fn check_claim(&self, address: IpAddr) -> Result<(), IpamError> {
        self.layout.check_static(address)?;
        if self.leaving.is_some() {
            return Err(IpamError::Leaving { id: self.id });
        }
        let waiting = self.statics.claims.values().find(|claim| claim.address == address);
        let owner = self.allocated().get(&address).or_else(|| waiting.map(|claim| &claim.owner));
        if let Some(owner) = owner {
            return Err(IpamError::InUse { address, owner: owner.clone() });
        }
        if self.statics.claims.len() >= MAX_CLAIMS {
            return Err(IpamError::TooManyClaims { count: MAX_CLAIMS });
        }
        if self.statics.since.len() + self.statics.claims.len() >= MAX_STATIC {
            return Err(IpamError::TooManyStatic { count: MAX_STATIC });
        }
        self.check_elsewhere(address)
    }

    /// Refuses an address that another node announces, reachable or not.
    fn check_elsewhere(&self, address: IpAddr) -> Result<(), IpamError> {
        let claims_it =
            |id: &NodeId, peer: &Peer| peer.claims.contains(&address) && self.is_member(*id, peer);
        match self.peers.iter().find(|(id, peer)| claims_it(id, peer)) {
            Some((&node, _)) => Err(IpamError::InUseElsewhere { address, node }),
            None => Ok(()),
        }
    }

    fn is_member(&self, id: NodeId, peer: &Peer) -> bool {
        !peer.left && !self.is_reclaimed(id, peer.incarnation)
    }

    /// Records that an address came into use here.
    pub(super) fn note_static(&mut self, address: IpAddr, now: Instant) {
        if self.layout.network().range.contains(&address) {
            return;
        }
        self.statics.since.insert(address, now);
        let rivals: Vec<_> =
            self.peers.iter().filter(|(_, peer)| peer.claims.contains(&address)).collect();
        let rivals: Vec<_> = rivals.into_iter().map(|(id, _)| *id).collect();
        for node in rivals {
            self.statics
                .rivals
                .insert((address, node), Rival { since: now, is_late: false, is_first: false });
        }
    }

    /// Records that an address is no longer in use here.
    pub(super) fn forget_static(&mut self, address: IpAddr) {
        if self.statics.since.remove(&address).is_some() {
            self.statics.rivals.retain(|(of, _), _| *of != address);
        }
    }

    /// Updates since when each node has been reachable.
    pub(super) fn follow_contacts(&mut self, now: Instant) {
        let reachable = &self.reachable;
        self.statics.contacts.retain(|id, _| reachable.contains(id));
        for id in reachable {
            self.statics.contacts.entry(*id).or_insert(now);
        }
    }

    /// Updates the rival claims from what a node announces. Called before `peers` has the new
    /// record.
    pub(super) fn follow_claims(&mut self, node: NodeId, peer: &Peer, now: Instant) {
        let known = self.peers.get(&node);
        if known.is_some_and(|known| known.incarnation != peer.incarnation)
            && let Some(contact) = self.statics.contacts.get_mut(&node)
        {
            *contact = now;
        }
        let propagation = self.timing.propagation;
        let is_old = |since: &Instant| *since + propagation <= now;
        let is_long_reachable = self.statics.contacts.get(&node).is_some_and(is_old);
        let is_there = self.is_member(node, peer);
        let announced: BTreeSet<IpAddr> =
            peer.claims.iter().copied().filter(|_| is_there).collect();
        self.drop_rivals(now, |address, of| of == node && !announced.contains(&address));
        let mut new = Vec::new();
        for address in announced {
            let Some(since) = self.statics.since.get(&address) else { continue };
            // While another node keeps the address, this node does not announce it, so no node
            // could know of it.
            let is_announced = self.keeper(address).is_none();
            let is_late = is_announced && is_long_reachable && is_old(since);
            let rival = Rival { since: now, is_late, is_first: false };
            if let std::collections::btree_map::Entry::Vacant(entry) =
                self.statics.rivals.entry((address, node))
            {
                entry.insert(rival);
                new.push(address);
            }
        }
        for address in new {
            self.report(Problem::Clash { address, node });
        }
    }

    fn drop_rivals(&mut self, now: Instant, is_gone: impl Fn(IpAddr, NodeId) -> bool) {
        let gone: Vec<_> = self
            .statics
            .rivals
            .keys()
            .filter(|(address, node)| is_gone(*address, *node))
            .copied()
            .collect();
        for (address, node) in gone {
            let was_kept = self.keeper(address).is_some();
            self.statics.rivals.remove(&(address, node));
            if !was_kept || self.keeper(address).is_some() {
                continue;
            }
            let left: Vec<_> = self.rivals_of(address).map(|(node, _)| node).collect();
            for node in left {
                if let Some(rival) = self.statics.rivals.get_mut(&(address, node)) {
                    rival.is_first = true;
                }
            }
            // The others hear of the address only from now on and could not know of it before.
            if self.keeper(address).is_none()
                && let Some(since) = self.statics.since.get_mut(&address)
            {
                *since = now;
            }
        }
    }

    /// Returns the current clashes of static addresses.
    pub(super) fn clashes(&self, now: Instant) -> impl Iterator<Item = Problem> {
        let owner = |address: &IpAddr| self.allocated().get(address).cloned().unwrap_or_default();
        self.statics.rivals.iter().filter(move |((_, node), _)| self.counts(*node)).filter_map(
            move |(&(address, node), rival)| match self.keeper(address) {
                Some(keeper) => (keeper == node).then(|| Problem::Yielded {
                    address,
                    owner: owner(&address),
                    node,
                }),
                // A node that does not keep the address needs a moment to notice.
                None if rival.since + self.timing.settle > now => None,
                None => Some(Problem::Contested { address, owner: owner(&address), node }),
            },
        )
    }

    /// Returns false for a node that is unknown, has left or is gone for good.
    pub(super) fn counts(&self, node: NodeId) -> bool {
        self.peers.get(&node).is_some_and(|peer| self.is_member(node, peer))
    }

    /// Asks the nodes that have not answered and answers the claims that are decided.
    pub(super) fn drive_claims(&mut self, now: Instant) {
        // The record of a node may outlive the reclaim of its space.
        let nodes: BTreeSet<NodeId> = self.statics.rivals.keys().map(|(_, node)| *node).collect();
        let gone: BTreeSet<NodeId> = nodes.into_iter().filter(|node| !self.counts(*node)).collect();
        self.drop_rivals(now, |_, node| gone.contains(&node));
        if self.statics.claims.is_empty() {
            return;
        }
        if self.leaving.is_some() {
            for request in std::mem::take(&mut self.statics.claims).into_keys() {
                self.effects
                    .push(Action::Failed { request, error: IpamError::Leaving { id: self.id } });
            }
            return;
        }
        let gone = |id: &NodeId| self.peers.get(id).is_some_and(|peer| !self.is_member(*id, peer));
        let asked: Vec<NodeId> = self.reachable.iter().copied().filter(|id| !gone(id)).collect();
        let timing =
            Timing { retry_cap: self.timing.claim, retry: self.timing.claim / 5, ..self.timing };
        let mut decided = Vec::new();
        let mut messages = Vec::new();
        for (&request, claim) in &mut self.statics.claims {
            let missing = asked.iter().filter(|id| !claim.agreed.contains(id));
            let missing: Vec<NodeId> = missing.copied().collect();
            if missing.is_empty() || claim.deadline <= now {
                decided.push(request);
            } else if claim.retry.take(now, &timing) {
                let message = Message::Claim { address: claim.address, round: claim.round };
                messages.extend(missing.into_iter().map(|to| (to, message.clone())));
            }
        }
        for (to, message) in messages {
            self.send(to, &message);
        }
        for request in decided {
            let Some(claim) = self.statics.claims.remove(&request) else { continue };
            let address = claim.address;
            let answer = match self.check_elsewhere(address) {
                Ok(()) => {
                    self.allocation.insert(address, claim.owner);
                    self.note_static(address, now);
                    Action::Granted { request, address }
                }
                Err(error) => Action::Failed { request, error },
            };
            self.effects.push(answer);
        }
    }

    pub(super) fn next_claim(&self) -> Option<Instant> {
        self.statics.claims.values().map(|claim| claim.retry.at.min(claim.deadline)).min()
    }

    /// Answers another node that asks for a static address.
    pub(super) fn handle_claim(&mut self, from: NodeId, address: IpAddr, round: Round) {
        let wanted = self.statics.claims.iter().find(|(_, claim)| claim.address == address);
        let wanted = wanted.map(|(request, _)| *request);
        let verdict = match wanted {
            _ if self.allocated().contains_key(&address) => Verdict::Taken,
            Some(_) if self.id < from => Verdict::Wanted,
            Some(request) => {
                self.fail_claim(request, IpamError::WantedElsewhere { address, node: from });
                Verdict::Free
            }
            None => Verdict::Free,
        };
        self.send(from, &Message::ClaimAnswer { address, round, verdict });
    }

    pub(super) fn handle_claim_answer(
        &mut self,
        from: NodeId,
        address: IpAddr,
        round: Round,
        verdict: Verdict,
    ) {
        let asked = self.statics.claims.iter_mut().find(|(_, claim)| claim.round == round);
        let Some((&request, claim)) = asked.filter(|(_, claim)| claim.address == address) else {
            return;
        };
        match verdict {
            // Answers of nodes that were not asked are ignored.
            Verdict::Free if self.reachable.contains(&from) => drop(claim.agreed.insert(from)),
            Verdict::Free => {}
            Verdict::Taken => {
                self.fail_claim(request, IpamError::InUseElsewhere { address, node: from })
            }
            Verdict::Wanted => {
                self.fail_claim(request, IpamError::WantedElsewhere { address, node: from })
            }
        }
    }

    fn fail_claim(&mut self, request: RequestId, error: IpamError) {
        self.statics.claims.remove(&request);
        self.effects.push(Action::Failed { request, error });
    }
}
