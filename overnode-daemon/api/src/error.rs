//! Errors that the node's API returns.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a request was not carried out. Displays as one line, "what: why: what to do".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Where the fault is.
    pub kind: ErrorKind,
    /// One line, "what: why: what to do".
    pub message: String,
}

/// Where the fault of an error is. Decides the HTTP status and the exit status of the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request is invalid (400, exit status 2).
    Usage,
    /// The node's state does not allow the request (409).
    Refused,
    /// The thing that the request names does not exist (404).
    Missing,
    /// The request was valid, but carrying it out failed (500).
    Failed,
}

/// The JSON form of an [`ApiError`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// [`ApiError::message`].
    pub error: String,
}

impl ApiError {
    /// Creates an [`ErrorKind::Usage`] error: the request is invalid.
    pub fn usage(message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Usage, message)
    }

    /// Creates an [`ErrorKind::Refused`] error: the node's state does not allow the request.
    pub fn refused(message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Refused, message)
    }

    /// Creates an [`ErrorKind::Missing`] error: the thing that the request names does not exist.
    pub fn missing(message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Missing, message)
    }

    /// Creates an [`ErrorKind::Failed`] error: a valid request could not be carried out. Pass an
    /// `anyhow::Error` together with its causes: `format_args!("{error:#}")`.
    pub fn failed(message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Failed, message)
    }

    /// Creates an error. Line breaks in the message become spaces, so that it stays one line.
    pub fn new(kind: ErrorKind, message: impl fmt::Display) -> Self {
        let message = message.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        Self { kind, message }
    }
}

impl ErrorKind {
    /// Maps an HTTP status code to a kind. The codes with which the server rejects a request before
    /// reading it (404 for an unknown path, 405, 413, 415, 422) are all in the 400s.
    pub const fn from_status(status: u16) -> Self {
        match status {
            404 => Self::Missing,
            409 => Self::Refused,
            400..=499 => Self::Usage,
            _ => Self::Failed,
        }
    }
}

#[cfg(feature = "anyhow")]
impl From<anyhow::Error> for ApiError {
    fn from(error: anyhow::Error) -> Self {
        Self::failed(format_args!("{error:#}"))
    }
}
