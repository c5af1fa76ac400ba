//! Whether a lender still has its title: asked of the other nodes before anything is lent.
//!
//! A node that is cut off may be declared gone for good meanwhile, and cannot know. So a quarter is
//! lent, to its holder too, only while another node *vouches* for it: a node that the holder told
//! of the title while another one vouched for it, that reaches the holder, and has not agreed that
//! the holder's space be taken back. A node agrees to that only when it has not reached the holder
//! for [`Timing::grace`](super::Timing::grace), longer than it takes the holder to notice that it
//! does not reach that node. Taking back needs the consent of every node, so as long as one
//! vouches, nobody can have taken the quarter.
//!
//! A node that the holder has told of the title while nobody vouched for it, or that other nodes
//! have told of it, may have been launched after the burial, and does not count alone. Where all
//! members say that they know nothing against the title, that does.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::fact::{Fact, Key};
use super::message::{Message, Round, Title};
use super::{Ipam, Retry};
use crate::types::NodeId;

/// What other nodes say about the quarters that this node lends: by quarter and node. Only nodes
/// that are reached now.
#[derive(Clone, Debug, Default)]
pub(super) struct Standing(BTreeMap<(NodeId, NodeId), Voucher>);

#[derive(Clone, Copy, Debug)]
struct Voucher {
    word: Word,
    round: Round,
    retry: Retry,
}

/// What a node has said about a title since it was last out of reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Word {
    /// Nothing yet, or nothing good.
    None,
    /// It knows nothing against this title, and cannot vouch for it.
    Ignorant,
    /// This node has the title by that one's consent.
    Consented,
    /// It vouches for the title.
    Vouched,
}

impl Standing {
    fn vouchers(&self, quarter: NodeId) -> usize {
        self.0
            .iter()
            .filter(|((of, _), voucher)| *of == quarter && voucher.word >= Word::Consented)
            .count()
    }

    fn is_known(&self, quarter: NodeId, member: NodeId) -> bool {
        self.0.get(&(quarter, member)).is_some_and(|voucher| voucher.word >= Word::Ignorant)
    }

