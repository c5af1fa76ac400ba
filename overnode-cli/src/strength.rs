//! Estimates how soon an attacker guesses a token.
//!
//! An attacker can check guesses without contacting the cluster: against a stolen disk, or against
//! what a node sends to a target that the attacker impersonates. So only the number of guesses
//! protects a token.

use zxcvbn::zxcvbn;

/// Guesses per second of a determined attacker: a thousand graphics cards that derive about a
/// thousand keys per second each (Argon2id, 64 MiB, 3 passes).
const GUESSES_PER_SECOND: f64 = 1e6;
const MINUTE: f64 = 60.0;
const HOUR: f64 = 60.0 * MINUTE;
const DAY: f64 = 24.0 * HOUR;
/// Tokens that take longer to guess than this, in seconds, get no warning.
const SOON: f64 = 365.0 * DAY;

/// Returns why a token is weak and what to do, or `None` if it is not guessed within `SOON`. The
/// message contains no part of the token.
pub(crate) fn weakness(token: &str) -> Option<String> {
    // Words that every attacker would try here.
    let estimate = zxcvbn(token, &["overnode", "weave", "cluster", "token", "container", "docker"]);
    let seconds = 10_f64.powf(estimate.guesses_log10()) / GUESSES_PER_SECOND;
    if seconds > SOON {
        return None;
    }
    let pattern = estimate.feedback().and_then(|feedback| feedback.warning());
    let pattern = pattern.map(|pattern| format!(" ({})", clause(&pattern.to_string())));
    Some(format!(
        "the token is easy to guess{}: an attacker with a thousand graphics cards, who tries \
         likely tokens first, finds it {} and can then join the cluster; create a strong one with \
         `overnode token`",
        pattern.unwrap_or_default(),
        within(seconds)
    ))
}

/// Turns a sentence into a clause: removes the full stop and the capital letter.
fn clause(sentence: &str) -> String {
    let sentence = sentence.trim_end_matches('.');
    let mut letters = sentence.chars();
    letters.next().map(|first| first.to_ascii_lowercase()).into_iter().chain(letters).collect()
}

fn within(seconds: f64) -> String {
    let (count, unit) = match seconds {
        ..1.0 => return "at once".to_owned(),
        ..MINUTE => (seconds, "second"),
        ..HOUR => (seconds / MINUTE, "minute"),
        ..DAY => (seconds / HOUR, "hour"),
        _ => (seconds / DAY, "day"),
    };
    let count = count.ceil();
    format!("within {count} {unit}{}", if count == 1.0 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn tokens_that_users_make_up_are_weak() {
        for token in [
            "my-cluster-password",
            "another-password",
            "password",
            "overnode",
            "t",
            "Tr0ub4dor&3",
            "qwertyuiop",
            "20261130",
            "aaaaaaaaaaaaaaaaaaaaaaaa",
            "hunter2hunter2hunter2",
            "prod-cluster-2026",
        ] {
            let why = weakness(token).unwrap_or_else(|| panic!("{token} counts as strong"));
            assert!(why.contains("overnode token"), "{why}");
            // Tokens that are words of the message itself do not count.
            assert!(
                token.len() < 3
                    || token == "overnode"
                    || token == "password"
                    || !why.contains(token)
            );
        }
        assert!(weakness("password").unwrap().contains("(this is a top-10 common password)"));
    }

    #[test]
    fn random_tokens_get_no_warning() {
        for _ in 0..300 {
            let token = crate::command::token::random().unwrap();
            assert_eq!(weakness(token.trim_end()), None, "{token}");
        }
        // Sixteen bytes in hexadecimal, as printed by `openssl rand -hex 16`.
        assert_eq!(weakness("5f2a9c0be7714d83a6f0c2d94b18e35d"), None);
    }

    #[test]
    fn tokens_of_any_length_are_judged_quickly() {
        let begun = Instant::now();
        for token in ["ab1!".repeat(1024), "é".repeat(2048), "password".repeat(512)] {
            weakness(&token);
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    }

    #[test]
    fn times_are_rounded_up() {
        let shown = [(0.1, "at once"), (1.0, "within 1 second"), (61.0, "within 2 minutes")];
        for (seconds, text) in shown.into_iter().chain([(2.0 * DAY, "within 2 days")]) {
            assert_eq!(within(seconds), text);
        }
    }
}
