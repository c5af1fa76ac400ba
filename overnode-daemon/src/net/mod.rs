//! Network sockets of the node.

pub mod admission;
pub mod known;
pub mod mesh;
pub mod session;
pub mod udp;
