//! Lending: the ledger of the quarters that this node holds.
//!
//! For each borrower the ledger has at least everything that the borrower holds, at every moment. A
//! loan is on disk before the borrower hears of it. It becomes free again only when the borrower
//! says so, or when the borrower has left or is gone for good.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use ipnet::IpNet;

use super::borrow::MAX_AHEAD;
use super::fact::{Fact, Key, Successor};
use super::message::{Loan, MAX_BLOCKS, Message, Round, Title};
use super::space::{choose, free, overlap, single, size};
use super::{Ipam, Problem, Retry};
use overnode_types::NodeId;

/// Maximum number of blocks that one answer adds.
const MAX_ADDED_BLOCKS: usize = 8;

#[derive(Clone, Debug, Default)]
pub(super) struct Lending {
    pub(super) ledgers: BTreeMap<NodeId, Ledger>,
    /// Loans by quarter and borrower, this node included. An entry without blocks keeps late
    /// requests out.
    pub(super) loans: BTreeMap<(NodeId, NodeId), Lent>,
    /// The latest title of each quarter.
    pub(super) known_titles: BTreeMap<NodeId, Title>,
    /// The last title of each quarter that its holder told this node of while another node vouched
    /// for it. This node can vouch for that title: since then the quarter could be taken back only
    /// with this node's consent.
    pub(super) confirmed: BTreeMap<NodeId, Title>,
    /// The serial of the last title of each quarter that this node has taken.
    pub(super) taken: BTreeMap<NodeId, u64>,
    /// Quarters that this node lends and that another node announces as lent by itself.
    disputes: BTreeMap<(NodeId, NodeId), Retry>,
}

/// The ledger of a quarter that this node lends.
#[derive(Clone, Debug)]
pub(super) struct Ledger {
    pub(super) serial: u64,
    pub(super) successor: Option<Successor>,
    /// Borrowers that may hold less than the ledger says.
    pub(super) unsure: BTreeMap<NodeId, Retry>,
    /// Parts of the ledger that the successor has acknowledged.
    pub(super) acked: BTreeSet<u16>,
    /// When to send the successor the missing parts.
    pub(super) retry: Retry,
}

/// The blocks lent to one node.
#[derive(Clone, Debug, Default)]
pub(super) struct Lent {
    pub(super) loan: Loan,
    pub(super) round: Round,
}

impl Lending {
    pub(super) fn ledger(&mut self, quarter: NodeId, serial: u64, now: Instant) -> &mut Ledger {
        let ledger = self.ledgers.entry(quarter).or_insert_with(|| Ledger {
            serial,
            successor: None,
            unsure: BTreeMap::new(),
            acked: BTreeSet::new(),
            retry: Retry::new(now),
        });
        ledger.serial = serial;
        ledger
    }

    pub(super) fn of(&self, quarter: NodeId) -> impl Iterator<Item = (NodeId, &Lent)> {
        let entries = self
            .loans
            .range((quarter, NodeId::FIRST)..)
            .take_while(move |((of, _), _)| *of == quarter);
        entries.map(|((_, borrower), lent)| (*borrower, lent))
    }
}

impl Ipam {
    /// Returns the quarters that this node lends, with the blocks of each borrower.
    pub fn ledger(&self) -> impl Iterator<Item = (NodeId, Vec<(NodeId, &[IpNet])>)> {
        self.lending.ledgers.iter().filter(|(_, ledger)| ledger.successor.is_none()).map(
            |(quarter, _)| {
                let lent =
                    self.lending.of(*quarter).filter(|(_, lent)| !lent.loan.blocks.is_empty());
                (*quarter, lent.map(|(id, lent)| (id, lent.loan.blocks.as_slice())).collect())
            },
        )
    }

    /// Returns the serial of the title under which this node lends a quarter, if it does.
    pub fn lends(&self, quarter: NodeId) -> Option<u64> {
        self.lending
            .ledgers
            .get(&quarter)
            .filter(|ledger| ledger.successor.is_none())
            .map(|ledger| ledger.serial)
    }

