//! Tests of the programs under `BPF_PROG_TEST_RUN`: every path and every reason, as TC and as XDP,
//! over IPv4 and IPv6 underlays. Need root.
#![allow(clippy::print_stderr, reason = "measurements, and the case that failed")]

mod bulk;
mod checks;
mod containers;
mod handshake;
mod object;
mod opening;
mod packet;
mod receive_ring;
mod recording;
mod relaying;
mod sealing;
mod world;
