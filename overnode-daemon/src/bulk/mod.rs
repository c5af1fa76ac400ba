//! The bulk path: workers in user space segment, seal, open and coalesce the packets of bulk flows,
//! which send many segments at a time.
//!
//! | file | contents |
//! | --- | --- |
//! | `message` | wire format between workers |
//! | `session` | keys, nonces, replay windows |
//! | `peer` | whether a peer is served, and with which cipher |
//! | `segment`, `coalesce`, `packet` | segmenting and coalescing packets of a TAP device |
//! | `udp` | sockets of a worker, and batches of messages |
//! | `worker`, `process` | threads that move packets, and their process |
//! | `confine` | privileges that the process drops |
//! | `control`, `ipc` | protocol with the daemon, and how the daemon starts the process |
//!
//! Checksums of such packets stay partial on the way, because the seal protects the packets. The
//! checksum field holds the sum of the pseudo-header, like the kernel's `CHECKSUM_PARTIAL`.

pub mod coalesce;
mod confine;
pub mod control;
pub mod ipc;
mod measure;
pub mod message;
pub mod packet;
pub mod peer;
pub mod process;
pub mod segment;
pub mod session;
mod udp;
mod worker;

pub use coalesce::Coalescer;
pub use packet::{BadPacket, VnetHeader};
pub use segment::Segmentation;
