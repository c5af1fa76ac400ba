//! How bulk flows are sealed.

use serde::{Deserialize, Serialize};

/// How bulk flows are sealed. The comments of the variants are the help of `--bulk`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", value(rename_all = "lower"))]
pub enum Mode {
    /// The eBPF programs seal them, like all other traffic
    Off,
    /// Workers seal them, with the cipher that is faster for both ends
    #[default]
    Auto,
    /// Workers seal them, with ChaCha20-Poly1305
    ChaCha,
    /// Workers seal them, with AES-256-GCM
    Aes,
}

/// A cipher that seals messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Cipher {
    /// ChaCha20-Poly1305 (RFC 8439).
    #[serde(rename = "ChaCha20-Poly1305")]
    ChaCha,
    /// AES-256-GCM (NIST SP 800-38D).
    #[serde(rename = "AES-256-GCM")]
    Aes,
}

impl Cipher {
    /// All ciphers, ordered by number.
    pub const ALL: [Self; 2] = [Self::ChaCha, Self::Aes];

    /// Returns the usual name of the cipher.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ChaCha => "ChaCha20-Poly1305",
            Self::Aes => "AES-256-GCM",
        }
    }

    /// Returns the cipher with this number in data messages.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }
}
