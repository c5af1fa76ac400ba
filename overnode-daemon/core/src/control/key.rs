//! Derives a cluster's keys from its token, and a node's two key pairs from its identity.
//!
//! # One identity
//!
//! A node has one secret, drawn at launch: the seed of an Ed25519 key pair (RFC 8032). With this
//! key pair, the node signs its record and the messages that it sends to nodes other than its
//! neighbors. Its X25519 key pair, used in handshakes (Noise, WireGuard, the bulk path), is derived
//! from the Ed25519 pair. The secret is the Ed25519 scalar, which is the first half of SHA-512 of
//! the seed. The public key is the Ed25519 public key, a point of the Edwards form of Curve25519,
//! converted to the Montgomery form. libsodium (`crypto_sign_ed25519_pk_to_curve25519`) and age
//! (for SSH keys) do the same.
//!
//! The conversion of the public key needs no secret. So every node that verifies a record also
//! knows that its X25519 key is the signer's. A member cannot put another node's key into its own
//! record, because it would need a signature by that node. Two independent keys would need a proof
//! for each that binds it to the other, and a code path might omit the check of such a proof. For a
//! greeting, the handshake proves the X25519 key, and the same conversion proves the Ed25519 key.
//! The conversion loses only the sign of the point's x coordinate, and the holder of the secret for
//! one sign also has the secret for the other.
//!
//! Signing and key agreement with one scalar are jointly secure (Thormarker, "On using the same key
//! pair for Ed25519 and an X25519 based KEM", 2021). In signatures, the scalar is combined only
//! with the output of domain-separated hashes. In key agreement, it is used only for a
//! Diffie-Hellman result that goes into a key derivation.
//!
//! [`exchange_key`] refuses public keys that no honest node can have: encodings that are not
//! canonical, points of small order, and points with a component of small order. So one node cannot
//! appear under several keys that are equal to X25519.

use argon2::{Algorithm, Argon2, Params, Version};
use curve25519_dalek::edwards::CompressedEdwardsY;
use curve25519_dalek::scalar::clamp_integer;
use ring::digest::{SHA512, digest};
use ring::hkdf::{HKDF_SHA256, KeyType, Salt};
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair};
use zeroize::Zeroizing;

use overnode_types::{PublicKey, Secret, VerifyingKey};

/// Memory of one derivation, in KiB. RFC 9106 section 4, second recommended option: 64 MiB, 3
/// passes, 4 lanes. Measured: 0.15 s on one core of a virtual machine.
pub const ARGON2_MEMORY_KIB: u32 = 64 * 1024;
/// Passes over the memory (RFC 9106 section 4).
pub const ARGON2_PASSES: u32 = 3;
/// Lanes (RFC 9106 section 4).
pub const ARGON2_LANES: u32 = 4;
/// Longest token, in bytes.
pub const MAX_TOKEN: usize = 4096;

/// Two clusters with the same token are the same cluster, so the salt cannot be random. A fixed
/// salt still makes tables that were computed for other programs useless.
const SALT: &[u8] = b"overnode cluster key v1";
const PAIR: &[u8] = b"overnode pair v1";
const CONTROL: &[u8] = b"overnode control v1";
const BULK_PAIR: &[u8] = b"overnode bulk pair v1";
const BULK: &[u8] = b"overnode bulk v1";

/// A token that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadToken {
    /// No characters, or only white space.
    #[error("the token is empty: give the cluster's token, or make one with `overnode token`")]
    Empty,
    /// More than [`MAX_TOKEN`] bytes.
    #[error("the token is longer than {MAX_TOKEN} bytes: make a shorter one with `overnode token`")]
    TooLong,
}

/// Returns the key that every node of the cluster shares: Argon2id (RFC 9106) of the token. Takes
/// [`ARGON2_MEMORY_KIB`] of memory and a fraction of a second, so do not call it from an async
/// task.
///
/// # Errors
/// [`BadToken`] if the token is empty or too long.
pub fn cluster_key(token: &str) -> Result<Secret, BadToken> {
    if token.trim().is_empty() {
        return Err(BadToken::Empty);
    }
    if token.len() > MAX_TOKEN {
        return Err(BadToken::TooLong);
    }
    Ok(argon2id(token.as_bytes()))
}

/// Returns the WireGuard pre-shared key of two nodes. The order of the public keys does not matter.
pub fn pair_key(cluster_key: &Secret, one: &PublicKey, other: &PublicKey) -> Secret {
    of_pair(PAIR, cluster_key, one, other)
}

/// Returns the pre-shared key of two nodes for handshakes of the bulk path. The order of the public
/// keys does not matter.
pub fn bulk_pair_key(cluster_key: &Secret, one: &PublicKey, other: &PublicKey) -> Secret {
    of_pair(BULK_PAIR, cluster_key, one, other)
}

