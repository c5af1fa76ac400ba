//! Tests of packets with a partial checksum: they arrive with the right checksum, wherever it was
//! completed.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, Map, MapData};
use lab::flow::{self, Amount};
use lab::pcap::{Packet, TCP, UDP};
use lab::raw::{Injector, checksum};
use lab::{Container, Host, Lab};
use overnode_ebpf::map::Peer;
use serde_json::Value;

use crate::spoofing;
use crate::support::{TIMEOUT, in_lab, launch_containers};

/// Length in bytes, including the IP header, of the longest packet that bypasses the offload veth.
const SMALL: usize = 255;
const HEADERS: usize = 28;

#[test]
fn small_packets_are_completed_without_the_offload_veth() -> Result<()> {
    in_lab(Lab::new("checksums").hosts(2), |lab| {
        for host in lab.hosts() {
            // If the kernel still expected a partial checksum, it would complete it here, in the
            // ciphertext.
            host.netns().run("ethtool", &["-K", host.interface(), "tx", "off"])?;
        }
        let containers = launch_containers(lab)?;
        let [one, far] = &containers[..] else { unreachable!() };
        let capture = lab::Capture::start(
            far.netns(),
            lab.folder(),
            &["-i", "overnode0", "-Q", "in", "tcp or udp"],
        )?;

        let before = offload_out(lab.host(1))?;
        let datagrams = send_datagrams(one, far, 0..=SMALL - HEADERS)?;
        let through = offload_out(lab.host(1))? - before;
        // The daemon's probes and keepalives also go through the veth.
        ensure!(through < datagrams / 4, "{through} packets went through the offload veth");
        let larger = send_datagrams(one, far, SMALL - HEADERS + 1..=1392)?;
        let through = offload_out(lab.host(1))? - before;
        ensure!(
            through >= larger,
            "{through} of {larger} large packets went through the offload veth"
        );
        echo(one, far)?;

        let captured = capture.stop()?;
        ensure!(captured.missed == 0, "the capture missed {} packets", captured.missed);
        let mut seen = [0, 0];
        for packet in captured.packets()? {
            let Some(ip) = packet.ip else { continue };
            let right = checksum_is_right(&packet)?;
            ensure!(
                right,
                "wrong checksum in a packet of {} bytes, protocol {}",
                packet.network.len(),
                ip.protocol
            );
            seen[usize::from(ip.protocol == UDP)] += 1;
        }
        ensure!(
            seen[1] == datagrams + larger,
            "only {} of {} datagrams were captured",
            seen[1],
            datagrams + larger
        );
        ensure!(seen[0] > ECHOES, "only {} segments were captured", seen[0]);
        Ok(())
    })
}

/// Small packets must not overtake those that are still in the offload veth.
#[test]
fn small_packets_do_not_overtake_others_in_the_offload_veth() -> Result<()> {
    in_lab(Lab::new("following").hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        let [one, far] = &containers[..] else { unreachable!() };
        let pin = lab::cleanup::pins_of(&lab.host(1).state_directory())?.join("maps/PEERS");
        let mut peers = Array::<_, Peer>::try_from(Map::Array(MapData::from_pin(pin)?))?;
        let mut through = |offload_last_ns: u64| -> Result<usize> {
            let peer = peers.get(&2, 0)?;
            let waiting =
                Peer { offload_in: peer.offload_out.wrapping_add(1), offload_last_ns, ..peer };
            peers.set(2, waiting, 0)?;
            let before = offload_out(lab.host(1))?;
            send_datagrams(one, far, 0..100)?;
            Ok(offload_out(lab.host(1))? - before)
        };
        let waiting = through(u64::MAX / 2)?;
        ensure!(waiting >= 100, "only {waiting} packets followed through the offload veth");
        // A packet that never leaves the veth, because it was lost, is not waited for.
        let lost = through(0)?;
        ensure!(lost < 50, "{lost} packets waited for a lost one");
        Ok(())
    })
}

