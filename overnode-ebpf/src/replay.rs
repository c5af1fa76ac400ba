//! The replay window, safe across CPUs without a lock (after RFC 6479, whose ring this is, with
//! WireGuard's size).
//!
//! A word of the ring belongs to one block of 32 counters at a time. [`Window::next`] is raised
//! before a counter is marked; so whoever finds another block in its word, and then its own counter
//! still in time, knows that the block found is an earlier one. Words therefore move to later
//! blocks only, by compare-and-swap of block and bitmap together, and a counter's bit is set at
//! most once, whatever the CPUs do at the same time.

use crate::reason::Reason;
use crate::wire::REJECT_AFTER_MESSAGES;

/// Counters this far behind the greatest one seen are refused.
pub const WINDOW: u64 = 8192 - 64;
/// Words of the ring; each covers 32 counters.
pub const WORDS: usize = 256;

/// Attempts at a compare-and-swap. Each one that fails means that another CPU accepted a counter
/// meanwhile.
const ATTEMPTS: usize = 16;

/// Which counters were seen. Each word holds a tag (upper half: the low 32 bits of `counter / 32`)
/// and a bitmap of the 32 counters of that block (lower half), and changes by compare-and-swap.
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

    /// Refuses what [`Self::accept`] would refuse now, and changes nothing: spares the opening of a
    /// replayed message. Takes a pointer because other CPUs write at the same time.
    ///
    /// # Errors
    /// [`Reason::TooOld`], [`Reason::Replayed`], or [`Reason::Exhausted`] for a counter that no
    /// session may use.
    ///
    /// # Safety
    /// `this` must point to a window that is otherwise used through this function and
    /// [`Self::accept`] only.
    #[inline(always)]
    pub unsafe fn check(this: *const Self, counter: u64) -> Result<(), Reason> {
        // SAFETY: the caller's.
        in_time(unsafe { cell::load(&raw const (*this).next) }, counter)?;
        // SAFETY: the caller's; the index is below WORDS.
        let word =
            unsafe { cell::load((&raw const (*this).words).cast::<u64>().add(index(counter))) };
        if word >> 32 == tag(counter) && word & bit(counter) != 0 {
            Err(Reason::Replayed)
        } else {
            Ok(())
        }
    }

    /// Marks a counter as seen, once its message is authenticated.
    ///
    /// # Errors
    /// [`Reason::TooOld`], [`Reason::Replayed`], or [`Reason::Exhausted`] for a counter that no
    /// session may use. [`Reason::Helper`] if so many other CPUs accepted counters at this very
    /// moment that this one could not be marked: the message counts as lost.
    ///
    /// # Safety
    /// As for [`Self::check`]; writes are made through the pointer.
    #[inline(always)]
    pub unsafe fn accept(this: *mut Self, counter: u64) -> Result<(), Reason> {
        // SAFETY: the caller's; the index is below WORDS.
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

/// Makes `next` greater than the counter.
///
/// # Safety
/// As for [`Window::accept`].
#[inline(always)]
unsafe fn raise(next: *mut u64, counter: u64) -> Result<(), Reason> {
    // SAFETY: the caller's.
    let mut seen = unsafe { cell::load(next) };
    in_time(seen, counter)?;
    for _ in 0..ATTEMPTS {
        if seen > counter {
            return Ok(());
        }
        // SAFETY: the caller's.
        let found = unsafe { cell::compare_exchange(next, seen, counter + 1) };
        if found == seen {
            return Ok(());
        }
        seen = found;
    }
    Err(Reason::Helper)
}

/// Sets the counter's bit, in a word that its block takes over if need be.
///
/// # Safety
/// As for [`Window::accept`].
#[inline(always)]
unsafe fn mark(word: *mut u64, next: *mut u64, counter: u64) -> Result<(), Reason> {
    // SAFETY: the caller's.
    let mut seen = unsafe { cell::load(word) };
    for _ in 0..ATTEMPTS {
        let marked = if seen >> 32 == tag(counter) {
            if seen & bit(counter) != 0 {
                return Err(Reason::Replayed);
            }
            seen | bit(counter)
        } else {
            // SAFETY: the caller's.
            in_time(unsafe { cell::load_after(next) }, counter)?;
            tag(counter) << 32 | bit(counter)
        };
        // SAFETY: the caller's.
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

/// Low 32 bits of the number of the counter's block. A block that is 2^37 counters later has the
/// same: after a leap that far, a message may be taken for a replay; never the other way round.
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

/// Words shared between CPUs. `AtomicU64` has no compare-and-swap on the BPF target; the kernel
/// has.
mod cell {
    #[cfg(not(target_arch = "bpf"))]
    pub use host::{compare_exchange, load, load_after};
    #[cfg(target_arch = "bpf")]
    pub use kernel::{compare_exchange, load, load_after};

    #[cfg(target_arch = "bpf")]
    mod kernel {
        use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};

        /// # Safety
        /// `word` must be valid for reads.
        #[inline(always)]
        pub unsafe fn load(word: *const u64) -> u64 {
            // SAFETY: the caller's. One instruction, which is all that a relaxed load is.
            unsafe { word.read_volatile() }
        }

        /// A load that stays behind earlier ones: the kernel orders atomics that return a value
        /// fully.
        ///
        /// # Safety
        /// `word` must be valid for reads and writes.
        #[inline(always)]
        pub unsafe fn load_after(word: *mut u64) -> u64 {
            // SAFETY: the caller's.
            unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(word, 0) }
        }

        /// Returns what was found; it was replaced if that equals `old`.
        ///
        /// # Safety
        /// `word` must be valid for reads and writes.
        #[inline(always)]
        pub unsafe fn compare_exchange(word: *mut u64, old: u64, new: u64) -> u64 {
            // SAFETY: the caller's.
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

        /// # Safety
        /// `word` must be valid for reads, and otherwise be used through this module only.
        pub unsafe fn load(word: *const u64) -> u64 {
            // SAFETY: the caller's; nothing is written.
            unsafe { AtomicU64::from_ptr(word.cast_mut()) }.load(SeqCst)
        }

        /// # Safety
        /// As for [`load`].
        pub unsafe fn load_after(word: *mut u64) -> u64 {
            // SAFETY: the caller's.
            unsafe { load(word) }
        }

        /// Returns what was found; it was replaced if that equals `old`.
        ///
        /// # Safety
        /// `word` must be valid for reads and writes, and otherwise be used through this module
        /// only.
        pub unsafe fn compare_exchange(word: *mut u64, old: u64, new: u64) -> u64 {
            // SAFETY: the caller's.
            match unsafe { AtomicU64::from_ptr(word) }.compare_exchange(old, new, SeqCst, SeqCst) {
                Ok(found) | Err(found) => found,
            }
        }
    }
}
