//! Checks with the other nodes that a lender still has its title, before anything is lent.
//!
//! A node that is cut off may be declared gone for good meanwhile without knowing it. So a quarter
//! is lent, even to its holder, only while another node *vouches* for the title. A node vouches if
//! the holder told it of the title while another node vouched, if the holder reaches it, and if it
//! has not agreed that the holder's space is taken back. A node agrees to that only after the
//! holder was unreachable for [`Timing::grace`](super::Timing::grace). By then the holder has
//! noticed that it does not reach that node either. Taking back space needs the consent of every
//! node, so no node can have taken the quarter while one vouches.
//!
//! A node may have been launched after the reclaim if the holder told it of the title while no node
//! vouched, or if only other nodes told it. Such a node does not count alone. If all members say
//! that they know nothing against the title, that is enough.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::fact::{Fact, Key};
use super::message::{Message, Round, Title};
use super::{Ipam, Retry};
use overnode_types::NodeId;

/// What other nodes say about the quarters that this node lends, by quarter and node. Has only
/// nodes that are reachable now.
#[derive(Clone, Debug, Default)]
pub(super) struct Vouchers(BTreeMap<(NodeId, NodeId), Voucher>);

#[derive(Clone, Copy, Debug)]
struct Voucher {
    statement: Statement,
    round: Round,
    retry: Retry,
}

/// What a node has said about a title since it was last unreachable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Statement {
    /// Nothing yet, or nothing that supports the title.
    None,
    /// The node knows nothing against this title but cannot vouch for it.
    Ignorant,
    /// This node took the title with that node's consent.
    Consented,
    /// The node vouches for the title.
    Vouched,
}

impl Vouchers {
    fn vouchers(&self, quarter: NodeId) -> usize {
        self.0
            .iter()
            .filter(|((of, _), voucher)| {
                *of == quarter && voucher.statement >= Statement::Consented
            })
            .count()
    }

    fn is_known(&self, quarter: NodeId, member: NodeId) -> bool {
        self.0
            .get(&(quarter, member))
            .is_some_and(|voucher| voucher.statement >= Statement::Ignorant)
    }

    /// Asks the nodes that vouch for this node again, because the title has a new serial.
    pub(super) fn renew(&mut self, quarter: NodeId, now: Instant) {
        for (_, voucher) in self.0.iter_mut().filter(|((of, _), _)| *of == quarter) {
            voucher.statement = voucher.statement.min(Statement::Consented);
            voucher.retry = Retry::new(now);
        }
    }

    pub(super) fn forget_member(&mut self, id: NodeId) {
        self.0.retain(|(_, member), _| *member != id);
    }

    pub(super) fn forget_quarter(&mut self, quarter: NodeId) {
        self.0.retain(|(of, _), _| *of != quarter);
    }
}

impl Ipam {
    /// Returns true if this node lends a quarter and no other node can do so now. Nothing of the
    /// quarter may be lent otherwise.
    pub fn may_lend(&self, quarter: NodeId) -> bool {
        if self.lending.ledgers.get(&quarter).is_none_or(|ledger| ledger.successor.is_some()) {
            return false;
        }
        // Only nodes 1 to 4 take back space.
        let mut members = self.members().peekable();
        let has_rivals = self.members().any(NodeId::has_initial_quarter);
        !has_rivals
            || self.vouching.vouchers(quarter) > 0
            || (members.peek().is_some()
                && members.all(|member| self.vouching.is_known(quarter, member)))
    }

    /// Returns true if more than half of the reachable members vouch for the title of a quarter.
    pub(super) fn is_vouched_for_by_most(&self, quarter: NodeId) -> bool {
        let reached = self.members().filter(|member| self.reachable.contains(member)).count();
        2 * self.vouching.vouchers(quarter) > reached
    }

    /// Records the nodes by whose consent a quarter was just taken. They have not agreed to
    /// anything else while they stay reachable.
    pub(super) fn record_consent(
        &mut self,
        quarter: NodeId,
        consented: &BTreeSet<NodeId>,
        now: Instant,
    ) {
        self.vouching.forget_quarter(quarter);
        let reached: Vec<_> = consented.intersection(&self.reachable).copied().collect();
        for member in reached {
            let (round, retry) = (self.next_round(), Retry::new(now));
            self.vouching.0.insert(
                (quarter, member),
                Voucher { statement: Statement::Consented, round, retry },
            );
        }
    }

    /// Discards the statements of nodes that are unreachable or no longer members.
    pub(super) fn prune_vouching(&mut self) {
        if self.vouching.0.is_empty() {
            return;
        }
        let members: BTreeSet<_> =
            self.members().filter(|it| self.reachable.contains(it)).collect();
        let Self { vouching, lending, .. } = self;
        vouching.0.retain(|(quarter, member), _| {
            lending.ledgers.get(quarter).is_some_and(|ledger| ledger.successor.is_none())
                && members.contains(member)
        });
    }

