//! Address allocation for containers: the space that this node may allocate from and the addresses
//! that it has allocated. Deterministic, without I/O or a clock.
//!
//! The range is divided into four quarters, named by the node IDs 1 to 4. Only the node with that
//! ID ever allocates from the first half of its quarter, and it needs no other node for that. The
//! holder of the quarter lends the second half in blocks. The node with the quarter's ID is its
//! holder by birth. Nodes with other IDs have only the blocks that they borrow.
//! `docs/internals/addresses.md` describes the protocol and its reasons.
//!
//! Inputs: [`Ipam::learn`], [`Ipam::set_reachable`], [`Ipam::set_targets_met`],
//! [`Ipam::handle_message`], [`Ipam::allocate`], [`Ipam::release`], [`Ipam::claim`],
//! [`Ipam::reclaim`], [`Ipam::leave`], [`Ipam::handle_timeout`]. Outputs: [`Ipam::poll_action`],
//! [`Ipam::poll_timeout`], [`Ipam::problems`].
//!
//! After each input, the caller polls actions until none is left and carries them out in order. The
//! changes of an [`Action::Persist`] are on disk before the caller polls the next action. The
//! caller stores a granted address before it uses the address or answers with it. If the address
//! cannot be stored, the caller calls [`Ipam::release`].

mod allocate;
mod borrow;
mod config;
mod consent;
mod error;
mod fact;
mod layout;
mod lend;
mod message;
mod problems;
mod reclaim;
mod retry;
mod shares;
mod space;
mod statics;
mod term;
mod tombstone;
mod transfer;
mod vouching;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::Instant;

use ipnet::IpNet;

pub use config::{Config, Timing};
pub use error::IpamError;
pub use fact::{Change, Fact, Key, Successor};
pub use layout::{BadNetwork, Layout, quarters};
pub use message::{
    BadMessage, LenderRole, Loan, MAX_MESSAGE, Message, Objection, Round, Title, Verdict,
};
pub use problems::Problem;
pub use shares::{Share, Shares};
pub use space::size;
pub use statics::{MAX_CLAIMS, MAX_STATIC};

use overnode_types::NodeId;
use retry::{Question, Retry};

/// What gossip says about another node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// The node's start counter.
    pub incarnation: u64,
    /// True once the node has left the cluster.
    pub left: bool,
    /// The address space that the node announces.
    pub ranges: Vec<IpNet>,
    /// The node's static addresses.
    pub claims: Vec<IpAddr>,
}

/// Identifies a request for an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// An effect that the caller carries out, or an event that it must know about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Write all of these changes to disk in one transaction before the next action is polled.
    Persist(Vec<Change>),
    /// Send a message to a node. It may be reachable only through other nodes.
    Send {
        /// The receiver.
        to: NodeId,
        /// The encoded message.
        bytes: Vec<u8>,
    },
    /// A request was granted. The address counts as allocated from now on.
    Granted {
        /// The request.
        request: RequestId,
        /// The address.
        address: IpAddr,
    },
    /// A request failed.
    Failed {
        /// The request.
        request: RequestId,
        /// The reason.
        error: IpamError,
    },
    /// A problem has come up. [`Ipam::problems`] says whether it persists.
    Report(Problem),
    /// The space of this node was taken back.
    Reclaimed(NodeId),
    /// The reclaim of a node's space failed.
    ReclaimFailed(IpamError),
    /// Nothing prevents this node from leaving any more.
    MayLeave,
    /// This node cannot leave now and stays in the cluster.
    CannotLeave(IpamError),
    /// This node was declared gone for good and counts as a new node from now on. It must announce
    /// this incarnation to the others.
    Renewed(u64),
}

/// The address allocation of one node.
#[derive(Clone, Debug)]
pub struct Ipam {
    id: NodeId,
    layout: Layout,
    timing: Timing,
    incarnation: u64,
    /// Incarnation of the first start since the launch, or the incarnation taken after this node
    /// was declared gone for good.
    epoch: u64,
    rounds: u64,
    peers: BTreeMap<NodeId, Peer>,
    reachable: BTreeSet<NodeId>,
    /// When this node began to count how long other nodes have been unreachable.
    started: Instant,
    /// When each unreachable node was last heard from.
    lost: BTreeMap<NodeId, Instant>,
    targets_met: bool,
    allocation: allocate::Allocation,
    borrowing: borrow::Borrowing,
    lending: lend::Lending,
    vouching: vouching::Vouchers,
    term: Option<term::Term>,
    incoming: BTreeMap<NodeId, transfer::IncomingLedger>,
    reclaiming: reclaim::Reclaiming,
    leaving: Option<transfer::Leaving>,
    statics: statics::Statics,
    reported: problems::Reported,
    changes: Vec<Change>,
    effects: Vec<Action>,
    actions: VecDeque<Action>,
}

