//! Rate limits per source address, for everything that unauthenticated hosts can send.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// Maximum number of tracked sources. Further sources are refused until a sweep finds idle ones.
/// Sweeps are at least one second apart.
const MAX_SOURCES: usize = 16384;

/// A limit for arrivals that share one rate.
#[derive(Debug)]
pub struct Limit {
    interval: Duration,
    burst: u32,
    empty_at: Option<Instant>,
}

impl Limit {
    /// Allows one arrival per `interval` on average, and bursts of `burst`, which is at least 1.
    pub const fn new(interval: Duration, burst: u32) -> Self {
        Self { interval, burst, empty_at: None }
    }

    /// Counts an arrival. Returns false if it exceeds the limit.
    pub fn allow(&mut self, now: Instant) -> bool {
        pour(self.empty_at.get_or_insert(now), self.interval, self.burst, now)
    }
}

/// A leaky bucket per source, stored as the time at which the bucket will be empty.
#[derive(Debug)]
pub struct Sources {
    interval: Duration,
    burst: u32,
    empty_at: BTreeMap<IpAddr, Instant>,
    swept: Option<Instant>,
}

impl Sources {
    /// Allows each source one arrival per `interval` on average, and bursts of `burst`, which is at
    /// least 1.
    pub const fn new(interval: Duration, burst: u32) -> Self {
        Self { interval, burst, empty_at: BTreeMap::new(), swept: None }
    }

    /// Counts an arrival. Returns false if it exceeds the source's limit.
    pub fn allow(&mut self, from: IpAddr, now: Instant) -> bool {
        let source = source_of(from);
        if !self.empty_at.contains_key(&source) && self.empty_at.len() >= MAX_SOURCES {
            self.sweep(now);
            if self.empty_at.len() >= MAX_SOURCES {
                return false;
            }
        }
        pour(self.empty_at.entry(source).or_insert(now), self.interval, self.burst, now)
    }

    fn sweep(&mut self, now: Instant) {
        if self
            .swept
            .is_none_or(|swept| now.saturating_duration_since(swept) >= Duration::from_secs(1))
        {
            self.swept = Some(now);
            self.empty_at.retain(|_, empty_at| *empty_at > now);
        }
    }
}

/// Adds an arrival to a leaky bucket. Returns false if the bucket is full.
fn pour(empty_at: &mut Instant, interval: Duration, burst: u32, now: Instant) -> bool {
    if empty_at.saturating_duration_since(now) > interval * (burst - 1) {
        return false;
    }
    *empty_at = (*empty_at).max(now) + interval;
    true
}

/// Returns the source that an address counts for: an IPv4 address itself, or the /64 of an IPv6
/// address, since a host chooses the rest freely.
pub fn source_of(ip: IpAddr) -> IpAddr {
    prefix(ip, 32, 64)
}

/// Returns the network that is probably under the same administration: an IPv4 /24, or an IPv6 /48,
/// the usual assignment to a site.
pub fn site_of(ip: IpAddr) -> IpAddr {
    prefix(ip, 24, 48)
}

fn prefix(ip: IpAddr, v4_bits: u32, v6_bits: u32) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V4(v4) => {
            std::net::Ipv4Addr::from_bits(v4.to_bits() >> (32 - v4_bits) << (32 - v4_bits)).into()
        }
        IpAddr::V6(v6) => {
            Ipv6Addr::from_bits(v6.to_bits() >> (128 - v6_bits) << (128 - v6_bits)).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_millis(50);
    const BURST: u32 = 5;

    fn sources() -> (Sources, Instant) {
        (Sources::new(INTERVAL, BURST), Instant::now())
    }

    #[test]
    fn one_source_cannot_use_up_the_limit_of_others() {
        let (mut sources, now) = sources();
        let [loud, calm, loud6, near6, far6]: [IpAddr; 5] =
            ["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"]
                .map(|address| address.parse().expect("a valid address"));
        for source in [loud, loud6] {
            for _ in 0..BURST {
                assert!(sources.allow(source, now));
            }
            assert!(!sources.allow(source, now));
        }
        assert!(sources.allow(calm, now));
        assert!(!sources.allow(near6, now), "the same /64");
        assert!(sources.allow(far6, now));
        assert!(sources.allow(loud, now + INTERVAL));
        assert!(!sources.allow(loud, now + INTERVAL));
    }

    #[test]
    fn the_table_of_sources_is_bounded_and_swept() {
        let (mut sources, now) = sources();
        let source = |i: u32| IpAddr::from(i.to_be_bytes());
        assert!((0..MAX_SOURCES as u32).all(|i| sources.allow(source(i), now)));
        assert!(!sources.allow(source(MAX_SOURCES as u32), now));
        assert!(sources.allow(source(0), now), "tracked sources are still allowed");
        let later = now + Duration::from_secs(1);
        assert!(sources.allow(source(MAX_SOURCES as u32), later));
        assert!(sources.empty_at.len() < 10);
    }

    #[test]
    fn a_site_is_an_ipv4_24_or_an_ipv6_48() {
        let of = |ip: &str| site_of(ip.parse().unwrap()).to_string();
        assert_eq!(of("192.0.2.77"), "192.0.2.0");
        assert_eq!(of("::ffff:192.0.2.77"), "192.0.2.0");
        assert_eq!(of("2001:db8:1:2:3::4"), "2001:db8:1::");
    }
}
