//! Refusals.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a request was not carried out: for people, one line "what: why: what to do".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Whose fault it is.
    pub kind: ErrorKind,
    /// One line "what: why: what to do".
    pub message: String,
}

/// Whose fault it is; decides the HTTP status and the exit status of the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request makes no sense (400; exit status 2).
    Usage,
    /// The node is in a state that does not allow it (409).
    Refused,
    /// What the request names does not exist (404).
    Missing,
    /// It should have worked (500).
    Failed,
}

/// The JSON form of an [`ApiError`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// [`ApiError::message`].
    pub error: String,
}

impl ApiError {
    /// The request makes no sense.
    pub fn usage(message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Usage, message)
    }

    /// The node is in a state that does not allow it.
    pub fn refused(message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Refused, message)
    }

    /// What the request names does not exist.
    pub fn missing(message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Missing, message)
    }

    /// It should have worked. An `anyhow::Error` is best passed with its causes:
    /// `format_args!("{error:#}")`.
    pub fn failed(message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Failed, message)
    }

    /// Of that kind. Line breaks become spaces: a refusal is one line.
    pub fn new(kind: ErrorKind, message: impl fmt::Display) -> Self {
        let message = message.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        Self { kind, message }
    }
}

impl ErrorKind {
    /// The kind that a status code stands for; every code that the server gives to a request that
    /// it could not even read (404 for an unknown path, 405, 413, 415, 422) is in the 400s.
    pub const fn from_status(status: u16) -> Self {
        match status {
            404 => Self::Missing,
            409 => Self::Refused,
            400..=499 => Self::Usage,
            _ => Self::Failed,
        }
    }
}

impl From<anyhow::Error> for ApiError {
    fn from(error: anyhow::Error) -> Self {
        Self::failed(format_args!("{error:#}"))
    }
}
