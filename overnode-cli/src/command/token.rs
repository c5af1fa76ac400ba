//! Implements `overnode token`.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;

use data_encoding::BASE64URL_NOPAD;
use rand::TryRngCore;
use rand::rngs::OsRng;

use crate::failure::Failure;
use crate::options::Token;

/// Random bytes in a token: 240 bits, or 40 characters of base64 without padding.
const BYTES: usize = 30;

/// Returns a strong random token, or writes it to a file.
///
/// # Errors
/// Fails if the kernel provides no randomness, or if the file exists or cannot be written.
pub(super) fn run(wanted: &Token) -> Result<String, Failure> {
    let token = format!("{}\n", random()?);
    let Some(file) = &wanted.out else { return Ok(token) };
    let create = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file)?;
        file.write_all(token.as_bytes())
    };
    create().map(|()| String::new()).map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::AlreadyExists => "; remove it first, or give another name",
            _ => "",
        };
        Failure::failed(format_args!("--out {}: {error}{advice}", file.display()))
    })
}

/// Returns a strong random token.
///
/// # Errors
/// Fails if the kernel provides no randomness.
pub(crate) fn random() -> Result<String, Failure> {
    loop {
        let mut bytes = [0; BYTES];
        OsRng.try_fill_bytes(&mut bytes).map_err(|error| {
            Failure::failed(format_args!("the kernel returned no random bytes: {error}; try again"))
        })?;
        let token = BASE64URL_NOPAD.encode(&bytes);
        // In `--token TOKEN`, a leading hyphen would look like an option.
        if !token.starts_with('-') {
            return Ok(token);
        }
    }
}
