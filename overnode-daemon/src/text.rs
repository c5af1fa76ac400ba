//! Text of others in messages: what strangers, engines and damaged files say ends up on terminals.

/// Most characters of somebody else's text in a message.
const LIMIT: usize = 100;
/// Most characters of a library's reason, which may quote what it has read.
const REASON_LIMIT: usize = 300;

/// False for what a terminal acts on, and for what is invisible or reorders the text around it.
pub fn is_harmless(c: char) -> bool {
    !c.is_control()
        && !matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// The first characters, each of them harmless.
pub fn quoted(text: &str) -> String {
    first(text, LIMIT)
}

/// As [`quoted`], for the words of a library.
pub fn reason(why: &impl std::fmt::Display) -> String {
    first(&why.to_string(), REASON_LIMIT)
}

/// All of it, as long as that may be.
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
    fn a_terminal_is_told_nothing_but_text() {
        assert_eq!(quoted("a\u{1b}[2Jb\n\u{202e}c"), "a?[2Jb??c");
        assert_eq!(quoted(&"é".repeat(1000)).chars().count(), LIMIT);
        assert_eq!(reason(&"x".repeat(1000)).len(), REASON_LIMIT);
    }
}
