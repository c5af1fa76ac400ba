//! Borrowing blocks, informing the lenders of what is held, and handing blocks back.
//!
//! There is one request per quarter at a time. It lists everything that the node holds of the
//! quarter, and only the answer to the latest request is accepted. So the lender may free whatever
//! a request does not list.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use ipnet::IpNet;

use super::layout::quarters;
use super::message::{MAX_BLOCKS, Message, Round, Title};
use super::{Fact, Ipam, IpamError, Peer, Retry, Timing};
use overnode_types::NodeId;

/// Minimum number of addresses in a request for space.
const MIN_REQUEST: usize = 16;
/// Maximum number of addresses in a request, unless more are needed at once.
const MAX_REQUEST: usize = 4096;
/// Number of free addresses that are not handed back, so that a node that is cut off can still
/// allocate.
const RESERVE: u128 = 16;
/// Titles whose serial is more than 35 years (in milliseconds) ahead of this node's incarnation are
/// not believed, unless they directly follow the known one.
pub(super) const MAX_AHEAD: u64 = 1 << 40;
/// Maximum number of changes of hands for a title to directly follow the known one.
const MAX_STEP: u64 = 1024;
/// A node that holds this many blocks does not ask for more.
const BLOCK_LIMIT: usize = MAX_BLOCKS - 32;

#[derive(Clone, Debug, Default)]
pub(super) struct Borrowing {
    pub(super) requests: BTreeMap<NodeId, Request>,
    /// Quarters whose lender may have outdated information about what this node holds.
    pub(super) dirty: BTreeSet<NodeId>,
    /// The lender of each quarter, if it is another node and reachable.
    pub(super) lenders: BTreeMap<NodeId, NodeId>,
    refused: BTreeMap<NodeId, RefusedRequest>,
}

#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) to: NodeId,
    pub(super) serial: u64,
    round: Round,
    need: usize,
    want: usize,
    since: Instant,
    pub(super) retry: Retry,
}

#[derive(Clone, Copy, Debug)]
struct RefusedRequest {
    by: NodeId,
    at: Instant,
    why: RefusalReason,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RefusalReason {
    Exhausted,
    NoAnswer,
    NoLender,
}

impl Ipam {
    /// Returns which quarters a node announces as lent by itself.
    pub(super) fn lends_of(&self, peer: &Peer) -> [bool; 4] {
        let mut quarters = quarters();
        std::array::from_fn(|_| {
            let half = quarters.next().and_then(|quarter| self.layout.lendable(quarter));
            let has = |half| peer.ranges.iter().any(|range| range.contains(&half));
            !peer.left && half.is_some_and(has)
        })
    }

    pub(super) fn find_lenders(&mut self) {
        self.borrowing.lenders.clear();
        for quarter in quarters().filter(|quarter| !self.lending.ledgers.contains_key(quarter)) {
            let index = usize::from(quarter.get()) - 1;
            let known = self.lending.known_titles.get(&quarter).map(|title| title.holder);
            let may = |id: &NodeId| {
                id.has_initial_quarter() && !self.has_promised(*id) && !self.has_left(*id)
            };
            let lends = |id: &NodeId| {
                self.peers.get(id).is_some_and(|it| self.lends_of(it)[index]) && may(id)
            };
            let mut announcers = self.reachable.iter().copied().filter(lends);
            let best = known.filter(|id| self.reachable.contains(id) && lends(id));
            let known = known.filter(|id| self.reachable.contains(id) && *id != self.id && may(id));
            if let Some(lender) = best.or_else(|| announcers.next()).or(known) {
                self.borrowing.lenders.insert(quarter, lender);
            }
        }
    }

    pub(super) fn drive_borrowing(&mut self, now: Instant) {
        let penalty = self.penalty();
        self.borrowing.refused.retain(|_, refused| now < refused.at + penalty);
        self.serve();
        while !self.allocation.waiting.is_empty()
            && self.lend_to_self(self.allocation.waiting.len(), now)
        {
            self.serve();
        }
        self.fail_overdue(now);
        self.hand_back(now);
        self.redirect(now);
        self.inform_lenders(now);
        self.borrow(now);
        self.send_requests(now);
    }

    pub(super) fn next_request(&self) -> Option<Instant> {
        let deadline = self.allocation.waiting.values().map(|waiting| waiting.deadline).min();
        let requests = self.borrowing.requests.values();
        let retry = requests
            .clone()
            .filter(|it| self.reachable.contains(&it.to))
            .map(|it| it.retry.at)
            .min();
        let late = requests.filter(|it| it.want > 0).map(|it| it.since + self.timing.lender).min();
        let wants = self.demand().is_some();
        let refused = self.borrowing.refused.values().map(|it| it.at + self.penalty());
        let again = refused.min().filter(|_| wants || !self.borrowing.dirty.is_empty());
        [deadline, retry, late, again].into_iter().flatten().min()
    }

