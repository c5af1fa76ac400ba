//! The error type of commands.

use std::fmt;

use overnode_api::{ApiError, ErrorKind};

/// Why a command failed: one line "what: why: what to do", and an exit status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    usage: bool,
    message: String,
}

impl Failure {
    /// Creates a failure for wrong usage, with exit status 2.
    pub fn usage(message: impl fmt::Display) -> Self {
        Self::new(true, message)
    }

    /// Creates a failure of a correctly used command, with exit status 1.
    pub fn failed(message: impl fmt::Display) -> Self {
        Self::new(false, message)
    }

    /// Returns the exit status, 1 or 2.
    pub const fn exit(&self) -> u8 {
        if self.usage { 2 } else { 1 }
    }

    /// Appends `more` to the message, after a semicolon.
    pub fn and(self, more: impl fmt::Display) -> Self {
        Self::new(self.usage, format_args!("{self}; {more}"))
    }

    fn new(usage: bool, message: impl fmt::Display) -> Self {
        let plain = |c: char| if c.is_control() { ' ' } else { c };
        let message: String = message.to_string().chars().map(plain).collect();
        Self { usage, message: message.split_whitespace().collect::<Vec<_>>().join(" ") }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self::new(error.kind == ErrorKind::Usage, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line_without_control_characters() {
        assert_eq!(Failure::failed("a\n  b\u{1b}[31mc").to_string(), "a b [31mc");
    }

    #[test]
    fn only_wrong_usage_exits_with_two() {
        assert_eq!(Failure::from(ApiError::usage("x")).exit(), 2);
        for error in [ApiError::refused("x"), ApiError::missing("x"), ApiError::failed("x")] {
            assert_eq!(Failure::from(error).exit(), 1);
        }
    }
}
