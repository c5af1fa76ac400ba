//! Errors as the CNI specification has them.

use std::fmt;

use serde_json::{Value, json};

/// The specification's codes, and one of the plugin's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Code {
    /// The configuration's version is not spoken, or does not have the command.
    Incompatible = 1,
    /// A key that cannot be honoured; the message has it with its value.
    Unsupported = 2,
    /// There is no such container: nothing needs to be cleaned up.
    UnknownContainer = 3,
    /// The message names the variables.
    Environment = 4,
    /// Input or output failed.
    Io = 5,
    /// What was given cannot be decoded.
    Decode = 6,
    /// What was given makes no sense.
    Config = 7,
    /// It may work later.
    TryAgain = 11,
    /// `STATUS`: no container can be added.
    NotAvailable = 50,
    /// The same, and containers may not reach those of other hosts.
    Limited = 51,
    /// The node refused or failed, or what was checked is not as it should be.
    Node = 100,
}

/// Why a command failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniError {
    /// What kind of failure it is.
    pub code: Code,
    /// What failed.
    pub message: String,
    /// Why, and what to do.
    pub details: String,
}

impl CniError {
    /// What failed; why, and what to do.
    pub fn new(code: Code, message: impl fmt::Display, details: impl fmt::Display) -> Self {
        Self { code, message: message.to_string(), details: details.to_string() }
    }

    /// What standard output gets.
    pub fn document(&self, version: &str) -> Value {
        json!({
            "cniVersion": version,
            "code": self.code as u16,
            "msg": self.message,
            "details": self.details,
        })
    }
}
