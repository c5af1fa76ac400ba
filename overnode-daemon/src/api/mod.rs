//! Serves the API of [`overnode_api`] over a unix socket.
//!
//! [`server`] has the HTTP server. It decides nothing: it passes each request to the node as a
//! [`Call`] and returns the node's answer.

pub mod server;

pub use overnode_api::*;
pub use server::serve;

pub use crate::dispatch::{BODY_LIMIT, Call, SOCKET};
pub use overnode_api::routes::{Reply, Request};