    /// Describes what was begun and is not finished: requests without answers, quarters that are
    /// being handed over, reclaims under way.
    pub fn pending(&self) -> Vec<&'static str> {
        let ledgers = || self.lending.ledgers.values();
        let pending = [
            (!self.allocation.waiting.is_empty(), "requests for addresses wait for a lender"),
            (self.pending_claims() > 0, "requests for static addresses wait for answers"),
            (!self.borrowing.requests.is_empty(), "lenders have not answered"),
            (!self.borrowing.dirty.is_empty(), "lenders have not been told what this node holds"),
            (!self.incoming.is_empty(), "a quarter is being received"),
            (self.term.is_some(), "this node's own quarter is not lent yet"),
            (ledgers().any(|ledger| ledger.successor.is_some()), "a quarter is being handed over"),
            (
                ledgers().any(|ledger| !ledger.unsure.is_empty()),
                "borrowers have not reported what they hold",
            ),
            (!self.reclaiming.is_settled(), "nodes have not been told which nodes are gone"),
            (self.leaving.is_some(), "the node is leaving"),
        ];
        pending.into_iter().filter(|(is, _)| *is).map(|(_, what)| what).collect()
    }

    /// Returns true if nothing is pending.
    pub fn is_settled(&self) -> bool {
        self.pending().is_empty()
    }

    pub(super) fn lent_halves(&self) -> Vec<IpNet> {
        let active = self.lending.ledgers.iter().filter(|(_, ledger)| ledger.successor.is_none());
        active.filter_map(|(quarter, _)| self.layout.lendable(*quarter)).collect()
    }

    /// Returns the number of addresses that this node could lend and that no node has.
    pub(super) fn lendable_free(&self) -> u128 {
        let active = self.lending.ledgers.keys().filter(|quarter| self.may_lend(**quarter));
        active.flat_map(|quarter| self.free_blocks(*quarter)).map(size).sum()
    }

    fn free_blocks(&self, quarter: NodeId) -> Vec<IpNet> {
        let Some(half) = self.layout.lendable(quarter) else { return Vec::new() };
        let lent = self.lending.of(quarter).flat_map(|(_, lent)| lent.loan.blocks.iter().copied());
        // The last address of the range is never allocated.
        let last = single(self.layout.network().range.broadcast());
        // Packets for a block that another node announces go to that node, whether the block was
        // ever lent to it or not.
        let peers = self
            .peers
            .iter()
            .filter(|(id, peer)| !peer.left && !self.is_reclaimed(**id, peer.incarnation));
        let announced = peers.flat_map(|(_, peer)| peer.ranges.iter().copied());
        let announced = announced.filter(|range| half.contains(range) && *range != half);
        free(half, lent.chain(announced).chain([last]))
    }

    pub(super) fn handle_request(
        &mut self,
        from: NodeId,
        quarter: NodeId,
        serial: u64,
        loan: Loan,
        round: Round,
        (need, want): (u32, u32),
    ) {
        if self.is_gone(from, loan.epoch) {
            self.send_reclaimed(from, loan.epoch);
            return;
        }
        // The node that has the ID next could not exceed numbers beyond the incarnation. A request
        // from before the node's last start is late: nothing waits for the grant, and the blocks
        // would stay lent.
        let known = self.peers.get(&from).map_or(0, |peer| peer.incarnation);
        if loan.epoch > known || round.incarnation != known {
            return;
        }
        let Some(ledger) = self.lending.ledgers.get_mut(&quarter) else {
            let title = self.title_of(quarter);
            self.send(from, &Message::Title { quarter, title });
            return;
        };
        if ledger.successor.is_some() {
            return;
        }
        if ledger.serial != serial {
            let serial = ledger.serial;
            self.send(from, &Message::Query { quarter, serial });
            return;
        }
        let known = self.lending.loans.get(&(quarter, from));
        if known.is_some_and(|known| known.round > round) {
            return;
        }
        let is_repeated = known.is_some_and(|known| known.round == round);
        let before = loan.blocks.clone();
        if !is_repeated {
            ledger.unsure.remove(&from);
            self.renew(from, quarter, loan, round, (need, want));
        }
        let Some(lent) = self.lending.loans.get(&(quarter, from)) else { return };
        let blocks = lent.loan.blocks.clone();
        let added = blocks.iter().filter(|block| !before.contains(block));
        let added = added.map(|block| size(*block)).sum::<u128>();
        let exhausted = added < u128::from(need) || (want > 0 && added == 0);
        self.send(from, &Message::Grant { quarter, serial, round, blocks, exhausted });
    }

    /// Records what the borrower says it holds and what it is granted.
    fn renew(
        &mut self,
        from: NodeId,
        quarter: NodeId,
        mut loan: Loan,
        round: Round,
        (need, want): (u32, u32),
    ) {
        let before = self.lending.loans.get(&(quarter, from)).map(|lent| lent.loan.blocks.clone());
        let before = before.unwrap_or_default();
        self.reported.forget_contradictions(from, self.layout.lendable(quarter));
        let mut contradictions = Vec::new();
        loan.blocks.retain(|block| {
            let is_free = before.contains(block) || !self.is_lent_to_another(quarter, from, *block);
            if !is_free {
                contradictions.push(*block);
            }
            is_free
        });
        for block in contradictions {
            self.report(Problem::Contradiction { borrower: from, block });
        }
        self.enter(quarter, from, loan, round);
        // A node that may have been declared gone gets no more space: it would use addresses that
        // are lent again.
        let may_be_gone = self.has_promised(from) || self.claims_space_of(from);
        let amount = if may_be_gone { 0 } else { self.grantable(quarter, need, want) };
        if amount > 0 {
            self.add(quarter, from, amount);
        }
    }

    /// Returns how many addresses to add: no more than a quarter of those left, unless they are
    /// needed at once.
    fn grantable(&self, quarter: NodeId, need: u32, want: u32) -> u128 {
        if self.leaving.is_some() || !self.may_lend(quarter) {
            return 0;
        }
        let left: u128 = self.free_blocks(quarter).into_iter().map(size).sum();
        u128::from(want).min(u128::from(need).max(left / 4)).min(left)
    }

    /// Lends about `amount` more addresses and returns their blocks.
    fn add(&mut self, quarter: NodeId, borrower: NodeId, amount: u128) -> Vec<IpNet> {
        let Some(lent) = self.lending.loans.get(&(quarter, borrower)).cloned() else {
            return Vec::new();
        };
        let Lent { mut loan, round } = lent;
        let room = (MAX_BLOCKS - 16).saturating_sub(loan.blocks.len());
        let chosen = choose(&self.free_blocks(quarter), amount, MAX_ADDED_BLOCKS.min(room));
        loan.blocks.extend(&chosen);
        loan.blocks.sort_unstable();
        self.enter(quarter, borrower, loan, round);
        chosen
    }

    pub(super) fn enter(&mut self, quarter: NodeId, borrower: NodeId, loan: Loan, round: Round) {
        self.put(Fact::Loan { quarter, borrower, loan: loan.clone(), round });
        self.lending.loans.insert((quarter, borrower), Lent { loan, round });
    }

    /// Records what this node itself holds of a quarter that it lends.
    pub(super) fn enter_own(&mut self, quarter: NodeId) {
        let half = self.layout.lendable(quarter);
        let blocks = self
            .allocation
            .blocks_in(half)
            .filter(|(_, block)| !block.lost)
            .map(|(net, _)| net)
            .collect();
        self.enter(quarter, self.id, Loan { epoch: self.epoch, blocks }, Round::default());
    }

    /// Takes blocks of a quarter that this node lends for its own containers. Returns false if no
    /// quarter has a free block.
    pub(super) fn lend_to_self(&mut self, need: usize, now: Instant) -> bool {
        let active = self.lending.ledgers.iter().filter(|(_, ledger)| ledger.successor.is_none());
        let quarters: Vec<_> = active.map(|(quarter, _)| *quarter).collect();
        for quarter in quarters {
            let want = need.max(self.allocation.used()).next_power_of_two();
            let need = u32::try_from(need).unwrap_or(u32::MAX);
            let amount = self.grantable(quarter, need, u32::try_from(want).unwrap_or(u32::MAX));
            if amount == 0 {
                continue;
            }
            self.enter_own(quarter);
            let blocks = self.add(quarter, self.id, amount);
            for block in &blocks {
                self.hold(*block, now);
            }
            if !blocks.is_empty() {
                return true;
            }
        }
        false
    }

    pub(super) fn is_lent_to_another(
        &self,
        quarter: NodeId,
        borrower: NodeId,
        block: IpNet,
    ) -> bool {
        self.lending.of(quarter).any(|(id, lent)| {
            id != borrower && lent.loan.blocks.iter().any(|other| overlap(*other, block))
        })
    }

    /// Returns true if that launch of a node has left or was declared gone for good.
    pub(super) fn is_gone(&self, id: NodeId, epoch: u64) -> bool {
        let left = self.peers.get(&id).is_some_and(|peer| peer.left && peer.incarnation >= epoch);
        left || self.is_reclaimed(id, epoch)
    }

    /// Frees the loans of a node that has left for good.
    pub(super) fn free_left(&mut self, borrower: NodeId, incarnation: u64) {
        let quarters: Vec<_> = self.lending.ledgers.keys().copied().collect();
        for quarter in quarters {
            let lent = self.lending.loans.get(&(quarter, borrower));
            let has_some = lent
                .is_some_and(|lent| lent.loan.epoch <= incarnation && !lent.loan.blocks.is_empty());
            let is_handing =
                self.lending.ledgers.get(&quarter).is_none_or(|ledger| ledger.successor.is_some());
            if has_some && !is_handing {
                // All requests of that launch count as late from now on.
                let next = incarnation.saturating_add(1);
                let loan = Loan { epoch: next, blocks: Vec::new() };
                self.enter(quarter, borrower, loan, Round { incarnation: next, count: 0 });
                if let Some(ledger) = self.lending.ledgers.get_mut(&quarter) {
                    ledger.unsure.remove(&borrower);
                }
            }
        }
    }

    /// Marks the loans of a borrower as unsure after it restarted, perhaps without its disk: it may
    /// no longer hold everything in the ledger.
    pub(super) fn mark_unsure(&mut self, borrower: NodeId, now: Instant) {
        for (quarter, ledger) in &mut self.lending.ledgers {
            let lent = self.lending.loans.get(&(*quarter, borrower));
            if lent.is_some_and(|lent| !lent.loan.blocks.is_empty()) {
                ledger.unsure.insert(borrower, Retry::new(now));
            }
        }
    }

    /// Makes this node the lender of a quarter.
    pub(super) fn take_title(
        &mut self,
        quarter: NodeId,
        serial: u64,
        loans: BTreeMap<NodeId, Loan>,
        consented: &BTreeSet<NodeId>,
        now: Instant,
    ) {
        let id = self.id;
        let old: Vec<_> = self.lending.of(quarter).map(|(borrower, _)| borrower).collect();
        for borrower in old {
            self.lending.loans.remove(&(quarter, borrower));
            self.forget(Key::Loan(quarter, borrower));
        }
        self.lending.ledger(quarter, serial, now).successor = None;
        self.put(Fact::Ledger { quarter, serial, successor: None });
        self.lending.taken.insert(quarter, serial);
        self.put(Fact::Taken { quarter, serial });
        self.void_requests(quarter);
        self.borrowing.dirty.remove(&quarter);
        for (borrower, loan) in
            loans.into_iter().filter(|(borrower, loan)| *borrower != id && !loan.blocks.is_empty())
        {
            if self.is_gone(borrower, loan.epoch) {
                continue;
            }
            self.enter(quarter, borrower, loan, Round::default());
            if let Some(ledger) = self.lending.ledgers.get_mut(&quarter) {
                ledger.unsure.insert(borrower, Retry::new(now));
            }
        }
        self.enter_own(quarter);
        self.lending.known_titles.remove(&quarter);
        self.learn_title(quarter, Title { serial, holder: id });
        self.record_consent(quarter, consented, now);
        self.find_lenders();
        for other in self.peers.keys().copied().collect::<Vec<_>>() {
            self.dispute(other, now);
        }
    }

    /// Ends this node's lending of a quarter.
    pub(super) fn drop_title(&mut self, quarter: NodeId) {
        self.lending.ledgers.remove(&quarter);
        self.lending.disputes.retain(|(disputed, _), _| *disputed != quarter);
        self.vouching.forget_quarter(quarter);
        self.forget(Key::Ledger(quarter));
        let borrowers: Vec<_> = self.lending.of(quarter).map(|(borrower, _)| borrower).collect();
        for borrower in borrowers {
            self.lending.loans.remove(&(quarter, borrower));
            self.forget(Key::Loan(quarter, borrower));
        }
        if self.allocation.blocks_in(self.layout.lendable(quarter)).next().is_some() {
            self.borrowing.dirty.insert(quarter);
        }
        self.find_lenders();
    }

    /// Returns the latest title that this node has heard of.
    pub(super) fn title_of(&self, quarter: NodeId) -> Title {
        self.lending
            .known_titles
            .get(&quarter)
            .copied()
            .unwrap_or(Title { serial: 0, holder: quarter })
    }

    pub(super) fn handle_title(
        &mut self,
        from: NodeId,
        quarter: NodeId,
        title: Title,
        now: Instant,
    ) {
        // Reports of other nodes matter only to the lender, which may have to outbid it. All
        // other nodes accept titles only from lenders.
        let is_possible = from.has_initial_quarter() || self.may_outbid(quarter, title.serial);
        if !is_possible
            || !title.holder.has_initial_quarter()
            || !self.is_plausible(quarter, title.serial)
        {
            return;
        }
        if let Some(ledger) = self.lending.ledgers.get(&quarter) {
            if title.holder == self.id && ledger.successor.is_none() && title.serial > ledger.serial
            {
                // The title is from an earlier life of this node that no node knew of when it took
                // the quarter again. Nodes that know that title use it in their requests.
                return self.resume_title(quarter, title, now);
            }
            let mine = Title { serial: ledger.serial, holder: self.id };
            let is_active = ledger.successor.is_none();
            let loses = (title.serial, self.id.get()) > (mine.serial, title.holder.get());
            if title.holder == self.id || !is_active {
                return;
            }
            if title.holder != from {
                if loses && self.has_left(title.holder) && self.may_lend(quarter) {
                    // The title is of a node that is gone, which others still consider the lender.
                    let serial = title.serial.saturating_add(1);
                    self.resume_title(quarter, Title { serial, holder: self.id }, now);
                } else if loses && self.reachable.contains(&title.holder) {
                    // A title counts only if its holder sends it, so this node contacts the holder.
                    self.send(title.holder, &Message::Title { quarter, title: mine });
                }
                return;
            }
            if self.has_left(from) {
                return self.send_tombstones_of(from, Some(from));
            }
            if loses {
                self.drop_title(quarter);
                self.report(Problem::Superseded { quarter, holder: title.holder });
            } else {
                self.send(from, &Message::Title { quarter, title: mine });
            }
        }
        self.learn_title(quarter, title);
        // A lender with that title would have answered the request itself.
        let request = self.borrowing.requests.get(&quarter).filter(|request| request.to == from);
        if title.holder != from || request.is_some_and(|request| title.serial <= request.serial) {
            self.handle_no_lender(from, quarter, now);
        }
    }

    /// Returns true if this node lends the quarter and can outbid `serial` with a serial that all
    /// others still accept as plausible.
    fn may_outbid(&self, quarter: NodeId, serial: u64) -> bool {
        self.lends(quarter).is_some() && serial <= self.incarnation.saturating_add(MAX_AHEAD / 2)
    }

    fn resume_title(&mut self, quarter: NodeId, title: Title, now: Instant) {
        let Some(ledger) = self.lending.ledgers.get_mut(&quarter) else { return };
        ledger.serial = title.serial;
        self.put(Fact::Ledger { quarter, serial: title.serial, successor: None });
        self.learn_title(quarter, title);
        self.vouching.renew(quarter, now);
    }

    /// Records whether another node announces that it lends a quarter which this node lends.
    pub(super) fn dispute(&mut self, other: NodeId, now: Instant) {
        let Some(peer) = self.peers.get(&other).filter(|peer| !peer.left) else {
            self.lending.disputes.retain(|(_, id), _| *id != other);
            return;
        };
        for (&quarter, ledger) in &self.lending.ledgers {
            let half = self.layout.lendable(quarter);
            let announces_half =
                half.is_some_and(|half| peer.ranges.iter().any(|range| range.contains(&half)));
            let announces_half = announces_half && other.has_initial_quarter();
            if announces_half && ledger.successor.is_none() {
                self.lending.disputes.entry((quarter, other)).or_insert_with(|| Retry::new(now));
            } else {
                self.lending.disputes.remove(&(quarter, other));
            }
        }
    }

    /// Asks borrowers whether they still hold what the ledger says, and sends this node's title to
    /// nodes that dispute it.
    pub(super) fn drive_loans(&mut self, now: Instant) {
        let mut queries = Vec::new();
        for (&quarter, ledger) in
            self.lending.ledgers.iter_mut().filter(|(_, ledger)| ledger.successor.is_none())
        {
            let has_some = |id| {
                let lent = self.lending.loans.get(&(quarter, id));
                lent.is_some_and(|lent| !lent.loan.blocks.is_empty())
            };
            ledger.unsure.retain(|id, _| has_some(*id));
            for (&borrower, retry) in &mut ledger.unsure {
                if self.reachable.contains(&borrower) && retry.take(now, &self.timing) {
                    queries.push((borrower, Message::Query { quarter, serial: ledger.serial }));
                }
            }
        }
        for (&(quarter, other), retry) in &mut self.lending.disputes {
            if let Some(ledger) = self.lending.ledgers.get(&quarter)
                && self.reachable.contains(&other)
                && retry.take(now, &self.timing)
            {
                let title = Title { serial: ledger.serial, holder: self.id };
                queries.push((other, Message::Title { quarter, title }));
            }
        }
        for (borrower, query) in queries {
            self.send(borrower, &query);
        }
    }

    pub(super) fn next_loan_check(&self) -> Option<Instant> {
        let active = self.lending.ledgers.values().filter(|ledger| ledger.successor.is_none());
        let unsure =
            active.flat_map(|ledger| &ledger.unsure).filter(|(id, _)| self.reachable.contains(id));
        let disputes =
            self.lending.disputes.iter().filter(|((_, id), _)| self.reachable.contains(id));
        unsure.map(|(_, retry)| retry.at).chain(disputes.map(|(_, retry)| retry.at)).min()
    }
}
