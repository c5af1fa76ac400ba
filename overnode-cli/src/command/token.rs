//! Implements `overnode token`.

use data_encoding::BASE64URL_NOPAD;
use rand::TryRngCore;
use rand::rngs::OsRng;

use crate::failure::Failure;

/// Random bytes in a token: 240 bits, or 40 characters of base64 without padding.
const BYTES: usize = 30;

/// Returns a strong random token.
///
/// # Errors
/// Fails if the kernel provides no randomness.
pub(crate) fn run() -> Result<String, Failure> {
    loop {
        let mut bytes = [0; BYTES];
        OsRng.try_fill_bytes(&mut bytes).map_err(|error| {
            Failure::failed(format_args!("the kernel returned no random bytes: {error}; try again"))
        })?;
        let token = BASE64URL_NOPAD.encode(&bytes);
        // In `--token TOKEN`, a leading hyphen would look like an option.
        if !token.starts_with('-') {
            return Ok(format!("{token}\n"));
        }
    }
}
