//! The replay window, safe across CPUs without a lock (after RFC 6479, whose ring this is, with WireGuard's size).
//!
//! A word of the ring belongs to one block of 32 counters at a time and moves only to later blocks, by
//! compare-and-swap of block and bitmap together. So a counter's bit is set at most once, whatever the CPUs do at
//! the same time; [`Window::next`] may lag behind for a moment, which lets nothing in twice.

use crate::reason::Reason;
use crate::wire::REJECT_AFTER_MESSAGES;

/// Counters this far behind the greatest one seen are refused.
pub const WINDOW: u64 = 8192 - 64;
/// Words of the ring; each covers 32 counters.
pub const WORDS: usize = 256;

/// Attempts at a compare-and-swap. Each one that fails means that another CPU accepted a counter of the same 32.
const ATTEMPTS: usize = 16;

/// Which counters were seen. Each word holds a tag (upper half: the low 32 bits of `counter / 32`) and a bitmap
/// of the 32 counters of that block (lower half), and changes by compare-and-swap.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Window {
    /// Greatest counter accepted, plus one; 0 if none was.
    pub next: u64,
    /// The ring.
    pub words: [u64; WORDS],
}

impl Window {
    /// Nothing seen: all bytes zero.
    pub const fn new() -> Self {
        Self { next: 0, words: [0; WORDS] }
    }

    /// Refuses what [`Self::accept`] would refuse now, and changes nothing: spares the opening of a replayed
    /// message. Takes a pointer because other CPUs write at the same time.
    ///
    /// # Errors
    /// [`Reason::TooOld`], [`Reason::Replayed`], or [`Reason::Exhausted`] for a counter that no session may use.
    ///
    /// # Safety
    /// `this` must point to a window that is otherwise used through this function and [`Self::accept`] only.
    #[inline(always)]
    pub unsafe fn check(this: *const Self, counter: u64) -> Result<(), Reason> {
        // SAFETY: the caller's.
        let next = unsafe { cell::load(&raw const (*this).next) };
        in_time(next, counter)?;
        // SAFETY: the caller's; the index is below WORDS.
        let word =
            unsafe { cell::load((&raw const (*this).words).cast::<u64>().wrapping_add(index(counter))) };
        mark(word, counter).map(|_| ())
    }

    /// Marks a counter as seen, once its message is authenticated.
    ///
    /// # Errors
    /// [`Reason::TooOld`], [`Reason::Replayed`], or [`Reason::Exhausted`] for a counter that no session may use.
    /// [`Reason::Helper`] if so many other CPUs accepted neighbours of this counter at this very moment that it
    /// could not be marked: the message counts as lost.
    ///
    /// # Safety
    /// As for [`Self::check`]; writes are made through the pointer.
    #[inline(always)]
    pub unsafe fn accept(this: *mut Self, counter: u64) -> Result<(), Reason> {
        // SAFETY: the caller's.
        let mut next = unsafe { cell::load(&raw const (*this).next) };
        in_time(next, counter)?;
        // SAFETY: the caller's; the index is below WORDS.
        let word = unsafe { (&raw mut (*this).words).cast::<u64>().add(index(counter)) };
        // SAFETY: the caller's.
        let mut seen = unsafe { cell::load(word) };
        let mut marked = false;
        for _ in 0..ATTEMPTS {
            let with = mark(seen, counter)?;
            // SAFETY: the caller's.
            let found = unsafe { cell::compare_exchange(word, seen, with) };
            if found == seen {
                marked = true;
                break;
            }
            seen = found;
        }
        if !marked {
            return Err(Reason::Helper);
        }
        for _ in 0..ATTEMPTS {
            if next > counter {
                break;
            }
            // SAFETY: the caller's.
            let found = unsafe { cell::compare_exchange(&raw mut (*this).next, next, counter + 1) };
            if found == next {
                break;
            }
            next = found;
        }
        Ok(())
    }
}

impl Default for Window {
    fn default() -> Self {
        Self::new()
    }
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

/// The word with the counter's bit set, moved to the counter's block if it belongs to an earlier one.
#[inline(always)]
fn mark(word: u64, counter: u64) -> Result<u64, Reason> {
    let bit = 1u64 << (counter % 32);
    let block = (counter / 32) as u32;
    // Distances, not values: the tag wraps after 2^37 counters.
    let ahead = block.wrapping_sub((word >> 32) as u32);
    if ahead == 0 {
        if word & bit != 0 { Err(Reason::Replayed) } else { Ok(word | bit) }
    } else if ahead > 1 << 31 {
        Err(Reason::TooOld)
    } else {
        Ok(u64::from(block) << 32 | bit)
    }
}

#[inline(always)]
fn index(counter: u64) -> usize {
    (counter / 32) as usize % WORDS
}

/// Words shared between CPUs. `AtomicU64` has no compare-and-swap on the BPF target; the kernel has.
mod cell {
    #[cfg(not(target_arch = "bpf"))]
    pub use host::{compare_exchange, load};
    #[cfg(target_arch = "bpf")]
    pub use kernel::{compare_exchange, load};

    #[cfg(target_arch = "bpf")]
    mod kernel {
        use core::intrinsics::{AtomicOrdering, atomic_cxchg};

        /// # Safety
        /// `word` must be valid for reads.
        #[inline(always)]
        pub unsafe fn load(word: *const u64) -> u64 {
            // SAFETY: the caller's. One instruction, which is all that a relaxed load is.
            unsafe { word.read_volatile() }
        }

        /// Returns what was found; it was replaced if that equals `old`.
        ///
        /// # Safety
        /// `word` must be valid for reads and writes.
        #[inline(always)]
        pub unsafe fn compare_exchange(word: *mut u64, old: u64, new: u64) -> u64 {
            // SAFETY: the caller's.
            unsafe {
                atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(word, old, new).0
            }
        }
    }

    #[cfg(not(target_arch = "bpf"))]
    mod host {
        use core::sync::atomic::AtomicU64;
        use core::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};

        /// # Safety
        /// `word` must be valid for reads, and otherwise be used through this module only.
        pub unsafe fn load(word: *const u64) -> u64 {
            // SAFETY: the caller's; nothing is written.
            unsafe { AtomicU64::from_ptr(word.cast_mut()) }.load(Relaxed)
        }

        /// Returns what was found; it was replaced if that equals `old`.
        ///
        /// # Safety
        /// `word` must be valid for reads and writes, and otherwise be used through this module only.
        pub unsafe fn compare_exchange(word: *mut u64, old: u64, new: u64) -> u64 {
            // SAFETY: the caller's.
            match unsafe { AtomicU64::from_ptr(word) }.compare_exchange(old, new, SeqCst, Acquire) {
                Ok(found) | Err(found) => found,
            }
        }
    }
}
