//! The node: everything of overnode that runs in user space, except for the command line.
//!
//! [`overnode_core`] makes the decisions. The modules here act on them: [`datapath`] programs the
//! kernel, [`net`] owns the sockets, [`bulk`] the workers, [`dns`] serves containers, [`docker`] a
//! Docker engine, [`store`] keeps the state on disk, [`api`] serves the unix socket, [`monitor`]
//! the events, and [`metrics`] Prometheus. [`node`] is one task that connects them.

pub mod api;
pub mod bulk;
mod checksum;
pub mod datapath;
pub mod dispatch;
pub mod dns;
pub mod docker;
pub mod failpoint;
pub mod metrics;
pub mod monitor;
pub mod net;
pub mod node;
pub mod options;
pub mod store;

/// The eBPF object file that `build.rs` compiled.
pub static PROGRAMS: &[u8] = aya::include_bytes_aligned!(env!("OVERNODE_EBPF_OBJECT"));
