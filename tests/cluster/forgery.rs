//! Tests of containers that impersonate others: through positions of partial checksums, through
//! probes, and through paths that check less than others.

use std::collections::BTreeMap;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::flow::MARKER;
use lab::pcap::{TCP, UDP};
use lab::raw::{
    Frame, GSO_TCPV4, GSO_UDP, GSO_UDP_L4, Injector, Listener, Offload, SOURCE, aimed,
    begins_in_header, is_hostile, leave_checksum, octets, packet, wanted,
};
use lab::{Container, Host, Lab, eventually};
use serde_json::json;

use crate::spoofing::{learnt_mac, own_mac};
use crate::support::{
    TIMEOUT, attached, counter, in_lab, launch_all, list, peer, wait_for_workers,
};

const INTERFACE: &str = "overnode0";
/// Number of frames between two reads of the received ones. Less than any queue holds.
const BATCH: usize = 250;
/// Milliseconds after which no more frames are expected.
const QUIET_MS: u16 = 300;

/// See [`lab::raw::packet`].
fn frame(
    thief: &Container,
    gateway: [u8; 6],
    to: IpAddr,
    protocol: u8,
    len: usize,
) -> Result<Vec<u8>> {
    Ok(packet([gateway, own_mac(thief)?], [thief.address(), to], protocol, len))
}

struct Scene {
    thief: Container,
    /// The container that the thief tries to impersonate.
    neighbor: Container,
    near: Container,
    far: Container,
}

fn scene(lab: &Lab) -> Result<Scene> {
    launch_all(lab)?;
    let scene = Scene {
        thief: attached(lab.host(1), "thief")?,
        neighbor: attached(lab.host(1), "neighbor")?,
        near: attached(lab.host(1), "near")?,
        far: attached(lab.host(2), "far")?,
    };
    scene.thief.reach(scene.far.address(), TIMEOUT)?;
    scene.neighbor.reach(scene.far.address(), TIMEOUT)?;
    Ok(scene)
}

/// Results of sending frames: how many the kernel accepted, how many arrived with the thief's
/// address, and how many with each other address.
#[derive(Debug, Default)]
struct Arrived {
    sent: usize,
    honest: usize,
    foreign: BTreeMap<[u8; 4], usize>,
}

/// Sends frames, and completes the checksum of each frame that arrives at `to` as its receiver
/// would.
fn send(thief: &Container, to: &Container, frames: &[Frame]) -> Result<Arrived> {
    let listener = Listener::open(to.netns(), INTERFACE)?;
    let injector = Injector::open(thief.netns(), INTERFACE)?;
    let own = octets(thief.address());
    let mut arrived = Arrived::default();
    let take = |quiet_ms, arrived: &mut Arrived| -> Result<()> {
        for (offload, mut frame) in listener.frames(quiet_ms)? {
            if !frame.windows(4).any(|window| window == &MARKER[..4]) {
                continue;
            }
            offload.finish(&mut frame);
            match frame[SOURCE..SOURCE + 4].try_into()? {
                source if source == own => arrived.honest += 1,
                source => *arrived.foreign.entry(source).or_default() += 1,
            }
        }
        Ok(())
    };
    for batch in frames.chunks(BATCH) {
        arrived.sent += injector.send_offloaded(batch)?;
        take(1, &mut arrived)?;
    }
    take(QUIET_MS, &mut arrived)?;
    Ok(arrived)
}

/// Returns the number of packets that all programs dropped for any reason. A packet with a changed
/// destination, for example, is dropped where it then leads.
fn dropped(lab: &Lab) -> Result<u64> {
    lab.hosts().iter().try_fold(0, |sum, host| {
        let status = host.status()?;
        let drops = list(&status, "counters")?.iter().filter(|counter| counter["dropped"] == true);
        Ok(sum + drops.filter_map(|counter| counter["count"].as_u64()).sum::<u64>())
    })
}