    /// Asks the reachable members about the quarters that this node lends.
    pub(super) fn drive_vouching(&mut self, now: Instant) {
        let active = self.lending.ledgers.iter().filter(|(_, ledger)| ledger.successor.is_none());
        let ledgers: BTreeMap<NodeId, u64> =
            active.map(|(quarter, ledger)| (*quarter, ledger.serial)).collect();
        if ledgers.is_empty() {
            return;
        }
        let members: BTreeSet<_> =
            self.members().filter(|it| self.reachable.contains(it)).collect();
        let mut messages = Vec::new();
        for (&quarter, &serial) in &ledgers {
            let sure = self.may_lend(quarter);
            for &member in &members {
                if !self.vouching.0.contains_key(&(quarter, member)) {
                    let (round, retry) = (self.next_round(), Retry::new(now));
                    self.vouching.0.insert(
                        (quarter, member),
                        Voucher { statement: Statement::None, round, retry },
                    );
                }
                let Some(voucher) = self.vouching.0.get_mut(&(quarter, member)) else { continue };
                // A member that knows nothing about the title is asked again only when this node is
                // sure of the title.
                let is_done = voucher.statement == Statement::Vouched
                    || (voucher.statement == Statement::Ignorant && !sure);
                if !is_done && voucher.retry.take(now, &self.timing) {
                    let (round, epoch) = (voucher.round, self.epoch);
                    messages.push((member, Message::Hold { quarter, serial, epoch, round, sure }));
                }
            }
        }
        for (member, message) in messages {
            self.send(member, &message);
        }
    }

    pub(super) fn next_vouching(&self) -> Option<Instant> {
        let sure: BTreeSet<_> =
            self.lending.ledgers.keys().filter(|quarter| self.may_lend(**quarter)).collect();
        let is_asked = |quarter: &NodeId, member: &NodeId, statement: Statement| {
            let is_member = self.reachable.contains(member) && !self.has_left(*member);
            is_member
                && (statement < Statement::Ignorant
                    || statement == Statement::Consented
                    || sure.contains(quarter))
        };
        let open =
            self.vouching.0.iter().filter(|(_, voucher)| voucher.statement != Statement::Vouched);
        let waiting = open
            .filter(|((quarter, member), voucher)| is_asked(quarter, member, voucher.statement));
        waiting.map(|(_, voucher)| voucher.retry.at).min()
    }

    /// Answers a lender that asks whether its title still holds.
    pub(super) fn handle_hold(
        &mut self,
        from: NodeId,
        quarter: NodeId,
        (serial, epoch): (u64, u64),
        round: Round,
        sure: bool,
        now: Instant,
    ) {
        if !from.has_initial_quarter() {
            return;
        }
        let title = Title { serial, holder: from };
        if self.is_gone(from, epoch) {
            self.send_reclaimed(from, epoch);
            return;
        }
        if self.lending.ledgers.contains_key(&quarter) {
            self.handle_title(from, quarter, title, now);
            return;
        }
        let known = self.title_of(quarter);
        if known.serial > serial {
            self.send(from, &Message::Title { quarter, title: known });
            return;
        }
        if self.has_promised(from) || self.claims_space_of(from) {
            return;
        }
        // The node was there just now, whether it counts as reachable or not.
        self.lost.insert(from, now);
        if sure {
            self.learn_title(quarter, title);
            self.confirm(quarter, title);
        }
        let can_vouch = self.lending.confirmed.get(&quarter) == Some(&title);
        self.send(from, &Message::Vouch { quarter, serial, round, heard: can_vouch });
    }

    /// Records a title of which its holder says that another node vouches for it. If the holder is
    /// unreachable, the message may be old.
    fn confirm(&mut self, quarter: NodeId, title: Title) {
        let is_latest = self.lending.known_titles.get(&quarter) == Some(&title);
        let is_news = self.lending.confirmed.get(&quarter) != Some(&title);
        if is_latest && is_news && self.reachable.contains(&title.holder) {
            self.lending.confirmed.insert(quarter, title);
            self.put(Fact::Confirmed { quarter, title });
        }
    }

    pub(super) fn forget_confirmed(&mut self, is_void: impl Fn(&Title) -> bool) {
        let void = self.lending.confirmed.iter().filter(|(_, title)| is_void(title));
        for quarter in void.map(|(quarter, _)| *quarter).collect::<Vec<_>>() {
            self.lending.confirmed.remove(&quarter);
            self.forget(Key::Confirmed(quarter));
        }
    }

    pub(super) fn handle_vouch(
        &mut self,
        from: NodeId,
        quarter: NodeId,
        serial: u64,
        round: Round,
        heard: bool,
        now: Instant,
    ) {
        if self.lends(quarter) != Some(serial) {
            return;
        }
        let Some(voucher) = self.vouching.0.get_mut(&(quarter, from)) else { return };
        if voucher.round != round {
            return;
        }
        let statement = if heard { Statement::Vouched } else { Statement::Ignorant };
        if statement > voucher.statement {
            *voucher = Voucher { statement, retry: Retry::new(now), ..*voucher };
        }
    }
}
