//! Tests of invariant S4 on the wire: recorded messages that are replayed, unchanged or changed,
//! are dropped and counted by reason.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use lab::raw::{Injector, checksum};
use lab::{Container, Family, Host, Lab};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::support::{MILLISECOND, counter, in_lab, launch_containers, list};

/// All reasons for which a message from the underlay can be dropped.
const REFUSALS: [&str; 9] = [
    "malformed",
    "expired",
    "unknown-index",
    "replayed",
    "too-old",
    "forged",
    "foreign-source",
    "not-here",
    "fragment",
];

/// Records data messages from host1 to host2 during a few pings, and returns them as Ethernet
/// frames.
pub(crate) fn record(lab: &Lab, containers: &[Container]) -> Result<Vec<Vec<u8>>> {
    let capture = lab.host(2).capture()?;
    let stats = containers[0].ping(containers[1].address(), 200, MILLISECOND)?;
    ensure!(stats.lost() == 0, "{} pings were lost", stats.lost());
    let captured = capture.stop()?;
    let target = lab.host(2).address();
    let frames: Vec<Vec<u8>> = captured
        .packets()?
        .iter()
        .filter(|packet| packet.wireguard_type() == Some(4))
        // Keepalives have no ciphertext to tamper with.
        .filter(|packet| packet.ip.is_some_and(|ip| ip.to == target && ip.payload.len() > 32))
        .map(|packet| packet.bytes.to_vec())
        .collect();
    ensure!(frames.len() >= 200, "only {} data messages were recorded", frames.len());
    Ok(frames)
}

/// Returns the underlay's end of host2's cable. Frames sent here arrive at host2 as if they came
/// from the network.
pub(crate) fn attacker(lab: &Lab) -> Result<Injector> {
    // Frames that are sent into this end of the veth come out on the host.
    Injector::open(lab.underlay(), "p2")
}

fn refusals(host: &Host) -> Result<BTreeMap<String, u64>> {
    let status = host.status()?;
    let counted = list(&status, "counters")?
        .iter()
        .filter_map(|it| Some((it["reason"].as_str()?.to_owned(), it["count"].as_u64()?)))
        .filter(|(reason, _)| REFUSALS.contains(&reason.as_str()))
        .collect();
    Ok(counted)
}

/// Returns how much each counter has increased, without zeros.
fn difference(
    before: &BTreeMap<String, u64>,
    after: &BTreeMap<String, u64>,
) -> BTreeMap<String, u64> {
    after
        .iter()
        .map(|(reason, count)| (reason.clone(), count - before.get(reason).unwrap_or(&0)))
        .filter(|(_, count)| *count > 0)
        .collect()
}

/// Returns the number of packets that the container's interface received.
fn received(container: &Container) -> Result<u64> {
    let links: serde_json::Value =
        serde_json::from_str(&container.netns().ip(&["-j", "-s", "link", "show", "overnode0"])?)?;
    links[0]["stats64"]["rx"]["packets"].as_u64().context("no packet count")
}

fn header_length(family: Family) -> usize {
    14 + if family == Family::V6 { 40 } else { 20 } + 8
}

fn replays(family: Family) -> Result<()> {
    in_lab(Lab::new("replay").hosts(2).family(family), |lab| {
        let containers = launch_containers(lab)?;
        let frames = record(lab, &containers)?;
        let attacker = attacker(lab)?;
        let (before, delivered) = (refusals(lab.host(2))?, received(&containers[1])?);
        let reversed: Vec<&Vec<u8>> = frames.iter().rev().collect();
        for _ in 0..5 {
            attacker.send_all(&frames)?;
            attacker.send_all(&reversed)?;
        }
        let refused = difference(&before, &refusals(lab.host(2))?);
        assert_eq!(refused, BTreeMap::from([("replayed".to_owned(), 10 * frames.len() as u64)]));
        assert_eq!(received(&containers[1])?, delivered, "a replayed packet was delivered");
        assert_eq!(containers[0].ping(containers[1].address(), 200, MILLISECOND)?.lost(), 0);
        Ok(())
    })
}

#[test]
fn recorded_messages_cannot_be_replayed_over_ipv4() -> Result<()> {
    replays(Family::V4)
}

#[test]
fn recorded_messages_cannot_be_replayed_over_ipv6() -> Result<()> {
    replays(Family::V6)
}

#[test]
fn messages_from_long_ago_are_too_old() -> Result<()> {
    in_lab(Lab::new("old").hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        let frames = record(lab, &containers)?;
        // The replay window is 8128 counters wide.
        let datagrams = lab::flow::udp(&containers[0], &containers[1], 9000, 64, MILLISECOND / 20)?;
        ensure!(datagrams.received > 8200, "too few datagrams: {datagrams:?}");
        let before = counter(lab.host(2), "too-old")?;
        attacker(lab)?.send_all(&frames)?;
        assert_eq!(counter(lab.host(2), "too-old")? - before, frames.len() as u64);
        Ok(())
    })
}

