//! Network namespaces joined by hand, stock WireGuard processes, and probes that measure what passes between them.
//!
//! The benchmark and the interoperability tests stand on this. Nothing here knows overnode.

pub mod probe;
pub mod space;
pub mod wireguard;
