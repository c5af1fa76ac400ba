//! Words at any address, one instruction each.
//!
//! LLVM takes the BPF target for one that cannot read unaligned words and makes bytes and shifts of
//! `read_unaligned`. The kernel lets packets be read so on every architecture with efficient
//! unaligned access, x86-64 and arm64 among them. Volatile, or the compiler reads all words of a
//! block first, and keeps them on the stack.

/// The little-endian word at `at`.
///
/// # Safety
/// Four bytes must be valid for reads.
#[inline(always)]
pub unsafe fn load(at: *const u8) -> u32 {
    #[cfg(target_arch = "bpf")]
    {
        // SAFETY: the caller's. The kernel, not the type's alignment, says which addresses are
        // good.
        unsafe { at.cast::<u32>().read_volatile() }
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        // SAFETY: the caller's.
        u32::from_le(unsafe { at.cast::<u32>().read_unaligned() })
    }
}

/// Writes `value` to `at`, as little-endian.
///
/// # Safety
/// Four bytes must be valid for writes.
#[inline(always)]
pub unsafe fn store(at: *mut u8, value: u32) {
    #[cfg(target_arch = "bpf")]
    {
        // SAFETY: the caller's. The kernel, not the type's alignment, says which addresses are
        // good.
        unsafe { at.cast::<u32>().write_volatile(value) }
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        // SAFETY: the caller's.
        unsafe { at.cast::<u32>().write_unaligned(value.to_le()) }
    }
}
