//! Sanitizes untrusted text for messages. Text from peers, container engines and damaged files ends
//! up on terminals.

/// Maximum number of characters of untrusted text in a message.
const LIMIT: usize = 100;
/// Maximum number of characters of a library's error message, which may quote its input.
const REASON_LIMIT: usize = 300;

/// Returns false for characters that control a terminal, are invisible, or reorder the surrounding
/// text.
pub fn is_harmless(c: char) -> bool {
    !c.is_control()
        && !matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
        && !matches!(c, '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// Returns the first 100 characters, with harmful ones replaced by `?`.
pub fn quoted(text: &str) -> String {
    first(text, LIMIT)
}

/// Does the same for a library's error message, with the first 300 characters.
pub fn reason(why: &impl std::fmt::Display) -> String {
    first(&why.to_string(), REASON_LIMIT)
}

/// Replaces harmful characters in the whole text, whatever its length.
pub fn harmless(text: &str) -> String {
    first(text, usize::MAX)
}

fn first(text: &str, limit: usize) -> String {
    text.chars().take(limit).map(|c| if is_harmless(c) { c } else { '?' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn untrusted_text_cannot_control_a_terminal() {
        assert_eq!(quoted("a\u{1b}[2Jb\n\u{202e}c"), "a?[2Jb??c");
        assert_eq!(quoted(&"é".repeat(1000)).chars().count(), LIMIT);
        assert_eq!(reason(&"x".repeat(1000)).len(), REASON_LIMIT);
    }
}
