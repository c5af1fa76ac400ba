//! What containers do to be taken for somebody else: places of unfinished checksums, probes, ways
//! in that check less than others.

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
    PATIENCE, attached, counter, in_lab, launch_all, list, peer, wait_for_workers,
};

const INTERFACE: &str = "overnode0";
/// Frames between two looks at what has arrived: fewer than any queue has room for.
const BATCH: usize = 250;
/// After so many milliseconds nothing more arrives.
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
    /// In whose name the thief wants to speak.
    neighbour: Container,
    near: Container,
    far: Container,
}

fn scene(lab: &Lab) -> Result<Scene> {
    launch_all(lab)?;
    let scene = Scene {
        thief: attached(lab.host(1), "thief")?,
        neighbour: attached(lab.host(1), "neighbour")?,
        near: attached(lab.host(1), "near")?,
        far: attached(lab.host(2), "far")?,
    };
    scene.thief.reach(scene.far.address(), PATIENCE)?;
    scene.neighbour.reach(scene.far.address(), PATIENCE)?;
    Ok(scene)
}

/// What came of frames: how many the kernel took, how many arrived with the thief's address, how
/// many with which other one.
#[derive(Debug, Default)]
struct Arrived {
    sent: usize,
    honest: usize,
    foreign: BTreeMap<[u8; 4], usize>,
}

/// Sends frames and looks at each that arrives at `to` as whoever gets it would finish it.
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

/// Packets that all programs have dropped, for whatever reason: another destination, say, is
/// refused where it leads.
fn dropped(lab: &Lab) -> Result<u64> {
    lab.hosts().iter().try_fold(0, |sum, host| {
        let status = host.status()?;
        let drops = list(&status, "counters")?.iter().filter(|counter| counter["dropped"] == true);
        Ok(sum + drops.filter_map(|counter| counter["count"].as_u64()).sum::<u64>())
    })
}

/// Sends frames, and ensures that none arrives from anybody but the thief, and that each that does
/// not arrive with the headers that it had is refused and counted. Segments the container's own
/// kernel may have made before, and checksums with them.
fn ensure_refused(
    lab: &Lab,
    scene: &Scene,
    to: &Container,
    frames: &[Frame],
    what: &str,
) -> Result<()> {
    let is_local = to.name == scene.near.name;
    // Where nobody finishes it on the way, it is enough that the sum begins in the headers.
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
        ensure!(counted >= refused, "{what}: {counted} are counted of {refused}");
        // Sealed is what the sum happens to leave as it was.
        ensure!(!is_local || misplaced == arrived.sent as u64, "{what}: {misplaced}, {arrived:?}");
        // Both halves of the source are hit from each start in front of them, unless the programs
        // have finished the packet's own checksum instead.
        ensure!(refused == 0 || refused >= 15, "{what} to {}: {arrived:?}", to.name);
        // The kernel does not take every place, but from the 20th byte on it does.
        ensure!(arrived.sent > 80, "{what}: {} were sent", arrived.sent);
    }
    let arrived = send(&scene.thief, to, &harmless)?;
    ensure!(arrived.foreign.is_empty(), "{what} to {}: {arrived:?}", to.name);
    ensure!(!is_one || arrived.honest == arrived.sent, "{what} to {}: {arrived:?}", to.name);
    Ok(())
}

/// Every pair of start and place, in packets that are sealed at once, that are finished by the
/// programs, and that go through the normaliser.
#[test]
fn no_place_of_a_checksum_makes_a_container_another_one() -> Result<()> {
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
                let wanted = wanted(&honest, scene.neighbour.address());
                let frames = aimed(&honest, &wanted, (0, 0), |_| true);
                let what =
                    format!("protocol {protocol}, {len} bytes, its own checksum left: {is_left}");
                ensure_refused(lab, &scene, to, &frames, &what)?;
            }
        }
        Ok(())
    })
}