/// Sends frames, and checks that none arrives with a source other than the thief's. Each single
/// packet that does not arrive with its original headers must be dropped and counted. For segments
/// nothing is counted, because the container's own kernel may segment them and complete their
/// checksums first.
fn ensure_refused(
    lab: &Lab,
    scene: &Scene,
    to: &Container,
    frames: &[Frame],
    what: &str,
) -> Result<()> {
    let is_local = to.name == scene.near.name;
    // On the local path, nothing completes the checksum. There, a frame is hostile if its checksum
    // begins in the headers.
    let is_hostile =
        |frame: &Frame| if is_local { begins_in_header(frame) } else { is_hostile(frame) };
    let (hostile, harmless): (Vec<_>, Vec<_>) = frames.iter().cloned().partition(is_hostile);
    let is_one = hostile.iter().chain(&harmless).all(|(offload, _)| offload.gso_type == 0);
    let before = (dropped(lab)?, counter(lab.host(1), "checksum")?);
    let arrived = send(&scene.thief, to, &hostile)?;
    ensure!(arrived.foreign.is_empty(), "{what} to {}: {arrived:?}", to.name);
    if is_one {
        let counted = dropped(lab)? - before.0;
        let misplaced = counter(lab.host(1), "checksum")? - before.1;
        let refused = (arrived.sent - arrived.honest) as u64;
        ensure!(counted >= refused, "{what}: only {counted} of {refused} are counted");
        // Only packets to another host may be sealed, if the checksum happens to change nothing.
        ensure!(!is_local || misplaced == arrived.sent as u64, "{what}: {misplaced}, {arrived:?}");
        // From each start before the source address, both halves of it are hit, unless the programs
        // complete the packet's own checksum instead.
        ensure!(refused == 0 || refused >= 15, "{what} to {}: {arrived:?}", to.name);
        // The kernel rejects some positions, but none from the 20th byte on.
        ensure!(arrived.sent > 80, "{what}: only {} were sent", arrived.sent);
    }
    let arrived = send(&scene.thief, to, &harmless)?;
    ensure!(arrived.foreign.is_empty(), "{what} to {}: {arrived:?}", to.name);
    ensure!(!is_one || arrived.honest == arrived.sent, "{what} to {}: {arrived:?}", to.name);
    Ok(())
}

/// Tries every pair of start and position, in packets that are sealed at once, packets whose
/// checksum the programs complete, and packets that go through the offload veth.
#[test]
fn no_checksum_position_allows_impersonation() -> Result<()> {
    in_lab(Lab::new("places").hosts(2), |lab| {
        let scene = scene(lab)?;
        for to in [&scene.far, &scene.near] {
            let gateway = learnt_mac(&scene.thief, to.address())?;
            for (protocol, len, is_left) in [
                (UDP, 60, false),
                (UDP, 60, true),
                (TCP, 64, true),
                (UDP, 300, false),
                (253, 60, false),
            ] {
                let mut honest = frame(&scene.thief, gateway, to.address(), protocol, len)?;
                if is_left {
                    leave_checksum(&mut honest);
                }
                let wanted = wanted(&honest, scene.neighbor.address());
                let frames = aimed(&honest, &wanted, (0, 0), |_| true);
                let what =
                    format!("protocol {protocol}, {len} bytes, own checksum kept: {is_left}");
                ensure_refused(lab, &scene, to, &frames, &what)?;
            }
        }
        Ok(())
    })
}

#[test]
fn no_checksum_position_in_segments_allows_impersonation() -> Result<()> {
    in_lab(Lab::new("segments").hosts(2), |lab| {
        let scene = scene(lab)?;
        for to in [&scene.far, &scene.near] {
            let gateway = learnt_mac(&scene.thief, to.address())?;
            for (protocol, gso_type) in
                [(UDP, GSO_UDP_L4), (TCP, GSO_TCPV4), (UDP, GSO_UDP), (UDP, GSO_TCPV4)]
            {
                let mut honest = frame(&scene.thief, gateway, to.address(), protocol, 1000)?;
                leave_checksum(&mut honest);
                let wanted = wanted(&honest, scene.neighbor.address());
                let frames = aimed(&honest, &wanted, (gso_type, 400), |place| place < 64);
                ensure_refused(lab, &scene, to, &frames, &format!("segments of type {gso_type}"))?;
            }
        }
        Ok(())
    })
}

/// Moves the thief's flow to the bulk path.
fn move_flow(host: &Host, scene: &Scene, honest: &Frame) -> Result<()> {
    let injector = Injector::open(scene.thief.netns(), INTERFACE)?;
    let before = counter(host, "bulk-sent")?;
    eventually(TIMEOUT, || {
        for _ in 0..20 {
            injector.send_offloaded(&vec![honest.clone(); 10])?;
            std::thread::sleep(Duration::from_millis(2));
        }
        ensure!(counter(host, "bulk-sent")? > before, "the flow does not move to the workers");
        Ok(())
    })
}

