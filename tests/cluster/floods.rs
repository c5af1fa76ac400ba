//! Tests of floods of a node's ports by a stranger on the underlay: honest nodes keep working, and
//! new ones can join.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use lab::flood::{self, Flood};
use lab::flow::{self, Amount};
use lab::ping::Pinging;
use lab::rough::Roughness;
use lab::{Host, Lab, eventually};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use overnode_types::PublicKey;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::support::{
    MILLISECOND, TIMEOUT, TOKEN, all_reach_all, attached, in_lab, launch, launch_all, peer,
    wait_for_peers,
};

const DATA_PORT: u16 = 6784;
const BULK_PORT: u16 = 6783;
/// Datagrams per second to each port.
const PER_SECOND: u32 = 100_000;
/// Time limit of a rekey, before the keys expire. A peer that is asked for a cookie tries again
/// after five seconds, on each path.
const RENEWAL: Duration = Duration::from_secs(60);
/// Number of different frames in a flood.
const FRAMES: usize = 4096;

/// Contents of a flood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Random bytes of any length.
    Garbage,
    /// Random bytes in the form of initiations.
    Initiations,
    /// Initiations with a valid first MAC and random sources, including a node's own address.
    Sealed,
}

/// Returns a payload for a node whose public key is known.
fn payload(kind: Kind, rng: &mut StdRng, victim: &PublicKey) -> Vec<u8> {
    if kind == Kind::Garbage {
        let mut bytes = vec![0; rng.random_range(1..300)];
        rng.fill(&mut bytes[..]);
        return bytes;
    }
    let mut bytes = vec![0; 148];
    rng.fill(&mut bytes[..132]);
    bytes[..4].copy_from_slice(&[1, 0, 0, 0]);
    if kind == Kind::Sealed {
        let key = Blake2s256::new().chain_update(b"mac1----").chain_update(victim.0).finalize();
        let mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(&key).expect("32 bytes are a key");
        let (body, macs) = bytes.split_at_mut(116);
        macs[..16].copy_from_slice(&mac.chain(body).finalize_fixed());
    }
    bytes
}

/// Returns the source that a frame claims. One in eight sealed frames claims to come from the peer.
fn source(
    kind: Kind,
    rng: &mut StdRng,
    number: usize,
    attacker: Ipv4Addr,
    peer: Ipv4Addr,
) -> SocketAddrV4 {
    match kind {
        Kind::Sealed if number.is_multiple_of(8) => SocketAddrV4::new(peer, DATA_PORT),
        Kind::Sealed => {
            SocketAddrV4::new([100, 64, rng.random(), rng.random()].into(), rng.random())
        }
        Kind::Garbage | Kind::Initiations => {
            SocketAddrV4::new(attacker, rng.random_range(1024..=u16::MAX))
        }
    }
}

fn v4(host: &Host) -> Result<Ipv4Addr> {
    match host.address() {
        IpAddr::V4(address) => Ok(address),
        IpAddr::V6(address) => bail!("{address} is not an IPv4 address"),
    }
}

fn public_key(host: &Host) -> Result<PublicKey> {
    Ok(serde_json::from_value(host.status()?["node"]["public_key"].clone())?)
}

/// Floods both UDP ports of a host, or only `port` if it is given.
fn start(
    kind: Kind,
    attacker: &Host,
    victim: &Host,
    peer: &Host,
    port: Option<u16>,
) -> Result<[Flood; 2]> {
    let key = public_key(victim)?;
    let macs = [flood::mac_of(attacker)?, flood::mac_of(victim)?];
    let floods = [DATA_PORT, BULK_PORT].map(|usual| {
        let mut rng = StdRng::seed_from_u64(usual.into());
        let to = SocketAddrV4::new(v4(victim)?, port.unwrap_or(usual));
        let mut frames = Vec::new();
        for number in 0..FRAMES {
            let from = source(kind, &mut rng, number, v4(attacker)?, v4(peer)?);
            frames.push(flood::datagram(macs, from, to, &payload(kind, &mut rng, &key)));
        }
        Flood::of_frames(attacker, frames, PER_SECOND)
    });
    let [data, bulk] = floods;
    Ok([data?, bulk?])
}

/// Checks that both nodes have session keys for both paths with each other.
fn ensure_sessions(hosts: [&Host; 2]) -> Result<()> {
    for (host, other) in [(hosts[0], hosts[1]), (hosts[1], hosts[0])] {
        let peer =
            peer(host, other.number)?.with_context(|| format!("{} is not known", other.name))?;
        let (session, age) =
            (&peer["data"]["session"], &peer["data"]["bulk"]["session_age_seconds"]);
        ensure!(
            session == "established",
            "{}'s session with {} is {session}",
            host.name,
            other.name
        );
        ensure!(age.is_u64(), "{} has no bulk keys with {}", host.name, other.name);
    }
    Ok(())
}

