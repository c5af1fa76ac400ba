//! Poly1305 (RFC 8439, section 2.5) in four 32-bit limbs, with 16 multiplications per block.
//!
//! eBPF multiplies 64 by 64 bits into 64 bits, so 44-bit limbs are of no use. Clamping keeps the
//! limbs of `r` below 2^28, so the limbs of the accumulator need not be reduced to 26 bits.

use core::mem::offset_of;

/// The authenticator's state between blocks. All bytes zero is a valid value.
#[repr(C, align(8))]
#[derive(Clone, Copy, Default)]
pub struct Poly1305 {
    /// The accumulator, in 32-bit limbs. The first may be unreduced, below 2^32 * 2.02. The last
    /// has 34 bits.
    h: [u64; 4],
    /// The clamped key. Each limb is below 2^28, and all but the first are multiples of 4.
    r: [u64; 4],
    /// `r * 5 / 4` for all limbs but the first: the factor for products that exceed 2^130.
    q: [u64; 4],
    /// The second half of the one-time key, which is added to the accumulator to make the tag.
    pad: [u64; 4],
}

/// The accumulator while blocks are absorbed. It is kept in registers.
pub struct Absorbing<'a> {
    h: [u64; 4],
    key: &'a Poly1305,
}

const LOW: u64 = 0xffff_ffff;

impl Poly1305 {
    /// Resets the accumulator.
    #[inline(always)]
    pub fn clear(&mut self) {
        for limb in &mut self.h {
            // Volatile, because the compiler would otherwise call a function that loops over bytes.
            // SAFETY: writes a limb of `self`.
            unsafe { core::ptr::from_mut(limb).write_volatile(0) };
        }
    }

    /// Sets the one-time key from the first 32 bytes of block 0: `r`, not yet clamped, and the pad.
    #[inline(always)]
    pub fn set_key(&mut self, stream: &[u32; 16]) {
        let [r0, r1, r2, r3, p0, p1, p2, p3, ..] = *stream;
        let clamped = [r0 & 0x0fff_ffff, r1 & 0x0fff_fffc, r2 & 0x0fff_fffc, r3 & 0x0fff_fffc];
        self.r = clamped.map(u64::from);
        self.q = clamped.map(|limb| u64::from(limb >> 2) * 5);
        self.pad = [p0, p1, p2, p3].map(u64::from);
    }

    /// Returns the accumulator, to absorb more blocks.
    #[inline(always)]
    pub fn resume(&self) -> Absorbing<'_> {
        Absorbing { h: self.h, key: self }
    }

    /// Stores the accumulator.
    #[inline(always)]
    pub fn suspend(&mut self, h: [u64; 4]) {
        self.h = h;
    }

    /// Returns the tag of the absorbed blocks, as two little-endian words.
    #[inline(always)]
    pub fn tag(&self) -> [u64; 2] {
        let [h0, h1, h2, h3] = self.h;
        // `h` is below 2^130 + 2^34. It is at least p = 2^130 - 5 exactly if h + 5 reaches 2^130.
        let carry = (h0 + 5) >> 32;
        let carry = (h1 + carry) >> 32;
        let carry = (h2 + carry) >> 32;
        let above = (h3 + carry) >> 34;
        let t0 = h0 + 5 * above + self.pad[0];
        let t1 = h1 + (t0 >> 32) + self.pad[1];
        let t2 = h2 + (t1 >> 32) + self.pad[2];
        let t3 = h3 + (t2 >> 32) + self.pad[3];
        [(t0 & LOW) | t1 << 32, (t2 & LOW) | t3 << 32]
    }

    /// Returns `sum + limb * factor`. `OFFSET` is the offset of the limb in this struct, in bytes.
    #[inline(always)]
    fn multiply_add<const OFFSET: usize>(&self, sum: u64, factor: u64) -> u64 {
        #[cfg(target_arch = "bpf")]
        {
            // Otherwise, the compiler would read all limbs first and keep them on the stack, which
            // has no room for them.
            let mut sum = sum;
            // SAFETY: reads a limb of `self`.
            unsafe {
                core::arch::asm!(
                    "{limb} = *(u64 *)({key} + {offset})",
                    "{limb} *= {factor}",
                    "{sum} += {limb}",
                    limb = out(reg) _,
                    key = in(reg) &raw const *self,
                    offset = const OFFSET,
                    factor = in(reg) factor,
                    sum = inout(reg) sum,
                    options(readonly, nostack),
                );
            }
            sum
        }
        #[cfg(not(target_arch = "bpf"))]
        {
            let limbs = [&self.h, &self.r, &self.q, &self.pad];
            sum + limbs[OFFSET / 32][OFFSET % 32 / 8] * factor
        }
    }
}

// Byte offsets of limbs in `Poly1305`.
const R0: usize = offset_of!(Poly1305, r);
const R1: usize = R0 + 8;
const R2: usize = R0 + 16;
const R3: usize = R0 + 24;
const Q1: usize = offset_of!(Poly1305, q) + 8;
const Q2: usize = Q1 + 8;
const Q3: usize = Q1 + 16;

impl Absorbing<'_> {
    /// Returns the accumulator, to be passed to [`Poly1305::suspend`].
    #[inline(always)]
    pub fn into_accumulator(self) -> [u64; 4] {
        self.h
    }

    /// Adds a whole block of 16 bytes (four 32-bit words) and multiplies by `r`.
    ///
    /// Nothing overflows. In units of 2^32, the first sum is at most 3.02, the next two are at most
    /// 2, and the last is at most 6 (34 bits, a word, and the bit above the block). With `r` below
    /// 2^28 and `q` below 2^28 * 1.25, the products add up to less than 2^60 * 15.6. The part of
    /// the last product above 34 bits is below 2^26 * 13.1. Five times that keeps the first limb
    /// below 2^32 * 2.02.
    #[inline(always)]
    pub fn absorb(&mut self, words: [u64; 4]) {
        let key = self.key;
        let s0 = self.h[0] + words[0];
        let s1 = self.h[1] + words[1];
        let s2 = self.h[2] + words[2];
        let s3 = self.h[3] + words[3] + (1 << 32);
        let x0 = key.multiply_add::<R0>(0, s0);
        let x0 = key.multiply_add::<Q3>(x0, s1);
        let x0 = key.multiply_add::<Q2>(x0, s2);
        let x0 = key.multiply_add::<Q1>(x0, s3);
        let x1 = key.multiply_add::<R1>(x0 >> 32, s0);
        let x1 = key.multiply_add::<R0>(x1, s1);
        let x1 = key.multiply_add::<Q3>(x1, s2);
        let x1 = key.multiply_add::<Q2>(x1, s3);
        let x2 = key.multiply_add::<R2>(x1 >> 32, s0);
        let x2 = key.multiply_add::<R1>(x2, s1);
        let x2 = key.multiply_add::<R0>(x2, s2);
        let x2 = key.multiply_add::<Q3>(x2, s3);
        let x3 = key.multiply_add::<R3>(x2 >> 32, s0);
        let x3 = key.multiply_add::<R2>(x3, s1);
        let x3 = key.multiply_add::<R1>(x3, s2);
        let x3 = key.multiply_add::<R0>(x3, s3);
        self.h = [(x0 & LOW) + (x3 >> 34) * 5, x1 & LOW, x2 & LOW, x3 & 0x3_ffff_ffff];
    }
}
