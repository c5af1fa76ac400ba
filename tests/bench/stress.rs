//! `cargo xtask bench stress`: many kinds of streams over many kinds of underlays, with every byte
//! verified. It also measures what it costs when flows change their path. All random choices come
//! from a seed.

use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use comfy_table::CellAlignment;
use lab::flow::{Amount, Manner, TcpFlow};
use lab::rough::Roughness;
use lab::{Container, Family, Host, Lab};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::network;
use crate::report;

/// Duration of a scene that includes a rekey. Sessions rekey every 120 s.
const REKEY: Duration = Duration::from_secs(150);
const MEGABYTE: u64 = 1_000_000;
/// Headers of the tunnel over IPv6 (80 bytes) and of the inner TCP and IP (40 bytes).
const HEADERS: u32 = 80 + 40;

/// Options of `cargo xtask bench stress`.
#[derive(Debug, Parser)]
pub(crate) struct Stress {
    /// Number of bytes to send and verify, over all underlays together.
    #[arg(long, value_name = "COUNT", default_value_t = 10_000_000_000)]
    bytes: u64,
    /// Seed of all random choices.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
}

/// An underlay, and the workers' mode.
#[derive(Clone, Copy)]
struct Scene {
    family: Family,
    mtu: u32,
    bulk: &'static str,
    /// Share of all bytes, in percent.
    share: u64,
    at_least: Duration,
}

const SCENES: [Scene; 8] = [
    Scene { at_least: REKEY, ..scene(Family::V4, 1500, "aes", 30) },
    scene(Family::V4, 1500, "chacha", 20),
    scene(Family::V6, 1500, "auto", 15),
    scene(Family::V4, 9000, "auto", 20),
    scene(Family::V4, 1280, "auto", 5),
    scene(Family::V6, 1280, "auto", 5),
    scene(Family::V4, 576, "auto", 2),
    // Baseline for the other scenes.
    scene(Family::V4, 1500, "off", 3),
];

const fn scene(family: Family, mtu: u32, bulk: &'static str, share: u64) -> Scene {
    Scene { family, mtu, bulk, share, at_least: Duration::ZERO }
}

impl fmt::Display for Scene {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.family == Family::V6 { "IPv6" } else { "IPv4" };
        write!(f, "{family}, MTU {}, {}", self.mtu, self.bulk)
    }
}

/// Settings of a round.
struct Round {
    /// Options of both containers that differ from the default: `net.ipv4.NAME` and its value.
    options: Vec<(&'static str, &'static str)>,
    /// The largest segment that the containers announce, in bytes.
    segment: Option<u32>,
    roughness: Option<Roughness>,
    /// Seed of the rough wire.
    seed: u64,
    /// Flows: whether each goes from the first container to the second one, and how it sends.
    flows: Vec<(bool, Manner)>,
    bytes: u64,
}

/// TCP options: the name, its default, and the alternative.
const OPTIONS: [(&str, &str, &str); 4] = [
    ("tcp_timestamps", "1", "0"),
    ("tcp_window_scaling", "1", "0"),
    ("tcp_sack", "1", "0"),
    ("tcp_ecn", "2", "1"),
];

impl Round {
    fn draw(rng: &mut StdRng, scene: &Scene) -> Self {
        let options = OPTIONS
            .iter()
            .filter(|_| rng.random_bool(0.25))
            .map(|(name, _, other)| (*name, *other))
            .collect();
        let segment = rng.random_bool(0.25).then(|| rng.random_range(216..scene.mtu - HEADERS));
        let roughness = rng.random_bool(0.25).then(|| Roughness {
            lost: rng.random_range(0.0..0.003),
            doubled: rng.random_range(0.0..0.01),
            late: rng.random_range(0.0..0.01),
            ..Roughness::default()
        });
        let count = *[1, 1, 4, 16].choose(rng).unwrap_or(&1);
        let flows: Vec<_> = (0..count)
            .map(|_| {
                let manner =
                    if rng.random_bool(0.5) { Manner::Steady } else { Manner::Moody(rng.random()) };
                (rng.random(), manner)
            })
            .collect();
        let bytes = match (&roughness, segment) {
            (Some(_), _) => 40 * MEGABYTE,
            (None, Some(_)) => 100 * MEGABYTE,
            (None, None) => 400 * MEGABYTE,
        };
        Self { options, segment, roughness, seed: rng.random(), flows, bytes }
    }
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let moody = self.flows.iter().filter(|(_, manner)| *manner != Manner::Steady).count();
        write!(f, "{} flows ({moody} with bursts)", self.flows.len())?;
        for (name, value) in &self.options {
            write!(f, ", {name} {value}")?;
        }
        if let Some(segment) = self.segment {
            write!(f, ", segments of {segment} bytes")?;
        }
        if let Some(Roughness { lost, doubled, late, .. }) = self.roughness {
            let percent = |share: f64| 100.0 * share;
            let [lost, doubled, late] = [lost, doubled, late].map(percent);
            write!(f, ", {lost:.2} % lost, {doubled:.2} % duplicated, {late:.2} % delayed")?;
        }
        Ok(())
    }
}

