//! The ChaCha20 block function (RFC 8439, section 2.3).

/// "expand 32-byte k".
const CONSTANTS: [u32; 4] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];

/// A key, a nonce, and the state that all blocks of one message share. All bytes zero is a valid
/// value.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct ChaCha20 {
    key: [u32; 8],
    nonce: [u32; 3],
    /// Columns 1 to 3 after the first column round. They are the same for every block; only column
    /// 0 depends on the counter.
    columns: [[u32; 4]; 3],
}

impl ChaCha20 {
    /// Starts a message. The words are little-endian, as in RFC 8439.
    #[inline(always)]
    pub fn start(&mut self, key: &[u32; 8], nonce: [u32; 3]) {
        self.key = *key;
        self.nonce = nonce;
        self.start_column::<1>();
        self.start_column::<2>();
        self.start_column::<3>();
    }

    /// Computes column `N` after the first column round. Stores are volatile, like the loads:
    /// computing one column after the other needs less stack.
    #[inline(always)]
    fn start_column<const N: usize>(&mut self) {
        let [a, b, c, d] = quarter([CONSTANTS[N], self.key(N), self.key(4 + N), self.nonce(N - 1)]);
        let column = (&raw mut self.columns[N - 1]).cast::<u32>();
        // SAFETY: the four words of the column.
        unsafe {
            column.write_volatile(a);
            column.add(1).write_volatile(b);
            column.add(2).write_volatile(c);
            column.add(3).write_volatile(d);
        }
    }

    /// Returns 64 bytes of key stream, as little-endian words.
    #[inline(always)]
    pub fn block(&self, counter: u32) -> [u32; 16] {
        let mut w = [0; 16];
        for (column, words) in (1..).zip(&self.columns) {
            [w[column], w[4 + column], w[8 + column], w[12 + column]] = *words;
        }
        [w[0], w[4], w[8], w[12]] = quarter([CONSTANTS[0], self.key(0), self.key(4), counter]);
        diagonal_round(&mut w);
        for _ in 1..10 {
            quarter_rounds(&mut w, [0, 4, 8, 12], [1, 5, 9, 13]);
            quarter_rounds(&mut w, [2, 6, 10, 14], [3, 7, 11, 15]);
            diagonal_round(&mut w);
        }
        // Unrolled, because a loop would put `w` on the stack.
        w[0] = w[0].wrapping_add(CONSTANTS[0]);
        w[1] = w[1].wrapping_add(CONSTANTS[1]);
        w[2] = w[2].wrapping_add(CONSTANTS[2]);
        w[3] = w[3].wrapping_add(CONSTANTS[3]);
        w[4] = w[4].wrapping_add(self.key(0));
        w[5] = w[5].wrapping_add(self.key(1));
        w[6] = w[6].wrapping_add(self.key(2));
        w[7] = w[7].wrapping_add(self.key(3));
        w[8] = w[8].wrapping_add(self.key(4));
        w[9] = w[9].wrapping_add(self.key(5));
        w[10] = w[10].wrapping_add(self.key(6));
        w[11] = w[11].wrapping_add(self.key(7));
        w[12] = w[12].wrapping_add(counter);
        w[13] = w[13].wrapping_add(self.nonce(0));
        w[14] = w[14].wrapping_add(self.nonce(1));
        w[15] = w[15].wrapping_add(self.nonce(2));
        w
    }

    // Volatile, so that each use reads the map again. Otherwise, the compiler would copy all of it
    // to the stack, which has no room for it.

    #[inline(always)]
    fn key(&self, word: usize) -> u32 {
        // SAFETY: reads or writes a field of `self`.
        unsafe { (&raw const self.key[word]).read_volatile() }
    }

    #[inline(always)]
    fn nonce(&self, word: usize) -> u32 {
        // SAFETY: reads or writes a field of `self`.
        unsafe { (&raw const self.nonce[word]).read_volatile() }
    }
}

#[inline(always)]
fn diagonal_round(w: &mut [u32; 16]) {
    quarter_rounds(w, [0, 5, 10, 15], [3, 4, 9, 14]);
    quarter_rounds(w, [1, 6, 11, 12], [2, 7, 8, 13]);
}

/// The quarter round (RFC 8439, section 2.1).
#[inline(always)]
fn quarter([mut a, mut b, mut c, mut d]: [u32; 4]) -> [u32; 4] {
    a = a.wrapping_add(b);
    d = (d ^ a).rotate_left(16);
    c = c.wrapping_add(d);
    b = (b ^ c).rotate_left(12);
    a = a.wrapping_add(b);
    d = (d ^ a).rotate_left(8);
    c = c.wrapping_add(d);
    b = (b ^ c).rotate_left(7);
    [a, b, c, d]
}

/// Two quarter rounds, interleaved. In the order that the compiler chooses, a double round takes a
/// fifth more instructions, which move words between registers and stack. Two quarter rounds at a
/// time just fit the registers.
#[cfg(target_arch = "bpf")]
#[inline(always)]
fn quarter_rounds(w: &mut [u32; 16], i: [usize; 4], j: [usize; 4]) {
    // SAFETY: arithmetic on registers only.
    unsafe {
        core::arch::asm!(
            "{a0} += {b0}",
            "{a1} += {b1}",
            "{d0} ^= {a0}",
            "{d1} ^= {a1}",
            "{t} = {d0}",
            "{d0} <<= 16",
            "{t} >>= 16",
            "{d0} |= {t}",
            "{t} = {d1}",
            "{d1} <<= 16",
            "{t} >>= 16",
            "{d1} |= {t}",
            "{c0} += {d0}",
            "{c1} += {d1}",
            "{b0} ^= {c0}",
            "{b1} ^= {c1}",
            "{t} = {b0}",
            "{b0} <<= 12",
            "{t} >>= 20",
            "{b0} |= {t}",
            "{t} = {b1}",
            "{b1} <<= 12",
            "{t} >>= 20",
            "{b1} |= {t}",
            "{a0} += {b0}",
            "{a1} += {b1}",
            "{d0} ^= {a0}",
            "{d1} ^= {a1}",
            "{t} = {d0}",
            "{d0} <<= 8",
            "{t} >>= 24",
            "{d0} |= {t}",
            "{t} = {d1}",
            "{d1} <<= 8",
            "{t} >>= 24",
            "{d1} |= {t}",
            "{c0} += {d0}",
            "{c1} += {d1}",
            "{b0} ^= {c0}",
            "{b1} ^= {c1}",
            "{t} = {b0}",
            "{b0} <<= 7",
            "{t} >>= 25",
            "{b0} |= {t}",
            "{t} = {b1}",
            "{b1} <<= 7",
            "{t} >>= 25",
            "{b1} |= {t}",
            a0 = inout(wreg) w[i[0]], b0 = inout(wreg) w[i[1]],
            c0 = inout(wreg) w[i[2]], d0 = inout(wreg) w[i[3]],
            a1 = inout(wreg) w[j[0]], b1 = inout(wreg) w[j[1]],
            c1 = inout(wreg) w[j[2]], d1 = inout(wreg) w[j[3]],
            t = out(wreg) _,
            options(pure, nomem, nostack),
        );
    }
}

#[cfg(not(target_arch = "bpf"))]
fn quarter_rounds(w: &mut [u32; 16], i: [usize; 4], j: [usize; 4]) {
    for [a, b, c, d] in [i, j] {
        [w[a], w[b], w[c], w[d]] = quarter([w[a], w[b], w[c], w[d]]);
    }
}
