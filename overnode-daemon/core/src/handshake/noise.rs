//! Implements Noise_IKpsk2 as WireGuard uses it (whitepaper section 5.4), with snow.
//!
//! The primitives that hold keys are not snow's, because snow's neither wipe keys nor refuse
//! all-zero Diffie-Hellman results. X25519 is from x25519-dalek, ChaCha20-Poly1305 from ring. The
//! caller supplies ephemeral keys, so that a run can be reproduced from its seed. snow does not
//! wipe its chaining key and its copy of the pre-shared key.

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use snow::params::{CipherChoice, DHChoice, HashChoice, NoiseParams};
use snow::resolvers::{CryptoResolver, DefaultResolver};
use snow::types::{Cipher, Dh, Hash, Random};
use snow::{Builder, Error, HandshakeState};
use x25519_dalek::StaticSecret;
use zeroize::Zeroize;

use super::message::{INITIATION_NOISE_LEN, RESPONSE_NOISE_LEN};
use crate::control::key::public_key;
use overnode_types::{PublicKey, Secret};

const CONSTRUCTION: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
/// The prologue of WireGuard's handshakes.
pub(crate) const WIREGUARD: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
/// The prologue of the bulk path's handshakes. Although the static keys are the same, a message of
/// one kind is invalid as the other.
pub(crate) const BULK: &[u8] = b"overnode bulk v1";
/// Position of the pre-shared key in the pattern: the end of the second message.
const PSK: u8 = 2;

/// Length of a TAI64N timestamp, in bytes.
pub(crate) const TIMESTAMP_LEN: usize = 12;

/// This node's static key pair.
pub(crate) struct Identity {
    secret: Secret,
    public: PublicKey,
    params: NoiseParams,
    prologue: &'static [u8],
}

/// The keys of a finished handshake.
pub(crate) struct Keys {
    /// Key that seals what we send.
    pub tx: Secret,
    /// Key that opens what we receive.
    pub rx: Secret,
}

/// An initiation that awaits its response.
pub(crate) struct Initiated(HandshakeState);

/// An initiation that was received and authenticated but not yet answered.
pub(crate) struct Received {
    state: HandshakeState,
    /// Static public key of the sender.
    pub remote: PublicKey,
    /// Timestamp from the sender's clock. None may be accepted twice.
    pub timestamp: [u8; TIMESTAMP_LEN],
}

impl Identity {
    /// Creates an identity. `prologue` is [`WIREGUARD`] or [`BULK`].
    pub(crate) fn new(secret: Secret, prologue: &'static [u8]) -> Self {
        let params = CONSTRUCTION.parse().expect("snow supports WireGuard's construction");
        Self { public: public_key(&secret), secret, params, prologue }
    }

    pub(crate) fn public(&self) -> PublicKey {
        self.public
    }

    /// Begins a handshake.
    pub(crate) fn initiate(
        &self,
        remote: &PublicKey,
        preshared: &Secret,
        ephemeral: Secret,
        timestamp: &[u8; TIMESTAMP_LEN],
    ) -> Result<(Initiated, [u8; INITIATION_NOISE_LEN]), Error> {
        let mut state = self
            .builder(ephemeral)?
            .remote_public_key(&remote.0)?
            .psk(PSK, &preshared.0)?
            .build_initiator()?;
        let mut message = [0; INITIATION_NOISE_LEN];
        state.write_message(timestamp, &mut message)?;
        Ok((Initiated(state), message))
    }

    /// Decrypts and authenticates an initiation.
    ///
    /// # Errors
    /// If it is forged, was made for another node, or contains a point of low order.
    pub(crate) fn receive(
        &self,
        ephemeral: Secret,
        message: &[u8; INITIATION_NOISE_LEN],
    ) -> Result<Received, Error> {
        let mut state = self.builder(ephemeral)?.build_responder()?;
        let mut timestamp = [0; TIMESTAMP_LEN];
        state.read_message(message, &mut timestamp)?;
        let remote =
            state.get_remote_static().and_then(|key| key.try_into().ok()).ok_or(Error::Decrypt)?;
        Ok(Received { state, remote: PublicKey(remote), timestamp })
    }

