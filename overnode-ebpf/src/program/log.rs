//! Debug logging of the programs. The loader sets [`DEBUG`] before it loads them. If it is 0, the
//! verifier removes all of this code.

use core::hint::black_box;

use aya_ebpf::Global;
use aya_log_ebpf::debug;
use overnode_ebpf::map::{
    PROGRAM_FROM_BULK, PROGRAM_FROM_CONTAINER, PROGRAM_FROM_UNDERLAY, PROGRAM_FROM_UNDERLAY_XDP,
    PROGRAM_SEAL, PROGRAM_TO_CONTAINER,
};
use overnode_ebpf::reason::Reason;

use super::frame::Frame;

#[unsafe(no_mangle)]
static DEBUG: Global<u8> = Global::new(0);

/// Logs a dropped packet.
#[inline(always)]
pub fn dropped<const PROGRAM: u32>(frame: impl Frame, reason: Reason) {
    if DEBUG.load() != 0 {
        // Not inlined, so that its stack is not part of the caller's frame, which is live while the
        // cipher runs.
        #[inline(never)]
        fn emit(program: &str, reason: u32, ifindex: u32, len: u32) {
            debug!((), "{}: reason {}, interface {}, {} bytes", program, reason, ifindex, len);
        }
        // Linux 6.1 verifies `emit` once for each reason that it is called with, because it
        // compares scalars exactly in programs with functions. After this, the verifier does not
        // know the number any more: the length is unknown to it.
        let len = frame.len();
        let reason = black_box(reason as u32 ^ len) ^ len;
        emit(const { name(PROGRAM) }, reason, frame.ifindex(), len);
    }
}

const fn name(program: u32) -> &'static str {
    match program {
        PROGRAM_FROM_CONTAINER => "from_container",
        PROGRAM_SEAL => "seal",
        PROGRAM_FROM_UNDERLAY => "from_underlay",
        PROGRAM_FROM_UNDERLAY_XDP => "from_underlay_xdp",
        PROGRAM_FROM_BULK => "from_bulk",
        PROGRAM_TO_CONTAINER => "to_container",
        _ => "unknown",
    }
}
