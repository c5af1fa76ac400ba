//! Sockets.

pub mod mesh;
pub mod udp;
