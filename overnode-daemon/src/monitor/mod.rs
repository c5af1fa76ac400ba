//! The parts of `overnode monitor`: [`decode`] parses the programs' records of dropped packets, and
//! [`hub`] distributes events to readers. The events come from `node/`.

pub mod decode;
pub mod hub;

use overnode_ebpf::reason::Reason;

pub use hub::{Hub, NotRead, Reader};

/// Returns the names of all drop reasons.
pub fn drop_reasons() -> impl Iterator<Item = &'static str> {
    Reason::ALL.iter().filter(|reason| reason.is_drop()).map(|reason| reason.as_str())
}