/// Only the sender knows the position of a partial checksum. If it is neither TCP's nor UDP's, the
/// kernel completes it.
#[test]
fn a_checksum_at_an_unusual_offset_is_completed_there() -> Result<()> {
    const START: usize = 14 + 20 + 8 + 2;
    const OFFSET: usize = 4;
    const SEED: [u8; 2] = [0x12, 0x34];
    in_lab(Lab::new("elsewhere").hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        let [one, far] = &containers[..] else { unreachable!() };
        let gateway = spoofing::learnt_mac(one, far.address())?;
        let mut frame =
            spoofing::datagram(spoofing::own_mac(one)?, gateway, one.address(), far.address());
        frame[START + OFFSET..][..2].copy_from_slice(&SEED);
        let target = far.address();
        let ring = far.netns().enter(move || Ok(UdpSocket::bind((target, 5001))?))?;
        ring.set_read_timeout(Some(TIMEOUT))?;
        Injector::open(one.netns(), "overnode0")?.send_partial_checksum(
            &frame,
            START as u16,
            OFFSET as u16,
        )?;

        let mut expected = frame[42..].to_vec();
        let sum = checksum(&[&frame[START..]]);
        expected[START - 42 + OFFSET..][..2].copy_from_slice(&sum.to_be_bytes());
        let mut buffer = [0; 2048];
        let (length, _) = ring.recv_from(&mut buffer)?;
        ensure!(
            buffer[..length] == expected,
            "{:02x?} instead of {expected:02x?}",
            &buffer[..length]
        );
        Ok(())
    })
}

/// The partial checksum belongs to the inner packet. Completing the outer one would leave the inner
/// one wrong.
#[test]
fn a_tunnel_between_containers_works() -> Result<()> {
    in_lab(Lab::new("nested").hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        let [one, far] = &containers[..] else { unreachable!() };
        let outer = [one.address(), far.address()];
        for outer_checksum in ["noudpcsum", "udpcsum"] {
            for (container, number, remote) in [(one, 1, outer[1]), (far, 2, outer[0])] {
                let address = format!("172.31.0.{number}");
                let ip = |line: &str| container.netns().ip(&line.split(' ').collect::<Vec<_>>());
                ip(&format!(
                    "link add nested type vxlan id 7 dstport 4789 remote {remote} \
                     dev overnode0 {outer_checksum}"
                ))?;
                ip(&format!("address add {address}/24 dev nested"))?;
                ip("link set nested up")?;
                container.set_address(Some(address.parse()?));
            }
            let attempt = || -> Result<()> {
                one.reach(far.address(), TIMEOUT)?;
                send_datagrams(one, far, 0..=400)?;
                echo(one, far)?;
                flow::tcp(one, far, Amount::Bytes(1_000_003))?;
                Ok(())
            };
            attempt().context(outer_checksum)?;
            for container in [one, far] {
                container.netns().ip(&["link", "delete", "nested"])?;
            }
        }
        Ok(())
    })
}

/// Returns the number of packets that the host's node sent into the offload veth.
fn offload_out(host: &Host) -> Result<usize> {
    let links: Value = serde_json::from_str(&host.netns().ip(&[
        "-json",
        "-statistics",
        "link",
        "show",
        "ovn0",
    ])?)?;
    let packets = links[0]["stats64"]["tx"]["packets"].as_u64().context("no statistics of ovn0")?;
    Ok(packets as usize)
}

