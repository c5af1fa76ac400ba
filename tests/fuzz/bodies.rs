//! What the fuzzer runs for each target, and the tests run for each file of `corpus` and
//! `regressions`.
//!
//! A body takes any bytes, gives them to decoders as hostile hosts and careless people would, and
//! panics if anything panics or a property does not hold. It is deterministic but for the epoch of
//! its clock.

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

/// Something to fuzz.
#[derive(Clone, Copy)]
pub struct Target {
    /// Also the name of its folder in `corpus` and in `regressions`.
    pub name: &'static str,
    /// Runs it.
    pub body: fn(&[u8]),
    /// Valid inputs to start from, by name.
    #[allow(dead_code, reason = "the fuzzer reads them from files")]
    pub seeds: fn() -> Vec<(&'static str, Vec<u8>)>,
}

/// All of them. `xtask/src/fuzz.rs` has the same names.
pub const TARGETS: [Target; 13] = [
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
