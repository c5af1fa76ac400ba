//! Sockets.

pub mod admission;
pub mod mesh;
pub mod udp;