/// Returns the key for one worker and cipher of the bulk path, from one of the two secrets of a
/// handshake.
pub fn bulk_key(secret: &Secret, cipher: u8, worker: u8) -> Secret {
    expand(secret, &[BULK, &[cipher, worker]])
}

fn of_pair(label: &[u8], cluster_key: &Secret, one: &PublicKey, other: &PublicKey) -> Secret {
    let (lower, higher) = if one <= other { (one, other) } else { (other, one) };
    expand(cluster_key, &[label, &lower.0, &higher.0])
}

/// Returns the pre-shared key of control connections (psk3 of the Noise pattern).
pub fn control_key(cluster_key: &Secret) -> Secret {
    expand(cluster_key, &[CONTROL])
}

/// Returns the X25519 secret of the node with this identity. All its handshakes use it.
pub fn exchange_secret(seed: &Secret) -> Secret {
    let mut scalar = Zeroizing::new([0; 32]);
    scalar.copy_from_slice(&digest(&SHA512, &seed.0).as_ref()[..32]);
    // X25519 clamps the scalar at each use as well.
    Secret(clamp_integer(*scalar))
}

/// Returns the Ed25519 key pair of the node with this identity. Its secret half is never printed.
pub fn signing_key(seed: &Secret) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&seed.0).expect("any 32 bytes are a valid seed")
}

/// Returns the Ed25519 public key of the node with this identity.
pub fn verifying_key(seed: &Secret) -> VerifyingKey {
    let mut key = [0; 32];
    key.copy_from_slice(signing_key(seed).public_key().as_ref());
    VerifyingKey(key)
}

/// Returns the X25519 public key that belongs to an Ed25519 public key, or `None` if no honest node
/// can have `key`.
pub fn exchange_key(key: &VerifyingKey) -> Option<PublicKey> {
    let point = CompressedEdwardsY(key.0).decompress()?;
    let is_honest =
        point.compress().0 == key.0 && !point.is_small_order() && point.is_torsion_free();
    is_honest.then(|| PublicKey(point.to_montgomery().to_bytes()))
}

/// Returns 32 bytes from the system's random generator, for the seed of a new identity or another
/// secret.
///
/// # Errors
/// [`NoRandomness`] if the system gives no random bytes.
pub fn new_secret() -> Result<Secret, NoRandomness> {
    let mut bytes = Zeroizing::new([0; 32]);
    SystemRandom::new().fill(bytes.as_mut()).map_err(|_| NoRandomness)?;
    Ok(Secret(*bytes))
}

/// The system gave no random bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the kernel returned no random bytes; check that getrandom(2) is allowed here")]
pub struct NoRandomness;

/// Returns the public key of an X25519 secret.
pub fn public_key(secret: &Secret) -> PublicKey {
    let secret = x25519_dalek::StaticSecret::from(secret.0);
    PublicKey(x25519_dalek::PublicKey::from(&secret).to_bytes())
}

fn argon2id(token: &[u8]) -> Secret {
    let params = Params::new(ARGON2_MEMORY_KIB, ARGON2_PASSES, ARGON2_LANES, Some(32))
        .expect("the constants are within Argon2's limits");
    let mut key = Zeroizing::new([0; 32]);
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into(token, SALT, key.as_mut())
        .expect("token, salt and output are within Argon2's limits");
    Secret(*key)
}

struct Bytes32;

impl KeyType for Bytes32 {
    fn len(&self) -> usize {
        32
    }
}

