//! The paths of packets through the programs, one file each.
//!
//! A path ends with what became of the packet, or with the [`Reason`] why it was refused; only the
//! entry points turn either into a verdict. Offsets count bytes from the first byte of the Ethernet
//! header.

use overnode_ebpf::reason::Reason;

pub mod aead_check;
pub mod arp;
pub mod bulk;
pub mod checks;
pub mod checksum;
pub mod cipher;
pub mod envelope;
pub mod frame;
pub mod from_bulk;
pub mod from_container;
pub mod from_underlay;
pub mod handshake;
pub mod inbox;
pub mod log;
pub mod maps;
pub mod normaliser;
pub mod outer;
pub mod record;
pub mod relay;
pub mod seal;
pub mod tail;
pub mod too_big;
pub mod unfinished;

/// What a callback returns to `bpf_loop` (Linux 5.17): to be called again, or not.
const GO_ON: i64 = 0;
const STOP: i64 = 1;

/// A packet that goes on.
pub struct Sent {
    /// What it is counted as; `None` if another program will count it.
    pub counted: Option<Reason>,
    /// The program's verdict; for one that was redirected, what the helper returned.
    pub verdict: i64,
}
