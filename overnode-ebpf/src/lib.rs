//! Definitions that the eBPF programs and the daemon share: wire format, map layouts, reason codes,
//! the replay window, the AEAD, and the first MAC of handshake messages.
//!
//! Both sides compile this one source: `no_std`, no allocation, no I/O, no clock. The programs
//! themselves are this package's binary ([`main.rs`](../overnode_ebpf/index.html)).
#![cfg_attr(not(test), no_std)]
#![cfg_attr(
    target_arch = "bpf",
    feature(core_intrinsics, asm_experimental_arch),
    allow(internal_features)
)]

pub mod aead;
pub mod mac1;
pub mod map;
pub mod reason;
pub mod replay;
mod unaligned;
pub mod wire;
