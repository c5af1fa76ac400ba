//! The clock of the eBPF programs.

use std::ops::Add;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

/// A time of the clock that the eBPF programs read: nanoseconds since boot (`CLOCK_BOOTTIME`),
/// which include the time that the host was suspended. Encoded as that number.
///
/// The programs and the maps write 0 for an event that has not happened, see [`Self::NEVER`].
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    Zeroize,
)]
pub struct BootTime(u64);

impl BootTime {
    /// The time of an event that has not happened. It is before every other time.
    pub const NEVER: Self = Self(0);

    /// Creates a time from nanoseconds since boot.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Returns the nanoseconds since boot.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Returns the time that has passed since `earlier`, or zero if `earlier` is later.
    pub const fn saturating_duration_since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// Saturates at the last time that the clock can show, 584 years after boot.
impl Add<Duration> for BootTime {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanos))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_saturates() {
        let (early, late) = (BootTime::from_nanos(5), BootTime::from_nanos(u64::MAX));
        assert_eq!(early + Duration::from_nanos(2), BootTime::from_nanos(7));
        assert_eq!(late + Duration::MAX, late);
        assert_eq!(early.saturating_duration_since(BootTime::NEVER), Duration::from_nanos(5));
        assert_eq!(early.saturating_duration_since(late), Duration::ZERO);
    }
}
