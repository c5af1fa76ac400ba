//! Debug logging of the programs. The loader sets [`DEBUG`] before it loads them. If it is 0, the
//! verifier removes all of this code.

use aya_ebpf::Global;
use aya_ebpf::bindings::xdp_md;
use aya_log_ebpf::debug;
use overnode_ebpf::reason::Reason;

use super::frame::{Frame, Skb};

#[unsafe(no_mangle)]
static DEBUG: Global<u8> = Global::new(0);

macro_rules! refusals {
    ($($name:ident: $context:ty;)+) => {$(
        #[inline(always)]
        pub fn $name(frame: $context, reason: Reason) {
            if DEBUG.load() != 0 {
                // Not inlined, so that its stack is not part of the caller's frame, which is live
                // while the cipher runs.
                #[inline(never)]
                fn say(reason: u32, ifindex: u32, len: u32) {
                    debug!(
                        (),
                        "{}: reason {}, interface {}, {} bytes",
                        stringify!($name), reason, ifindex, len
                    );
                }
                say(reason as u32, frame.ifindex(), frame.len());
            }
        }
    )+};
}

refusals! {
    from_bulk: Skb;
    from_container: Skb;
    seal: Skb;
    from_underlay: Skb;
    from_underlay_xdp: *mut xdp_md;
}
