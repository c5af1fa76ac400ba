//! Converts between the programs' clock (`CLOCK_BOOTTIME`, in nanoseconds) and [`Instant`].

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// Returns the current time of the programs' clock, in nanoseconds since boot.
pub fn boot_now_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from).as_nanos() as u64
}

/// Both clocks, read at the same moment.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    instant: Instant,
    boot_ns: u64,
}

impl Clock {
    /// Reads both clocks.
    pub fn now() -> Self {
        Self { instant: Instant::now(), boot_ns: boot_now_ns() }
    }

    /// Returns the reading of the programs' clock, in nanoseconds since boot.
    pub(super) const fn boot_now(self) -> u64 {
        self.boot_ns
    }

    /// Converts a time of the programs' clock, in nanoseconds since boot. Returns `None` for 0,
    /// which means "never".
    pub fn instant(self, boot_ns: u64) -> Option<Instant> {
        match boot_ns {
            0 => None,
            ns if ns <= self.boot_ns => {
                self.instant.checked_sub(Duration::from_nanos(self.boot_ns - ns))
            }
            ns => self.instant.checked_add(Duration::from_nanos(ns - self.boot_ns)),
        }
    }

    /// Converts an instant to a time of the programs' clock, in nanoseconds since boot, at least 1.
    pub fn boot_ns(self, instant: Instant) -> u64 {
        let nanos = |duration: Duration| duration.as_nanos() as u64;
        match instant.checked_duration_since(self.instant) {
            Some(ahead) => self.boot_ns.saturating_add(nanos(ahead)),
            None => self.boot_ns.saturating_sub(nanos(self.instant.duration_since(instant))).max(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_round_trip() {
        let clock = Clock::now();
        for instant in [
            clock.instant - Duration::from_millis(1),
            clock.instant,
            clock.instant + Duration::from_secs(180),
        ] {
            assert_eq!(clock.instant(clock.boot_ns(instant)), Some(instant));
        }
        assert_eq!(clock.instant(0), None);
    }
}
