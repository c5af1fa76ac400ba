//! Records dropped packets for monitors, as far as the daemon allows it ([`Dropped`]).

use core::hint::black_box;

use overnode_ebpf::map::{DROPPED_LEN, Dropped};
use overnode_ebpf::reason::Reason;

use super::frame::Frame;
use super::maps;

/// Records a packet that a program drops.
#[inline(always)]
pub fn dropped(frame: impl Frame, reason: Reason, program: u32) {
    if maps::may_record(reason) {
        write(frame, reason as u32, program);
    }
}

/// Not inlined, so that its stack is not part of the caller's frame, which is live while the cipher
/// runs.
#[inline(never)]
fn write(frame: impl Frame, reason: u32, program: u32) {
    let Some(mut entry) = maps::reserve_dropped() else { return };
    let place: *mut Dropped = entry.as_mut_ptr();
    // Computed in a way that shows the verifier that it is between 1 and `DROPPED_LEN`.
    const LAST: u64 = DROPPED_LEN as u64 - 1;
    let last = u64::from(frame.len()).wrapping_sub(1).min(LAST);
    let captured = (black_box(last) & LAST) as u32 + 1;
    // SAFETY: this program owns the entry until it submits it, and the entry has room for
    // `DROPPED_LEN` bytes.
    unsafe {
        (*place).time_ns = maps::now();
        (*place).reason = reason;
        (*place).program = program;
        (*place).ifindex = frame.ifindex();
        (*place).len = frame.len();
        (*place).vlan = frame.vlan();
        let copied = frame.copy_to(0, (&raw mut (*place).bytes).cast(), captured);
        (*place).captured = if copied { captured } else { 0 };
    }
    entry.submit(0);
}
