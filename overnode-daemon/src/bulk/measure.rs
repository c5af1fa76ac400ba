//! Measures the speed of this host with each cipher.

use std::time::{Duration, Instant};

use ring::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use super::message::TAG_LEN;
use overnode_api::bulk::Cipher;

/// Length of the measured messages, in bytes: a full-sized packet.
const MESSAGE_LEN: usize = 1408;
/// How often each cipher is measured, in turns, and for how long. A host starts its node along with
/// many other programs, which may take the processor away for some milliseconds. With short
/// measurements this spoils only a few, and the best one counts.
const ROUNDS: usize = 16;
const ROUND_TIME: Duration = Duration::from_micros(250);

/// Returns the rate at which one core seals and opens messages with each cipher, ordered by number,
/// in MiB/s, at least 1. Takes a few milliseconds.
pub(crate) fn speeds() -> [u32; Cipher::ALL.len()] {
    let mut best = [1; Cipher::ALL.len()];
    for _ in 0..ROUNDS {
        for (best, cipher) in best.iter_mut().zip(Cipher::ALL) {
            *best = measure(cipher).max(*best);
        }
    }
    best
}

fn measure(cipher: Cipher) -> u32 {
    let algorithm = match cipher {
        Cipher::ChaCha => &CHACHA20_POLY1305,
        Cipher::Aes => &AES_256_GCM,
    };
    // This key protects nothing.
    let Ok(key) = UnboundKey::new(algorithm, &[0; 32]).map(LessSafeKey::new) else { return 1 };
    let mut message = vec![0; MESSAGE_LEN + TAG_LEN];
    let (started, mut messages) = (Instant::now(), 0_u64);
    while started.elapsed() < ROUND_TIME {
        let nonce = || Nonce::assume_unique_for_key([0; 12]);
        let (plaintext, tag) = message.split_at_mut(MESSAGE_LEN);
        if let Ok(computed_tag) = key.seal_in_place_separate_tag(nonce(), Aad::empty(), plaintext) {
            tag.copy_from_slice(computed_tag.as_ref());
        }
        if key.open_in_place(nonce(), Aad::empty(), &mut message).is_err() {
            return 1;
        }
        messages += 1;
    }
    let rate =
        messages as f64 * MESSAGE_LEN as f64 / started.elapsed().as_secs_f64() / f64::from(1 << 20);
    (rate as u32).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ciphers_work_on_every_machine() {
        assert!(speeds().iter().all(|speed| *speed > 1), "{:?}", speeds());
    }
}
