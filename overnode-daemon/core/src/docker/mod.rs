//! Decides what a node answers to a Docker engine.
//!
//! [`message`] holds the documents of the plugin protocol, [`report`] those of the engine's own
//! API, and [`plan`] the decisions. The daemon serves the sockets and carries the decisions out.

pub mod message;
pub mod plan;
pub mod report;

pub use message::{Refusal, Request, Response};
pub use plan::{Docker, Settings, Step};
pub use report::{Container, Report};

/// Name of the network driver, of the IPAM driver and of the default network.
pub const NAME: &str = "overnode";
