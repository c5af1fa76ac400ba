//! Round-trip time, smoothed as in RFC 6298.

use std::time::Duration;

/// Minimum time before an answer counts as missing. Answers come from a daemon, so a busy host may
/// take this long without a fault. RFC 6298 uses one second, which is too slow here. A value that
/// is too short costs only a few early probes.
pub const SHORTEST_WAIT: Duration = Duration::from_millis(200);
/// Maximum of this time, and its value before the first measurement (RFC 6298 section 2.1).
pub const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// Measured round-trip times.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rtt {
    smoothed: Option<Duration>,
    variation: Duration,
    least: Option<Duration>,
}

impl Rtt {
    /// Adds a measurement (section 2: alpha 1/8, beta 1/4).
    pub(super) fn sample(&mut self, rtt: Duration) {
        self.least = Some(self.least.map_or(rtt, |least| least.min(rtt)));
        match self.smoothed {
            None => {
                self.smoothed = Some(rtt);
                self.variation = rtt / 2;
            }
            Some(smoothed) => {
                self.variation = self.variation * 3 / 4 + smoothed.abs_diff(rtt) / 4;
                self.smoothed = Some(smoothed * 7 / 8 + rtt / 8);
            }
        }
    }

    /// Forgets the least round-trip time, because the network path may have changed.
    pub(super) fn forget_least(&mut self) {
        self.least = None;
    }

    pub(super) fn smoothed(&self) -> Option<Duration> {
        self.smoothed
    }

    pub(super) fn least(&self) -> Option<Duration> {
        self.least
    }

    /// Returns how long to wait for an answer (section 2.3: K = 4).
    pub(super) fn wait(&self) -> Duration {
        self.smoothed.map_or(LONGEST_WAIT, |smoothed| {
            (smoothed + self.variation * 4).clamp(SHORTEST_WAIT, LONGEST_WAIT)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimates_follow_rfc_6298() {
        let ms = Duration::from_millis;
        let mut rtt = Rtt::default();
        assert_eq!(rtt.wait(), LONGEST_WAIT);
        rtt.sample(ms(80));
        assert_eq!((rtt.smoothed(), rtt.variation, rtt.wait()), (Some(ms(80)), ms(40), ms(240)));
        rtt.sample(ms(160));
        assert_eq!((rtt.smoothed(), rtt.variation, rtt.wait()), (Some(ms(90)), ms(50), ms(290)));
        rtt.sample(ms(10));
        assert_eq!((rtt.smoothed(), rtt.least()), (Some(ms(80)), Some(ms(10))));
        for _ in 0..100 {
            rtt.sample(ms(1));
        }
        assert_eq!(rtt.wait(), SHORTEST_WAIT);
        for _ in 0..100 {
            rtt.sample(ms(3000));
        }
        assert_eq!(rtt.wait(), LONGEST_WAIT);
    }
}