    pub(super) fn next_hand_back(&self) -> Option<Instant> {
        self.idle_blocks().into_iter().map(|(_, since)| since + self.timing.hand_back).min()
    }

    pub(super) fn handle_grant(
        &mut self,
        from: NodeId,
        quarter: NodeId,
        (serial, round): (u64, Round),
        blocks: Vec<IpNet>,
        exhausted: bool,
        now: Instant,
    ) {
        let asked = self.borrowing.requests.get(&quarter).map(|it| (it.to, it.serial, it.round));
        if asked != Some((from, serial, round)) {
            // The answer to an abandoned request has arrived after all. The lender considers these
            // blocks lent.
            let is_unknown = |block: &IpNet| !self.held().any(|held| held == *block);
            if self.borrowing.lenders.get(&quarter) == Some(&from) && blocks.iter().any(is_unknown)
            {
                self.borrowing.dirty.insert(quarter);
            }
            return;
        }
        self.borrowing.requests.remove(&quarter);
        self.borrowing.refused.remove(&quarter);
        if exhausted {
            self.refuse(quarter, from, RefusalReason::Exhausted, now);
        }
        let held: BTreeMap<IpNet, bool> = self
            .allocation
            .blocks_in(self.layout.lendable(quarter))
            .map(|(net, block)| (net, block.lost))
            .collect();
        for (&block, &lost) in &held {
            let granted = blocks.binary_search(&block).is_ok();
            if !granted {
                self.lose(block, from);
            } else if lost {
                self.hold(block, now);
            }
        }
        for block in blocks {
            if !held.keys().any(|known| super::space::overlap(*known, block)) {
                self.hold(block, now);
            }
        }
    }

    pub(super) fn handle_query(
        &mut self,
        from: NodeId,
        quarter: NodeId,
        serial: u64,
        now: Instant,
    ) {
        if let Some(&title) = self.lending.known_titles.get(&quarter)
            && title.serial > serial
        {
            self.send(from, &Message::Title { quarter, title });
            return;
        }
        let is_possible =
            from.has_initial_quarter() && !self.has_promised(from) && !self.has_left(from);
        if self.lending.ledgers.contains_key(&quarter) || !is_possible {
            return;
        }
        self.learn_title(quarter, Title { serial, holder: from });
        self.borrowing.refused.remove(&quarter);
        self.ask_again(quarter, from, now);
    }

    /// Handles the answer that the node that was asked does not lend the quarter.
    pub(super) fn handle_no_lender(&mut self, from: NodeId, quarter: NodeId, now: Instant) {
        if self.borrowing.requests.get(&quarter).is_some_and(|request| request.to == from) {
            self.borrowing.requests.remove(&quarter);
            self.borrowing.dirty.insert(quarter);
            self.refuse(quarter, from, RefusalReason::NoLender, now);
        }
    }

    /// Ensures that no answer to an earlier request is accepted.
    pub(super) fn void_requests(&mut self, quarter: NodeId) {
        if self.borrowing.requests.remove(&quarter).is_some() {
            self.borrowing.dirty.insert(quarter);
        }
    }

    pub(super) fn no_lender(&self) -> IpamError {
        let describe = |quarter: NodeId| {
            let refused = self.borrowing.refused.get(&quarter);
            match self.borrowing.lenders.get(&quarter) {
                Some(lender) => {
                    match refused.filter(|refused| refused.by == *lender).map(|refused| refused.why)
                    {
                        Some(RefusalReason::Exhausted) => format!("node {lender} has none left"),
                        Some(RefusalReason::NoAnswer) => format!("node {lender} does not answer"),
                        Some(RefusalReason::NoLender) => {
                            format!("node {lender} is not lending yet")
                        }
                        None => format!("node {lender} has not been asked yet"),
                    }
                }
                None if self.lends(quarter).is_some() && !self.may_lend(quarter) => format!(
                    "no reachable node confirms that this node still lends quarter {quarter} \
                     (`overnode reclaim` the nodes that are gone for good, on one of nodes 1 to 4)"
                ),
                None if self.lending.ledgers.contains_key(&quarter) => {
                    format!("this node has lent everything that it lends of quarter {quarter}")
                }
                None if quarter == self.id => "this node is not lending yet".to_owned(),
                None if self.reachable.contains(&quarter) => {
                    format!("node {quarter} is not lending yet")
                }
                None if self.peers.contains_key(&quarter) => {
                    format!("node {quarter} is not reachable")
                }
                None => format!("node {quarter} is not known"),
            }
        };
        let lenders = quarters().map(describe).collect::<Vec<_>>().join(", ");
        IpamError::NoLender { id: self.id, count: self.active(), lenders }
    }

