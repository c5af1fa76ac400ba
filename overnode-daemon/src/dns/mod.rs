//! Serves DNS to the containers of this host: container names, and names that users added.
//!
//! [`overnode_core::names`] decides the answers. [`Service`] turns query bytes into answer bytes.
//! [`Upstream`] forwards other questions to the host's own resolvers. [`Server`] owns the sockets
//! and runs on its own thread, so that a container that floods it does not slow the node.
//!
//! Containers of an engine that has a resolver of its own ask that one. The eBPF programs redirect
//! these queries to [`RESOLVER_PORT`](overnode_ebpf::map::RESOLVER_PORT), and names that are not
//! ours are then asked from the engine's resolver instead of the host's.
//!
//! Only containers of this host can reach the sockets. The sockets are in a network namespace that
//! is attached like a container, at the node's address. The eBPF programs admit packets from local
//! containers, verify their source, and drop packets that other nodes send to this address.

mod engine;
pub mod server;
pub mod service;
pub mod upstream;

pub use server::Server;
pub use service::{Client, Counts, Service};
pub use upstream::Upstream;

/// The file that lists the host's resolvers.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The DNS port.
pub const PORT: u16 = 53;
