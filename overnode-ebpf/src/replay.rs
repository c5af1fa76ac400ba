//! The replay window, shared between CPUs without a lock. The ring is that of RFC 6479, with
//! WireGuard's size.
//!
//! At any time, a word of the ring belongs to one block of 32 counters. [`Window::next`] is raised
//! before a counter is marked. If a CPU finds another block in its counter's word, and then finds
//! its counter still within the window, the other block is an earlier one. Therefore words move
//! only to later blocks, with one compare-and-swap for block and bitmap together. A counter's bit
//! is set at most once, whatever the CPUs do concurrently.

use crate::reason::Reason;
use crate::wire::REJECT_AFTER_MESSAGES;

/// Size of the window: counters further than this behind the greatest accepted one are refused.
pub const WINDOW: u64 = 8192 - 64;
/// Words of the ring. Each covers 32 counters.
pub const WORDS: usize = 256;

/// Attempts at a compare-and-swap. Each failure means that another CPU accepted a counter in the
/// meantime.
const ATTEMPTS: usize = 16;

/// The counters that were accepted. The upper half of each word is a tag (the low 32 bits of
/// `counter / 32`); the lower half is a bitmap of the 32 counters of that block. Words change by
/// compare-and-swap.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Window {
    /// Greatest accepted counter plus one; 0 if no counter was accepted.
    pub next: u64,
    /// The ring.
    pub words: [u64; WORDS],
}

impl Window {
    /// Returns an empty window: all bytes zero.
    pub const fn new() -> Self {
        Self { next: 0, words: [0; WORDS] }
    }

    /// Refuses the counters that [`Self::accept`] would refuse now, and changes nothing. This saves
    /// opening a replayed message. Takes a pointer because other CPUs write at the same time.
    ///
    /// # Errors
    /// [`Reason::TooOld`], [`Reason::Replayed`], or [`Reason::Exhausted`] for a counter that no
    /// session may use.
    ///
    /// # Safety
    /// `this` must point to a window that is accessed only through this function and
    /// [`Self::accept`].
    #[inline(always)]
    pub unsafe fn check(this: *const Self, counter: u64) -> Result<(), Reason> {
        // SAFETY: upheld by the caller.
        in_time(unsafe { cell::load(&raw const (*this).next) }, counter)?;
        // SAFETY: upheld by the caller; the index is below `WORDS`.
        let word =
            unsafe { cell::load((&raw const (*this).words).cast::<u64>().add(index(counter))) };
        if word >> 32 == tag(counter) && word & bit(counter) != 0 {
            Err(Reason::Replayed)
        } else {
            Ok(())
        }
    }

    /// Marks a counter as seen. Call it once the message is authenticated.
    ///
    /// # Errors
    /// [`Reason::TooOld`], [`Reason::Replayed`], or [`Reason::Exhausted`] for a counter that no
    /// session may use. [`Reason::Helper`] if so many other CPUs accepted counters at the same
    /// moment that this one could not be marked; the message counts as lost.
    ///
    /// # Safety
    /// As for [`Self::check`]. The function writes through the pointer.
    #[inline(always)]
    pub unsafe fn accept(this: *mut Self, counter: u64) -> Result<(), Reason> {
        // SAFETY: upheld by the caller; the index is below `WORDS`.
        unsafe {
            raise(&raw mut (*this).next, counter)?;
            let word = (&raw mut (*this).words).cast::<u64>().add(index(counter));
            mark(word, &raw mut (*this).next, counter)
        }
    }
}

impl Default for Window {
    fn default() -> Self {
        Self::new()
    }
}

/// Raises `next` above the counter.
///
/// # Safety
/// As for [`Window::accept`].
#[inline(always)]
unsafe fn raise(next: *mut u64, counter: u64) -> Result<(), Reason> {
    // SAFETY: upheld by the caller.
    let mut seen = unsafe { cell::load(next) };
    in_time(seen, counter)?;
    for _ in 0..ATTEMPTS {
        if seen > counter {
            return Ok(());
        }
        // SAFETY: upheld by the caller.
        let found = unsafe { cell::compare_exchange(next, seen, counter + 1) };
        if found == seen {
            return Ok(());
        }
        seen = found;
    }
    Err(Reason::Helper)
}