    fn demand(&self) -> Option<(usize, usize)> {
        if self.leaving.is_some() {
            return None;
        }
        let waiting = self.allocation.waiting.len();
        let used = self.allocation.used();
        let capacity = self.allocation.capacity(&self.layout);
        let is_low = !self.id.has_initial_quarter()
            && capacity.saturating_sub(used as u128) <= used as u128 / 8;
        let need = if capacity == 0 { waiting.max(1) } else { waiting };
        let wants = waiting > 0 || is_low;
        let want = need.max(used).max(MIN_REQUEST).next_power_of_two().min(MAX_REQUEST);
        (wants && self.allocation.blocks.len() < BLOCK_LIMIT).then_some((need, want.max(need)))
    }

    fn penalty(&self) -> std::time::Duration {
        let Timing { lender, .. } = self.timing;
        if self.allocation.waiting.is_empty() && self.allocation.capacity(&self.layout) > 0 {
            lender * 15
        } else {
            lender * 2
        }
    }

    fn refuse(&mut self, quarter: NodeId, by: NodeId, why: RefusalReason, now: Instant) {
        self.borrowing.refused.insert(quarter, RefusedRequest { by, at: now, why });
    }

    fn is_refused(&self, quarter: NodeId, lender: NodeId, now: Instant) -> bool {
        let refused = self.borrowing.refused.get(&quarter);
        refused.is_some_and(|refused| refused.by == lender && now < refused.at + self.penalty())
    }

    /// Returns the unused blocks that exceed the reserve, each with the time since which it is
    /// unused, the largest first. The last one is only halved.
    fn idle_blocks(&self) -> Vec<(IpNet, Instant)> {
        let capacity = self.allocation.capacity(&self.layout);
        let free = capacity.saturating_sub(self.allocation.used() as u128);
        let spare = |net: IpNet| {
            self.id.has_initial_quarter() || free >= self.layout.usable_in(net) / 2 + RESERVE
        };
        let blocks = self.allocation.blocks.iter();
        let idle = blocks.filter(|(net, block)| block.used == 0 && (block.lost || spare(**net)));
        let mut idle: Vec<_> = idle.map(|(net, block)| (*net, block.idle_since)).collect();
        idle.sort_by_key(|(net, _)| net.prefix_len());
        idle
    }

    /// Hands back idle blocks one at a time, since each leaves less to spare.
    fn hand_back(&mut self, now: Instant) {
        loop {
            // No addresses are allocated from a lost block, so it goes back as soon as it is
            // unused.
            let is_lost = |block| self.allocation.blocks.get(&block).is_some_and(|it| it.lost);
            let due = |(block, since): &(IpNet, Instant)| {
                *since + self.timing.hand_back <= now || is_lost(*block)
            };
            let Some((block, since)) = self.idle_blocks().into_iter().find(due) else {
                return;
            };
            let free = self
                .allocation
                .capacity(&self.layout)
                .saturating_sub(self.allocation.used() as u128);
            let leaves_enough = self.id.has_initial_quarter()
                || is_lost(block)
                || free >= self.layout.usable_in(block) + RESERVE;
            self.give_back(block);
            let half =
                block.subnets(block.prefix_len() + 1).ok().and_then(|mut halves| halves.next());
            if !leaves_enough && let Some(half) = half {
                self.hold(half, since);
            }
        }
    }

    pub(super) fn give_back(&mut self, block: IpNet) {
        self.unhold(block);
        if let Some(quarter) = self.layout.quarter_of(block) {
            self.void_requests(quarter);
            self.borrowing.dirty.insert(quarter);
        }
    }

    /// Gives up on requests that were not answered, or whose receiver was replaced as the lender.
    fn redirect(&mut self, now: Instant) {
        for quarter in quarters() {
            let Some(request) = self.borrowing.requests.get(&quarter) else { continue };
            let to = request.to;
            let late = request.want > 0 && request.since + self.timing.lender <= now;
            let lost = !self.reachable.contains(&to);
            let replaced = lost && self.borrowing.lenders.contains_key(&quarter);
            let lends_itself = self.lending.ledgers.contains_key(&quarter);
            if lends_itself || replaced || (request.want > 0 && lost) {
                self.void_requests(quarter);
            } else if late {
                self.refuse(quarter, to, RefusalReason::NoAnswer, now);
                self.request(quarter, to, (0, 0), now);
            }
        }
    }