    fn builder(&self, ephemeral: Secret) -> Result<Builder<'_>, Error> {
        Builder::with_resolver(self.params.clone(), Box::new(Resolver { ephemeral }))
            .prologue(self.prologue)?
            .local_private_key(&self.secret.0)
    }
}

impl Received {
    /// Makes the response and the session keys.
    pub(crate) fn respond(
        mut self,
        preshared: &Secret,
    ) -> Result<([u8; RESPONSE_NOISE_LEN], Keys), Error> {
        self.state.set_psk(usize::from(PSK), &preshared.0)?;
        let mut message = [0; RESPONSE_NOISE_LEN];
        self.state.write_message(&[], &mut message)?;
        Ok((message, split(&mut self.state)))
    }
}

impl Initiated {
    /// Takes the response. After an error, the handshake still awaits the valid response.
    pub(crate) fn finish(&mut self, message: &[u8; RESPONSE_NOISE_LEN]) -> Result<Keys, Error> {
        self.0.read_message(message, &mut [])?;
        Ok(split(&mut self.0))
    }
}

fn split(state: &mut HandshakeState) -> Keys {
    let initiator = state.is_initiator();
    let (mut first, mut second) = state.dangerously_get_raw_split();
    let keys = if initiator {
        Keys { tx: Secret(first), rx: Secret(second) }
    } else {
        Keys { tx: Secret(second), rx: Secret(first) }
    };
    first.zeroize();
    second.zeroize();
    keys
}

struct Resolver {
    ephemeral: Secret,
}

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        Some(Box::new(Drawn(Some(self.ephemeral.clone()))))
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        matches!(choice, DHChoice::Curve25519).then(|| Box::new(X25519::default()) as _)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        DefaultResolver.resolve_hash(choice)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        matches!(choice, CipherChoice::ChaChaPoly)
            .then(|| Box::new(ChaChaPoly(Secret([0; 32]))) as _)
    }
}

/// Random source that returns one ephemeral key drawn earlier.
struct Drawn(Option<Secret>);

impl Random for Drawn {
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), Error> {
        let drawn = self.0.take().ok_or(Error::Rng)?;
        if dest.len() != drawn.0.len() {
            return Err(Error::Rng);
        }
        dest.copy_from_slice(&drawn.0);
        Ok(())
    }
}

struct X25519 {
    secret: Secret,
    public: [u8; 32],
}

impl Default for X25519 {
    fn default() -> Self {
        Self { secret: Secret([0; 32]), public: [0; 32] }
    }
}

impl Dh for X25519 {
    fn name(&self) -> &'static str {
        "25519"
    }

    fn pub_len(&self) -> usize {
        32
    }

    fn priv_len(&self) -> usize {
        32
    }

    fn set(&mut self, privkey: &[u8]) {
        self.secret.0.copy_from_slice(privkey);
        self.public = public_key(&self.secret).0;
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), Error> {
        rng.try_fill_bytes(&mut self.secret.0)?;
        self.public = public_key(&self.secret).0;
        Ok(())
    }

    fn pubkey(&self) -> &[u8] {
        &self.public
    }

    fn privkey(&self) -> &[u8] {
        &self.secret.0
    }

    fn dh(&self, pubkey: &[u8], out: &mut [u8]) -> Result<(), Error> {
        let remote: &[u8; 32] = pubkey.first_chunk().ok_or(Error::Dh)?;
        let shared = StaticSecret::from(self.secret.0).diffie_hellman(&(*remote).into());
        if !shared.was_contributory() {
            return Err(Error::Dh);
        }
        out.first_chunk_mut()
            .ok_or(Error::Dh)
            .map(|out: &mut [u8; 32]| out.copy_from_slice(shared.as_bytes()))
    }
}

struct ChaChaPoly(Secret);