/// Sends a datagram of each length and checks that it arrives. For each even length of two or more,
/// also sends one whose checksum is zero, which UDP transmits as 0xffff. Returns the number of
/// datagrams.
fn send_datagrams(
    from: &Container,
    to: &Container,
    lengths: impl Iterator<Item = usize>,
) -> Result<usize> {
    let (source, target) = (from.address(), to.address());
    let ring = to.netns().enter(move || Ok(UdpSocket::bind((target, 0))?))?;
    let outbox = from.netns().enter(move || Ok(UdpSocket::bind((source, 0))?))?;
    outbox.connect(ring.local_addr()?)?;
    ring.set_read_timeout(Some(TIMEOUT))?;
    let (SocketAddr::V4(from), SocketAddr::V4(to)) = (outbox.local_addr()?, ring.local_addr()?)
    else {
        bail!("the overlay must have IPv4 addresses")
    };
    let mut sent = 0;
    let mut buffer = [0; 2048];
    for length in lengths {
        let plain: Vec<u8> = (0..length).map(|place| (place * 7 + length) as u8).collect();
        let special = (length >= 2 && length % 2 == 0).then(|| {
            let mut payload = plain.clone();
            payload[length - 2..].fill(0);
            let sum = datagram_checksum(from, to, &payload);
            payload[length - 2..].copy_from_slice(&sum.to_be_bytes());
            payload
        });
        for payload in [Some(plain), special].into_iter().flatten() {
            outbox.send(&payload)?;
            let (received, _) =
                ring.recv_from(&mut buffer).with_context(|| format!("{length} bytes"))?;
            ensure!(buffer[..received] == payload, "{length} bytes arrived changed");
            sent += 1;
        }
    }
    Ok(sent)
}

/// Number of TCP segments that [`echo`] sends in each direction.
const ECHOES: usize = 300;

/// Sends TCP messages of all lengths up to [`ECHOES`], each in its own segment, and has them sent
/// back.
fn echo(from: &Container, to: &Container) -> Result<()> {
    let target = to.address();
    let listener = to.netns().enter(move || Ok(TcpListener::bind((target, 0))?))?;
    let address = listener.local_addr()?;
    let mut client = from.netns().enter(move || Ok(TcpStream::connect(address)?))?;
    let (mut server, _) = listener.accept()?;
    for end in [&client, &server] {
        end.set_nodelay(true)?;
        end.set_read_timeout(Some(TIMEOUT))?;
    }
    let mut buffer = [0; ECHOES];
    for length in 1..=ECHOES {
        let message: Vec<u8> = (0..length).map(|place| (place * 3 + length) as u8).collect();
        client.write_all(&message)?;
        server.read_exact(&mut buffer[..length])?;
        ensure!(buffer[..length] == message, "{length} bytes arrived changed");
        server.write_all(&message)?;
        client.read_exact(&mut buffer[..length])?;
    }
    Ok(())
}

/// Returns the right checksum of a datagram.
fn datagram_checksum(from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> u16 {
    let length = (8 + payload.len() as u16).to_be_bytes();
    let header =
        [&from.port().to_be_bytes()[..], &to.port().to_be_bytes(), &length, &[0, 0], payload]
            .concat();
    transport_checksum(*from.ip(), *to.ip(), UDP, &header)
}

fn checksum_is_right(packet: &Packet<'_>) -> Result<bool> {
    let network = packet.network;
    let total = usize::from(u16::from_be_bytes([network[2], network[3]]));
    let address = |at: usize| {
        Ipv4Addr::from_octets([network[at], network[at + 1], network[at + 2], network[at + 3]])
    };
    let (protocol, transport) = (network[9], &network[20..total]);
    ensure!(
        network[0] == 0x45 && (protocol == TCP || protocol == UDP),
        "not a plain IPv4 packet: {network:02x?}"
    );
    // A datagram without a checksum would pass the calculation as well.
    let has_one = protocol == TCP || transport[6..8] != [0, 0];
    Ok(has_one && transport_checksum(address(12), address(16), protocol, transport) == 0)
}

/// Returns the checksum of a segment or datagram, including the pseudo header. The result is 0 if
/// the packet contains the right checksum.
fn transport_checksum(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, transport: &[u8]) -> u16 {
    let length = (transport.len() as u16).to_be_bytes();
    let pseudo = [&from.octets()[..], &to.octets(), &[0, protocol], &length].concat();
    checksum(&[&pseudo, transport])
}
