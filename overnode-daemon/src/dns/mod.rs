//! DNS: names of containers, and names that people added, for the containers of this host.
//!
//! What names there are follows from the records of gossip: each node says which ones it has, and
//! nobody else can. The [`Zone`] joins them, the [`Directory`] answers questions from it; both
//! without I/O and clock. [`Service`] takes queries as bytes and gives answers as bytes,
//! [`Upstream`] asks the host's own resolvers what is none of ours, and [`Server`] owns the
//! sockets: on a thread of its own, so that a container that floods it keeps the node from nothing.
//!
//! Only containers of this host reach the sockets. They are in a network namespace that is plugged
//! in like a container, at the node's address: the programs let in what local containers send,
//! check who sent it, and drop what other nodes send to that address.

pub mod directory;
pub mod name;
pub mod server;
pub mod service;
pub mod upstream;
pub mod zone;

pub use directory::Directory;
pub use name::Domain;
pub use server::Server;
pub use service::{Counts, Service};
pub use upstream::Upstream;
pub use zone::Zone;

/// The domain, unless another is chosen at launch.
pub const DEFAULT_DOMAIN: &str = "overnode.local";
/// Always served as well: containers that come from Weave Net have it in their configuration.
pub const ALIAS: &str = "weave.local";
/// Where the host says which resolvers it uses.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The port.
pub const PORT: u16 = 53;
