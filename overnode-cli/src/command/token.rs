//! `overnode token`

use data_encoding::BASE64URL_NOPAD;
use rand::TryRngCore;
use rand::rngs::OsRng;

use crate::failure::Failure;

/// 30 bytes are 240 bits and 40 characters of base64 without padding.
const BYTES: usize = 30;

/// A strong random token.
///
/// # Errors
/// When the kernel gives no randomness.
pub fn run() -> Result<String, Failure> {
    loop {
        let mut bytes = [0; BYTES];
        OsRng.try_fill_bytes(&mut bytes).map_err(|error| {
            Failure::failed(format_args!("the kernel gave no randomness: {error}: try again"))
        })?;
        let token = BASE64URL_NOPAD.encode(&bytes);
        // It would look like an option in `--token TOKEN`.
        if !token.starts_with('-') {
            return Ok(format!("{token}\n"));
        }
    }
}
