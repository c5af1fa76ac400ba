//! The replay window, safe across CPUs without a lock.

/// Counters this far behind the greatest one seen are refused.
pub const WINDOW: u64 = 8192 - 64;
/// Words of the ring; each covers 32 counters.
pub const WORDS: usize = 256;

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