#[test]
fn no_checksum_position_on_the_bulk_path_allows_impersonation() -> Result<()> {
    in_lab(Lab::new("bulkplaces").hosts(2), |lab| {
        let scene = scene(lab)?;
        wait_for_workers(lab)?;
        let gateway = learnt_mac(&scene.thief, scene.far.address())?;
        let large = {
            let mut large = frame(&scene.thief, gateway, scene.far.address(), UDP, 20_028)?;
            leave_checksum(&mut large);
            (Offload { checksum: Some((34, 6)), gso_type: GSO_UDP_L4, gso_size: 1000 }, large)
        };
        move_flow(lab.host(1), &scene, &large)?;
        let before = counter(lab.host(1), "bulk-sent")?;
        for (len, gso) in [(60, (0, 0)), (300, (0, 0)), (1000, (GSO_UDP_L4, 400))] {
            let mut honest = frame(&scene.thief, gateway, scene.far.address(), UDP, len)?;
            leave_checksum(&mut honest);
            let wanted = wanted(&honest, scene.neighbor.address());
            // The large packets in between must be less than 50 ms apart, or the flow becomes an
            // ordinary one again.
            let mut frames = Vec::new();
            for (number, frame) in
                aimed(&honest, &wanted, gso, |place| place < 64).into_iter().enumerate()
            {
                if number % 50 == 0 {
                    frames.extend(vec![large.clone(); 3]);
                }
                frames.push(frame);
            }
            let arrived = send(&scene.thief, &scene.far, &frames)?;
            ensure!(arrived.foreign.is_empty(), "{len} bytes: {arrived:?}");
            ensure!(arrived.honest > 0, "{len} bytes: {arrived:?}");
        }
        let moved = counter(lab.host(1), "bulk-sent")? - before;
        ensure!(moved > 1000, "only {moved} packets went to the workers");
        Ok(())
    })
}

/// Sends datagrams in the form of probes from `source` to node 2's own address. Returns their
/// number.
fn flood_with_probes(source: UdpSocket, is_over: &AtomicBool) -> Result<u64> {
    // Kind, version, the size of a path that carries little, and the probe's own size.
    let probe = |kind: u8, sequence: u64| {
        let mut probe = vec![kind, 1, 0, 100, 0, 0, 0, 56];
        probe.extend(sequence.to_be_bytes());
        probe.extend([0; 12]);
        probe
    };
    source.connect("10.39.240.2:6784")?;
    let mut sent = 0;
    let started = Instant::now();
    while !is_over.load(Ordering::Relaxed) {
        // About 10,000 per second.
        let due = started.elapsed().as_millis() as u64 * 10;
        while sent < due {
            let _ = source.send(&probe(1 + (sent % 2) as u8, sent));
            sent += 1;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(sent)
}

fn two_hosts_stay_together(
    lab: &Lab,
    source: UdpSocket,
    far: &Container,
    near: &Container,
) -> Result<()> {
    let received = counter(lab.host(2), "probe-received")?;
    let refused = counter(lab.host(1), "node-address")?;
    let is_over = AtomicBool::new(false);
    let started = Instant::now();
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| flood_with_probes(source, &is_over));
        let watch = || -> Result<()> {
            while started.elapsed() < Duration::from_secs(4) {
                for (host, other) in [(lab.host(1), 2), (lab.host(2), 1)] {
                    let peer = peer(host, other)?.context("the other node is not known")?;
                    let route = &peer["data"]["route"];
                    ensure!(
                        route["path"] == json!("direct"),
                        "{} reports for node {other}: {route}",
                        host.name
                    );
                    ensure!(
                        route["direct_works"] == true,
                        "{} reports for node {other}: {route}",
                        host.name
                    );
                }
            }
            let pings = near.ping(far.address(), 100, Duration::from_millis(1))?;
            ensure!(pings.lost() == 0, "{} pings of 100 were lost", pings.lost());
            Ok(())
        };
        let watched = watch();
        is_over.store(true, Ordering::Relaxed);
        let sent = flood.join().expect("the flooding thread")?;
        watched?;
        let received = counter(lab.host(2), "probe-received")? - received;
        ensure!(received < 500, "{received} probes were received and {sent} were forged");
        let refused = counter(lab.host(1), "node-address")? - refused;
        ensure!(refused >= sent / 2, "only {refused} of {sent} are counted");
        Ok(())
    })
}

#[test]
fn a_container_cannot_separate_two_hosts_with_forged_probes() -> Result<()> {
    in_lab(Lab::new("probes").hosts(2), |lab| {
        let scene = scene(lab)?;
        let address = scene.thief.address();
        let source = scene.thief.netns().enter(move || Ok(UdpSocket::bind((address, 0))?))?;
        two_hosts_stay_together(lab, source, &scene.far, &scene.near)
    })
}

