//! The fuzzer. `cargo xtask fuzz` builds it with libFuzzer's instrumentation and runs it.

#![no_main]

mod bodies;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

use bodies::{TARGETS, Target};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("OVERNODE_FUZZ_TARGET").unwrap_or_default();
    let target = TARGETS.iter().find(|target| target.name == name);
    *target.unwrap_or_else(|| {
        panic!("OVERNODE_FUZZ_TARGET is {name:?}; run `cargo xtask fuzz` instead")
    })
});

fuzz_target!(|data: &[u8]| (TARGET.body)(data));
