//! How the birth owner of a quarter comes to lend it.
//!
//! A node that was just launched cannot know whether it was launched before, or what it had lent
//! then. It asks every node that it knows. It takes the title when all of them have answered, no
//! other node lends the quarter, and it has met a node at each of its targets. Then it records what
//! the others hold as lent and lends the rest.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::message::{LenderRole, Loan, MAX_RIVALS, Message, Round, Title};
use super::{Ipam, Question, Retry, Successor};
use overnode_types::NodeId;

/// The questions that a birth owner asks before it takes the title, and the answers.
#[derive(Clone, Debug)]
pub(super) struct Term {
    pub(super) asked: BTreeMap<NodeId, Question>,
    answers: BTreeMap<NodeId, Answer>,
    /// No conclusion is drawn before this time.
    pub(super) settled: Instant,
    wake: Option<Instant>,
}

#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) loan: Loan,
    pub(super) title: Title,
    pub(super) part: LenderRole,
    pub(super) rivals: Vec<NodeId>,
    /// False once the node has been unreachable since it answered. It may have agreed to something
    /// else meanwhile.
    pub(super) is_fresh: bool,
}

impl Term {
    pub(super) fn mark_unsure(&mut self, id: NodeId) {
        if let Some(answer) = self.answers.get_mut(&id) {
            answer.is_fresh = false;
        }
    }

    /// Discards a node's answer, because the node would answer differently now. The earlier answer
    /// may still be on its way.
    pub(super) fn outdated(&mut self, id: NodeId) {
        self.answers.remove(&id);
        self.asked.remove(&id);
    }

    /// Asks all nodes again, because the quarter may have changed hands.
    pub(super) fn restart(&mut self, settled: Instant) {
        self.answers.clear();
        self.asked.clear();
        self.settled = settled;
    }
}

impl Ipam {
    pub(super) fn drive_term(&mut self, now: Instant) {
        if !self.id.has_initial_quarter()
            || self.lending.ledgers.contains_key(&self.id)
            || self.leaving.is_some()
        {
            self.term = None;
            return;
        }
        if self.term.is_none() {
            let settled = now + self.timing.settle;
            self.term = Some(Term {
                asked: BTreeMap::new(),
                answers: BTreeMap::new(),
                settled,
                wake: None,
            });
        }
        let required = self.required();
        let has_promised = !self.reclaiming.promises.is_empty();
        let (incarnation, mut count) = (self.incarnation, self.rounds);
        let Some(term) = &mut self.term else { return };
        term.wake = (term.settled > now).then_some(term.settled);
        if term.settled > now {
            return;
        }
        term.asked.retain(|id, _| required.contains(id));
        let mut ask = Vec::new();
        let mut complete = !required.is_empty();
        for id in required {
            if term.answers.get(&id).is_some_and(|answer| answer.part == LenderRole::None) {
                term.asked.remove(&id);
                continue;
            }
            complete = false;
            let question = term.asked.entry(id).or_insert_with(|| {
                count += 1;
                Question { round: Round { incarnation, count }, retry: Retry::new(now) }
            });
            if self.reachable.contains(&id) && question.retry.take(now, &self.timing) {
                ask.push((id, question.round));
            }
        }
        // A claimant that got this node's promise was told that no other node lends the quarter. So
        // this node does not take the title before the promise has ended.
        let done = complete && self.targets_met && !has_promised;
        let answers = done.then(|| std::mem::take(&mut term.answers));
        self.rounds = count;
        for (id, round) in ask {
            self.send(id, &Message::Ask { epoch: self.epoch, round });
        }
        if let Some(answers) = answers {
            self.term = None;
            let quarter = self.id;
            let serial = self.title_of(quarter).serial.saturating_add(1).max(self.epoch);
            let fresh = answers.iter().filter(|(_, answer)| answer.is_fresh).map(|(id, _)| *id);
            let consented = fresh.collect();
            let loans = answers.into_iter().map(|(id, answer)| (id, answer.loan)).collect();
            self.take_title(quarter, serial, loans, &consented, now);
        }
    }

