//! Limits incoming connections that have proven nothing yet: how many slots there are, and which
//! connection loses its slot.
//!
//! A connection that finds all slots taken gets a slot of the busiest source, so a source that
//! floods competes with itself. An honest remote with one connection, however slow its network
//! path, loses its slot only if no other source has more than one.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::rngs::StdRng;
use tokio::sync::oneshot;

use overnode_core::sources::{Sources, site_of, source_of};

/// Limits of incoming connections.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time.
    pub connections: usize,
    /// Connections at a time from one source.
    pub of_source: usize,
    /// Average interval between two connections from one source.
    pub interval: Duration,
    /// Connections in a burst from one source.
    pub burst: u32,
}

/// The slots of one group of sources, the oldest first.
#[derive(Debug)]
pub struct Admission {
    limits: Limits,
    sources: Sources,
    rng: StdRng,
    taken: Vec<(IpAddr, oneshot::Sender<()>)>,
}

/// The slot of a connection. Dropping it frees the slot.
#[derive(Debug)]
pub struct Slot(oneshot::Receiver<()>);

impl Slot {
    /// Completes when the slot is needed for another connection.
    pub async fn is_lost(&mut self) {
        let _ = (&mut self.0).await;
    }
}

impl Admission {
    /// Creates an admission without connections. `rng` breaks ties between connections.
    pub fn new(limits: Limits, rng: StdRng) -> Self {
        Self {
            limits,
            sources: Sources::new(limits.interval, limits.burst),
            rng,
            taken: Vec::new(),
        }
    }

    /// Returns a slot for a connection, if necessary by evicting another. Returns `None` if its
    /// source connects too often.
    pub fn admit(&mut self, ip: IpAddr, now: Instant) -> Option<Slot> {
        if !self.sources.allow(ip, now) {
            return None;
        }
        self.taken.retain(|(_, sender)| !sender.is_closed());
        let own = self.of(|other| source_of(other) == source_of(ip));
        if own.len() >= self.limits.of_source {
            self.taken.remove(*own.first()?);
        } else if self.taken.len() >= self.limits.connections {
            let victim = self.victim()?;
            self.taken.remove(victim);
        }
        let (sender, receiver) = oneshot::channel();
        self.taken.push((ip, sender));
        Some(Slot(receiver))
    }

    /// Returns the positions of connections whose address matches, the oldest first.
    fn of(&self, fits: impl Fn(IpAddr) -> bool) -> Vec<usize> {
        (0..self.taken.len())
            .filter(|at| self.taken.get(*at).is_some_and(|(ip, _)| fits(*ip)))
            .collect()
    }

    /// Returns the oldest connection of one of the busiest sources. If several sources are equally
    /// busy, it picks from the site with the most connections from these sources.
    fn victim(&mut self) -> Option<usize> {
        let all = (0..self.taken.len()).collect();
        let busiest = self.busiest(all, source_of).concat();
        let sites = self.busiest(busiest, site_of);
        let site = self.any_of(sites)?;
        let sources = self.busiest(site, source_of);
        self.any_of(sources)?.first().copied()
    }

    fn any_of(&mut self, mut groups: Vec<Vec<usize>>) -> Option<Vec<usize>> {
        (!groups.is_empty()).then(|| groups.swap_remove(self.rng.random_range(0..groups.len())))
    }

    /// Returns the largest groups of connections, in each the oldest first.
    fn busiest(&self, among: Vec<usize>, group: fn(IpAddr) -> IpAddr) -> Vec<Vec<usize>> {
        let mut groups: BTreeMap<IpAddr, Vec<usize>> = BTreeMap::new();
        for at in among {
            if let Some((ip, _)) = self.taken.get(at) {
                groups.entry(group(*ip)).or_default().push(at);
            }
        }
        let most = groups.values().map(Vec::len).max().unwrap_or_default();
        groups.into_values().filter(|group| group.len() == most).collect()
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    const LIMITS: Limits =
        Limits { connections: 16, of_source: 8, interval: Duration::from_millis(100), burst: 1000 };

    fn admission(limits: Limits) -> (Admission, Instant) {
        (Admission::new(limits, StdRng::seed_from_u64(1)), Instant::now())
    }

    fn is_lost(slot: &mut Slot) -> bool {
        slot.0.try_recv() == Err(oneshot::error::TryRecvError::Closed)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_source_that_floods_competes_with_itself() {
        let (mut admission, now) = admission(LIMITS);
        let mut quiet = admission.admit(ip("192.0.2.1"), now).unwrap();
        let mut flood = Vec::new();
        for number in 0..1000_u128 {
            // Five sources, one of them an IPv6 /64.
            let last = (number % 5) as u8;
            let source = match last {
                0 => IpAddr::from((0x2001_0db8_u128 << 96 | number).to_be_bytes()),
                last => ip(&format!("192.0.2.{}", 10 + last)),
            };
            flood.push(admission.admit(source, now).unwrap());
            assert!(!is_lost(&mut quiet), "after {number}");
        }
        let kept = flood.iter_mut().map(|slot| usize::from(!is_lost(slot))).sum::<usize>();
        assert_eq!(kept, LIMITS.connections - 1);
    }

    #[test]
    fn many_sources_of_one_site_compete_with_each_other() {
        let (mut admission, now) = admission(LIMITS);
        let mut quiet = admission.admit(ip("2001:db8:ffff::1"), now).unwrap();
        let mut flood = Vec::new();
        for number in 0..1000_u128 {
            let source = 0x2001_0db8_u128 << 96 | number << 64;
            flood.push(admission.admit(IpAddr::from(source.to_be_bytes()), now).unwrap());
            assert!(!is_lost(&mut quiet), "after {number}");
        }
    }

    #[test]
    fn a_flood_from_everywhere_evicts_at_random() {
        let (mut admission, now) = admission(LIMITS);
        let mut survived = 0;
        for round in 0..200_u32 {
            let mut quiet = admission.admit(ip("203.0.113.1"), now).unwrap();
            let mut flood = Vec::new();
            for number in 0..LIMITS.connections as u32 {
                let source = IpAddr::from((round * 4096 + number * 0x0101_0101).to_be_bytes());
                flood.push(admission.admit(source, now).unwrap());
            }
            survived += u32::from(!is_lost(&mut quiet));
        }
        // A policy that always evicts the oldest connection would have evicted it each time.
        assert!((100..200).contains(&survived), "{survived}");
    }

    #[test]
    fn a_source_that_connects_too_often_is_refused() {
        let (mut admission, now) = admission(Limits { burst: 3, ..LIMITS });
        let calls = (0..5).filter_map(|_| admission.admit(ip("192.0.2.1"), now)).count();
        assert_eq!(calls, 3);
        assert!(admission.admit(ip("192.0.2.2"), now).is_some());
        assert!(admission.admit(ip("192.0.2.1"), now + LIMITS.interval).is_some());
    }

    #[test]
    fn released_places_are_free_again() {
        let (mut admission, now) = admission(LIMITS);
        let mut quiet = admission.admit(ip("192.0.2.1"), now).unwrap();
        for number in 0..1000_u32 {
            drop(admission.admit(IpAddr::from(number.to_be_bytes()), now).unwrap());
        }
        assert!(!is_lost(&mut quiet));
        assert_eq!(admission.taken.len(), 2);
    }
}