/// Counters of both containers' kernels and of the workers.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    bytes: u64,
    seconds: f64,
    rounds: u64,
    by_workers: u64,
    resent: u64,
    /// Number of times that a sender noticed that its segments were reordered.
    reordered: u64,
    /// Retransmitted segments that had already arrived, as D-SACK reports (RFC 2883).
    needless: u64,
}

impl Counted {
    fn read(containers: &[Container; 2], host: &Host) -> Result<Self> {
        let mut counted = Self::default();
        for container in containers {
            let text = container.netns().enter(|| {
                let [one, other] = ["snmp", "netstat"]
                    .map(|file| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")));
                Ok(one? + &other?)
            })?;
            let value = |name: &str| kernel_counter(&text, name);
            counted.resent += value("RetransSegs")?;
            counted.reordered +=
                value("TCPSACKReorder")? + value("TCPTSReorder")? + value("TCPRenoReorder")?;
            counted.needless += value("TCPDSACKRecv")?;
        }
        let status = host.status()?;
        let peers = status["peers"].as_array().into_iter().flatten();
        let workers = peers.map(|peer| &peer["data"]["bulk"]);
        counted.by_workers = workers
            .flat_map(|bulk| [&bulk["rx_bytes"], &bulk["tx_bytes"]])
            .filter_map(serde_json::Value::as_u64)
            .sum();
        Ok(counted)
    }

    fn add(&mut self, before: &Self, after: &Self) {
        self.resent += after.resent - before.resent;
        self.reordered += after.reordered - before.reordered;
        self.needless += after.needless - before.needless;
        self.by_workers += after.by_workers - before.by_workers;
    }
}

/// Returns a value of `/proc/net/snmp` or `/proc/net/netstat`. Each line of names there is followed
/// by a line of values.
fn kernel_counter(text: &str, name: &str) -> Result<u64> {
    let lines: Vec<&str> = text.lines().collect();
    lines
        .windows(2)
        .find_map(|pair| {
            let at = pair[0].split_whitespace().position(|word| word == name)?;
            pair[1].split_whitespace().nth(at)?.parse().ok()
        })
        .with_context(|| format!("the kernel has no counter {name}"))
}

/// Results of a scene: its smooth rounds, its rough ones, and the number of rekeys.
struct Outcome {
    scene: Scene,
    smooth: Counted,
    rough: Counted,
    rekeys: u64,
}

pub(crate) fn run(arguments: &Stress) -> Result<()> {
    let started = Instant::now();
    let mut outcomes = Vec::new();
    for (number, scene) in SCENES.iter().enumerate() {
        let mut rng = StdRng::seed_from_u64(arguments.seed.wrapping_add(1000 * number as u64));
        let quota = arguments.bytes * scene.share / 100;
        outcomes.push(play(*scene, quota, &mut rng).with_context(|| format!("{scene}"))?);
    }
    print(&outcomes);
    let bytes: u64 = outcomes.iter().map(|it| it.smooth.bytes + it.rough.bytes).sum();
    println!("{bytes} bytes arrived intact in {}", report::spoken(started.elapsed()));
    Ok(())
}

fn play(scene: Scene, quota: u64, rng: &mut StdRng) -> Result<Outcome> {
    let lab = Lab::new("stress").family(scene.family).mtu(scene.mtu).build()?;
    let containers = [lab.host(1).container("a")?, lab.host(2).container("b")?];
    let targets: Vec<IpAddr> = lab.hosts().iter().map(Host::address).collect();
    network::launch(&lab, [&containers[0], &containers[1]], [targets[0], targets[1]], scene.bulk)?;
    let mut outcome =
        Outcome { scene, smooth: Counted::default(), rough: Counted::default(), rekeys: 0 };
    let (started, mut age) = (Instant::now(), 0);
    // A small run only shows that everything works and need not wait for a rekey.
    let at_least = if quota >= 1000 * MEGABYTE { scene.at_least } else { Duration::ZERO };
    loop {
        let moved = outcome.smooth.bytes + outcome.rough.bytes;
        if moved >= quota && started.elapsed() >= at_least {
            return Ok(outcome);
        }
        let mut round = Round::draw(rng, &scene);
        if moved < quota {
            round.bytes = round.bytes.min((quota - moved).max(MEGABYTE * round.flows.len() as u64));
        }
        eprintln!("{scene}: {} of {} MB; {round}", moved / MEGABYTE, quota / MEGABYTE);
        let counted =
            if round.roughness.is_some() { &mut outcome.rough } else { &mut outcome.smooth };
        play_round(&lab, &containers, &round, counted).with_context(|| format!("{round}"))?;
        let now = age_of_keys(lab.host(1))?;
        outcome.rekeys += u64::from(now < age);
        age = now;
    }
}

fn play_round(
    lab: &Lab,
    containers: &[Container; 2],
    round: &Round,
    counted: &mut Counted,
) -> Result<()> {
    for container in containers {
        for (name, usual, _) in OPTIONS {
            let value = round
                .options
                .iter()
                .find(|(other, _)| *other == name)
                .map_or(usual, |(_, value)| value);
            container.run("sysctl", &["-q", "-w", &format!("net.ipv4.{name}={value}")])?;
        }
    }
    for (own, other) in [(0, 1), (1, 0)] {
        // 0 means the largest segment that fits.
        let segment = round.segment.unwrap_or(0).to_string();
        let to = containers[other].address().to_string();
        let route = [
            "route",
            "replace",
            &to,
            "dev",
            "overnode0",
            "advmss",
            &segment,
            "congctl",
            network::CONGESTION,
        ];
        containers[own].netns().ip(&route)?;
    }
    let host = lab.host(2);
    let wire =
        round.roughness.map(|roughness| lab.roughen(host, roughness, round.seed)).transpose()?;
    let before = Counted::read(containers, lab.host(1))?;
    let started = Instant::now();
    let each = round.bytes / round.flows.len() as u64;
    let flows: Vec<TcpFlow> = round
        .flows
        .iter()
        .map(|(forth, manner)| {
            let [a, b] = containers;
            let (from, to) = if *forth { (a, b) } else { (b, a) };
            TcpFlow::start_as(from, to, Amount::Bytes(each), *manner)
        })
        .collect::<Result<_>>()?;
    for flow in flows {
        let received = flow.finish()?;
        ensure!(received.bytes == each, "{} of {each} bytes arrived", received.bytes);
        counted.bytes += received.bytes;
    }
    counted.seconds += started.elapsed().as_secs_f64();
    counted.rounds += 1;
    // Workers report their counters once a second.
    std::thread::sleep(Duration::from_millis(1100));
    counted.add(&before, &Counted::read(containers, lab.host(1))?);
    wire.map_or(Ok(()), |wire| lab.smooth(host, wire))
}

/// Returns the age in seconds of the session keys on the path that bulk flows take.
fn age_of_keys(host: &Host) -> Result<u64> {
    let status = host.status()?;
    let mut peers = status["peers"].as_array().into_iter().flatten().map(|peer| &peer["data"]);
    let data = peers.find(|data| data.is_object()).context("the node has no peer")?;
    let of = if data["bulk"].is_object() { &data["bulk"] } else { data };
    of["session_age_seconds"].as_u64().context("the path has no session keys")
}

fn print(outcomes: &[Outcome]) {
    let mut table = report::table(&[
        "underlay",
        "wire",
        "rounds",
        "MB",
        "Gbit/s",
        "by workers",
        "resent/GB",
        "reordered/GB",
        "needless/GB",
        "rekeys",
    ]);
    for outcome in outcomes {
        for (wire, counted) in [("smooth", outcome.smooth), ("rough", outcome.rough)] {
            if counted.rounds == 0 {
                continue;
            }
            let bytes = counted.bytes as f64;
            let per_gigabyte = |count: u64| format!("{:.0}", count as f64 * 1e9 / bytes);
            table.add_row([
                outcome.scene.to_string(),
                wire.to_owned(),
                counted.rounds.to_string(),
                (counted.bytes / MEGABYTE).to_string(),
                format!("{:.2}", bytes * 8.0 / counted.seconds / 1e9),
                format!("{:.0} %", (100.0 * counted.by_workers as f64 / bytes).min(100.0)),
                per_gigabyte(counted.resent),
                per_gigabyte(counted.reordered),
                per_gigabyte(counted.needless),
                outcome.rekeys.to_string(),
            ]);
        }
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("\n{table}");
}