    /// The title has another serial now: those that vouch for this node have to hear of it.
    pub(super) fn renew(&mut self, quarter: NodeId, now: Instant) {
        for (_, voucher) in self.0.iter_mut().filter(|((of, _), _)| *of == quarter) {
            voucher.word = voucher.word.min(Word::Consented);
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
    /// Whether this node lends a quarter and nobody else can by now: otherwise nothing of it may be
    /// given away.
    pub fn may_lend(&self, quarter: NodeId) -> bool {
        if self.lending.books.get(&quarter).is_none_or(|book| book.heir.is_some()) {
            return false;
        }
        // Only nodes 1 to 4 take anything back.
        let mut members = self.members().peekable();
        let has_rivals = self.members().any(NodeId::owns_a_quarter);
        !has_rivals
            || self.standing.vouchers(quarter) > 0
            || (members.peek().is_some()
                && members.all(|member| self.standing.is_known(quarter, member)))
    }

    /// Whether more than half of the members that are reached vouch for the title of a quarter.
    pub(super) fn is_vouched_for_by_most(&self, quarter: NodeId) -> bool {
        let reached = self.members().filter(|member| self.reachable.contains(member)).count();
        2 * self.standing.vouchers(quarter) > reached
    }

    /// Notes by whose consent a quarter was just taken: as long as they are reached, they have not
    /// agreed to anything else.
    pub(super) fn stand_by(&mut self, quarter: NodeId, consented: &BTreeSet<NodeId>, now: Instant) {
        self.standing.forget_quarter(quarter);
        let reached: Vec<_> = consented.intersection(&self.reachable).copied().collect();
        for member in reached {
            let (round, retry) = (self.next_round(), Retry::new(now));
            self.standing
                .0
                .insert((quarter, member), Voucher { word: Word::Consented, round, retry });
        }
    }

    /// What nodes said that are out of reach counts no more.
    pub(super) fn prune_standing(&mut self) {
        if self.standing.0.is_empty() {
            return;
        }
        let members: BTreeSet<_> =
            self.members().filter(|it| self.reachable.contains(it)).collect();
        let Self { standing, lending, .. } = self;
        standing.0.retain(|(quarter, member), _| {
            lending.books.get(quarter).is_some_and(|book| book.heir.is_none())
                && members.contains(member)
        });
    }

    /// Asks the members that are reached about the quarters that this node lends.
    pub(super) fn drive_standing(&mut self, now: Instant) {
        let active = self.lending.books.iter().filter(|(_, book)| book.heir.is_none());
        let books: BTreeMap<NodeId, u64> =
            active.map(|(quarter, book)| (*quarter, book.serial)).collect();
        if books.is_empty() {
            return;
        }
        let members: BTreeSet<_> =
            self.members().filter(|it| self.reachable.contains(it)).collect();
        let mut messages = Vec::new();
        for (&quarter, &serial) in &books {
            let sure = self.may_lend(quarter);
            for &member in &members {
                if !self.standing.0.contains_key(&(quarter, member)) {
                    let (round, retry) = (self.next_round(), Retry::new(now));
                    self.standing
                        .0
                        .insert((quarter, member), Voucher { word: Word::None, round, retry });
                }
                let Some(voucher) = self.standing.0.get_mut(&(quarter, member)) else { continue };
                // Members that know nothing are asked again when there is something to tell them.
                let is_done =
                    voucher.word == Word::Vouched || (voucher.word == Word::Ignorant && !sure);
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

    pub(super) fn next_standing(&self) -> Option<Instant> {
        let sure: BTreeSet<_> =
            self.lending.books.keys().filter(|quarter| self.may_lend(**quarter)).collect();
        let is_asked = |quarter: &NodeId, member: &NodeId, word: Word| {
            let is_member = self.reachable.contains(member) && !self.has_left(*member);
            is_member
                && (word < Word::Ignorant || word == Word::Consented || sure.contains(quarter))
        };
        let open = self.standing.0.iter().filter(|(_, voucher)| voucher.word != Word::Vouched);
        let waiting =
            open.filter(|((quarter, member), voucher)| is_asked(quarter, member, voucher.word));
        waiting.map(|(_, voucher)| voucher.retry.at).min()
    }

    /// A lender asks whether it still is one.
    pub(super) fn handle_hold(
        &mut self,
        from: NodeId,
        quarter: NodeId,
        (serial, epoch): (u64, u64),
        round: Round,
        sure: bool,
        now: Instant,
    ) {
        if !from.owns_a_quarter() {
            return;
        }
        let title = Title { serial, holder: from };
        if self.is_gone(from, epoch) {
            self.tell_buried(from, epoch);
            return;
        }
        if self.lending.books.contains_key(&quarter) {
            self.handle_title(from, quarter, title, now);
            return;
        }
        let known = self.title_of(quarter);
        if known.serial > serial {
            self.send(from, &Message::Title { quarter, title: known });
            return;
        }
        if self.has_pledged(from) || self.claims_space_of(from) {
            return;
        }
        // It was there just now, whether it counts as reached or not.
        self.lost.insert(from, now);
        if sure {
            self.hear(quarter, title);
            self.confirm(quarter, title);
        }
        let heard = self.lending.confirmed.get(&quarter) == Some(&title);
        self.send(from, &Message::Vouch { quarter, serial, round, heard });
    }

    /// Notes that another node vouches for the holder of a title. A holder that is not reached may
    /// have said so long ago.
    fn confirm(&mut self, quarter: NodeId, title: Title) {
        let is_latest = self.lending.heard.get(&quarter) == Some(&title);
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
        let Some(voucher) = self.standing.0.get_mut(&(quarter, from)) else { return };
        if voucher.round != round {
            return;
        }
        let word = if heard { Word::Vouched } else { Word::Ignorant };
        if word > voucher.word {
            *voucher = Voucher { word, retry: Retry::new(now), ..*voucher };
        }
    }
}
