//! Tests of invariant S3: a container can neither send from an address that is not its own nor
//! receive packets for others.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, ensure};
use lab::flow::{self, Amount, MARKER};
use lab::raw::{Injector, checksum};
use lab::{Capture, Container, Lab};

use crate::support::{MILLISECOND, TIMEOUT, attached, counter, in_lab, launch_all};

const INTERFACE: &str = "overnode0";
const BROADCAST: [u8; 6] = [0xff; 6];

/// Returns the container's MAC address, as its own namespace reports it.
pub(crate) fn own_mac(container: &Container) -> Result<[u8; 6]> {
    let links: serde_json::Value =
        serde_json::from_str(&container.netns().ip(&["-j", "link", "show", INTERFACE])?)?;
    parse_mac(links[0]["address"].as_str().context("no hardware address")?)
}

/// Returns the MAC address that ARP resolved for `other`.
pub(crate) fn learnt_mac(container: &Container, other: IpAddr) -> Result<[u8; 6]> {
    container.reach(other, TIMEOUT)?;
    let neighbors: serde_json::Value = serde_json::from_str(&container.netns().ip(&[
        "-j",
        "neigh",
        "show",
        &other.to_string(),
    ])?)?;
    parse_mac(neighbors[0]["lladdr"].as_str().context("no neighbor entry")?)
}

fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let bytes =
        text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<Vec<_>, _>>()?;
    bytes.try_into().ok().context("not six bytes")
}

fn octets(address: IpAddr) -> [u8; 4] {
    match address {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED.octets(),
    }
}

