//! Signatures on records and routed messages, so that no node can send in another one's name.
//!
//! Each node has one identity, an Ed25519 key, and derives its X25519 key from it ([`key`]). The
//! identity is part of the greeting of a connection, and the handshake proves it. It is also in
//! every record together with the ID, covered by the record's signature.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use data_encoding::BASE64;
use ring::digest::{SHA256, digest};
use ring::signature::{ED25519, Ed25519KeyPair, UnparsedPublicKey};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::message::Record;
use crate::control::key;
use overnode_types::{PublicKey, Secret, VerifyingKey};

const RECORD: &[u8] = b"overnode record v2";

/// The signing key of a node. The secret half is never displayed.
#[derive(Debug)]
pub struct Signer {
    pair: Ed25519KeyPair,
    verifying_key: VerifyingKey,
    public_key: PublicKey,
}

/// An Ed25519 signature. Displayed as base64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Signature(pub [u8; 64]);

impl Signer {
    /// Creates the signer of the node with this identity.
    pub fn new(seed: &Secret) -> Self {
        Self {
            pair: key::signing_key(seed),
            verifying_key: key::verifying_key(seed),
            public_key: key::public_key(&key::exchange_secret(seed)),
        }
    }

    /// Returns the public half of the key.
    pub fn verifying_key(&self) -> VerifyingKey {
        self.verifying_key
    }

    /// Returns the X25519 key that is derived from the identity.
    pub fn public_key(&self) -> PublicKey {
        self.public_key
    }

    /// Writes the node's keys and signature into its record.
    pub fn sign(&self, record: &mut Record) {
        record.verifying_key = self.verifying_key;
        record.public_key = self.public_key;
        record.signature = self.sign_bytes(&signed_part(record));
    }

    /// Signs bytes that begin with a label for their purpose.
    pub(super) fn sign_bytes(&self, bytes: &[u8]) -> Signature {
        let mut signature = [0; 64];
        signature.copy_from_slice(self.pair.sign(bytes).as_ref());
        Signature(signature)
    }
}

/// A shared set of records whose signatures were verified, for a process that runs many nodes, such
/// as a simulation. Each signature is then verified once per process instead of once per node. The
/// set grows without bound.
#[derive(Clone, Debug, Default)]
pub struct Verified(Arc<Mutex<BTreeSet<[u8; 32]>>>);

impl Verified {
    /// Adds a record that was just signed in this process.
    pub(super) fn trust(&self, record: &Record) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(Self::hash(record));
    }

    pub(super) fn is_signed(&self, record: &Record) -> bool {
        let hash = Self::hash(record);
        let known = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known().contains(&hash) || is_signed(record) && known().insert(hash)
    }

    fn hash(record: &Record) -> [u8; 32] {
        let bytes = postcard::to_allocvec(record).expect("plain data always encodes");
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, &bytes).as_ref());
        hash
    }
}

/// Returns true if the record is signed with the identity that it names, and names the X25519 key
/// that is derived from it. It does not check that the ID belongs to that identity.
pub(super) fn is_signed(record: &Record) -> bool {
    is_signature(&record.verifying_key, &signed_part(record), &record.signature)
        && key::exchange_key(&record.verifying_key) == Some(record.public_key)
}

pub(super) fn is_signature(key: &VerifyingKey, bytes: &[u8], signature: &Signature) -> bool {
    UnparsedPublicKey::new(&ED25519, key.0).verify(bytes, &signature.0).is_ok()
}

/// Returns the record without its last field, after a label that no other signed bytes begin with.
pub(super) fn signed_part(record: &Record) -> Vec<u8> {
    let mut bytes =
        postcard::to_extend(record, RECORD.to_vec()).expect("plain data always encodes");
    bytes.truncate(bytes.len() - size_of::<Signature>());
    bytes
}

impl Default for Signature {
    fn default() -> Self {
        Self([0; 64])
    }
}

impl Serialize for Signature {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return serializer.collect_str(&BASE64.encode_display(&self.0));
        }
        let (first, second) = self.0.split_at(32);
        let half = |bytes: &[u8]| <[u8; 32]>::try_from(bytes).map_err(serde::ser::Error::custom);
        (half(first)?, half(second)?).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Signature {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = if deserializer.is_human_readable() {
            BASE64
                .decode(String::deserialize(deserializer)?.as_bytes())
                .map_err(D::Error::custom)?
        } else {
            <([u8; 32], [u8; 32])>::deserialize(deserializer)
                .map(|(first, second)| [first, second].concat())?
        };
        bytes.try_into().map(Self).map_err(|_| D::Error::custom("a signature is 64 bytes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gossip::tests::{record, signed};

    #[test]
    fn a_verified_signature_is_remembered_for_that_record_only() {
        let verified = Verified::default();
        let good = record(1, 1);
        let mut forged = good.clone();
        forged.version += 1;
        for _ in 0..2 {
            assert!(verified.is_signed(&good));
            assert!(!verified.is_signed(&forged));
        }
        assert_eq!(verified.0.lock().unwrap().len(), 1);
        assert!(verified.clone().is_signed(&signed(forged, 1)));
        assert_eq!(verified.0.lock().unwrap().len(), 2, "clones share what was verified");
    }

    #[test]
    fn keys_derive_from_the_secret_and_are_shown_as_text() {
        let [one, again, other] = [1, 1, 2].map(|seed| Signer::new(&Secret([seed; 32])));
        assert_eq!(one.verifying_key(), again.verifying_key());
        assert_ne!(one.verifying_key(), other.verifying_key());
        let record = record(1, 1);
        let json = serde_json::to_string(&record).unwrap();
        assert!(json.contains(&BASE64.encode(&record.signature.0)), "{json}");
        assert_eq!(serde_json::from_str::<Record>(&json).unwrap(), record);
        let cut = json.replace(&BASE64.encode(&record.signature.0), "AAAA");
        assert!(serde_json::from_str::<Record>(&cut).is_err());
        let debug = format!("{one:?}");
        assert!(!debug.contains("[1, 1, 1"), "{debug}");
    }
}
