//! Allocates receiver indices: 20 random bits above the slot number in the data plane's `SESSIONS`
//! map.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use overnode_ebpf::map::{SESSION_SLOT_BITS, SESSION_SLOTS};
use rand::Rng;
use rand::rngs::StdRng;

use overnode_types::{PeerIndex, SessionIndex};

/// How long a slot stays unused after its session was withdrawn. By then, a program that still uses
/// the session has ended, and late packets do not reach the next session in the slot.
pub(crate) const QUARANTINE: Duration = Duration::from_secs(5);

/// The session slots in use and their owners.
pub(crate) struct Slots {
    slots: Vec<Slot>,
    /// In the order in which they became free, so that each slot stays unused for as long as
    /// possible.
    free: VecDeque<u32>,
    quarantine: VecDeque<(Instant, u32)>,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    /// Current or last receiver index of the slot.
    index: SessionIndex,
    owner: Option<PeerIndex>,
}

impl Slots {
    /// Creates the slots, all free. The first slot to allocate is random, so that slots in use
    /// before a restart also stay unused for a while.
    pub(crate) fn new(rng: &mut StdRng) -> Self {
        let mut free: VecDeque<_> = (1..SESSION_SLOTS).collect();
        free.rotate_left(rng.random_range(0..free.len()));
        Self {
            slots: vec![Slot::default(); SESSION_SLOTS as usize],
            free,
            quarantine: VecDeque::new(),
        }
    }

    /// Returns a new receiver index, or `None` if no slot is free.
    pub(crate) fn allocate(
        &mut self,
        peer: PeerIndex,
        now: Instant,
        rng: &mut StdRng,
    ) -> Option<SessionIndex> {
        while self.quarantine.front().is_some_and(|(until, _)| *until <= now) {
            self.free.extend(self.quarantine.pop_front().map(|(_, slot)| slot));
        }
        let number = self.free.pop_front()?;
        let slot = &mut self.slots[number as usize];
        let before = slot.index;
        while slot.index == before {
            slot.index = SessionIndex::new((rng.random::<u32>() << SESSION_SLOT_BITS) | number);
        }
        slot.owner = Some(peer);
        Some(slot.index)
    }

    /// Reserves the slot of an index that was allocated before a restart. Returns false if there is
    /// no such slot or it is not free.
    pub(crate) fn reserve(&mut self, index: SessionIndex, peer: PeerIndex) -> bool {
        let number = number(index);
        let Some(position) = self.free.iter().position(|free| *free == number) else {
            return false;
        };
        self.free.remove(position);
        self.slots[number as usize] = Slot { index, owner: Some(peer) };
        true
    }

    /// Returns the peer that the index belongs to.
    pub(crate) fn owner(&self, index: SessionIndex) -> Option<PeerIndex> {
        let slot = self.slots[number(index) as usize];
        slot.owner.filter(|_| slot.index == index)
    }

    /// Frees an index that never had a session.
    pub(crate) fn discard(&mut self, index: SessionIndex) {
        if self.vacate(index) {
            self.free.push_back(number(index));
        }
    }

    /// Frees the index of a withdrawn session, after [`QUARANTINE`].
    pub(crate) fn retire(&mut self, index: SessionIndex, now: Instant) {
        if self.vacate(index) {
            self.quarantine.push_back((now + QUARANTINE, number(index)));
        }
    }

    /// Returns the number of slots in use.
    pub(crate) fn used(&self) -> usize {
        self.slots.len() - 1 - self.free.len() - self.quarantine.len()
    }

    fn vacate(&mut self, index: SessionIndex) -> bool {
        let slot = &mut self.slots[number(index) as usize];
        slot.index == index && slot.owner.take().is_some()
    }
}

fn number(index: SessionIndex) -> u32 {
    index.get() % SESSION_SLOTS
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    const PEER: PeerIndex = PeerIndex(7);

    #[test]
    fn every_slot_except_zero_is_allocated_once() {
        let (mut rng, now) = (StdRng::seed_from_u64(1), Instant::now());
        let mut slots = Slots::new(&mut rng);
        let mut numbers: Vec<_> = (1..SESSION_SLOTS)
            .map(|_| number(slots.allocate(PEER, now, &mut rng).expect("a slot is free")))
            .collect();
        assert_eq!(slots.allocate(PEER, now, &mut rng), None);
        assert_eq!(slots.used(), SESSION_SLOTS as usize - 1);
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(1..SESSION_SLOTS));
    }

    #[test]
    fn a_retired_slot_is_quarantined_and_returns_with_another_index() {
        let (mut rng, now) = (StdRng::seed_from_u64(1), Instant::now());
        let mut slots = Slots::new(&mut rng);
        let all: Vec<_> = (1..SESSION_SLOTS)
            .map(|_| slots.allocate(PEER, now, &mut rng).expect("a slot is free"))
            .collect();
        slots.retire(all[5], now);
        slots.retire(all[5], now);
        slots.retire(SessionIndex::new(all[6].get() ^ (1 << 31)), now);
        assert_eq!((slots.owner(all[5]), slots.owner(all[6])), (None, Some(PEER)));
        assert_eq!(
            slots.allocate(PEER, now + QUARANTINE - Duration::from_nanos(1), &mut rng),
            None
        );
        let again =
            slots.allocate(PEER, now + QUARANTINE, &mut rng).expect("the quarantine is over");
        assert_eq!(number(again), number(all[5]));
        assert_ne!(again, all[5]);
        assert_eq!(slots.allocate(PEER, now + QUARANTINE, &mut rng), None);
        slots.discard(again);
        assert!(
            slots.allocate(PEER, now, &mut rng).is_some(),
            "an index that had no session needs no quarantine"
        );
    }

    #[test]
    fn reserved_slots_are_not_allocated() {
        let (mut rng, now) = (StdRng::seed_from_u64(1), Instant::now());
        let mut slots = Slots::new(&mut rng);
        let index = SessionIndex::new(0xabcd_e003);
        assert!(slots.reserve(index, PEER));
        assert!(!slots.reserve(SessionIndex::new(0x0000_0003), PEER), "the slot is in use");
        assert!(!slots.reserve(SessionIndex::new(0xabcd_e000), PEER), "slot 0 is not a slot");
        assert_eq!((slots.owner(index), slots.owner(SessionIndex::new(3))), (Some(PEER), None));
        while let Some(given) = slots.allocate(PEER, now, &mut rng) {
            assert_ne!(number(given), 3);
        }
    }
}
