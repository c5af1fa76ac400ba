//! Tests that the bulk path segments and coalesces packets like a model.

mod coalesce;
mod segment;
mod tap;

use overnode_bulk_model::{ACK, CWR, ECE, FIN, PSH, Packet};
use proptest::prelude::*;

/// Generates packets with any field values that a data segment may have.
fn packets(most: usize) -> impl Strategy<Value = Packet> {
    let ip = (any::<bool>(), any::<bool>(), any::<u8>(), any::<u8>(), any::<u16>(), any::<bool>());
    let tcp = (any::<u16>(), any::<u32>(), any::<u32>(), any::<u8>(), any::<u16>(), 0..=10_usize);
    (ip, tcp, 0..=most, any::<u8>()).prop_map(|(ip, tcp, length, fill)| {
        let (v6, is_tcp, tos, ttl, id, df) = ip;
        let (port, sequence, acknowledged, flags, window, words) = tcp;
        let flags = flags & (ECE | FIN | PSH | CWR) | ACK;
        let options = if is_tcp { vec![fill; words * 4] } else { Vec::new() };
        let mut packet = Packet::new(v6, is_tcp, length);
        packet.payload.iter_mut().for_each(|byte| *byte = byte.wrapping_mul(fill));
        Packet { tos, ttl, id, df, port, sequence, acknowledged, flags, window, options, ..packet }
    })
}
