//! The node: everything of overnode that runs in user space, except for the command line.
//!
//! The modules that make decisions do no I/O and read no clock: [`handshake`], [`gossip`],
//! [`ipam`], [`routing`], the dialer in [`control`] and the zone in [`dns`]. They take events
//! together with the time and return actions. The modules that act are thin: [`datapath`] programs
//! the kernel, [`net`] owns the sockets, [`docker`] serves a Docker engine, [`store`] the disk,
//! [`api`] the unix socket, and [`metrics`] Prometheus. [`node`] is one task that connects them.

pub mod api;
pub mod bulk;
mod checksum;
pub mod control;
pub mod datapath;
pub mod dispatch;
pub mod dns;
pub mod docker;
pub mod failpoint;
pub mod gossip;
pub mod handshake;
pub mod ipam;
pub mod metrics;
pub mod monitor;
pub mod net;
pub mod node;
pub mod options;
pub mod path;
pub mod routing;
mod sources;
pub mod store;

/// The eBPF object file that `build.rs` compiled.
pub static PROGRAMS: &[u8] = aya::include_bytes_aligned!(env!("OVERNODE_EBPF_OBJECT"));