impl Ipam {
    /// Creates the allocation of a node from the persisted facts and from the addresses that were
    /// allocated before a restart, each with its owner.
    ///
    /// # Errors
    /// [`BadNetwork`] if the subnet and range are not valid.
    pub fn new(
        config: Config,
        facts: impl IntoIterator<Item = Fact>,
        allocated: BTreeMap<IpAddr, String>,
        now: Instant,
    ) -> Result<Self, BadNetwork> {
        let layout = Layout::new(config.network)?;
        let mut ipam = Self {
            id: config.id,
            layout,
            timing: config.timing,
            incarnation: config.incarnation,
            epoch: 0,
            rounds: 0,
            peers: BTreeMap::new(),
            reachable: BTreeSet::new(),
            started: now,
            lost: BTreeMap::new(),
            targets_met: false,
            allocation: allocate::Allocation::new(layout.own_part(config.id)),
            borrowing: borrow::Borrowing::default(),
            lending: lend::Lending::default(),
            vouching: vouching::Vouchers::default(),
            term: None,
            incoming: BTreeMap::new(),
            reclaiming: reclaim::Reclaiming::default(),
            leaving: None,
            statics: statics::Statics::default(),
            reported: problems::Reported::default(),
            changes: Vec::new(),
            effects: Vec::new(),
            actions: VecDeque::new(),
        };
        for fact in facts {
            ipam.restore(fact, now);
        }
        if ipam.epoch == 0 {
            ipam.epoch = config.incarnation;
            ipam.put(Fact::Epoch(config.incarnation));
        }
        for (address, owner) in allocated {
            ipam.allocation.insert(address, owner);
            ipam.note_static(address, now);
        }
        ipam.allocation.resume();
        // The ledgers of the lenders may be older than the state on this disk.
        ipam.borrowing.dirty = ipam.held().filter_map(|block| layout.quarter_of(block)).collect();
        ipam.finish(now);
        Ok(ipam)
    }

    /// Returns the division of the cluster's addresses.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Returns the epoch, which distinguishes this node's launches.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Updates what gossip says about another node. Nodes that were never passed in are unknown.
    pub fn learn(&mut self, id: NodeId, peer: Peer, now: Instant) {
        if id == self.id || self.peers.get(&id) == Some(&peer) {
            return;
        }
        self.follow_claims(id, &peer, now);
        self.report_ranges(id, &peer);
        let known = self.peers.get(&id).map(|known| (known.incarnation, known.left));
        let lends = |peer: &Peer| self.lends_of(peer);
        let is_other_lender = self.peers.get(&id).map(lends).unwrap_or_default() != lends(&peer);
        let is_news = known != Some((peer.incarnation, peer.left));
        if peer.left {
            self.free_left(id, peer.incarnation);
        } else {
            if known.map(|(incarnation, _)| incarnation) != Some(peer.incarnation) {
                self.mark_unsure(id, now);
                self.resend_tombstones(id);
                self.vouching.forget_member(id);
            }
        }
        self.peers.insert(id, peer);
        self.dispute(id, now);
        if is_news {
            self.ask_all_again(now);
        }
        // A node that was declared gone for good lends again from its next incarnation on.
        if is_news || is_other_lender {
            self.find_lenders();
        }
        self.finish(now);
    }

    /// Sets the nodes that are reachable now, directly or through other nodes.
    pub fn set_reachable(&mut self, reachable: BTreeSet<NodeId>, now: Instant) {
        if self.reachable == reachable {
            return;
        }
        let gained: Vec<_> = reachable.difference(&self.reachable).copied().collect();
        let lost: Vec<_> = self.reachable.difference(&reachable).copied().collect();
        self.reachable = reachable;
        self.follow_contacts(now);
        for id in gained {
            self.lost.remove(&id);
            self.retry_now(id, now);
        }
        for id in lost {
            self.lost.insert(id, now);
            self.doubt_consent(id);
        }
        self.find_lenders();
        self.finish(now);
    }

    /// Marks a node's consent as stale after the node was unreachable. What it said still counts,
    /// but it may have agreed to something else meanwhile.
    fn doubt_consent(&mut self, id: NodeId) {
        if let Some(term) = &mut self.term {
            term.mark_unsure(id);
        }
        self.reclaiming.mark_unsure(id);
    }