    /// Informs the lenders of what is held where they may not know.
    fn inform_lenders(&mut self, now: Instant) {
        for quarter in std::mem::take(&mut self.borrowing.dirty) {
            match self.lending.ledgers.get(&quarter).map(|ledger| ledger.successor) {
                Some(None) => {
                    self.enter_own(quarter);
                    continue;
                }
                // A ledger that is being handed over no longer changes. The successor will ask.
                Some(Some(_)) => continue,
                None => {}
            }
            match self.borrowing.lenders.get(&quarter).copied() {
                Some(lender) if !self.is_refused(quarter, lender, now) => {
                    self.ask_again(quarter, lender, now)
                }
                Some(_) | None => {
                    self.borrowing.dirty.insert(quarter);
                }
            }
        }
    }

    fn ask_again(&mut self, quarter: NodeId, lender: NodeId, now: Instant) {
        let before = self.borrowing.requests.get(&quarter).filter(|request| request.to == lender);
        let amount = before.map_or((0, 0), |request| (request.need, request.want));
        self.request(quarter, lender, amount, now);
    }

    fn borrow(&mut self, now: Instant) {
        let Some(demand) = self.demand() else { return };
        if self.borrowing.requests.values().any(|request| request.want > 0) {
            return;
        }
        let order = |quarter: &NodeId| {
            let has_some =
                self.allocation.blocks_in(self.layout.lendable(*quarter)).next().is_some();
            (!has_some, (quarter.get() + 4 - self.id.get() % 4) % 4)
        };
        let lenders = self.borrowing.lenders.iter();
        let willing =
            lenders.filter(|(quarter, lender)| !self.is_refused(**quarter, **lender, now));
        let best = willing.min_by_key(|(quarter, _)| order(quarter));
        if let Some((&quarter, &lender)) = best {
            self.request(quarter, lender, demand, now);
        }
    }

    fn request(&mut self, quarter: NodeId, to: NodeId, (need, want): (usize, usize), now: Instant) {
        let serial = self.lending.known_titles.get(&quarter).map_or(0, |title| title.serial);
        let round = self.next_round();
        self.borrowing.dirty.remove(&quarter);
        let since = match self.borrowing.requests.get(&quarter) {
            Some(before) if before.to == to && before.want > 0 => before.since,
            Some(_) | None => now,
        };
        let request = Request { to, serial, round, need, want, since, retry: Retry::new(now) };
        self.borrowing.requests.insert(quarter, request);
    }

    fn send_requests(&mut self, now: Instant) {
        let mut messages = Vec::new();
        for (&quarter, request) in &mut self.borrowing.requests {
            if self.reachable.contains(&request.to) && request.retry.take(now, &self.timing) {
                let half = self.layout.lendable(quarter);
                let message = Message::Request {
                    quarter,
                    serial: request.serial,
                    epoch: self.epoch,
                    round: request.round,
                    need: u32::try_from(request.need).unwrap_or(u32::MAX),
                    want: u32::try_from(request.want).unwrap_or(u32::MAX),
                    holds: self.allocation.blocks_in(half).map(|(net, _)| net).collect(),
                };
                messages.push((request.to, message));
            }
        }
        for (to, message) in messages {
            self.send(to, &message);
        }
    }

    /// Returns true if the holder of a title with that serial can be outbid. Serials begin with the
    /// milliseconds since 1970 and grow in small steps.
    pub(super) fn is_plausible(&self, quarter: NodeId, serial: u64) -> bool {
        let known = self.lending.known_titles.get(&quarter).map_or(0, |title| title.serial);
        serial <= self.incarnation.saturating_add(MAX_AHEAD)
            || serial <= known.saturating_add(MAX_STEP)
    }

    /// Records a title if it is later than the known one.
    pub(super) fn learn_title(&mut self, quarter: NodeId, title: Title) {
        if !title.holder.has_initial_quarter() || !self.is_plausible(quarter, title.serial) {
            return;
        }
        if self.lending.known_titles.get(&quarter).is_none_or(|known| known.serial < title.serial) {
            self.lending.known_titles.insert(quarter, title);
            self.put(Fact::Heard { quarter, title });
            self.find_lenders();
            // The new lender's ledger may be from before this node got its last block.
            let holds = self.allocation.blocks_in(self.layout.lendable(quarter)).next().is_some();
            if holds && !self.lending.ledgers.contains_key(&quarter) {
                self.borrowing.dirty.insert(quarter);
            }
            // A node that got the quarter after it had answered would answer differently now.
            if quarter == self.id
                && let Some(term) = &mut self.term
            {
                term.outdated(title.holder);
            }
        }
    }
}