/// HKDF-SHA256 (RFC 5869) without a salt, because the input is already a uniform key.
fn expand(key: &Secret, info: &[&[u8]]) -> Secret {
    let mut out = Zeroizing::new([0; 32]);
    Salt::new(HKDF_SHA256, &[])
        .extract(&key.0)
        .expand(info, Bytes32)
        .and_then(|material| material.fill(out.as_mut()))
        .expect("32 bytes are within HKDF's limit of 255 blocks");
    Secret(*out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cluster_key_matches_the_reference_program() {
        // printf %s my-cluster-password | argon2 'overnode cluster key v1' -id -t 3 -k 65536 -p 4
        // -l 32 -r
        let key = cluster_key("my-cluster-password").unwrap();
        assert_eq!(hex(&key.0), ARGON2_REFERENCE);
        assert_ne!(cluster_key("my-cluster-passwore").unwrap(), key);
    }

    const ARGON2_REFERENCE: &str =
        "9a8f929819a0da8977b7ad171200ea26497c3039004d4c4cc76ebb94c9264c58";

    #[test]
    fn new_secrets_differ_and_public_keys_match_rfc_7748() {
        assert_ne!(new_secret().unwrap(), new_secret().unwrap());
        // RFC 7748 section 6.1, Alice's keys.
        let secret = unhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a");
        let public = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a";
        assert_eq!(hex(&public_key(&Secret(secret)).0), public);
    }

    // Computed from a seed of 32 bytes 0xaa with Python's cryptography module and hashlib: X25519
    // secret, X25519 public key, Ed25519 public key.
    const IDENTITY: [&str; 3] = [
        "05df8dd9e9eac760a1b68c1565388b1e93049b155baa8808cf4b4985f8665ba8",
        "552291f02c9317519633021302d0f7ba39b1cf32310e23ee7aa6a4312ae4a027",
        "e734ea6c2b6257de72355e472aa05a4c487e6b463c029ed306df2f01b5636b58",
    ];

    #[test]
    fn the_exchange_key_of_an_identity_follows_from_its_verifying_key() {
        let seed = Secret([0xaa; 32]);
        let [secret, public, verifying] = IDENTITY.map(unhex);
        assert_eq!(exchange_secret(&seed).0, clamp_integer(secret));
        assert_eq!(public_key(&exchange_secret(&seed)), PublicKey(public));
        assert_eq!(verifying_key(&seed), VerifyingKey(verifying));
        for byte in 0..=255 {
            let seed = Secret([byte; 32]);
            assert_eq!(
                exchange_key(&verifying_key(&seed)),
                Some(public_key(&exchange_secret(&seed)))
            );
        }
    }

    #[test]
    fn keys_that_no_honest_node_has_are_refused() {
        for (what, key) in [
            (
                "the neutral element",
                "0100000000000000000000000000000000000000000000000000000000000000",
            ),
            (
                "a point of order 2",
                "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
            ),
            (
                "a point of order 4",
                "0000000000000000000000000000000000000000000000000000000000000000",
            ),
            (
                "a point of order 8",
                "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
            ),
            (
                "the neutral element, not reduced",
                "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
            ),
            (
                "the neutral element with the sign bit set",
                "0100000000000000000000000000000000000000000000000000000000000080",
            ),
            (
                "the key above plus a point of order 2",
                "06cb1593d49da8218dcaa1b8d55fa5b3b78194b9c3fd612cf920d0fe4a9c94a7",
            ),
            (
                "not a point on the curve",
                "0200000000000000000000000000000000000000000000000000000000000000",
            ),
        ] {
            assert_eq!(exchange_key(&VerifyingKey(unhex(key))), None, "{what}");
        }
    }

    fn unhex(text: &str) -> [u8; 32] {
        data_encoding::HEXLOWER.decode(text.as_bytes()).unwrap().try_into().unwrap()
    }

    #[test]
    fn empty_and_overlong_tokens_are_refused() {
        assert_eq!(cluster_key(""), Err(BadToken::Empty));
        assert_eq!(cluster_key(" \n\t"), Err(BadToken::Empty));
        assert_eq!(cluster_key(&"x".repeat(MAX_TOKEN + 1)), Err(BadToken::TooLong));
    }

    #[test]
    fn a_pair_key_is_the_same_on_both_sides_and_unique_to_the_pair() {
        let cluster = Secret([7; 32]);
        let [a, b, c] = [1, 2, 3].map(|byte| PublicKey([byte; 32]));
        assert_eq!(pair_key(&cluster, &a, &b), pair_key(&cluster, &b, &a));
        assert_ne!(pair_key(&cluster, &a, &b), pair_key(&cluster, &a, &c));
        assert_ne!(pair_key(&cluster, &a, &b), pair_key(&Secret([8; 32]), &a, &b));
        assert_ne!(pair_key(&cluster, &a, &b), control_key(&cluster));
    }

    #[test]
    fn expansion_is_hkdf_sha256() {
        // RFC 5869, test case 3, with neither salt nor info: the first 32 bytes of its output.
        let mut out = [0; 32];
        let input = [0x0b; 22];
        Salt::new(HKDF_SHA256, &[])
            .extract(&input)
            .expand(&[&[]], Bytes32)
            .unwrap()
            .fill(&mut out)
            .unwrap();
        assert_eq!(hex(&out), "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d");
        assert_eq!(
            hex(&pair_key(&Secret([1; 32]), &PublicKey([2; 32]), &PublicKey([3; 32])).0),
            PAIR_GOLDEN
        );
    }

    // Computed with two HMAC-SHA256 calls of Python's hmac module.
    const PAIR_GOLDEN: &str = "213d19caa0e6c05a6da823f49db9dc9b5d587593456bea38c9af3d5edca124ad";

    fn hex(bytes: &[u8]) -> String {
        data_encoding::HEXLOWER.encode(bytes)
    }
}
