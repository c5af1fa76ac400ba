//! The bulk path: flows that send many segments at once go through workers in user space, which
//! cut, seal, open and join them.
//!
//! | file | what |
//! | --- | --- |
//! | `message` | what travels between workers |
//! | `session` | keys, nonces, replay windows |
//! | `peer` | whether a peer is served, and with which cipher |
//! | `segment`, `join`, `packet` | packets cut out of what a TAP device gives, and joined for one |
//! | `udp` | the sockets of a worker, and batches of messages |
//! | `worker`, `process` | the threads that move packets, and the process that they live in |
//! | `confine` | what that process may still do |
//! | `control`, `link` | what it and the daemon say to each other, and how it is started |
//!
//! The checksum of such packets is never finished on the way, the seal protects them: what a
//! checksum field holds is the sum of the pseudo-header, as in the kernel's `CHECKSUM_PARTIAL`.

mod confine;
pub mod control;
pub mod join;
pub mod link;
mod measure;
pub mod message;
pub mod packet;
pub mod peer;
pub mod process;
pub mod segment;
pub mod session;
mod udp;
mod worker;

pub use join::Joiner;
pub use packet::{BadPacket, VnetHeader};
pub use segment::Cut;
