//! Debug logging of the programs. The loader sets [`DEBUG`] before it loads them. If it is 0, the
//! verifier removes all of this code.

use aya_ebpf::Global;
use aya_log_ebpf::debug;
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
        fn emit(program: u32, reason: u32, ifindex: u32, len: u32) {
            debug!(
                (),
                "program {}: reason {}, interface {}, {} bytes", program, reason, ifindex, len
            );
        }
        emit(PROGRAM, reason as u32, frame.ifindex(), frame.len());
    }
}