    pub(super) fn next_question(&self) -> Option<Instant> {
        let term = self.term.as_ref()?;
        let asked = term.asked.iter().filter(|(id, _)| self.reachable.contains(id));
        asked.map(|(_, question)| question.retry.at).chain(term.wake).min()
    }

    /// Returns the nodes that have to answer: all known members and the nodes that they name.
    fn required(&self) -> Vec<NodeId> {
        let mut required: Vec<_> = self.members().collect();
        let named =
            self.term.iter().flat_map(|term| term.answers.values()).flat_map(|it| &it.rivals);
        for id in named.copied().chain([self.title_of(self.id).holder]) {
            if id != self.id && !self.peers.contains_key(&id) && !required.contains(&id) {
                required.push(id);
            }
        }
        required
    }

    pub(super) fn handle_ask(&mut self, from: NodeId, epoch: u64, round: Round, now: Instant) {
        let quarter = from;
        let Some(half) = self.layout.lendable(quarter) else { return };
        if self.is_gone(from, epoch) {
            self.send_reclaimed(from, epoch);
            return;
        }
        self.abandon_claim(from);
        self.send_tombstones_of(from, None);
        let ledger = self.lending.ledgers.get(&quarter).map(|ledger| ledger.successor);
        let part = match ledger {
            None => LenderRole::None,
            Some(Some(successor)) if successor.id == from && successor.epoch < epoch => {
                // The launch that was to receive the quarter is gone. The node that has the quarter
                // now answers for itself.
                self.drop_title(quarter);
                LenderRole::None
            }
            Some(Some(_)) => LenderRole::Lends,
            // A node that may not lend has nothing to hand over, and a node that may be gone for
            // good receives nothing.
            Some(None) if !self.may_lend(quarter) || self.has_promised(from) => LenderRole::Lends,
            Some(None) => {
                self.begin_transfer(quarter, Successor { id: from, epoch }, now);
                LenderRole::Lends
            }
        };
        self.void_requests(quarter);
        let lender = self.borrowing.lenders.get(&quarter).copied();
        let successor = ledger.flatten().map(|successor| successor.id);
        let promised =
            self.reclaiming.promises.keys().filter(|(of, _)| *of == from).map(|(_, by)| *by);
        let rivals: BTreeSet<_> =
            promised.chain(lender).chain(successor).filter(|id| *id != from).collect();
        let rivals = rivals.into_iter().take(MAX_RIVALS).collect();
        let held = self.allocation.blocks_in(Some(half)).filter(|(_, block)| !block.lost);
        let holds = held.map(|(net, _)| net).collect();
        let title = self.title_of(quarter);
        self.send(from, &Message::Answer { round, epoch: self.epoch, title, part, holds, rivals });
    }

    pub(super) fn handle_answer(
        &mut self,
        from: NodeId,
        round: Round,
        mut answer: Answer,
        now: Instant,
    ) {
        let Some(term) = &mut self.term else { return };
        if term.asked.get(&from).is_none_or(|question| question.round != round) {
            return;
        }
        answer.loan.epoch = self.bounded_epoch(from, answer.loan.epoch);
        let half = self.layout.lendable(self.id);
        answer.loan.blocks.retain(|block| half.is_some_and(|half| half.contains(block)));
        if from.has_initial_quarter() {
            self.learn_title(self.id, answer.title);
        } else {
            // The sender never lends, and it may have made up the title that it reports. The title
            // is not even a hint: if its holder does not exist, this node would wait for it
            // forever.
            answer.part = LenderRole::None;
            answer.rivals.retain(|rival| rival.has_initial_quarter());
        }
        let settled = now + self.timing.settle;
        if let Some(term) = &mut self.term {
            let lent =
                term.answers.get(&from).is_some_and(|before| before.part == LenderRole::Lends);
            if lent && answer.part == LenderRole::None {
                term.restart(settled);
            } else {
                term.answers.insert(from, answer);
            }
        }
    }
}
