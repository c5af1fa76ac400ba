//! What the tests of real kernels share.

#[path = "../rig/mod.rs"]
pub mod rig;