/// Returns an Ethernet frame with a UDP datagram that contains the lab's marker.
pub(crate) fn datagram(from_mac: [u8; 6], to_mac: [u8; 6], from: IpAddr, to: IpAddr) -> Vec<u8> {
    let payload = [&MARKER[..], &MARKER].concat();
    let length = (20 + 8 + payload.len()) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend(length.to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(octets(from));
    ip.extend(octets(to));
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    // Zero means no UDP checksum, which IPv4 allows.
    let udp = [&[0x13, 0x88, 0x13, 0x89][..], &(length - 20).to_be_bytes(), &[0, 0]].concat();
    [&to_mac[..], &from_mac, &[8, 0], &ip, &udp, &payload].concat()
}

struct Scene {
    thief: Container,
    neighbor: Container,
    far: Container,
}

/// Sets up a thief and a neighbor on host1, and a container on host2.
fn scene(lab: &Lab) -> Result<Scene> {
    launch_all(lab)?;
    let scene = Scene {
        thief: attached(lab.host(1), "thief")?,
        neighbor: attached(lab.host(1), "neighbor")?,
        far: attached(lab.host(2), "far")?,
    };
    for other in [&scene.neighbor, &scene.far] {
        scene.thief.reach(other.address(), TIMEOUT)?;
    }
    scene.neighbor.reach(scene.far.address(), TIMEOUT)?;
    Ok(scene)
}

/// Sends 100 frames each from the thief to the neighbor and to the far container. Checks that none
/// arrives and that each is counted.
fn ensure_dropped(
    lab: &Lab,
    scene: &Scene,
    reason: &str,
    frame: impl Fn([u8; 6], [u8; 6], IpAddr) -> Vec<u8>,
) -> Result<()> {
    const EACH: usize = 100;
    let mac = own_mac(&scene.thief)?;
    let injector = Injector::open(scene.thief.netns(), INTERFACE)?;
    let listening =
        |container: &Container| Capture::start(container.netns(), lab.folder(), &["-i", INTERFACE]);
    let captures = [listening(&scene.neighbor)?, listening(&scene.far)?];
    let before = counter(lab.host(1), reason)?;
    for victim in [&scene.neighbor, &scene.far] {
        let gateway = learnt_mac(&scene.thief, victim.address())?;
        let one = frame(mac, gateway, victim.address());
        injector.send_all(&vec![one; EACH])?;
    }
    for capture in captures {
        let captured = capture.stop()?;
        // The pings of `learnt_mac` also carry the marker, but they are not UDP.
        let arrived = captured.count(|packet| {
            packet.ip.is_none_or(|ip| ip.protocol == lab::pcap::UDP)
                && packet.bytes.windows(MARKER.len()).any(|window| window == MARKER)
        })?;
        ensure!(arrived == 0, "{arrived} forged packets arrived");
    }
    let counted = counter(lab.host(1), reason)? - before;
    ensure!(counted >= 2 * EACH as u64, "only {counted} of {} are counted as {reason}", 2 * EACH);
    Ok(())
}

/// Checks the injector and the capture themselves: honest frames arrive.
#[test]
fn honest_frames_arrive() -> Result<()> {
    in_lab(Lab::new("honest").hosts(2), |lab| {
        let scene = scene(lab)?;
        let mac = own_mac(&scene.thief)?;
        let injector = Injector::open(scene.thief.netns(), INTERFACE)?;
        for victim in [&scene.neighbor, &scene.far] {
            let gateway = learnt_mac(&scene.thief, victim.address())?;
            let capture = Capture::start(victim.netns(), lab.folder(), &["-i", INTERFACE, "udp"])?;
            let frame = datagram(mac, gateway, scene.thief.address(), victim.address());
            injector.send_all(&vec![frame; 100])?;
            assert_eq!(capture.stop()?.containing(&MARKER)?.len(), 100, "{}", victim.name);
        }
        Ok(())
    })
}

#[test]
fn another_containers_address_cannot_be_used() -> Result<()> {
    in_lab(Lab::new("source").hosts(2), |lab| {
        let scene = scene(lab)?;
        let foreign: [IpAddr; 5] = [
            scene.neighbor.address(),
            "10.42.0.77".parse()?,
            "192.168.48.11".parse()?,
            "127.0.0.1".parse()?,
            "0.0.0.0".parse()?,
        ];
        for from in foreign {
            ensure_dropped(lab, &scene, "spoofed", |mac, gateway, to| {
                datagram(mac, gateway, from, to)
            })
            .with_context(|| format!("from {from}"))?;
        }
        Ok(())
    })
}

#[test]
fn another_hardware_address_cannot_be_used() -> Result<()> {
    in_lab(Lab::new("mac").hosts(2), |lab| {
        let scene = scene(lab)?;
        let stolen = own_mac(&scene.neighbor)?;
        let own = scene.thief.address();
        for mac in [stolen, [2, 0, 0, 0, 0, 9]] {
            ensure_dropped(lab, &scene, "spoofed", |_, gateway, to| {
                datagram(mac, gateway, own, to)
            })?;
        }
        Ok(())
    })
}

#[test]
fn other_protocols_do_not_pass() -> Result<()> {
    in_lab(Lab::new("protocols").hosts(2), |lab| {
        let scene = scene(lab)?;
        let own = scene.thief.address();
        // IPv6, LLDP, the daemon's request for a keepalive, and an unassigned type.
        for ether_type in [[0x86, 0xdd], [0x88, 0xcc], [0x88, 0xb5], [0x12, 0x34]] {
            ensure_dropped(lab, &scene, "unsupported", |mac, gateway, to| {
                let mut frame = datagram(mac, gateway, own, to);
                frame[12..14].copy_from_slice(&ether_type);
                frame
            })
            .with_context(|| format!("EtherType {ether_type:02x?}"))?;
        }
        for to in ["255.255.255.255", "10.47.255.255", "224.0.0.251"] {
            let to: IpAddr = to.parse()?;
            let capture =
                Capture::start(scene.neighbor.netns(), lab.folder(), &["-i", INTERFACE, "udp"])?;
            let frame = datagram(own_mac(&scene.thief)?, BROADCAST, own, to);
            Injector::open(scene.thief.netns(), INTERFACE)?.send_all(&vec![frame; 20])?;
            assert_eq!(capture.stop()?.containing(&MARKER)?.len(), 0, "{to}");
        }
        Ok(())
    })
}

#[test]
fn arp_cannot_be_poisoned() -> Result<()> {
    in_lab(Lab::new("arp").hosts(2), |lab| {
        let scene = scene(lab)?;
        let (thief, neighbor) = (&scene.thief, &scene.neighbor);
        let mac = own_mac(thief)?;
        let before = learnt_mac(neighbor, scene.far.address())?;
        let capture = Capture::start(neighbor.netns(), lab.folder(), &["-i", INTERFACE, "arp"])?;
        let injector = Injector::open(thief.netns(), INTERFACE)?;
        for operation in [1, 2] {
            for to_mac in [BROADCAST, own_mac(neighbor)?] {
                // An ARP message that claims that the far container's address has the thief's MAC
                // address.
                let arp = [
                    &[0, 1, 8, 0, 6, 4, 0, operation][..],
                    &mac,
                    &octets(scene.far.address()),
                    &own_mac(neighbor)?,
                    &octets(neighbor.address()),
                ]
                .concat();
                let frame = [&to_mac[..], &mac, &[8, 6], &arp, &[0; 18]].concat();
                injector.send_all(&vec![frame; 20])?;
            }
        }
        let seen =
            capture.stop()?.count(|packet| packet.bytes.windows(6).any(|window| window == mac))?;
        assert_eq!(seen, 0, "the neighbor received ARP packets of the thief");
        assert_eq!(learnt_mac(neighbor, scene.far.address())?, before);
        assert_eq!(neighbor.ping(scene.far.address(), 100, MILLISECOND)?.lost(), 0);
        Ok(())
    })
}

#[test]
fn truncated_frames_are_dropped_and_do_no_harm() -> Result<()> {
    in_lab(Lab::new("truncated").hosts(2), |lab| {
        let scene = scene(lab)?;
        let gateway = learnt_mac(&scene.thief, scene.far.address())?;
        let whole =
            datagram(own_mac(&scene.thief)?, gateway, scene.thief.address(), scene.far.address());
        let frames: Vec<&[u8]> = (14..whole.len() - 1).map(|length| &whole[..length]).collect();
        let capture = Capture::start(scene.far.netns(), lab.folder(), &["-i", INTERFACE, "udp"])?;
        let dropped = |reason| counter(lab.host(1), reason);
        let before = dropped("malformed")? + dropped("unsupported")? + dropped("spoofed")?;
        Injector::open(scene.thief.netns(), INTERFACE)?.send_all(&frames)?;
        assert_eq!(capture.stop()?.packets()?.len(), 0);
        let after = dropped("malformed")? + dropped("unsupported")? + dropped("spoofed")?;
        assert!(
            after - before >= frames.len() as u64 / 2,
            "only {} of {} are counted",
            after - before,
            frames.len()
        );
        assert_eq!(scene.thief.ping(scene.far.address(), 100, MILLISECOND)?.lost(), 0);
        Ok(())
    })
}

#[test]
fn containers_cannot_overhear_each_other() -> Result<()> {
    in_lab(Lab::new("overhear").hosts(2), |lab| {
        let scene = scene(lab)?;
        let capture = Capture::start(scene.thief.netns(), lab.folder(), &["-i", INTERFACE])?;
        flow::tcp(&scene.neighbor, &scene.far, Amount::Bytes(5_000_000))?;
        flow::tcp(&scene.far, &scene.neighbor, Amount::Bytes(5_000_000))?;
        let captured = capture.stop()?;
        assert_eq!(captured.containing(&MARKER)?.len(), 0);
        let other = captured
            .count(|packet| packet.ip.is_some_and(|ip| ip.to == scene.neighbor.address()))?;
        assert_eq!(other, 0);
        Ok(())
    })
}

/// A plain packet from another host does not enter the container network through the underlay.
#[test]
fn an_unencrypted_packet_from_the_underlay_does_not_get_in() -> Result<()> {
    in_lab(Lab::new("underlay").hosts(2), |lab| {
        let scene = scene(lab)?;
        let (from, to) = (lab.host(2), scene.thief.address());
        let capture = Capture::start(scene.thief.netns(), lab.folder(), &["-i", INTERFACE])?;
        from.netns().ip(&[
            "route",
            "add",
            "10.40.0.0/15",
            "via",
            &lab.host(1).address().to_string(),
        ])?;
        lab.host(1).netns().enter(|| Ok(std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?))?;
        let stats = lab::ping::Pinging::start(from.netns(), to, Some(50), MILLISECOND)?.finish()?;
        assert_eq!(stats.received, 0);
        assert_eq!(capture.stop()?.containing(&MARKER)?.len(), 0);
        Ok(())
    })
}
