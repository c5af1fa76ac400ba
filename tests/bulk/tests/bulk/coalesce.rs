use overnode_bulk_model::{
    ACK, CWR, ECE, FIN, Opened, PSH, Packet, RST, SYN, URG, check_coalesce, coalesce, finish,
    is_right, link, runs, split, words,
};
use overnode_daemon::bulk::VnetHeader;
use overnode_daemon::bulk::coalesce::FLOWS;
use proptest::prelude::*;

use crate::packets;

fn opened(packets: &[Packet]) -> Vec<Opened> {
    packets.iter().map(|packet| (1, packet.bytes(), true)).collect()
}

/// Returns the number of delivered frames. Each is checked.
fn frames(packets: &[Packet]) -> usize {
    check_coalesce(&opened(packets), true);
    coalesce(&opened(packets), true).len()
}

const KINDS: [(bool, bool); 4] = [(false, true), (true, true), (false, false), (true, false)];

#[test]
fn segments_of_one_packet_are_coalesced() {
    for (v6, tcp) in KINDS {
        let packet = Packet { flags: ACK | PSH | CWR, ..Packet::new(v6, tcp, 60_001) };
        let frames = coalesce(&opened(&packet.segments(1372)), true);
        assert_eq!(frames.len(), 1);
        assert_eq!(frames[0][10..24], link(1));
        assert_eq!(split(&frames[0]), (packet.vnet(1372), packet.bytes().as_slice()));
        assert!(is_right(&finish(&packet.bytes())));
    }
}

#[test]
fn a_single_packet_is_not_changed() {
    for (v6, tcp) in KINDS {
        let packet = Packet::new(v6, tcp, 700);
        for (partial, vnet) in [(true, packet.vnet_alone()), (false, VnetHeader::default())] {
            let frames = coalesce(&[(1, packet.bytes(), partial)], true);
            assert_eq!(frames.len(), 1);
            assert_eq!(split(&frames[0]), (vnet, packet.bytes().as_slice()));
        }
    }
}

#[test]
fn complete_checksums_are_not_coalesced_and_keep_their_place() {
    let segments = Packet::new(false, true, 400).segments(100);
    let mut packets = opened(&segments);
    packets[2].2 = false;
    check_coalesce(&packets, true);
    let lengths: Vec<_> =
        coalesce(&packets, true).iter().map(|frame| frame.len() - 24 - 52).collect();
    assert_eq!(lengths, [200, 100, 100]);
}

/// Each of these changes alone must keep two segments apart.
#[test]
fn a_segment_that_differs_is_not_coalesced() {
    type Change = fn(&mut Packet);
    let both: [Change; 5] = [
        |packet| packet.ttl -= 1,
        |packet| packet.tos ^= 1,
        |packet| packet.payload.push(0),
        |packet| packet.port += 1,
        |packet| packet.host += 1,
    ];
    let v4: [Change; 3] =
        [|packet| packet.id = 0xfffe, |packet| packet.id = 1, |packet| packet.df = !packet.df];
    let v6: [Change; 1] = [|packet| packet.label += 1];
    let tcp: [Change; 13] = [
        |packet| packet.sequence += 1,
        |packet| packet.sequence -= 100,
        |packet| packet.acknowledged += 1,
        |packet| packet.window += 1,
        |packet| packet.urgent = 1,
        |packet| packet.options[11] ^= 1,
        |packet| packet.options.truncate(8),
        |packet| packet.flags |= ECE,
        |packet| packet.flags |= CWR,
        |packet| packet.flags |= SYN,
        |packet| packet.flags |= RST,
        |packet| packet.flags |= URG,
        |packet| packet.payload.clear(),
    ];
    for (is_v6, is_tcp) in KINDS {
        let mut changes = both.to_vec();
        changes.extend(if is_v6 { &v6[..] } else { &v4 });
        changes.extend(if is_tcp { &tcp[..] } else { &[] });
        let segments = Packet::new(is_v6, is_tcp, 200).segments(100);
        assert_eq!(frames(&segments), 1);
        for (number, change) in changes.into_iter().enumerate() {
            let mut segments = segments.clone();
            change(&mut segments[1]);
            assert_eq!(frames(&segments), 2, "{number} of {is_v6} {is_tcp}");
        }
    }
}

