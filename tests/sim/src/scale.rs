//! Measures clusters at rest: how fast they converge, and what each node costs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use overnode_core::ipam::{Layout, Timing};
use overnode_types::{Network, NodeId};
use rand::Rng;

use crate::world::{Event, Sabotage, Settings, World};

/// Largest cluster in which every node connects to every other one by default. In larger clusters,
/// each node has about [`LINKS`] connections, plus those to IDs 1 to 4.
const FULL_MESH: u16 = 100;
const LINKS: usize = 12;
/// Time after which all nodes must know a change.
const MOST_AFTER_CHANGE: Duration = Duration::from_secs(5);
/// Maximum memory of a node in bytes.
const MOST_MEMORY: u64 = 64 << 20;

struct Row {
    nodes: u16,
    cold: Duration,
    primed: Duration,
    change: Duration,
    messages: f64,
    bytes: f64,
    memory: u64,
    paths: Duration,
    took: Duration,
}

/// Measures clusters of these sizes and prints a table. Returns false if a cluster exceeds a limit.
pub fn table(sizes: &[u16], is_full: bool) -> bool {
    println!(
        "{:>6} {:>12} {:>12} {:>12} {:>14} {:>14} {:>12} {:>12} {:>8}",
        "nodes",
        "cold start",
        "all primed",
        "one change",
        "messages/min",
        "bytes/min",
        "memory",
        "paths",
        "took"
    );
    let mut rows: Vec<Row> = Vec::new();
    for size in sizes {
        let row = measure(*size, is_full || *size <= FULL_MESH);
        println!(
            "{:>6} {:>10.2} s {:>10.2} s {:>10.2} s {:>14.1} {:>14.0} \
             {:>8.1} MiB {:>9.3} ms {:>6.0} s",
            row.nodes,
            row.cold.as_secs_f64(),
            row.primed.as_secs_f64(),
            row.change.as_secs_f64(),
            row.messages,
            row.bytes,
            row.memory as f64 / f64::from(1 << 20),
            row.paths.as_secs_f64() * 1000.0,
            row.took.as_secs_f64(),
        );
        rows.push(row);
    }
    println!(
        "messages and bytes: sent by one idle node, without path probes; \
         memory: of one node; paths: CPU time to compute all of them once"
    );
    if !is_full {
        println!(
            "up to {FULL_MESH} nodes form a full mesh; in larger clusters, each node connects to \
             IDs 1 to 4 and {LINKS} others"
        );
    }
    let linear = rows.windows(2).all(|pair| {
        let growth = f64::from(pair[1].nodes) / f64::from(pair[0].nodes);
        pair[1].bytes <= pair[0].bytes * growth
    });
    linear && rows.iter().all(|row| row.change <= MOST_AFTER_CHANGE && row.memory < MOST_MEMORY)
}