/// The kinds of hostile messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Attack {
    Replay,
    FlipCiphertext,
    FlipTag,
    OtherIndex,
    OtherCounter,
    Truncate,
    Extend,
}

const ATTACKS: [Attack; 7] = [
    Attack::Replay,
    Attack::FlipCiphertext,
    Attack::FlipTag,
    Attack::OtherIndex,
    Attack::OtherCounter,
    Attack::Truncate,
    Attack::Extend,
];

fn forge(rng: &mut StdRng, recorded: &[u8], header: usize, attack: Attack) -> Vec<u8> {
    let mut frame = recorded.to_vec();
    let message = header..frame.len();
    let fresh = |rng: &mut StdRng, frame: &mut Vec<u8>| {
        let counter = rng.random_range(1_000_000_u64..1 << 60);
        frame[header + 8..header + 16].copy_from_slice(&counter.to_le_bytes());
    };
    match attack {
        Attack::Replay => {}
        Attack::FlipCiphertext => {
            fresh(rng, &mut frame);
            let place = rng.random_range(message.start + 16..message.end - 16);
            frame[place] ^= 1 << rng.random_range(0..8);
        }
        Attack::FlipTag => {
            let place = rng.random_range(message.end - 16..message.end);
            frame[place] ^= 1 << rng.random_range(0..8);
        }
        Attack::OtherIndex => {
            let place = rng.random_range(header + 4..header + 8);
            frame[place] ^= 1 << rng.random_range(0..8);
        }
        Attack::OtherCounter => fresh(rng, &mut frame),
        Attack::Truncate => {
            let length = rng.random_range(header + 4..message.end);
            shorten(&mut frame, length, header);
        }
        Attack::Extend => {
            fresh(rng, &mut frame);
            let more = rng.random_range(1..64);
            let length = frame.len() + more;
            frame.resize(length, rng.random());
            shorten(&mut frame, length, header);
        }
    }
    frame
}

/// Sets the length of a frame and of its IPv4 and UDP headers, and corrects the IPv4 checksum.
fn shorten(frame: &mut Vec<u8>, length: usize, header: usize) {
    frame.truncate(length);
    frame[16..18].copy_from_slice(&((length - 14) as u16).to_be_bytes());
    frame[header - 4..header - 2].copy_from_slice(&((length - header + 8) as u16).to_be_bytes());
    frame[header - 2..header].copy_from_slice(&[0, 0]);
    frame[24..26].copy_from_slice(&[0, 0]);
    let sum = checksum(&[&frame[14..34]]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
}

#[test]
fn a_million_hostile_packets_are_all_dropped_and_counted() -> Result<()> {
    const BATCH: usize = 10_000;
    const BATCHES: usize = 100;
    in_lab(Lab::new("million").hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        let frames = record(lab, &containers)?;
        let attacker = attacker(lab)?;
        let header = header_length(Family::V4);
        let mut rng = StdRng::seed_from_u64(6784);
        let (before, delivered) = (refusals(lab.host(2))?, received(&containers[1])?);
        let mut sent: BTreeMap<Attack, usize> = BTreeMap::new();
        let mut short = 0;
        for _ in 0..BATCHES {
            let batch: Vec<Vec<u8>> = (0..BATCH)
                .map(|_| {
                    let attack = ATTACKS[rng.random_range(0..ATTACKS.len())];
                    *sent.entry(attack).or_default() += 1;
                    let recorded = &frames[rng.random_range(0..frames.len())];
                    let frame = forge(&mut rng, recorded, header, attack);
                    short += usize::from(frame.len() < header + 32);
                    frame
                })
                .collect();
            attacker.send_all(&batch)?;
        }
        let refused = difference(&before, &refusals(lab.host(2))?);
        assert_eq!(
            received(&containers[1])?,
            delivered,
            "a hostile packet was delivered: {sent:?}, {refused:?}"
        );
        let total: u64 = refused.values().sum();
        assert_eq!(total, (BATCH * BATCHES) as u64, "{sent:?}, {short} too short, {refused:?}");
        let of = |reason: &str| refused.get(reason).copied().unwrap_or(0);
        let sent_as = |attack| sent[&attack] as u64;
        assert!(
            of("forged") >= sent_as(Attack::FlipCiphertext) + sent_as(Attack::OtherCounter),
            "{refused:?}"
        );
        assert!(of("replayed") >= sent_as(Attack::Replay), "{refused:?}");
        assert!(of("unknown-index") >= sent_as(Attack::OtherIndex), "{refused:?}");
        assert!(of("malformed") > 0, "{refused:?}");
        // The session is unaffected, so honest traffic continues.
        assert_eq!(containers[0].ping(containers[1].address(), 500, MILLISECOND)?.lost(), 0);
        Ok(())
    })
}
