//! The node: everything of overnode that runs in user space and is not the command line.
//!
//! The parts that decide have no I/O and read no clock: [`handshake`], [`gossip`], [`ipam`],
//! [`routing`] and the dialler in [`control`]. They take events with the time and return actions;
//! so does the zone in [`dns`]. The parts that act are thin: [`datapath`] programs the kernel,
//! [`net`] owns the sockets, [`docker`] serves a Docker engine, [`store`] the disk, [`api`] the
//! unix socket, [`metrics`] Prometheus. [`node`] is one task that joins them.

pub mod api;
pub mod bulk;
mod checksum;
pub mod control;
pub mod datapath;
pub mod dns;
pub mod docker;
pub mod fault;
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
pub mod text;
pub mod trust;
pub mod types;

/// The eBPF programs, as `build.rs` made them.
pub static PROGRAMS: &[u8] = aya::include_bytes_aligned!(env!("OVERNODE_EBPF_OBJECT"));
