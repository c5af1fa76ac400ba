use overnode_bulk_model::{
    CWR, FIN, PSH, Packet, URG, check_segment, finish, is_right, words, write_all,
};
use overnode_daemon::bulk::packet::NEEDS_CSUM;
use overnode_daemon::bulk::{BadPacket, Segmentation, VnetHeader};
use proptest::prelude::*;

use crate::packets;

fn segments(packet: &Packet, size: u16) -> Vec<Vec<u8>> {
    let bytes = packet.bytes();
    let vnet = packet.vnet(size);
    let segmentation = Segmentation::new(&bytes, &vnet).expect("a super-packet");
    assert!(segmentation.is_partial());
    write_all(&segmentation)
}

#[test]
fn the_vnet_header_has_the_layout_of_the_kernel() {
    let header = VnetHeader {
        flags: 1,
        gso_type: 2,
        hdr_len: 3,
        gso_size: 4,
        csum_start: 5,
        csum_offset: 0x0607,
    };
    let mut bytes = [1, 2, 3, 0, 4, 0, 5, 0, 7, 6];
    if cfg!(target_endian = "big") {
        bytes = [1, 2, 0, 3, 0, 4, 0, 5, 6, 7];
    }
    assert_eq!(header.to_bytes(), bytes);
    assert_eq!(VnetHeader::from_bytes(bytes), header);
}

/// Written by hand, so that the model does not vouch for itself.
#[test]
fn two_tcp_segments_match_bytes_written_by_hand() {
    let sixteen =
        |hex: &str| data_encoding::HEXLOWER_PERMISSIVE.decode(hex.replace(' ', "").as_bytes());
    // 10.0.0.1:1 to 10.0.0.2:2, 3 bytes of payload, ACK and PSH.
    let packet = "4500002b ffff4000 4006 26cb 0a000001 0a000002 \
                  0001 0002 00000010 00000020 50 18 0100 1420 0000 616263";
    let first = "4500002a ffff4000 4006 26cc 0a000001 0a000002 \
                 0001 0002 00000010 00000020 50 10 0100 141f 0000 6162";
    let second = "45000029 00004000 4006 26cd 0a000001 0a000002 \
                  0001 0002 00000012 00000020 50 18 0100 141e 0000 63";
    let [packet, first, second] =
        [packet, first, second].map(|hex| sixteen(hex).expect("hexadecimal"));
    let vnet = Packet::new(false, true, 0).vnet(2);
    let segmentation = Segmentation::new(&packet, &vnet).expect("a super-packet");
    assert_eq!(write_all(&segmentation), [first, second]);
}

#[test]
fn fin_and_psh_are_on_the_last_segment_and_cwr_is_on_the_first() {
    let packet = Packet { flags: FIN | PSH | CWR, ..Packet::new(false, true, 250) };
    let flags: Vec<u8> = segments(&packet, 100).iter().map(|segment| segment[33]).collect();
    assert_eq!(flags, [CWR, 0, FIN | PSH]);
}

#[test]
fn the_urgent_pointer_counts_from_each_segment() {
    let packet = Packet { flags: URG, urgent: 150, ..Packet::new(true, true, 350) };
    let urgent: Vec<_> = segments(&packet, 100)
        .iter()
        .map(|segment| (segment[53], segment[58], segment[59]))
        .collect();
    assert_eq!(urgent, [(URG, 0, 150), (URG, 0, 50), (0, 0, 0), (0, 0, 0)]);
}

#[test]
fn ids_and_sequence_numbers_wrap() {
    let packet = Packet { id: 0xffff, sequence: u32::MAX, ..Packet::new(false, true, 3) };
    let numbers: Vec<_> =
        segments(&packet, 2).iter().map(|s| (s[4..6].to_vec(), s[24..28].to_vec())).collect();
    assert_eq!(numbers, [(vec![255, 255], vec![255; 4]), (vec![0, 0], vec![0, 0, 0, 1])]);
}

/// Extension headers are copied into each segment.
#[test]
fn extension_headers_are_kept() {
    let packet = Packet::new(true, true, 300);
    let mut bytes = packet.bytes();
    let next = std::mem::replace(&mut bytes[6], 60);
    bytes.splice(40..40, [next, 0, 1, 4, 0, 0, 0, 0]);
    let length = (bytes.len() - 40) as u16;
    bytes[4..6].copy_from_slice(&length.to_be_bytes());
    let vnet = VnetHeader { csum_start: 14 + 48, ..packet.vnet(100) };
    let segmentation = Segmentation::new(&bytes, &vnet).expect("a super-packet");
    for (segment, plain) in write_all(&segmentation).into_iter().zip(packet.segments(100)) {
        let mut plain = plain.bytes();
        (plain[4], plain[5], plain[6]) = (segment[4], segment[5], 60);
        plain.splice(40..40, bytes[40..48].iter().copied());
        assert_eq!(segment, plain);
        assert_eq!(usize::from(segment[5]), segment.len() - 40);
    }
}

