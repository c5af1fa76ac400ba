//! Words at any address, one instruction each.
//!
//! LLVM takes the BPF target for one that cannot read unaligned words and makes bytes and shifts of
//! `read_unaligned`. The kernel lets packets be read so on every architecture with efficient unaligned access, x86-64 and
//! arm64 among them.

/// The little-endian word at `at + OFFSET`.
///
/// # Safety
/// The eight bytes must be valid for reads.
#[inline(always)]
pub unsafe fn load<const OFFSET: usize>(at: *const u8) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        // SAFETY: the caller's. The kernel, not the type's alignment, says which addresses are good.
        unsafe { *at.wrapping_add(OFFSET).cast::<u64>() }
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        // SAFETY: the caller's.
        u64::from_le(unsafe { at.wrapping_add(OFFSET).cast::<u64>().read_unaligned() })
    }
}

/// Writes `value` to `at + OFFSET` as little-endian.
///
/// # Safety
/// The eight bytes must be valid for writes.
#[inline(always)]
pub unsafe fn store<const OFFSET: usize>(at: *mut u8, value: u64) {
    #[cfg(target_arch = "bpf")]
    {
        // SAFETY: the caller's. The kernel, not the type's alignment, says which addresses are good.
        unsafe { *at.wrapping_add(OFFSET).cast::<u64>() = value }
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        // SAFETY: the caller's.
        unsafe { at.wrapping_add(OFFSET).cast::<u64>().write_unaligned(value.to_le()) }
    }
}
