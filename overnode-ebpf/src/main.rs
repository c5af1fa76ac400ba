//! The programs. On the host this file is an empty `main`, so that `cargo build --workspace` works.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(core_intrinsics), allow(internal_features))]

#[cfg(target_arch = "bpf")]
mod program;

#[cfg(not(target_arch = "bpf"))]
fn main() {}

/// Runs test vectors; never attached.
#[cfg(target_arch = "bpf")]
#[aya_ebpf::macros::classifier]
pub fn aead_check(ctx: aya_ebpf::programs::TcContext) -> i32 {
    program::aead_check::aead_check(ctx.skb.skb)
}

/// The kernel lends its GPL-only helpers to programs that say so.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
