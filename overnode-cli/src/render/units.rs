//! Formats numbers for human readers.

use std::time::{Duration, SystemTime};

/// Formats seconds as their two largest units: `45s`, `3m12s`, `3h12m`, `5d4h`.
pub(super) fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{}s", seconds % 60),
        3600..86_400 => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

/// Formats the time elapsed since a Unix time, in seconds.
pub(super) fn since(unix_seconds: u64, now: SystemTime) -> String {
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(unix_seconds.min(u64::from(u32::MAX)));
    duration(now.duration_since(then).map_or(0, |age| age.as_secs()))
}

/// Formats bytes with three digits: `512 B`, `1.23 KiB`, `45.6 MiB`, `789 GiB`.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = UNITS[0];
    for larger in &UNITS[1..] {
        // From here on, the value would have four digits.
        if value < 999.5 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.decimals$} {unit}")
}

/// Formats microseconds as milliseconds, because `85µs` is not ASCII: `0.085 ms`, `1.20 ms`,
/// `34 ms`.
pub(super) fn round_trip(microseconds: u64) -> String {
    let value = microseconds as f64 / 1000.0;
    let decimals = match microseconds {
        0..1000 => 3,
        1000..10_000 => 2,
        _ => 0,
    };
    format!("{value:.decimals$} ms")
}

/// Formats a percentage, 0 to 100, with at least one significant digit: `25.0%`, `0.018%`, `0%`.
pub(super) fn share(percent: f64) -> String {
    match percent {
        0.1.. => format!("{percent:.1}%"),
        0.001.. => format!("{percent:.3}%"),
        0.0 => "0%".to_owned(),
        _ => "<0.001%".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let shown = [
            (0, "0s"),
            (59, "59s"),
            (60, "1m0s"),
            (3599, "59m59s"),
            (3600, "1h0m"),
            (11_520, "3h12m"),
        ];
        for (seconds, text) in
            shown.into_iter().chain([(86_399, "23h59m"), (86_400, "1d0h"), (446_400, "5d4h")])
        {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn shares() {
        let shown = [(100.0, "100.0%"), (24.994, "25.0%"), (0.1, "0.1%"), (0.0061, "0.006%")];
        for (percent, text) in shown.into_iter().chain([(0.000_19, "<0.001%"), (0.0, "0%")]) {
            assert_eq!(share(percent), text);
        }
    }

    #[test]
    fn ages() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        assert_eq!(since(940, now), "1m0s");
        assert_eq!(since(2000, now), "0s", "a clock that was set back");
        assert_eq!(since(u64::MAX, now), "0s");
    }

    #[test]
    fn sizes() {
        let shown = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (10_240, "10.0 KiB"),
            (102_400, "100 KiB"),
        ];
        for (count, text) in
            shown.into_iter().chain([(1_023_999, "0.98 MiB"), (u64::MAX, "16.0 EiB")])
        {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn round_trips() {
        for (microseconds, text) in
            [(0, "0.000 ms"), (85, "0.085 ms"), (1200, "1.20 ms"), (34_400, "34 ms")]
        {
            assert_eq!(round_trip(microseconds), text);
        }
    }
}