    /// Limits the epoch that a node claims to the incarnation that it announces to everybody. The
    /// owner of the ID can always exceed that one.
    fn bounded_epoch(&self, id: NodeId, epoch: u64) -> u64 {
        epoch.min(self.peers.get(&id).map_or(0, |peer| peer.incarnation))
    }

    /// Returns true if a node was unreachable for so long that it has noticed it as well.
    fn is_long_gone(&self, id: NodeId, now: Instant) -> bool {
        let since = self.lost.get(&id).copied().unwrap_or(self.started);
        !self.reachable.contains(&id) && since + self.timing.grace <= now
    }

    /// Sets the incarnation by which the other nodes know this node. It may have had to outbid
    /// another one.
    pub fn set_incarnation(&mut self, incarnation: u64, now: Instant) {
        if incarnation <= self.incarnation {
            return;
        }
        self.incarnation = incarnation;
        // Lenders treat requests from an earlier incarnation as late.
        for quarter in layout::quarters() {
            self.void_requests(quarter);
        }
        self.finish(now);
    }

    /// Sets whether this node has met, since its launch, a node at each of its targets.
    pub fn set_targets_met(&mut self, met: bool, now: Instant) {
        if self.targets_met != met {
            self.targets_met = met;
            self.finish(now);
        }
    }

    /// Handles a message from another node.
    ///
    /// # Errors
    /// [`BadMessage`] if the message violates the protocol. No part of it is applied.
    pub fn handle_message(
        &mut self,
        from: NodeId,
        bytes: &[u8],
        now: Instant,
    ) -> Result<(), BadMessage> {
        let message = Message::decode(bytes, &self.layout)?;
        if from == self.id {
            return Ok(());
        }
        match message {
            Message::Request { quarter, serial, epoch, round, need, want, holds } => {
                let loan = Loan { epoch, blocks: holds };
                self.handle_request(from, quarter, serial, loan, round, (need, want));
            }
            Message::Grant { quarter, serial, round, blocks, exhausted } => {
                self.handle_grant(from, quarter, (serial, round), blocks, exhausted, now);
            }
            Message::Query { quarter, serial } => self.handle_query(from, quarter, serial, now),
            Message::Hold { quarter, serial, epoch, round, sure } => {
                self.handle_hold(from, quarter, (serial, epoch), round, sure, now);
            }
            Message::Vouch { quarter, serial, round, heard } => {
                self.handle_vouch(from, quarter, serial, round, heard, now);
            }
            Message::Title { quarter, title } => self.handle_title(from, quarter, title, now),
            Message::Ask { epoch, round } => self.handle_ask(from, epoch, round, now),
            Message::Answer { round, epoch, title, part, holds, rivals } => {
                let loan = Loan { epoch, blocks: holds };
                let answer = term::Answer { loan, title, part, rivals, is_fresh: true };
                self.handle_answer(from, round, answer, now);
            }
            Message::Transfer { quarter, serial, epoch, part, parts, loans } => {
                self.handle_transfer(from, quarter, (serial, epoch), (part, parts), loans, now);
            }
            Message::TransferAck { quarter, serial, part, taken } => {
                self.handle_transfer_ack(from, quarter, serial, part, taken, now);
            }
            Message::Reclaim { of, incarnation, round } => {
                self.handle_reclaim(from, of, incarnation, round, now)
            }
            Message::ReclaimAck { of, round, epoch, titles, lends, holds, rivals } => {
                let loan = Loan { epoch, blocks: holds };
                let ack = reclaim::Ack { loan, titles, lends, rivals, is_fresh: true };
                self.handle_reclaim_ack(from, of, round, ack);
            }
            Message::ReclaimRefused { of, round, why } => self.handle_refusal(from, of, round, why),
            Message::Promised { of, incarnation, round } => {
                self.handle_promised(from, of, incarnation, round);
            }
            Message::ReclaimOver { of, round } => self.handle_reclaim_over(from, of, round),
            Message::Reclaimed { of, incarnation, by, titles } => {
                self.handle_reclaimed(from, of, incarnation, by, titles, now);
            }
            Message::ReclaimedAck { of, incarnation } => {
                self.handle_reclaimed_ack(from, of, incarnation)
            }
            Message::Claim { address, round } => self.handle_claim(from, address, round),
            Message::ClaimAnswer { address, round, verdict } => {
                self.handle_claim_answer(from, address, round, verdict);
            }
        }
        self.finish(now);
        Ok(())
    }

