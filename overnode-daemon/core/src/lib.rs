//! Everything that a node decides: no I/O, no clock, no runtime.
//!
//! Each module is a state machine. Its inputs take the present time; randomness is a seeded
//! generator that is handed in. Its outputs are polled: `poll_action`, `poll_transmit`,
//! `poll_event`, `poll_timeout`. The daemon carries them out. So every decision can be tested, and
//! the simulation runs a cluster of a thousand nodes in one process.
//!
//! | module | decides |
//! | --- | --- |
//! | [`gossip`] | which records are true, who is reachable, where to send what |
//! | [`control`] | which nodes to dial, and the messages of control connections |
//! | [`handshake`] | WireGuard's handshake and its timers |
//! | [`path`] | whether a direct path works, its RTT, loss and MTU |
//! | [`ipam`] | who owns which address |
//! | [`routing`] | which announced address space packets are sent to |
//! | [`names`] | the answers to DNS questions |
//! | [`docker`] | the answers to a Docker engine |
//! | [`attachment`] | what holds an address on this host |
//! | [`sources`] | how much one source address may cost |

pub mod attachment;
pub mod control;
pub mod docker;
pub mod gossip;
pub mod handshake;
pub mod ipam;
pub mod names;
pub mod path;
pub mod routing;
pub mod sources;
