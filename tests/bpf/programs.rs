//! Tests of the programs under `BPF_PROG_TEST_RUN`: every path and every reason, as TC and as XDP,
//! over IPv4 and IPv6 underlays. Need root.
#![allow(clippy::print_stderr, reason = "measurements, and the case that failed")]

#[path = "programs/bulk.rs"]
mod bulk;
#[path = "programs/containers.rs"]
mod containers;
#[path = "programs/handshake.rs"]
mod handshake;
#[path = "programs/object.rs"]
mod object;
#[path = "programs/opening.rs"]
mod opening;
#[path = "programs/packet.rs"]
mod packet;
#[path = "programs/receive_ring.rs"]
mod receive_ring;
#[path = "programs/recording.rs"]
mod recording;
#[path = "programs/relaying.rs"]
mod relaying;
#[path = "programs/sealing.rs"]
mod sealing;
#[path = "programs/ways.rs"]
mod ways;
#[path = "programs/world.rs"]
mod world;
