//! What `overnode monitor` shows: [`decode`] makes sense of what programs record of dropped
//! packets, [`hub`] hands events to whoever reads. Where events come from: `node/`.

pub mod decode;
pub mod hub;

use overnode_ebpf::reason::Reason;

pub use hub::{Hub, NotRead, Reader};

/// The names of all reasons for which packets are dropped.
pub fn drop_reasons() -> impl Iterator<Item = &'static str> {
    Reason::ALL.iter().filter(|reason| reason.is_drop()).map(|reason| reason.as_str())
}
