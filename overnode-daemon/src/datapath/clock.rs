//! Converts between the programs' clock (`CLOCK_BOOTTIME`) and [`Instant`].

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use overnode_types::BootTime;

/// Returns the current time of the programs' clock.
pub fn boot_now() -> BootTime {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    BootTime::NEVER + now
}

/// Both clocks, read at the same moment.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    instant: Instant,
    boot: BootTime,
}

impl Clock {
    /// Reads both clocks.
    pub fn now() -> Self {
        Self { instant: Instant::now(), boot: boot_now() }
    }

    /// Converts a time of the programs' clock. Returns `None` for [`BootTime::NEVER`].
    pub fn instant(self, time: BootTime) -> Option<Instant> {
        if time == BootTime::NEVER {
            None
        } else if time <= self.boot {
            self.instant.checked_sub(self.boot.saturating_duration_since(time))
        } else {
            self.instant.checked_add(time.saturating_duration_since(self.boot))
        }
    }

    /// Converts an instant to a time of the programs' clock. The result is never
    /// [`BootTime::NEVER`].
    pub fn boot_time(self, instant: Instant) -> BootTime {
        match instant.checked_duration_since(self.instant) {
            Some(ahead) => self.boot + ahead,
            None => {
                let since = self.boot.saturating_duration_since(BootTime::NEVER);
                let ago = self.instant.duration_since(instant);
                // One nanosecond after boot is the earliest time that is not `NEVER`.
                BootTime::NEVER + since.saturating_sub(ago).max(Duration::from_nanos(1))
            }
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
            assert_eq!(clock.instant(clock.boot_time(instant)), Some(instant));
        }
        assert_eq!(clock.instant(BootTime::NEVER), None);
    }
}