impl ChaChaPoly {
    fn key(&self) -> LessSafeKey {
        LessSafeKey::new(
            UnboundKey::new(&CHACHA20_POLY1305, &self.0.0).expect("the key has 32 bytes"),
        )
    }

    fn nonce(counter: u64) -> Nonce {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&counter.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }
}

impl Cipher for ChaChaPoly {
    fn name(&self) -> &'static str {
        "ChaChaPoly"
    }

    fn set(&mut self, key: &[u8; 32]) {
        self.0 = Secret(*key);
    }

    fn encrypt(&self, nonce: u64, authtext: &[u8], plaintext: &[u8], out: &mut [u8]) -> usize {
        let (text, rest) = out.split_at_mut(plaintext.len());
        text.copy_from_slice(plaintext);
        let tag = self
            .key()
            .seal_in_place_separate_tag(Self::nonce(nonce), Aad::from(authtext), text)
            .expect("a handshake message is far below ring's limit");
        rest[..tag.as_ref().len()].copy_from_slice(tag.as_ref());
        plaintext.len() + tag.as_ref().len()
    }

    fn decrypt(
        &self,
        nonce: u64,
        authtext: &[u8],
        ciphertext: &[u8],
        out: &mut [u8],
    ) -> Result<usize, Error> {
        let mut buffer = ciphertext.to_vec();
        let text = self
            .key()
            .open_in_place(Self::nonce(nonce), Aad::from(authtext), &mut buffer)
            .map_err(|_| Error::Decrypt)?;
        out.get_mut(..text.len()).ok_or(Error::Decrypt)?.copy_from_slice(text);
        Ok(text.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(seed: u8) -> Identity {
        Identity::new(Secret([seed; 32]), WIREGUARD)
    }

    #[test]
    fn both_ends_get_the_same_keys() {
        let (a, b) = (identity(1), identity(2));
        let preshared = Secret([9; 32]);
        let (mut initiated, first) =
            a.initiate(&b.public(), &preshared, Secret([3; 32]), &[7; 12]).expect("a initiates");
        let received = b.receive(Secret([4; 32]), &first).expect("b accepts the initiation");
        assert_eq!((received.remote, received.timestamp), (a.public(), [7; 12]));
        let (second, theirs) = received.respond(&preshared).expect("b responds");

        let mut forged = second;
        forged[40] ^= 1;
        assert!(initiated.finish(&forged).is_err());
        forged[..32].fill(0);
        assert!(initiated.finish(&forged).is_err(), "an all-zero shared secret");
        let ours = initiated.finish(&second).expect("forgeries do not end the handshake");
        assert!(ours.tx == theirs.rx && ours.rx == theirs.tx && ours.tx != ours.rx);
    }

    #[test]
    fn points_of_low_order_are_refused() {
        // RFC 7748 section 6.1: points of order 1, 2, 4 and 8 of curve25519 and its twist.
        let low = [
            [0; 32],
            {
                let mut one = [0; 32];
                one[0] = 1;
                one
            },
            [
                0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f,
                0xc4, 0x6a, 0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16,
                0x5f, 0x49, 0xb8, 0x00,
            ],
            [
                0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83,
                0xef, 0x5b, 0x04, 0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd,
                0xd0, 0x9f, 0x11, 0x57,
            ],
        ];
        let a = identity(1);
        let (_, good) = identity(2)
            .initiate(&a.public(), &Secret([0; 32]), Secret([3; 32]), &[0; 12])
            .expect("it initiates");
        for point in low {
            let begun = a.initiate(&PublicKey(point), &Secret([0; 32]), Secret([3; 32]), &[0; 12]);
            assert_eq!(begun.map(|_| ()), Err(Error::Dh), "{point:x?} as a static key");
            let mut message = good;
            message[..32].copy_from_slice(&point);
            let received = a.receive(Secret([4; 32]), &message);
            assert_eq!(received.map(|_| ()), Err(Error::Dh), "{point:x?} as an ephemeral key");
        }
    }
}