/// Receives the daemon's messages to systemd, which must not block, and counts how often it feeds
/// its watchdog.
fn watch(socket: UnixDatagram) -> Arc<AtomicU64> {
    let fed = Arc::new(AtomicU64::new(0));
    std::thread::spawn({
        let fed = Arc::clone(&fed);
        move || {
            let mut buffer = [0; 256];
            while let Ok(length) = socket.recv(&mut buffer) {
                if buffer[..length].starts_with(b"WATCHDOG=1") {
                    fed.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    });
    fed
}

/// Nodes 2 and 3 already run. Node 1 joins while host 4 floods node 2. Its handshakes with node 2
/// are like any rekey: node 1 initiates, and node 2 has to respond.
fn attack(kind: Kind) -> Result<()> {
    in_lab(Lab::new("floods").hosts(4), |lab| {
        let [newcomer, victim, old, attacker] = lab.hosts() else { unreachable!("four were made") };
        // Emulate systemd, to see whether the daemon keeps feeding its watchdog.
        let notices = lab.folder().join("notify");
        let fed = watch(UnixDatagram::bind(&notices)?);
        let notices = notices.to_string_lossy().into_owned();
        let words = [&["launch", "--id", "2", "--token", TOKEN], &lab.targets()[..]].concat();
        victim
            .overnode_with(&words, &[("NOTIFY_SOCKET", &notices), ("WATCHDOG_USEC", "1000000")])?
            .success()?;
        launch(lab, old)?;
        eventually(TIMEOUT, || ensure_sessions([victim, old]))?;
        let containers = [attached(victim, "c")?, attached(old, "c")?];
        all_reach_all(&containers)?;
        // Replies to spoofed sources need a route.
        victim.netns().ip(&["route", "add", "default", "via", &attacker.address().to_string()])?;

        let floods = start(kind, attacker, victim, old, None)?;
        std::thread::sleep(500 * MILLISECOND);
        let (fed_before, flooded) = (fed.load(Ordering::Relaxed), Instant::now());
        let pings =
            Pinging::start(containers[1].netns(), containers[0].address(), None, 10 * MILLISECOND)?;
        let second = victim.container("second")?;
        let begun = Instant::now();
        victim.attach(&second, &[])?;
        let attaching = begun.elapsed();
        let begun = Instant::now();
        launch(lab, newcomer)?;
        let met = eventually(RENEWAL, || ensure_sessions([newcomer, victim]));
        let meeting = begun.elapsed();
        let path = peer(old, victim.number)?.context("the victim is no longer known")?;
        // A dead path is detected after 1.4 s.
        std::thread::sleep((3000 * MILLISECOND).saturating_sub(meeting));
        let later = peer(old, victim.number)?.context("the victim is no longer known")?;
        let stats = pings.stop()?;
        let (fed, flooded) = (fed.load(Ordering::Relaxed) - fed_before, flooded.elapsed());
        let rates = floods.map(Flood::stop);
        let log = format!(
            "{kind:?}: {rates:?} per second; attached in {attaching:?}, met in {meeting:?}, \
             {} of {} pings lost, watchdog fed {fed} times in {flooded:?}",
            stats.lost(),
            stats.sent
        );
        writeln!(std::io::stderr(), "{log}")?;
        met.with_context(|| log.clone())?;
        ensure!(attaching < Duration::from_secs(1), "{log}");
        for path in [path, later] {
            ensure!(path["reachable"] == true && path["path"] == "direct", "{log}: {path}");
        }
        ensure!(stats.lost() * 20 < stats.sent, "{log}");
        // The daemon feeds the watchdog twice a second. Once a second is required.
        ensure!(fed >= flooded.as_secs(), "{log}");
        Ok(())
    })
}

#[test]
fn garbage_on_both_udp_ports_stops_no_handshake_path_or_attach() -> Result<()> {
    attack(Kind::Garbage)
}

#[test]
fn false_initiations_on_both_udp_ports_stop_no_handshake_path_or_attach() -> Result<()> {
    attack(Kind::Initiations)
}

#[test]
fn spoofed_initiations_with_a_valid_mac_stop_no_handshake_path_or_attach() -> Result<()> {
    attack(Kind::Sealed)
}

/// There are two kinds of connections: some never send a byte, and the others never complete a
/// frame.
#[test]
fn constant_dialing_from_five_addresses_does_not_keep_out_a_slow_node() -> Result<()> {
    const HALF_A_FRAME: [u8; 24] = {
        let mut bytes = [7; 24];
        (bytes[0], bytes[1]) = (0, 48);
        bytes
    };
    // Connections that end before they are accepted occupy no slot, so many have to stay open.
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(hard.min(16384)), hard)?;
    in_lab(Lab::new("dials").hosts(3), |lab| {
        let [victim, slow, attacker] = lab.hosts() else { unreachable!("three were made") };
        // The victim has no targets, so it dials no node.
        victim.overnode(&["launch", "--id", "1", "--token", TOKEN])?.success()?;
        let to = SocketAddr::new(victim.address(), 6783);
        let mut floods = Vec::new();
        for last in 101..106_u8 {
            let source = Ipv4Addr::new(192, 168, 48, last);
            let address = format!("{source}/24");
            attacker.netns().ip(&["address", "add", &address, "dev", attacker.interface()])?;
            let word: &[u8] = if last % 2 == 0 { &[] } else { &HALF_A_FRAME };
            floods.push(Flood::of_connections(attacker.netns(), source, to, (1000, 1000), word));
        }
        let delay = 300 * MILLISECOND;
        let wire = lab.roughen(slow, Roughness { lost: 0.01, delay, ..Roughness::default() }, 3)?;
        std::thread::sleep(1000 * MILLISECOND);
        // The victim does not expect a node there yet, so the connection has no reserved slot.
        let begun = Instant::now();
        slow.overnode(&["launch", "--id", "2", "--token", TOKEN, victim.target()])?.success()?;
        let met = wait_for_peers(slow, 2);
        let meeting = begun.elapsed();
        let rates: Vec<_> = floods.into_iter().map(Flood::stop).collect();
        lab.smooth(slow, wire)?;
        writeln!(std::io::stderr(), "met in {meeting:?} during {rates:?} dials per second")?;
        met.with_context(|| format!("{rates:?} dials per second"))?;
        // One attempt: ten seconds for the handshake, plus the time to resolve and connect.
        ensure!(
            meeting < Duration::from_secs(12),
            "it took {meeting:?} during {rates:?} dials per second"
        );
        ensure!(attached(victim, "c").is_ok(), "the victim cannot attach a container");
        eventually(TIMEOUT, || ensure_sessions([victim, slow]))
    })
}

/// A process without rights on a node's own host, or a container behind its address, dials the
/// other node all the time. Sources that nodes use have slots of their own, which it competes for.
#[test]
fn constant_dialing_from_a_nodes_own_address_does_not_keep_it_out() -> Result<()> {
    const PER_SECOND: u32 = 400;
    in_lab(Lab::new("shared").hosts(2), |lab| {
        launch_all(lab)?;
        let [one, two] = lab.hosts() else { unreachable!("two were made") };
        eventually(TIMEOUT, || ensure_sessions([one, two]))?;
        one.kill_daemon()?;
        let mut floods = Vec::new();
        for (host, other) in [(one, two), (two, one)] {
            let to = SocketAddr::new(other.address(), 6783);
            floods.push(Flood::of_connections(host.netns(), v4(host)?, to, (PER_SECOND, 400), &[]));
        }
        std::thread::sleep(500 * MILLISECOND);
        let begun = Instant::now();
        one.overnode(&["resume"])?.success()?;
        let met = wait_for_peers(one, 2);
        let meeting = begun.elapsed();
        let rates: Vec<_> = floods.into_iter().map(Flood::stop).collect();
        writeln!(std::io::stderr(), "met in {meeting:?} during {rates:?} dials per second")?;
        met?;
        ensure!(
            meeting < Duration::from_secs(12),
            "it took {meeting:?} during {rates:?} dials per second"
        );
        Ok(())
    })
}

/// Compares a flow during a flood of the node's ports with a flow during the same flood of a port
/// without a listener, where the kernel has the same work.
#[test]
fn a_flood_of_both_udp_ports_costs_established_traffic_little() -> Result<()> {
    const ROUNDS: usize = 5;
    const UNSERVED: u16 = 9;
    in_lab(Lab::new("flooded-flow").hosts(3), |lab| {
        let [one, victim, attacker] = lab.hosts() else { unreachable!("three were made") };
        for host in [one, victim] {
            launch(lab, host)?;
        }
        eventually(TIMEOUT, || ensure_sessions([one, victim]))?;
        let containers = [attached(one, "c")?, attached(victim, "c")?];
        all_reach_all(&containers)?;
        victim.netns().ip(&["route", "add", "default", "via", &attacker.address().to_string()])?;
        let measure = |kind, port| -> Result<f64> {
            let floods = start(kind, attacker, victim, one, port)?;
            let flow = flow::tcp(&containers[0], &containers[1], Amount::Time(1000 * MILLISECOND))?;
            floods.into_iter().try_for_each(|flood| flood.stop().map(drop))?;
            Ok(flow.gigabits())
        };
        // The programs drop the first two kinds before they reach the kernel's UDP stack, so the
        // flow gains. The last kind requires knowledge of the node's public key.
        for (kind, least) in [(Kind::Garbage, 0.9), (Kind::Initiations, 0.9), (Kind::Sealed, 0.15)]
        {
            let mut rounds = Vec::new();
            for _ in 0..ROUNDS {
                let (beside, flooded) = (measure(kind, Some(UNSERVED))?, measure(kind, None)?);
                rounds.push((flooded / beside, flooded, beside));
            }
            rounds.sort_by(|a, b| a.0.total_cmp(&b.0));
            writeln!(
                std::io::stderr(),
                "{kind:?}: share, flooded, baseline (Gbit/s): {rounds:.2?}"
            )?;
            ensure!(rounds[ROUNDS / 2].0 > least, "{kind:?}: {rounds:.2?}");
        }
        Ok(())
    })
}