fn measure(nodes: u16, is_full: bool) -> Row {
    let began = Instant::now();
    let memory = resident();
    let mut world =
        World::new(Settings { seed: 1, nodes, sabotage: Sabotage::None, verbose: false });
    world.is_rough = false;
    world.pace = Duration::from_millis(250);
    world.network = Network::default();
    world.layout = Layout::new(world.network).expect("a valid network");
    world.timing = Timing::default();
    let ids = world.ids();
    if !is_full {
        let mut mesh = BTreeSet::new();
        for id in &ids {
            for owner in &ids[..4] {
                mesh.insert((*id.min(owner), *id.max(owner)));
            }
            for _ in 0..LINKS / 2 {
                let other = ids[world.rng.random_range(0..ids.len())];
                mesh.insert((*id.min(&other), *id.max(&other)));
            }
        }
        mesh.retain(|(a, b)| a != b);
        world.mesh = Some(mesh);
    }
    for id in &ids {
        let delay = world.random(0.0, 1.0);
        world.after(delay, Event::Launch(*id));
    }
    let start = world.now;
    let mut cold = None;
    let mut primed = None;
    let mut progress = Progress::new(nodes);
    while (cold.is_none() || primed.is_none()) && world.now - start < Duration::from_secs(300) {
        world.run(Duration::from_millis(250));
        progress.show("cold start", &world);
        if cold.is_none() && knows_all(&world) {
            cold = Some(world.now - start);
        }
        let is_primed = |id: &NodeId| {
            world.hosts[id].node.as_ref().is_some_and(|node| node.ipam.check_ready().is_ok())
        };
        if primed.is_none() && ids.iter().all(is_primed) {
            primed = Some(world.now - start);
        }
    }
    for _ in 0..30 {
        world.run(Duration::from_secs(1));
        progress.show("settling", &world);
    }
    let change = one_change(&mut world);
    for _ in 0..60 {
        world.run(Duration::from_secs(1));
        progress.show("settling", &world);
    }
    let before = world.traffic;
    for _ in 0..300 {
        world.run(Duration::from_secs(1));
        progress.show("idle", &world);
    }
    let minutes = 5.0 * f64::from(nodes);
    let traffic = world.traffic;
    let last = ids[ids.len() - 1];
    let node = world.node(last).expect("the last node runs");
    assert_eq!(
        node.gossip.paths().len(),
        usize::from(nodes) - 1,
        "the last node does not reach all others"
    );
    // Unlike paths, branches are computed on each call, by the same graph traversal.
    let clock = Instant::now();
    let branches = node.gossip.branches(last).len();
    let paths = clock.elapsed();
    assert!(branches > 0, "the last node has no neighbors");
    Row {
        nodes,
        cold: cold.unwrap_or(Duration::MAX),
        primed: primed.unwrap_or(Duration::MAX),
        change,
        messages: (traffic.messages - before.messages) as f64 / minutes,
        bytes: (traffic.bytes - before.bytes) as f64 / minutes,
        memory: resident().saturating_sub(memory) / u64::from(nodes),
        paths,
        took: began.elapsed(),
    }
}

/// Prints a line to standard error every few seconds.
struct Progress {
    nodes: u16,
    last: Instant,
}

impl Progress {
    const INTERVAL: Duration = Duration::from_secs(5);

    fn new(nodes: u16) -> Self {
        Self { nodes, last: Instant::now() }
    }

    fn show(&mut self, phase: &str, world: &World) {
        if self.last.elapsed() < Self::INTERVAL {
            return;
        }
        self.last = Instant::now();
        eprintln!(
            "{} nodes, {phase}: {:.2} s simulated, {} messages, {} MiB sent",
            self.nodes,
            (world.now - world.start).as_secs_f64(),
            world.traffic.messages,
            world.traffic.bytes >> 20
        );
    }
}

/// Gives a node a static address. Returns the time until all other nodes know it.
fn one_change(world: &mut World) -> Duration {
    let start = world.now;
    let Some(&last) = world.ids().last() else { return Duration::MAX };
    let address = "10.32.0.9".parse().expect("an address");
    let now = world.now;
    if let Some(node) = world.node(last) {
        let request = node.ipam.claim(address, "static", now);
        node.waiting.insert(request, "static".into());
    }
    world.pump(last);
    while world.now - start < Duration::from_secs(120) {
        world.run(Duration::from_millis(20));
        let knows = |id: &NodeId| {
            let record = world.hosts[id].node.as_ref().and_then(|node| node.gossip.record(last));
            record.is_some_and(|record| record.claims.contains(&address))
        };
        if world.ids().iter().all(knows) {
            return world.now - start;
        }
    }
    Duration::MAX
}

fn knows_all(world: &World) -> bool {
    let nodes: BTreeMap<_, _> =
        world.hosts.iter().filter_map(|(id, host)| Some((*id, host.node.as_ref()?))).collect();
    nodes.len() == world.hosts.len()
        && nodes.values().all(|node| {
            nodes.iter().all(|(other, truth)| {
                let stamp =
                    |record: &overnode_core::gossip::Record| (record.incarnation, record.version);
                node.gossip.record(*other).map(stamp) == Some(stamp(truth.gossip.own()))
            })
        })
}

/// Returns the resident memory of this process in bytes.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or_default() * 4096
}
