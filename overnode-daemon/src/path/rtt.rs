//! Round-trip time, as RFC 6298 smooths it.

use std::time::Duration;

/// The shortest wait for an answer before it is missed. Answers come from a daemon, so a busy host
/// may take so long without anything being wrong; RFC 6298 would say a second, which is too slow
/// here and costs nothing but a few early probes where it is too short.
pub const SHORTEST_WAIT: Duration = Duration::from_millis(200);
/// The longest wait, and the one before anything was measured (RFC 6298 section 2.1).
pub const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// What was measured.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rtt {
    smoothed: Option<Duration>,
    variation: Duration,
    least: Option<Duration>,
}

impl Rtt {
    /// Takes a measurement in (section 2: alpha 1/8, beta 1/4).
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

    /// Forgets the least: the path may be another one from now on.
    pub(super) fn forget_least(&mut self) {
        self.least = None;
    }

    pub(super) fn smoothed(&self) -> Option<Duration> {
        self.smoothed
    }

    pub(super) fn least(&self) -> Option<Duration> {
        self.least
    }

    /// How long to wait for an answer (section 2.3: K = 4).
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
    fn the_numbers_of_rfc_6298() {
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