    /// Handles everything that is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.finish(now);
    }

    /// Returns when to call [`Self::handle_timeout`] next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        [
            self.next_request(),
            self.next_hand_back(),
            self.next_loan_check(),
            self.next_vouching(),
            self.next_question(),
            self.next_transfer(),
            self.next_reclaim(),
            self.next_claim(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Returns the next action. The caller must have carried out all earlier ones.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Ends the handling of an input: applies everything that follows from the input and from the
    /// time, and queues the changes to persist before all effects that depend on them.
    fn finish(&mut self, now: Instant) {
        self.prune_vouching();
        self.drive_reclaim(now);
        self.drive_term(now);
        self.drive_transfers(now);
        self.drive_vouching(now);
        self.drive_loans(now);
        self.drive_borrowing(now);
        self.drive_claims(now);
        self.keep_reported(now);
        if !self.changes.is_empty() {
            self.actions.push_back(Action::Persist(std::mem::take(&mut self.changes)));
        }
        self.actions.extend(self.effects.drain(..));
    }

    /// Restores a fact that was read from disk.
    fn restore(&mut self, fact: Fact, now: Instant) {
        match fact {
            Fact::Epoch(epoch) => self.epoch = epoch,
            Fact::Held { block, lost } => self.allocation.add_block(block, lost, now),
            Fact::Heard { quarter, title } => {
                self.lending.known_titles.insert(quarter, title);
            }
            Fact::Confirmed { quarter, title } => {
                self.lending.confirmed.insert(quarter, title);
            }
            Fact::Taken { quarter, serial } => {
                self.lending.taken.insert(quarter, serial);
            }
            Fact::Ledger { quarter, serial, successor } => {
                self.lending.ledger(quarter, serial, now).successor = successor
            }
            Fact::Loan { quarter, borrower, loan, round } => {
                self.lending.loans.insert((quarter, borrower), lend::Lent { loan, round });
            }
            Fact::Tombstone { id, incarnation, by } => {
                self.reclaiming.restore_tombstone(
                    id,
                    incarnation,
                    by,
                    self.id.has_initial_quarter(),
                );
            }
            Fact::Promise { of, incarnation, by, round } => {
                self.promise(of, by, incarnation, round, now);
            }
            Fact::Claim { of, incarnation } => self.restore_claim(of, incarnation, now),
            Fact::LenderRole { quarter, serial, part, parts, loans } => {
                let incoming = self.incoming.entry(quarter).or_default();
                (incoming.serial, incoming.parts) = (serial, parts);
                incoming.loans.insert(part, loans);
            }
        }
    }

    /// Asks all nodes again after a node came, left or restarted: its holdings may have changed
    /// owners while the questions were under way.
    fn ask_all_again(&mut self, now: Instant) {
        let settled = now + self.timing.settle;
        if let Some(term) = &mut self.term {
            term.restart(settled);
        }
        self.reclaiming.restart_claims(settled);
    }

    fn put(&mut self, fact: Fact) {
        self.changes.push(Change::Put(fact));
    }

    fn forget(&mut self, key: Key) {
        self.changes.push(Change::Forget(key));
    }

    fn send(&mut self, to: NodeId, message: &Message) {
        self.effects.push(Action::Send { to, bytes: message.encode() });
    }

    fn report(&mut self, problem: Problem) {
        self.reported.add(&problem);
        self.effects.push(Action::Report(problem));
    }

    fn next_round(&mut self) -> Round {
        self.rounds += 1;
        Round { incarnation: self.incarnation, count: self.rounds }
    }

    /// Returns the nodes that may hold space: all known nodes that have neither left nor been
    /// declared gone for good.
    fn members(&self) -> impl Iterator<Item = NodeId> {
        self.peers
            .iter()
            .filter(|(id, peer)| !peer.left && !self.is_reclaimed(**id, peer.incarnation))
            .map(|(id, _)| *id)
    }

    /// Makes retries due at once for everything that waits for a node that has become reachable.
    fn retry_now(&mut self, id: NodeId, now: Instant) {
        for request in self.borrowing.requests.values_mut().filter(|request| request.to == id) {
            request.retry = Retry::new(now);
        }
        if let Some(retry) = self.term.as_mut().and_then(|term| term.asked.get_mut(&id)) {
            retry.retry = Retry::new(now);
        }
        for ledger in self.lending.ledgers.values_mut() {
            if let Some(retry) = ledger.unsure.get_mut(&id) {
                *retry = Retry::new(now);
            }
            ledger.retry = Retry::new(now);
        }
        self.reclaiming.retry_now(id, now);
    }
}
