//! Fuzzes packets of the bulk path: packets from a TAP device are segmented, and packets from peers
//! are coalesced. The model is that of `tests/bulk`.

use overnode_bulk_model::{ACK, Opened, Packet, check_coalesce, check_segment};
use overnode_daemon::bulk::VnetHeader;

use super::input::{Input, MAX_STEPS};

/// Runs one input. The first byte selects the type of the rest.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input(data);
    match input.byte() {
        0 => {
            let header = std::array::from_fn(|_| input.byte());
            check_segment(input.0, &VnetHeader::from_bytes(header));
        }
        1 => anything(&mut input),
        2 => flows(&mut input),
        _ => {}
    }
}

fn anything(input: &mut Input<'_>) {
    let mut packets: Vec<Opened> = Vec::new();
    while let Some(kind) = input.step()
        && packets.len() < MAX_STEPS
    {
        packets.push((kind & 3, input.bytes().to_vec(), kind & 4 == 0));
    }
    check_coalesce(&packets, true);
}

/// Simulates twelve flows, whose packets continue each other unless a step changes them.
fn flows(input: &mut Input<'_>) {
    let mut flows: Vec<Packet> = (0..12_u16)
        .map(|port| Packet { port, ..Packet::new(port % 2 == 1, port % 4 < 2, 0) })
        .collect();
    let coalesces_udp = input.byte().is_multiple_of(2);
    let mut packets: Vec<Opened> = Vec::new();
    while let Some(which) = input.step()
        && packets.len() < MAX_STEPS
    {
        let (change, value) = (input.byte(), input.byte());
        let flow = &mut flows[usize::from(which % 12)];
        flow.flags = ACK;
        let mut altered = None;
        match change % 16 {
            0 => flow.flags = value,
            1 => flow.tos = value,
            2 => flow.ttl = value,
            3 => flow.id = value.into(),
            4 => flow.sequence = flow.sequence.wrapping_add(value.into()),
            5 => flow.acknowledged = value.into(),
            6 => flow.window = value.into(),
            7 => flow.urgent = value.into(),
            8 if flow.tcp => flow.options = vec![value; usize::from(value % 11) * 4],
            9 => flow.payload = vec![value; value.into()],
            10 => flow.payload = vec![value; usize::from(value) * 64],
            11 => flow.df = !flow.df,
            12 => altered = Some(value),
            _ => {}
        }
        let mut bytes = flow.bytes();
        if let Some(value) = altered {
            let at = usize::from(value) % bytes.len();
            bytes[at] = input.byte();
        }
        flow.id = flow.id.wrapping_add(1);
        flow.sequence = flow.sequence.wrapping_add(flow.payload.len() as u32);
        packets.push((which / 12 % 2, bytes, change & 0x80 == 0));
    }
    check_coalesce(&packets, coalesces_udp);
}

pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let mut seeds = Vec::new();
    for (v6, tcp, cut, join) in [
        (false, true, "cut-tcp-4", "join-tcp-4"),
        (true, true, "cut-tcp-6", "join-tcp-6"),
        (false, false, "cut-udp-4", "join-udp-4"),
        (true, false, "cut-udp-6", "join-udp-6"),
    ] {
        let packet = Packet::new(v6, tcp, 250);
        // Little-endian, as on the machine that fuzzes.
        let vnet = packet.vnet(100);
        let numbers = [vnet.hdr_len, vnet.gso_size, vnet.csum_start, vnet.csum_offset];
        let numbers: Vec<u8> = numbers.into_iter().flat_map(u16::to_le_bytes).collect();
        seeds
            .push((cut, [&[0, vnet.flags, vnet.gso_type], &numbers[..], &packet.bytes()].concat()));
        let mut segments = vec![1];
        for segment in packet.segments(100) {
            segments.push(0);
            segments.extend(Input::framed(&segment.bytes()));
        }
        seeds.push((join, segments));
    }
    let long = [0, 10, 22, 0, 13, 0].repeat(20);
    let all: Vec<u8> =
        (0..24).flat_map(|which| [which, 9, 100, which, 13, 0, which, 0, 0x18]).collect();
    seeds.push(("flows-long", [&[2, 0], &long[..]].concat()));
    seeds.push(("flows-all", [&[2, 0], &all[..]].concat()));
    seeds
}
