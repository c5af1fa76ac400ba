//! Runs the real cores of many nodes in one process, under one seed and one clock. Everything else
//! is simulated: the disks, the network with its partitions, and the administrators.
//!
//! [`run`] attacks gossip and the address allocation, [`scale`] measures clusters at rest.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it reports to a terminal")]

mod chaos;
mod check;
mod host;
mod liar;
pub mod run;
pub mod scale;
mod statics;
mod world;

pub use world::{Counts, Sabotage, Settings};
