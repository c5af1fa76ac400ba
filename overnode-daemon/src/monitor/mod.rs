//! What `overnode monitor` shows: [`decode`] makes sense of what programs record of dropped packets, [`hub`] hands events to whoever
//! reads. Where events come from: `node/`.

pub mod decode;
pub mod hub;

pub use hub::{Hub, Reader, TooMany};
