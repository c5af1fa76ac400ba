//! Errors in the form of the CNI specification.

use std::fmt;

use serde_json::{Value, json};

/// Error codes of the specification, and one of the plugin's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Code {
    /// The configuration's version is not supported or does not have the command.
    Incompatible = 1,
    /// A key cannot be honored. The message holds the key and its value.
    Unsupported = 2,
    /// The container does not exist, so nothing needs to be cleaned up.
    UnknownContainer = 3,
    /// Environment variables are invalid. The message names them.
    Environment = 4,
    /// Input or output failed.
    Io = 5,
    /// The input cannot be decoded.
    Decode = 6,
    /// The configuration is invalid.
    Config = 7,
    /// The command may succeed later.
    TryAgain = 11,
    /// `STATUS`: no container can be added.
    NotAvailable = 50,
    /// `STATUS`: no container can be added, and containers may not reach those of other hosts.
    Limited = 51,
    /// The node refused or failed, or `CHECK` found a difference.
    Node = 100,
}

/// Why a command failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniError {
    /// Kind of failure.
    pub code: Code,
    /// What failed.
    pub message: String,
    /// Why, and what to do.
    pub details: String,
}

impl CniError {
    /// Creates an error. `message` says what failed, `details` says why and what to do.
    pub fn new(code: Code, message: impl fmt::Display, details: impl fmt::Display) -> Self {
        Self { code, message: message.to_string(), details: details.to_string() }
    }

    /// Returns the JSON document for standard output.
    pub fn document(&self, version: &str) -> Value {
        json!({
            "cniVersion": version,
            "code": self.code as u16,
            "msg": self.message,
            "details": self.details,
        })
    }
}
