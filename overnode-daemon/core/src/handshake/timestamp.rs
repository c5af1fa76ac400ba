//! Makes TAI64N timestamps (whitepaper section 5.1), which prevent replays of initiations.

use std::time::{Duration, SystemTime};

use super::noise::TIMESTAMP_LEN;

/// TAI64 label of 1970-01-01 00:00:10 TAI, the start of Unix time, as in other implementations.
const BASE: u64 = (1 << 62) + 10;
/// Resolution in nanoseconds: 2^24 ns, about 17 ms. Finer steps would reveal more about our clock
/// than the protocol needs.
const STEP: u32 = 1 << 24;

/// Makes strictly increasing timestamps.
///
/// They come from the wall clock, so they also increase across restarts. If the clock is set back
/// while we run, each timestamp is one step (17 ms) after the previous one until the clock has
/// caught up. If it is set back while we do not run, peers that remember a later timestamp refuse
/// our initiations until it has caught up. We still answer theirs.
#[derive(Default)]
pub(crate) struct Stamper {
    last: Duration,
}

impl Stamper {
    pub(crate) fn next(&mut self, wall: SystemTime) -> [u8; TIMESTAMP_LEN] {
        let wall = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let rounded = Duration::new(wall.as_secs(), wall.subsec_nanos() / STEP * STEP);
        self.last = rounded.max(self.last.saturating_add(Duration::from_nanos(u64::from(STEP))));
        let mut stamp = [0; TIMESTAMP_LEN];
        stamp[..8].copy_from_slice(&BASE.saturating_add(self.last.as_secs()).to_be_bytes());
        stamp[8..].copy_from_slice(&self.last.subsec_nanos().to_be_bytes());
        stamp
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_grow_whatever_the_clock_does() {
        let mut stamper = Stamper::default();
        let noon = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let walls = [
            noon,
            noon,
            noon + Duration::from_nanos(5),
            noon - Duration::from_secs(3600),
            SystemTime::UNIX_EPOCH - Duration::from_secs(1),
            noon + Duration::from_secs(1),
        ];
        let stamps: Vec<_> = walls.iter().map(|wall| stamper.next(*wall)).collect();
        assert!(stamps.is_sorted_by(|a, b| a < b), "{stamps:?}");
        assert_eq!(stamps[0][..8], (BASE + 1_700_000_000).to_be_bytes());
        assert_eq!(
            stamps[5][..8],
            (BASE + 1_700_000_001).to_be_bytes(),
            "it follows the clock again"
        );
    }
}
