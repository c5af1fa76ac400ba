//! The documents and routes of the daemon's API: HTTP with JSON over a unix socket. No I/O.
//!
//! [`documents`] holds the requests and answers, [`status`] the answer of `status`, [`health`] its
//! assessment, [`monitor`] the events, and [`error`] the errors. [`routes`] declares each route
//! once, for the daemon and the command.
//!
//! An error has the HTTP status of its [`ErrorKind`] and the body
//! `{"error": "what: why: what to do"}`.

pub mod attachment;
pub mod bulk;
pub mod documents;
pub mod error;
pub mod health;
pub mod monitor;
pub mod routes;
pub mod status;
pub mod target;

pub use attachment::{CniEndpoint, Kind};
pub use documents::*;
pub use error::{ApiError, ErrorKind};
pub use health::{Finding, Health, Level};
pub use monitor::*;
pub use routes::{Method, Route};
pub use status::*;
pub use target::{BadHost, BadTarget, Host, Netns, Target};

/// The file name of the socket inside the run directory.
pub const SOCKET: &str = "overnode.sock";
/// The largest request body that is read, in bytes.
pub const BODY_LIMIT: usize = 256 * 1024;
/// The default state directory.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/overnode";
/// The default directory of the socket.
pub const DEFAULT_RUN_DIR: &str = "/run/overnode";
/// Name of the interface in containers.
pub const CONTAINER_INTERFACE: &str = "overnode0";