#[test]
fn no_place_of_a_checksum_in_segments_makes_a_container_another_one() -> Result<()> {
    in_lab(Lab::new("segments").hosts(2), |lab| {
        let scene = scene(lab)?;
        for to in [&scene.far, &scene.near] {
            let gateway = learnt_mac(&scene.thief, to.address())?;
            for (protocol, gso_type) in
                [(UDP, GSO_UDP_L4), (TCP, GSO_TCPV4), (UDP, GSO_UDP), (UDP, GSO_TCPV4)]
            {
                let mut honest = frame(&scene.thief, gateway, to.address(), protocol, 1000)?;
                leave_checksum(&mut honest);
                let wanted = wanted(&honest, scene.neighbour.address());
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
    eventually(PATIENCE, || {
        for _ in 0..20 {
            injector.send_offloaded(&vec![honest.clone(); 10])?;
            std::thread::sleep(Duration::from_millis(2));
        }
        ensure!(counter(host, "bulk-sent")? > before, "the flow does not move to the workers");
        Ok(())
    })
}

#[test]
fn no_place_of_a_checksum_on_the_bulk_path_makes_a_container_another_one() -> Result<()> {
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
            let wanted = wanted(&honest, scene.neighbour.address());
            // Fewer than 50 ms of the thief's time, or the flow is an ordinary one again: with
            // large ones in between.
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
        ensure!(moved > 1000, "only {moved} went to the workers");
        Ok(())
    })
}

/// Datagrams as a probe has them, from whoever sends from `source`, to node 2's own address.
fn flood_with_probes(source: UdpSocket, is_over: &AtomicBool) -> Result<u64> {
    // Kind, version, a path that carries little, its own size.
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
        // Some 10,000 a second.
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
                        "{} says of {other}: {route}",
                        host.name
                    );
                    ensure!(route["straight"] == true, "{} says of {other}: {route}", host.name);
                }
            }
            let pings = near.ping(far.address(), 100, Duration::from_millis(1))?;
            ensure!(pings.lost() == 0, "{} pings of 100 were lost", pings.lost());
            Ok(())
        };
        let watched = watch();
        is_over.store(true, Ordering::Relaxed);
        let sent = flood.join().expect("the thread")?;
        watched?;
        let received = counter(lab.host(2), "probe-received")? - received;
        ensure!(received < 500, "{received} probes were received, {sent} were forged");
        let refused = counter(lab.host(1), "node-address")? - refused;
        ensure!(refused >= sent / 2, "{refused} of {sent} are counted");
        Ok(())
    })
}

#[test]
fn a_container_cannot_cut_two_hosts_apart_with_forged_probes() -> Result<()> {
    in_lab(Lab::new("probes").hosts(2), |lab| {
        let scene = scene(lab)?;
        let address = scene.thief.address();
        let source = scene.thief.netns().enter(move || Ok(UdpSocket::bind((address, 0))?))?;
        two_hosts_stay_together(lab, source, &scene.far, &scene.near)
    })
}

#[test]
fn an_exposed_host_cannot_forge_probes_either() -> Result<()> {
    in_lab(Lab::new("exposedprobes").hosts(2), |lab| {
        let scene = scene(lab)?;
        let printed = lab.host(1).overnode(&["expose"])?.success()?;
        let address = printed.trim().split('/').next().context("no address")?.parse::<IpAddr>()?;
        let source = lab.host(1).netns().enter(move || Ok(UdpSocket::bind((address, 0))?))?;
        two_hosts_stay_together(lab, source, &scene.far, &scene.near)
    })
}

/// Many queries in one packet, again and again, so that the flow moves to the workers.
#[test]
fn a_container_cannot_ask_another_hosts_name_server_by_the_bulk_path() -> Result<()> {
    in_lab(Lab::new("bulkdns").hosts(2), |lab| {
        let scene = scene(lab)?;
        wait_for_workers(lab)?;
        // host2.overnode.local, A, padded to some 400 bytes by an EDNS option (RFC 7830).
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
        ensure!(own > 0, "the queries are none: the own node's server does not answer them");
        let answers = ask("10.39.240.2")?;
        ensure!(answers == 0, "node 2's name server has answered {answers} queries from host 1");
        Ok(())
    })
}

/// Somebody on the wire, who can tell the receiver's kernel that a checksum in a sealed message is
/// still to be finished, as a virtual machine beside it or a container under it can.
#[test]
fn nobody_on_the_wire_has_a_receiver_change_what_was_sealed() -> Result<()> {
    // Behind Ethernet, IP, UDP and the message's header.
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
        // Not for so long that the nodes look for another way.
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
            "only {} messages were caught",
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
        ensure!(counted >= u64::from(MESSAGES), "{counted} are counted");
        Ok(())
    })
}
