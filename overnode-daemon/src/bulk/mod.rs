//! The bulk path: flows that send super-packets go through a worker in user space, which cuts, seals, opens and joins them.
//!
//! [`Cut`] makes inner packets that fit the path out of what a TAP device gave; [`Joiner`] makes super-packets for a TAP device out of
//! inner packets that came. The checksum of such packets is never finished on the way, the seal protects them: what a checksum field
//! holds is the sum of the pseudo-header, as in the kernel's `CHECKSUM_PARTIAL`.

pub mod join;
pub mod packet;
pub mod segment;

pub use join::Joiner;
pub use packet::{BadPacket, VnetHeader};
pub use segment::Cut;
