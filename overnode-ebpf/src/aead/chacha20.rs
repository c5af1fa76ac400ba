//! The ChaCha20 block function (RFC 8439, section 2.3).

/// "expand 32-byte k".
const CONSTANTS: [u32; 4] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];

/// 64 bytes of key stream, as little-endian words.
#[inline(always)]
pub fn block(key: &[u32; 8], counter: u32, nonce: &[u32; 3]) -> [u64; 8] {
    let mut w = [
        CONSTANTS[0],
        CONSTANTS[1],
        CONSTANTS[2],
        CONSTANTS[3],
        key[0],
        key[1],
        key[2],
        key[3],
        key[4],
        key[5],
        key[6],
        key[7],
        counter,
        nonce[0],
        nonce[1],
        nonce[2],
    ];
    for _ in 0..10 {
        quarter_rounds(&mut w, [0, 4, 8, 12], [1, 5, 9, 13]);
        quarter_rounds(&mut w, [2, 6, 10, 14], [3, 7, 11, 15]);
        quarter_rounds(&mut w, [0, 5, 10, 15], [3, 4, 9, 14]);
        quarter_rounds(&mut w, [1, 6, 11, 12], [2, 7, 8, 13]);
    }
    [
        pair(w[0], CONSTANTS[0], w[1], CONSTANTS[1]),
        pair(w[2], CONSTANTS[2], w[3], CONSTANTS[3]),
        pair(w[4], key[0], w[5], key[1]),
        pair(w[6], key[2], w[7], key[3]),
        pair(w[8], key[4], w[9], key[5]),
        pair(w[10], key[6], w[11], key[7]),
        pair(w[12], counter, w[13], nonce[0]),
        pair(w[14], nonce[1], w[15], nonce[2]),
    ]
}

#[cfg(target_arch = "bpf")]
#[inline(always)]
fn quarter_rounds(w: &mut [u32; 16], i: [usize; 4], j: [usize; 4]) {
    // SAFETY: arithmetic on registers.
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
            a0 = inout(wreg) w[i[0]], b0 = inout(wreg) w[i[1]], c0 = inout(wreg) w[i[2]], d0 = inout(wreg) w[i[3]],
            a1 = inout(wreg) w[j[0]], b1 = inout(wreg) w[j[1]], c1 = inout(wreg) w[j[2]], d1 = inout(wreg) w[j[3]],
            t = out(wreg) _,
            options(pure, nomem, nostack),
        );
    }
}

#[cfg(not(target_arch = "bpf"))]
fn quarter_rounds(w: &mut [u32; 16], i: [usize; 4], j: [usize; 4]) {
    for [a, b, c, d] in [i, j] {
        w[a] = w[a].wrapping_add(w[b]);
        w[d] = (w[d] ^ w[a]).rotate_left(16);
        w[c] = w[c].wrapping_add(w[d]);
        w[b] = (w[b] ^ w[c]).rotate_left(12);
        w[a] = w[a].wrapping_add(w[b]);
        w[d] = (w[d] ^ w[a]).rotate_left(8);
        w[c] = w[c].wrapping_add(w[d]);
        w[b] = (w[b] ^ w[c]).rotate_left(7);
    }
}

#[inline(always)]
fn pair(low: u32, low_start: u32, high: u32, high_start: u32) -> u64 {
    u64::from(low.wrapping_add(low_start)) | u64::from(high.wrapping_add(high_start)) << 32
}
