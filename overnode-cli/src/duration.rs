//! Durations as people write them.

use std::time::Duration;

/// Parses a duration such as `1s`, `500ms`, `2m` or `1h 30m`. A number alone is in seconds.
///
/// # Errors
/// Returns what is accepted if the text is not a duration.
pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map(Duration::from_secs);
    seconds
        .or_else(|_| humantime::parse_duration(text))
        .map_err(|_| "give a time such as 500ms, 10s, 2m or 1h".to_owned())
}

/// Parses a duration that is not zero.
///
/// # Errors
/// Returns what is accepted if the text is not such a duration.
pub(crate) fn parse_positive(text: &str) -> Result<Duration, String> {
    match parse(text)? {
        Duration::ZERO => Err("the time must be more than 0, such as 500ms, 10s, 2m or 1h".into()),
        duration => Ok(duration),
    }
}

/// Parses a whole number of seconds, 1 to 65535.
///
/// # Errors
/// Returns what is accepted if the text is not such a duration.
pub(crate) fn parse_seconds(text: &str) -> Result<u16, String> {
    let duration = parse_positive(text)?;
    match u16::try_from(duration.as_secs()) {
        Ok(seconds) if duration.subsec_nanos() == 0 => Ok(seconds),
        Ok(_) | Err(_) => Err("give whole seconds, 1s to 65535s, such as 25s".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_people_write_them() {
        let milliseconds = |text: &str| parse(text).map(|it| it.as_millis());
        for (text, expected) in [
            ("0", 0),
            ("10", 10_000),
            ("1s", 1000),
            ("500ms", 500),
            ("2m", 120_000),
            ("1h 30m", 5_400_000),
            ("1h30m", 5_400_000),
        ] {
            assert_eq!(milliseconds(text), Ok(expected), "{text}");
        }
        for text in ["", "s", "-1", "1 fortnight", "soon", "1e3", "99999999999999999999s"] {
            assert!(parse(text).unwrap_err().contains("500ms, 10s"), "{text}");
        }
        assert!(parse_positive("0").unwrap_err().contains("more than 0"));
        assert!(parse_positive("0ms").unwrap_err().contains("more than 0"));
        assert_eq!((parse_seconds("25"), parse_seconds("2m")), (Ok(25), Ok(120)));
        for text in ["1500ms", "20h", "0"] {
            assert!(parse_seconds(text).is_err(), "{text}");
        }
    }
}
