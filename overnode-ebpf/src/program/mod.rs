//! The packet paths of the programs, one file each.
//!
//! A path returns either the fate of the packet or the [`Reason`] why it was refused. Only the
//! entry points turn these into verdicts. Offsets are in bytes from the start of the Ethernet
//! header.

use overnode_ebpf::reason::Reason;

pub mod aead_check;
pub mod arp;
pub mod bulk;
pub mod checks;
pub mod checksum;
pub mod cipher;
pub mod decap;
pub mod encap;
pub mod frame;
pub mod from_bulk;
pub mod from_container;
pub mod from_underlay;
pub mod handshake;
pub mod log;
pub mod maps;
pub mod offload_veth;
pub mod partial_checksum;
pub mod receive_ring;
pub mod record;
pub mod relay;
pub mod seal;
pub mod tailroom;
pub mod too_big;

/// Return values of `bpf_loop` callbacks (Linux 5.17): continue or stop.
const CONTINUE: i64 = 0;
const STOP: i64 = 1;

/// A packet that was passed on.
pub struct Sent {
    /// The reason to count it under; `None` if another program counts it.
    pub counted: Option<Reason>,
    /// The verdict of the program. For a redirected packet, the return value of the helper.
    pub verdict: i64,
}