#[test]
fn an_exposed_host_cannot_forge_probes() -> Result<()> {
    in_lab(Lab::new("exposedprobes").hosts(2), |lab| {
        let scene = scene(lab)?;
        let printed = lab.host(1).overnode(&["expose"])?.success()?;
        let address = printed.trim().split('/').next().context("no address")?.parse::<IpAddr>()?;
        let source = lab.host(1).netns().enter(move || Ok(UdpSocket::bind((address, 0))?))?;
        two_hosts_stay_together(lab, source, &scene.far, &scene.near)
    })
}

/// Sends many queries in one packet, repeatedly, so that the flow moves to the workers.
#[test]
fn a_container_cannot_query_another_hosts_name_server_on_the_bulk_path() -> Result<()> {
    in_lab(Lab::new("bulkdns").hosts(2), |lab| {
        let scene = scene(lab)?;
        wait_for_workers(lab)?;
        // A query for none.overnode.local, type A, padded to about 400 bytes by an EDNS option (RFC
        // 7830).
        let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];
        query.extend(b"\x04none\x08overnode\x05local\0\0\x01\0\x01");
        query.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 1, 64, 0, 12, 1, 60]);
        query.extend([0; 316]);
        let address = scene.thief.address();
        let ask = |server: &str| -> Result<usize> {
            let server = server.to_owned();
            let socket = scene.thief.netns().enter(move || {
                let socket = UdpSocket::bind((address, 0))?;
                socket.connect((server.as_str(), 53))?;
                Ok(socket)
            })?;
            let size = query.len() as libc::c_int;
            let at = (&raw const size).cast();
            // SAFETY: pointer and length describe the size.
            let set = unsafe {
                libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, at, 4)
            };
            ensure!(set == 0, "UDP_SEGMENT: {}", std::io::Error::last_os_error());
            socket.set_nonblocking(true)?;
            let queries = query.repeat(40);
            let mut answers = 0;
            for _ in 0..500 {
                let _ = socket.send(&queries);
                let mut answer = [0; 2048];
                while let Ok(len) = socket.recv(&mut answer) {
                    answers += usize::from(len > 12 && answer[2] & 0x80 != 0);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            Ok(answers)
        };
        let own = ask("10.39.240.1")?;
        ensure!(own > 0, "the name server of host1 answers no query");
        let answers = ask("10.39.240.2")?;
        ensure!(answers == 0, "the name server of node 2 answered {answers} queries from host1");
        Ok(())
    })
}

/// An attacker on the wire can tell the receiver's kernel that a sealed message has a partial
/// checksum, as a virtual machine on the same host or a container inside it can.
#[test]
fn an_attacker_on_the_wire_cannot_make_a_receiver_alter_sealed_packets() -> Result<()> {
    // Offset of the inner source address, after Ethernet, IP, UDP and the message's header.
    const INNER_SOURCE: u16 = 14 + 20 + 8 + 16 + 12;
    const MESSAGES: u32 = 50;
    in_lab(Lab::new("wire").hosts(2), |lab| {
        let scene = scene(lab)?;
        let [one, two] = [lab.host(1), lab.host(2)];
        let before = counter(two, "checksum")?;
        let [from, to] = [one, two].map(|host| lab.port(host));
        let wire = Listener::open(lab.underlay(), &from)?;
        let injector = Injector::open(lab.underlay(), &to)?;
        let victim = Listener::open(scene.far.netns(), INTERFACE)?;
        // This is too short for the nodes to look for another route.
        lab.cut_one_way(one, two)?;
        scene.thief.ping(scene.far.address(), MESSAGES, Duration::from_millis(1))?;
        let messages: Vec<_> = wire
            .frames(10)?
            .into_iter()
            .filter(|(_, frame)| {
                frame.len() > 100 && frame[36..38] == [0x1a, 0x80] && frame[42] == 4
            })
            .map(|(_, frame)| (Offload::checksum(INNER_SOURCE, 0), frame))
            .collect();
        ensure!(
            messages.len() >= MESSAGES as usize,
            "only {} messages were captured",
            messages.len()
        );
        injector.send_offloaded(&messages)?;
        let arrived = victim.frames(QUIET_MS)?;
        lab.heal(one, two)?;
        for (offload, mut frame) in arrived {
            offload.finish(&mut frame);
            let source: [u8; 4] = frame[SOURCE..SOURCE + 4].try_into()?;
            ensure!(
                source == octets(scene.thief.address()),
                "a packet arrived from {source:?}: {offload:?}"
            );
        }
        let counted = counter(two, "checksum")? - before;
        ensure!(counted >= u64::from(MESSAGES), "only {counted} are counted");
        Ok(())
    })
}
