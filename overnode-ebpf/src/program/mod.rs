//! The programs, one file per packet path.

pub mod aead_check;
pub mod cipher;
