//! From the token to the keys that it yields.

use argon2::{Algorithm, Argon2, Params, Version};
use ring::hkdf::{HKDF_SHA256, KeyType, Salt};
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

use crate::types::{PublicKey, Secret};

/// Memory of one derivation, in KiB. RFC 9106 section 4, second recommended option: 64 MiB, 3 passes, 4
/// lanes. Measured: 0.15 s of one core of a virtual machine.
pub const ARGON2_MEMORY_KIB: u32 = 64 * 1024;
/// Passes over the memory (RFC 9106 section 4).
pub const ARGON2_PASSES: u32 = 3;
/// Lanes (RFC 9106 section 4).
pub const ARGON2_LANES: u32 = 4;
/// Longest token, in bytes.
pub const MAX_TOKEN: usize = 4096;

/// Two clusters with the same token are the same cluster, so the salt cannot be random. It still keeps tables made for
/// other programs useless.
const SALT: &[u8] = b"overnode cluster key v1";
const PAIR: &[u8] = b"overnode pair v1";
const CONTROL: &[u8] = b"overnode control v1";
const SIGNING: &[u8] = b"overnode signing v1";
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

/// The key that every node of the cluster has: Argon2id (RFC 9106) of the token. Takes
/// [`ARGON2_MEMORY_KIB`] of memory and a fraction of a second: not for an async task.
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

/// The WireGuard pre-shared key of two nodes. The order of the public keys does not matter.
pub fn pair_key(cluster_key: &Secret, one: &PublicKey, other: &PublicKey) -> Secret {
    of_pair(PAIR, cluster_key, one, other)
}

/// The pre-shared key of two nodes for the handshakes of the bulk path. The order of the public keys does not matter.
pub fn bulk_pair_key(cluster_key: &Secret, one: &PublicKey, other: &PublicKey) -> Secret {
    of_pair(BULK_PAIR, cluster_key, one, other)
}

/// The key of one worker and cipher of the bulk path, from one of the two secrets of a handshake.
pub fn bulk_key(secret: &Secret, cipher: u8, worker: u8) -> Secret {
    expand(secret, &[BULK, &[cipher, worker]])
}

fn of_pair(label: &[u8], cluster_key: &Secret, one: &PublicKey, other: &PublicKey) -> Secret {
    let (lower, higher) = if one <= other { (one, other) } else { (other, one) };
    expand(cluster_key, &[label, &lower.0, &higher.0])
}

/// The pre-shared key of control connections (the psk3 of the Noise pattern).
pub fn control_key(cluster_key: &Secret) -> Secret {
    expand(cluster_key, &[CONTROL])
}

/// The seed of the Ed25519 key with which the node that has this static secret signs.
pub fn signing_seed(static_secret: &Secret) -> Secret {
    expand(static_secret, &[SIGNING])
}

/// 32 bytes from the system's generator: a new static key.
///
/// # Errors
/// If the system gives no random bytes.
pub fn new_secret() -> Result<Secret, NoRandomness> {
    let mut bytes = Zeroizing::new([0; 32]);
    SystemRandom::new().fill(bytes.as_mut()).map_err(|_| NoRandomness)?;
    Ok(Secret(*bytes))
}

/// The system gave no random bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the system gives no random bytes; check that getrandom(2) is allowed here")]
pub struct NoRandomness;

/// The public key of a Curve25519 secret.
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

/// HKDF-SHA256 (RFC 5869) without salt: the input is already a uniform key.
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
    fn the_cluster_key_is_what_the_reference_program_prints() {
        // printf %s my-cluster-password | argon2 'overnode cluster key v1' -id -t 3 -k 65536 -p 4 -l 32 -r
        let key = cluster_key("my-cluster-password").unwrap();
        assert_eq!(hex(&key.0), ARGON2_REFERENCE);
        assert_ne!(cluster_key("my-cluster-passwore").unwrap(), key);
    }

    const ARGON2_REFERENCE: &str = "9a8f929819a0da8977b7ad171200ea26497c3039004d4c4cc76ebb94c9264c58";

    #[test]
    fn new_secrets_differ_and_public_keys_are_those_of_rfc_7748() {
        assert_ne!(new_secret().unwrap(), new_secret().unwrap());
        // RFC 7748 section 6.1, Alice's keys.
        let secret = unhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a");
        let public = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a";
        assert_eq!(hex(&public_key(&Secret(secret)).0), public);
    }

    fn unhex(text: &str) -> [u8; 32] {
        data_encoding::HEXLOWER.decode(text.as_bytes()).unwrap().try_into().unwrap()
    }

    #[test]
    fn empty_and_endless_tokens_are_refused() {
        assert_eq!(cluster_key(""), Err(BadToken::Empty));
        assert_eq!(cluster_key(" \n\t"), Err(BadToken::Empty));
        assert_eq!(cluster_key(&"x".repeat(MAX_TOKEN + 1)), Err(BadToken::TooLong));
    }

    #[test]
    fn a_pair_key_is_the_same_on_both_sides_and_for_no_other_pair() {
        let cluster = Secret([7; 32]);
        let [a, b, c] = [1, 2, 3].map(|byte| PublicKey([byte; 32]));
        assert_eq!(pair_key(&cluster, &a, &b), pair_key(&cluster, &b, &a));
        assert_ne!(pair_key(&cluster, &a, &b), pair_key(&cluster, &a, &c));
        assert_ne!(pair_key(&cluster, &a, &b), pair_key(&Secret([8; 32]), &a, &b));
        assert_ne!(pair_key(&cluster, &a, &b), control_key(&cluster));
    }

    #[test]
    fn expansion_is_hkdf_sha256() {
        // RFC 5869, test case 3, has no salt and no info; its first 32 bytes of output.
        let mut out = [0; 32];
        let input = [0x0b; 22];
        Salt::new(HKDF_SHA256, &[]).extract(&input).expand(&[&[]], Bytes32).unwrap().fill(&mut out).unwrap();
        assert_eq!(hex(&out), "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d");
        assert_eq!(hex(&pair_key(&Secret([1; 32]), &PublicKey([2; 32]), &PublicKey([3; 32])).0), PAIR_GOLDEN);
    }

    // HMAC-SHA256 twice, by Python's hmac module.
    const PAIR_GOLDEN: &str = "213d19caa0e6c05a6da823f49db9dc9b5d587593456bea38c9af3d5edca124ad";

    fn hex(bytes: &[u8]) -> String {
        data_encoding::HEXLOWER.encode(bytes)
    }
}
