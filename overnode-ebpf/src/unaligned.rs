//! Loads and stores of words at any address, one instruction each.
//!
//! LLVM assumes that the BPF target cannot read unaligned words, and compiles `read_unaligned` to
//! byte loads and shifts. The kernel allows unaligned access to packets on every architecture where
//! it is efficient, among them x86-64 and arm64. Accesses are volatile, because the compiler would
//! otherwise read all words of a block first and keep them on the stack.

/// Loads the little-endian word at `at`.
///
/// # Safety
/// Four bytes must be valid for reads.
#[inline(always)]
pub(crate) unsafe fn load(at: *const u8) -> u32 {
    #[cfg(target_arch = "bpf")]
    {
        // SAFETY: upheld by the caller. The kernel, not the type's alignment, decides which
        // addresses are valid.
        unsafe { at.cast::<u32>().read_volatile() }
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        // SAFETY: upheld by the caller.
        u32::from_le(unsafe { at.cast::<u32>().read_unaligned() })
    }
}

/// Stores `value` at `at` in little-endian order.
///
/// # Safety
/// Four bytes must be valid for writes.
#[inline(always)]
pub(crate) unsafe fn store(at: *mut u8, value: u32) {
    #[cfg(target_arch = "bpf")]
    {
        // SAFETY: upheld by the caller. The kernel, not the type's alignment, decides which
        // addresses are valid.
        unsafe { at.cast::<u32>().write_volatile(value) }
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        // SAFETY: upheld by the caller.
        unsafe { at.cast::<u32>().write_unaligned(value.to_le()) }
    }
}