/// Coalescing would repair wrong sums.
#[test]
fn wrong_checksums_are_not_coalesced() {
    for (v6, tcp) in KINDS {
        let packets = opened(&Packet::new(v6, tcp, 200).segments(100));
        let transport = if v6 { 40 } else { 20 };
        let sum = transport + if tcp { 16 } else { 6 };
        let places = if v6 { vec![sum] } else { vec![sum, 10] };
        for which in 0..2 {
            for &at in &places {
                let mut packets = packets.clone();
                packets[which].1[at] ^= 1;
                check_coalesce(&packets, true);
                assert_eq!(coalesce(&packets, true).len(), 2);
            }
        }
        // In UDP, 0 means that there is no checksum.
        let mut packets = packets;
        for packet in &mut packets {
            packet.1[sum..sum + 2].fill(0);
        }
        check_coalesce(&packets, true);
        assert_eq!(coalesce(&packets, true).len(), 2);
    }
}

#[test]
fn another_peer_is_another_flow() {
    let mut packets = opened(&Packet::new(false, true, 200).segments(100));
    packets[1].0 = 2;
    check_coalesce(&packets, true);
    assert_eq!(coalesce(&packets, true).len(), 2);
}

#[test]
fn ip_options_reserved_bits_and_fragments_are_not_coalesced() {
    for (at, byte) in [(6, 0xc0), (6, 0x60), (7, 1)] {
        let mut packets = opened(&Packet::new(false, true, 200).segments(100));
        for (_, packet, _) in &mut packets {
            packet[at] = byte;
            packet[10..12].fill(0);
            let checksum = !words(&packet[..20]);
            packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        check_coalesce(&packets, true);
        assert_eq!(coalesce(&packets, true).len(), 2);
    }
}

#[test]
fn udp_is_coalesced_only_if_asked_for() {
    let packets = opened(&Packet::new(false, false, 200).segments(100));
    check_coalesce(&packets, false);
    assert_eq!((coalesce(&packets, false).len(), coalesce(&packets, true).len()), (2, 1));
}

#[test]
fn a_run_ends_with_psh_fin_or_a_shorter_segment() {
    for flag in [PSH, FIN] {
        let mut segments = Packet::new(true, true, 400).segments(100);
        segments[1].flags |= flag;
        assert_eq!(frames(&segments), 2);
        segments[0].flags |= flag;
        assert_eq!(frames(&segments), 3);
    }
    let mut segments = Packet::new(false, true, 150).segments(100);
    let next =
        Packet { sequence: segments[0].sequence.wrapping_add(150), id: 0, ..segments[0].clone() };
    segments.push(next);
    assert_eq!(frames(&segments), 2);
}

/// The first segment may have CWR, and the super-packet says so.
#[test]
fn cwr_begins_a_run() {
    let mut segments =
        Packet { flags: ACK | ECE | CWR, ..Packet::new(false, true, 300) }.segments(100);
    let frames_made = coalesce(&opened(&segments), true);
    assert_eq!(split(&frames_made[0]).0.gso_type, 0x81);
    assert_eq!(frames_made.len(), 1);
    segments[1].flags |= CWR;
    assert_eq!(frames(&segments), 2);
}

#[test]
fn a_super_packet_is_no_longer_than_ip_allows() {
    for (v6, tcp) in KINDS {
        let size = if tcp { 9000 } else { 1400 };
        let base = Packet::new(v6, tcp, size);
        let segments: Vec<_> = (0..70_u16)
            .map(|index| Packet {
                id: base.id.wrapping_add(index),
                sequence: base.sequence.wrapping_add(u32::from(index) * size as u32),
                ..base.clone()
            })
            .collect();
        let lengths: Vec<_> = coalesce(&opened(&segments), true).iter().map(Vec::len).collect();
        assert!(lengths.iter().all(|&length| length <= 24 + 65_535));
        assert_eq!(lengths.len(), if tcp { 10 } else { 2 });
        assert_eq!(frames(&segments), runs(&segments).len());
        // 64 datagrams, however short.
        let short = Packet::new(v6, tcp, 70 * 10).segments(10);
        assert_eq!(frames(&short), if tcp { 1 } else { 2 });
    }
}

#[test]
fn one_flow_too_many_flushes_the_oldest() {
    let flows: Vec<_> =
        (0..=FLOWS as u16).map(|port| Packet { port, ..Packet::new(false, true, 200) }).collect();
    let first: Vec<_> = flows.iter().map(|flow| flow.segments(100).remove(0)).collect();
    let second: Vec<_> = flows.iter().skip(1).map(|flow| flow.segments(100).remove(1)).collect();
    let packets = opened(&[first, second].concat());
    check_coalesce(&packets, true);
    let ports: Vec<_> =
        coalesce(&packets, true).iter().map(|frame| (frame[24 + 21], frame.len() - 76)).collect();
    let mut expected = vec![(0, 100)];
    expected.extend((1..=FLOWS as u8).map(|port| (port, 200)));
    assert_eq!(ports, expected);
}

#[test]
fn non_ip_packets_are_delivered_unless_too_long() {
    check_coalesce(&[(1, Vec::new(), true), (1, vec![1], false)], true);
    assert_eq!(coalesce(&[(1, vec![0; 65_575], false)], true)[0].len(), 24 + 65_575);
    assert!(coalesce(&[(1, vec![0; 65_576], false)], true).is_empty());
}

/// Generates packets of a few flows. Most continue the previous packet of their flow, and some are
/// altered.
fn traffic() -> impl Strategy<Value = Vec<Opened>> {
    let step = (
        0..12_u16,
        prop::sample::select(vec![30_usize, 100, 100, 100, 100, 120]),
        any::<(u8, u8, u8)>(),
    );
    (prop::collection::vec(step, 0..120), 1..4_u8).prop_map(|(steps, peers)| {
        let mut flows: Vec<Packet> = (0..12_u16)
            .map(|number| Packet {
                port: number,
                ..Packet::new(number % 2 == 1, number % 4 < 2, 100)
            })
            .collect();
        steps
            .into_iter()
            .map(|(number, length, (kind, at, byte))| {
                let flow = &mut flows[usize::from(number)];
                flow.payload = vec![byte; length];
                flow.flags = ACK | if kind < 20 { byte } else { 0 };
                let mut bytes = flow.bytes();
                flow.id = flow.id.wrapping_add(1);
                flow.sequence = flow.sequence.wrapping_add(length as u32);
                match kind {
                    20..25 => {
                        let at = usize::from(at) % bytes.len();
                        bytes[at] = byte;
                    }
                    25..30 => bytes.truncate(at.into()),
                    _ => {}
                }
                (number as u8 % peers, bytes, kind != 30)
            })
            .collect()
    })
}

proptest! {
    #[test]
    fn segmenting_then_coalescing_gives_the_original(
        packet in packets(9000),
        size in 141..3000_u16,
    ) {
        // Rejecting packets that are too short would reject too many.
        let mut packet = packet;
        packet.payload.resize(packet.payload.len().max(usize::from(size) + 1), 7);
        let frames = coalesce(&opened(&packet.segments(size.into())), true);
        prop_assert_eq!(frames.len(), 1);
        let (vnet, bytes) = split(&frames[0]);
        prop_assert_eq!(vnet, packet.vnet(size));
        prop_assert!(bytes == packet.bytes());
    }

    #[test]
    fn coalescing_then_segmenting_gives_the_input(
        packets in traffic(),
        coalesces_udp in any::<bool>(),
    ) {
        check_coalesce(&packets, coalesces_udp);
    }

    #[test]
    fn one_flow_is_coalesced_as_in_the_model(
        v6 in any::<bool>(),
        tcp in any::<bool>(),
        steps in prop::collection::vec(
            (
                prop::sample::select(vec![0_usize, 50, 100, 100, 100, 100, 100, 110]),
                any::<u8>(),
            ),
            1..150,
        ),
    ) {
        let mut flow = Packet::new(v6, tcp, 0);
        let mut packets = Vec::new();
        for (length, event) in steps {
            flow.payload = vec![event; length];
            flow.flags = ACK;
            match event {
                0 => flow.window += 1,
                1 => flow.acknowledged += 1,
                2 => flow.sequence = flow.sequence.wrapping_add(1),
                3 => flow.id = flow.id.wrapping_add(1),
                4 => flow.tos ^= 1,
                5 => flow.flags |= PSH,
                6 => flow.flags |= CWR,
                7 => flow.flags |= SYN,
                8 => flow.flags |= FIN,
                9 => flow.flags |= ECE,
                10 => flow.flags |= RST,
                11 => flow.df = !flow.df,
                _ => {}
            }
            packets.push(flow.clone());
            flow.id = flow.id.wrapping_add(1);
            flow.sequence = flow.sequence.wrapping_add(length as u32);
        }
        check_coalesce(&opened(&packets), true);
        let made: Vec<_> = coalesce(&opened(&packets), true)
            .iter()
            .map(|frame| {
                let (vnet, bytes) = split(frame);
                if vnet.gso_type == 0 {
                    1
                } else {
                    (bytes.len() - flow.headers()).div_ceil(vnet.gso_size.into())
                }
            })
            .collect();
        prop_assert_eq!(made, runs(&packets));
    }

    #[test]
    fn any_bytes_are_delivered_in_order(
        packets in prop::collection::vec(
            (0..3_u8, prop::collection::vec(any::<u8>(), 0..80), any::<bool>()),
            0..30,
        ),
    ) {
        check_coalesce(&packets, true);
    }
}