#[test]
fn a_packet_that_is_not_to_be_segmented_is_not_changed() {
    let packet = Packet::new(false, true, 3000);
    let bytes = packet.bytes();
    for (vnet, partial) in [(packet.vnet_alone(), true), (VnetHeader::default(), false)] {
        let segmentation = Segmentation::new(&bytes, &vnet).expect("a packet");
        assert_eq!(
            (write_all(&segmentation), segmentation.is_partial()),
            (vec![bytes.clone()], partial)
        );
    }
    let segmentation = Segmentation::new(b"anything", &VnetHeader::default()).expect("a packet");
    assert!(!segmentation.is_partial() && write_all(&segmentation) == [b"anything"]);
}

/// The container runs its own tunnel, and the partial checksum belongs to the inner packet.
#[test]
fn a_partial_checksum_in_a_tunnel_is_completed() {
    let inner = Packet::new(false, true, 101);
    let outer =
        Packet { payload: [&[8; 22], &inner.bytes()[..]].concat(), ..Packet::new(false, false, 0) };
    let bytes = outer.bytes();
    let vnet = VnetHeader { csum_start: 14 + 28 + 22 + 20, ..inner.vnet_alone() };
    let segmentation = Segmentation::new(&bytes, &vnet).expect("a packet");
    let written = write_all(&segmentation).remove(0);
    assert!(!segmentation.is_partial());
    assert_eq!(written[..50], bytes[..50]);
    assert_eq!(written[50..], finish(&inner.bytes()));
    assert!(is_right(&written[50..]));
}

/// Otherwise a container could change its source address or ports after they were checked.
#[test]
fn no_checksum_is_written_before_the_transport_checksum() {
    let kinds = [(false, true), (true, false), (false, false), (true, true)];
    for packet in kinds.map(|(is_v6, is_tcp)| Packet::new(is_v6, is_tcp, 9)) {
        let bytes = packet.bytes();
        let own = packet.vnet_alone();
        let judged_by = usize::from(own.csum_start + own.csum_offset) - 14;
        let mut accepted = 0;
        for start in 0..bytes.len() as u16 + 16 {
            for offset in 0..bytes.len() as u16 + 16 {
                let vnet = VnetHeader { csum_start: start, csum_offset: offset, ..own };
                match Segmentation::new(&bytes, &vnet) {
                    Ok(segmentation) => {
                        assert_eq!(
                            write_all(&segmentation)[0][..judged_by],
                            bytes[..judged_by],
                            "{start} + {offset}"
                        );
                        accepted += 1;
                    }
                    Err(bad) => assert_eq!(bad, BadPacket::Checksum { start, offset }),
                }
            }
        }
        assert!(accepted > 0);
        for (start, offset) in [(60000, 0), (60, 60000), (65535, 65535), (14, judged_by as u16 - 1)]
        {
            let vnet = VnetHeader { csum_start: start, csum_offset: offset, ..own };
            let bad = BadPacket::Checksum { start, offset };
            assert_eq!(Segmentation::new(&bytes, &vnet).err(), Some(bad));
        }
    }
}

