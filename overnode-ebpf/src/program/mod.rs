//! The packet paths of the programs, one file each.
//!
//! A path returns a [`Verdict`], or the [`Reason`] why the packet is dropped. [`finish`] counts
//! either. Offsets are in bytes from the start of the Ethernet header.

use overnode_ebpf::reason::Reason;

use self::frame::Frame;

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
pub mod icmp_error;
pub mod log;
pub mod maps;
pub mod offload_veth;
pub mod partial_checksum;
pub mod receive_ring;
pub mod record;
pub mod relay;
pub mod resolver;
pub mod seal;
pub mod tailroom;
pub mod to_container;

/// Return values of `bpf_loop` callbacks (Linux 5.17): continue or stop.
const CONTINUE: i64 = 0;
const STOP: i64 = 1;

/// What a path did with a packet that it did not drop.
pub enum Verdict {
    /// Not for this program: the next one decides, or the host.
    Pass,
    /// The packet's content was taken and counted. The packet itself ends here.
    Consumed(Reason),
    /// Redirected, and counted. The second field is the return value of the redirecting helper.
    Redirected(Reason, i64),
    /// Handed to another program, which counts it, or counted already. The field is the return
    /// value of the helper.
    HandedOn(i64),
}

/// Counts what a path did with a packet, or records why it dropped it, and returns the verdict of
/// the program. Every entry point ends here. `PROGRAM` is one of the numbers in `Dropped::program`.
#[inline(always)]
pub fn finish<const PROGRAM: u32>(frame: impl Frame, result: Result<Verdict, Reason>) -> i64 {
    match result {
        Ok(Verdict::Pass) => frame.pass(),
        Ok(Verdict::HandedOn(verdict)) => verdict,
        Ok(Verdict::Redirected(reason, verdict)) => {
            maps::count(reason);
            verdict
        }
        Ok(Verdict::Consumed(reason)) => {
            maps::count(reason);
            frame.drop()
        }
        Err(reason) => {
            dropped::<PROGRAM>(frame, reason);
            frame.drop()
        }
    }
}

/// Counts and records a packet that is not delivered.
#[inline(always)]
pub fn dropped<const PROGRAM: u32>(frame: impl Frame, reason: Reason) {
    maps::count(reason);
    record::dropped(frame, reason, PROGRAM);
    log::dropped::<PROGRAM>(frame, reason);
}