/// Sets the counter's bit. If the word belongs to an earlier block, the counter's block takes it
/// over.
///
/// # Safety
/// As for [`Window::accept`].
#[inline(always)]
unsafe fn mark(word: *mut u64, next: *mut u64, counter: u64) -> Result<(), Reason> {
    // SAFETY: upheld by the caller.
    let mut seen = unsafe { cell::load(word) };
    for _ in 0..ATTEMPTS {
        let marked = if seen >> 32 == tag(counter) {
            if seen & bit(counter) != 0 {
                return Err(Reason::Replayed);
            }
            seen | bit(counter)
        } else {
            // SAFETY: upheld by the caller.
            in_time(unsafe { cell::load_after(next) }, counter)?;
            tag(counter) << 32 | bit(counter)
        };
        // SAFETY: upheld by the caller.
        let found = unsafe { cell::compare_exchange(word, seen, marked) };
        if found == seen {
            return Ok(());
        }
        seen = found;
    }
    Err(Reason::Helper)
}

#[inline(always)]
fn in_time(next: u64, counter: u64) -> Result<(), Reason> {
    if counter >= REJECT_AFTER_MESSAGES {
        Err(Reason::Exhausted)
    } else if counter + 1 + WINDOW < next {
        Err(Reason::TooOld)
    } else {
        Ok(())
    }
}

/// Returns the low 32 bits of the number of the counter's block. A block 2^37 counters later has
/// the same tag. After a leap that far, a message may be mistaken for a replay, but never the
/// reverse.
#[inline(always)]
const fn tag(counter: u64) -> u64 {
    (counter / 32) & 0xffff_ffff
}

#[inline(always)]
const fn bit(counter: u64) -> u64 {
    1 << (counter % 32)
}

#[inline(always)]
const fn index(counter: u64) -> usize {
    (counter / 32) as usize % WORDS
}

/// Words shared between CPUs. On the BPF target, `AtomicU64` has no compare-and-swap, although the
/// kernel supports it.
mod cell {
    #[cfg(not(target_arch = "bpf"))]
    pub(crate) use host::{compare_exchange, load, load_after};
    #[cfg(target_arch = "bpf")]
    pub use kernel::{compare_exchange, load, load_after};

    #[cfg(target_arch = "bpf")]
    mod kernel {
        use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};

        /// A relaxed load.
        ///
        /// # Safety
        /// `word` must be valid for reads.
        #[inline(always)]
        pub unsafe fn load(word: *const u64) -> u64 {
            // SAFETY: upheld by the caller. A single instruction is all that a relaxed load needs.
            unsafe { word.read_volatile() }
        }

        /// A load that is not reordered before earlier accesses: in the kernel, atomics that return
        /// a value are fully ordered.
        ///
        /// # Safety
        /// `word` must be valid for reads and writes.
        #[inline(always)]
        pub unsafe fn load_after(word: *mut u64) -> u64 {
            // SAFETY: upheld by the caller.
            unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(word, 0) }
        }

        /// Returns the value found. It was replaced if it equals `old`.
        ///
        /// # Safety
        /// `word` must be valid for reads and writes.
        #[inline(always)]
        pub unsafe fn compare_exchange(word: *mut u64, old: u64, new: u64) -> u64 {
            // SAFETY: upheld by the caller.
            unsafe {
                atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(
                    word, old, new,
                )
                .0
            }
        }
    }

    #[cfg(not(target_arch = "bpf"))]
    mod host {
        use core::sync::atomic::AtomicU64;
        use core::sync::atomic::Ordering::SeqCst;

        /// Loads a word.
        ///
        /// # Safety
        /// `word` must be valid for reads and accessed only through this module.
        pub(crate) unsafe fn load(word: *const u64) -> u64 {
            // SAFETY: upheld by the caller; nothing is written.
            unsafe { AtomicU64::from_ptr(word.cast_mut()) }.load(SeqCst)
        }

        /// Loads a word. Sequentially consistent, like [`load`].
        ///
        /// # Safety
        /// As for [`load`].
        pub(crate) unsafe fn load_after(word: *mut u64) -> u64 {
            // SAFETY: upheld by the caller.
            unsafe { load(word) }
        }

        /// Returns the value found. It was replaced if it equals `old`.
        ///
        /// # Safety
        /// `word` must be valid for reads and writes and accessed only through this module.
        pub(crate) unsafe fn compare_exchange(word: *mut u64, old: u64, new: u64) -> u64 {
            // SAFETY: upheld by the caller.
            match unsafe { AtomicU64::from_ptr(word) }.compare_exchange(old, new, SeqCst, SeqCst) {
                Ok(found) | Err(found) => found,
            }
        }
    }
}