#[test]
fn packets_that_contradict_their_headers_are_refused() {
    let tcp = Packet::new(false, true, 3000);
    let udp = Packet::new(true, false, 3000);
    let segmentation =
        |packet: &Packet, vnet: VnetHeader| Segmentation::new(&packet.bytes(), &vnet).err();
    let vnet = tcp.vnet(1000);
    assert_eq!(segmentation(&tcp, vnet), None);
    assert_eq!(segmentation(&tcp, VnetHeader { gso_size: 0, ..vnet }), Some(BadPacket::GsoSize));
    assert_eq!(
        segmentation(&tcp, VnetHeader { gso_size: 1, ..vnet }),
        Some(BadPacket::Segments(3000))
    );
    assert_eq!(segmentation(&tcp, VnetHeader { flags: 2, ..vnet }), Some(BadPacket::NotPartial));
    for gso_type in [2, 3, 4, 5, 0x84, 0x80] {
        assert_eq!(
            segmentation(&tcp, VnetHeader { gso_type, ..vnet }),
            Some(BadPacket::GsoType(gso_type))
        );
    }
    for gso_type in [1, 4, 0x85] {
        let vnet = VnetHeader { gso_type, ..udp.vnet(1000) };
        assert_eq!(segmentation(&udp, vnet), Some(BadPacket::GsoType(gso_type)));
    }
    for (start, offset) in [(33, 16), (34, 6), (0, 0)] {
        let vnet = VnetHeader { csum_start: start, csum_offset: offset, ..vnet };
        assert_eq!(segmentation(&tcp, vnet), Some(BadPacket::Checksum { start, offset }));
    }
    let altered = |packet: &Packet, at: usize, byte: u8| {
        let mut bytes = packet.bytes();
        bytes[at] = byte;
        Segmentation::new(&bytes, &packet.vnet(1000)).err()
    };
    let length = Some(BadPacket::Length(tcp.bytes().len()));
    assert_eq!(altered(&tcp, 0, 0x55), Some(BadPacket::NotIp));
    assert_eq!(altered(&tcp, 0, 0x44), length);
    assert_eq!(altered(&tcp, 3, 0), length);
    assert_eq!(altered(&tcp, 32, 0x40), length);
    assert_eq!(altered(&tcp, 6, 0x20), Some(BadPacket::Fragment));
    assert_eq!(altered(&tcp, 7, 1), Some(BadPacket::Fragment));
    assert_eq!(altered(&tcp, 9, 1), Some(BadPacket::Protocol(1)));
    let length = Some(BadPacket::Length(udp.bytes().len()));
    assert_eq!(altered(&udp, 5, 0), length);
    assert_eq!(altered(&udp, 45, 0), length);
    assert_eq!(altered(&udp, 6, 44), Some(BadPacket::Fragment));
    assert_eq!(altered(&udp, 6, 0), Some(BadPacket::Protocol(15)));
    assert_eq!(Segmentation::new(&[], &vnet).err(), Some(BadPacket::NotIp));
}

proptest! {
    #[test]
    fn segments_match_the_model(
        packet in packets(9000),
        urgent in any::<Option<u16>>(),
        size in 50..3000_u16,
    ) {
        let mut packet = packet;
        if let Some(urgent) = urgent {
            (packet.flags, packet.urgent) = (packet.flags | URG, urgent);
        }
        let expected: Vec<_> = packet.segments(size.into()).iter().map(Packet::bytes).collect();
        let made = segments(&packet, size);
        prop_assert!(made == expected);
        // Each segment is valid for a receiver once a network card has completed its checksum.
        prop_assert!(made.iter().all(|segment| is_right(&finish(segment))));
        prop_assert!(is_right(&finish(&packet.bytes())));
    }

    #[test]
    fn no_packet_causes_a_panic(
        packet in packets(400),
        alterations in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        header in any::<[u8; 10]>(),
        is_own in any::<bool>(),
        length in any::<prop::sample::Index>(),
    ) {
        let mut bytes = packet.bytes();
        for (at, byte) in alterations {
            let at = at.index(bytes.len().min(60));
            bytes[at] = byte;
        }
        let vnet = if is_own {
            packet.vnet(u16::from(header[0]))
        } else {
            VnetHeader::from_bytes(header)
        };
        check_segment(&bytes, &vnet);
        check_segment(&bytes[..length.index(bytes.len())], &vnet);
    }

    #[test]
    fn no_bytes_cause_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        header in any::<[u8; 10]>(),
    ) {
        let mut vnet = VnetHeader::from_bytes(header);
        check_segment(&bytes, &vnet);
        vnet.flags |= NEEDS_CSUM;
        vnet.gso_type %= 8;
        (vnet.csum_start, vnet.csum_offset) = (vnet.csum_start % 200, vnet.csum_offset % 200);
        check_segment(&bytes, &vnet);
    }

    #[test]
    fn a_completed_checksum_is_right(
        bytes in prop::collection::vec(any::<u8>(), 2..300),
        start in 0..100_usize,
    ) {
        // The transport header is unknown, and the sum begins anywhere after the IP header.
        let mut packet = vec![0; 40 + start];
        packet[0] = 0x60;
        packet.extend(&bytes);
        let vnet = VnetHeader {
            flags: NEEDS_CSUM,
            csum_start: (54 + start) as u16,
            ..VnetHeader::default()
        };
        let segmentation = Segmentation::new(&packet, &vnet).expect("a packet");
        let written = write_all(&segmentation).remove(0);
        prop_assert_eq!(&written[..40 + start], &packet[..40 + start]);
        prop_assert_eq!(&written[42 + start..], &packet[42 + start..]);
        let field = u16::from_be_bytes([written[40 + start], written[41 + start]]);
        prop_assert!(field != 0);
        prop_assert!(field == !words(&bytes) || field == 0xffff && words(&bytes) == 0xffff);
    }
}
