//! Poly1305 (RFC 8439, section 2.5) with 32-bit limbs: eBPF multiplies 64 bits by 64 into 64, so that limbs
//! of 44 bits have no use, and clamping keeps every limb of `r` below 2^28, so that limbs need not be cut to 26.

/// The authenticator's state between blocks. All bytes zero is a valid value.
#[repr(C, align(8))]
#[derive(Clone, Copy, Default)]
pub struct Poly1305 {
    /// The accumulator, in limbs of 32 bits (the last: 2). The first may be unreduced, below 2^34.
    h: [u64; 5],
    /// The clamped key: 32 bits each, below 2^28.
    r: [u64; 4],
    /// `5 * (r / 4)`: what a limb of `r` weighs after it went over 2^130. Exact but for the first, whose two low
    /// bits are in `r0_low`.
    q: [u64; 4],
    /// `r[0] % 4`.
    r0_low: u64,
    /// What the tag is masked with.
    pad: [u64; 2],
}

/// The state while blocks are absorbed: held in registers.
pub struct Absorbing<'a> {
    h: [u64; 5],
    key: &'a Poly1305,
}

const LOW: u64 = 0xffff_ffff;

impl Poly1305 {
    /// Forgets what was absorbed.
    #[inline(always)]
    pub fn clear(&mut self) {
        self.h = [0; 5];
    }

    /// Sets the one-time key: `r` (not clamped yet) and the pad, little-endian words.
    #[inline(always)]
    pub fn set_key(&mut self, r_low: u64, r_high: u64, pad_low: u64, pad_high: u64) {
        let (low, high) = (r_low & 0x0fff_fffc_0fff_ffff, r_high & 0x0fff_fffc_0fff_fffc);
        self.r = [low & LOW, low >> 32, high & LOW, high >> 32];
        self.q = [(self.r[0] >> 2) * 5, (self.r[1] >> 2) * 5, (self.r[2] >> 2) * 5, (self.r[3] >> 2) * 5];
        self.r0_low = self.r[0] & 3;
        self.pad = [pad_low, pad_high];
    }

    /// The accumulator, to be continued.
    #[inline(always)]
    pub fn resume(&self) -> Absorbing<'_> {
        Absorbing { h: self.h, key: self }
    }

    /// The tag of what was absorbed, as two little-endian words.
    #[inline(always)]
    pub fn tag(&self) -> [u64; 2] {
        let [h0, h1, h2, h3, h4] = self.h;
        // `h` is below 2^130 + 2^34. It is at least p = 2^130 - 5 just if h + 5 has a bit above 2^130.
        let carry = (5 + h0) >> 32;
        let carry = (carry + h1) >> 32;
        let carry = (carry + h2) >> 32;
        let carry = (carry + h3) >> 32;
        let above = (carry + h4) >> 2;
        let t0 = h0 + 5 * above + (self.pad[0] & LOW);
        let t1 = (t0 >> 32) + h1 + (self.pad[0] >> 32);
        let t2 = (t1 >> 32) + h2 + (self.pad[1] & LOW);
        let t3 = (t2 >> 32) + h3 + (self.pad[1] >> 32);
        [(t0 & LOW) | t1 << 32, (t2 & LOW) | t3 << 32]
    }

    // Volatile: each use reads the map again. The compiler would otherwise keep the key on the stack, where there is
    // no room, and move it to a register from there just the same.

    #[inline(always)]
    fn r(&self, limb: usize) -> u64 {
        // SAFETY: a reference.
        unsafe { (&raw const self.r[limb]).read_volatile() }
    }

    #[inline(always)]
    fn q(&self, limb: usize) -> u64 {
        // SAFETY: a reference.
        unsafe { (&raw const self.q[limb]).read_volatile() }
    }

    #[inline(always)]
    fn r0_low(&self) -> u64 {
        // SAFETY: a reference.
        unsafe { (&raw const self.r0_low).read_volatile() }
    }

    /// Stores the accumulator.
    #[inline(always)]
    pub fn suspend(&mut self, h: [u64; 5]) {
        self.h = h;
    }
}

impl Absorbing<'_> {
    /// The accumulator.
    #[inline(always)]
    pub fn into_accumulator(self) -> [u64; 5] {
        self.h
    }

    /// Adds a block (little-endian words; `top` is the bit above it: 1 for a full block) and multiplies by `r`.
    #[inline(always)]
    pub fn absorb(&mut self, low: u64, high: u64, top: u64) {
        // s0 < 2^32 * 3.25, s1 to s3 < 2^33, s4 <= 4; r < 2^28, q < 2^28 * 1.25. Hence each sum is below
        // 2^60 * 10.75 + 2^31, the top limb below 2^28 * 10.75 + 2^4, and the next s0 below the bound above.
        let s0 = self.h[0] + (low & LOW);
        let s1 = self.h[1] + (low >> 32);
        let s2 = self.h[2] + (high & LOW);
        let s3 = self.h[3] + (high >> 32);
        let s4 = self.h[4] + top;
        let key = self.key;
        let x0 = s0 * key.r(0) + s1 * key.q(3) + s2 * key.q(2) + s3 * key.q(1) + s4 * key.q(0);
        let x1 = s0 * key.r(1) + s1 * key.r(0) + s2 * key.q(3) + s3 * key.q(2) + s4 * key.q(1) + (x0 >> 32);
        let x2 = s0 * key.r(2) + s1 * key.r(1) + s2 * key.r(0) + s3 * key.q(3) + s4 * key.q(2) + (x1 >> 32);
        let x3 = s0 * key.r(3) + s1 * key.r(2) + s2 * key.r(1) + s3 * key.r(0) + s4 * key.q(3) + (x2 >> 32);
        let x4 = s4 * key.r0_low() + (x3 >> 32);
        self.h = [(x0 & LOW) + (x4 >> 2) * 5, x1 & LOW, x2 & LOW, x3 & LOW, x4 & 3];
    }
}
