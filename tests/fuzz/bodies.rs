//! Bodies of the fuzz targets. The fuzzer runs them, and the tests run them for each file in
//! `corpus` and `regressions`.
//!
//! A body takes any bytes and passes them to decoders, as hostile hosts or careless users would. It
//! panics if anything panics or a property does not hold. It is deterministic except for the start
//! time of its clock.

mod allocation;
mod api;
mod bulk;
mod cni;
mod control;
mod dns;
mod docker;
mod gossip;
mod handshake;
mod input;
mod monitor;
mod path;
mod store;
mod wire;

/// A fuzz target.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    /// Name of the target, and of its folder in `corpus` and in `regressions`.
    pub name: &'static str,
    /// Runs the target.
    pub body: fn(&[u8]),
    /// Valid inputs to start from, by name.
    #[allow(dead_code, reason = "the fuzzer reads them from files")]
    pub seeds: fn() -> Vec<(&'static str, Vec<u8>)>,
}

/// All targets. `xtask/src/fuzz.rs` lists the same names.
pub(crate) const TARGETS: [Target; 13] = [
    Target { name: "gossip", body: gossip::run, seeds: gossip::seeds },
    Target { name: "handshake", body: handshake::run, seeds: handshake::seeds },
    Target { name: "control", body: control::run, seeds: control::seeds },
    Target { name: "allocation", body: allocation::run, seeds: allocation::seeds },
    Target { name: "api", body: api::run, seeds: api::seeds },
    Target { name: "path", body: path::run, seeds: path::seeds },
    Target { name: "wire", body: wire::run, seeds: wire::seeds },
    Target { name: "bulk", body: bulk::run, seeds: bulk::seeds },
    Target { name: "dns", body: dns::run, seeds: dns::seeds },
    Target { name: "docker", body: docker::run, seeds: docker::seeds },
    Target { name: "cni", body: cni::run, seeds: cni::seeds },
    Target { name: "monitor", body: monitor::run, seeds: monitor::seeds },
    Target { name: "store", body: store::run, seeds: store::seeds },
];
