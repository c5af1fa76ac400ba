//! Runs one seed, or many seeds on all cores.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::world::{Counts, Sabotage, Settings, World};

/// Summed results of several runs.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Runs that ended.
    pub seeds: u64,
    /// Events of all runs.
    pub counts: Counts,
    /// Failed runs in which no address was given out twice.
    pub unconverged: u64,
    /// Reasons of the failures, by seed.
    pub failures: BTreeMap<u64, String>,
}

impl Outcome {
    fn add(&mut self, seed: u64, counts: Counts, result: Result<(), String>) {
        self.seeds += 1;
        let sum = &mut self.counts;
        sum.steps += counts.steps;
        sum.partitions += counts.partitions;
        sum.crashes += counts.crashes;
        sum.resets += counts.resets;
        sum.reclaims += counts.reclaims;
        sum.reclaimed_alive += counts.reclaimed_alive;
        sum.lies += counts.lies;
        sum.lost_races += counts.lost_races;
        sum.attaches += counts.attaches;
        sum.granted += counts.granted;
        sum.refused += counts.refused;
        sum.duplicates += counts.duplicates;
        sum.reports += counts.reports;
        if let Err(why) = result {
            self.unconverged += u64::from(counts.duplicates == 0);
            self.failures.insert(seed, why);
        }
    }
}

/// Runs one seed. Returns the reason if the run failed.
pub fn one(settings: Settings) -> (Counts, Result<(), String>) {
    let mut world = World::new(settings);
    let result = world.live();
    (world.counts, result)
}

/// Runs seeds on all cores until all are done or `most_failures` have failed.
pub fn all(
    seeds: Range<u64>,
    nodes: u16,
    sabotage: Sabotage,
    most_failures: usize,
    progress: bool,
) -> Outcome {
    let next = AtomicU64::new(seeds.start);
    let outcome = Mutex::new(Outcome::default());
    let began = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let (counts, result) = one(Settings { seed, nodes, sabotage, verbose: false });
                    let mut sum = outcome.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    if progress && let Err(why) = &result {
                        eprintln!("\rseed {seed}: {why}");
                    }
                    sum.add(seed, counts, result);
                    if progress && sum.seeds % 50 == 0 {
                        eprint!(
                            "\r{} of {} seeds, {:.0} s ",
                            sum.seeds,
                            seeds.end - seeds.start,
                            began.elapsed().as_secs_f64()
                        );
                    }
                    if sum.failures.len() >= most_failures {
                        return;
                    }
                }
            });
        }
    });
    if progress {
        eprintln!();
    }
    outcome.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Runs seeds and prints the results. Returns false if any run failed.
pub fn many(seeds: Range<u64>, nodes: u16) -> bool {
    let began = Instant::now();
    let outcome = all(seeds, nodes, Sabotage::None, 10, true);
    let Outcome { seeds, counts, unconverged, failures } = &outcome;
    println!("seeds        {seeds} of {nodes} nodes");
    println!("steps        {}", counts.steps);
    println!("partitions   {}", counts.partitions);
    println!("crashes      {}", counts.crashes);
    println!("resets       {}", counts.resets);
    println!("reclaims     {}, {} of live nodes", counts.reclaims, counts.reclaimed_alive);
    println!(
        "lies         {}, {} sightings of addresses that the liar announced first",
        counts.lies, counts.lost_races
    );
    println!("attaches     {}, {} refused", counts.attaches, counts.refused);
    println!("reports      {}", counts.reports);
    println!("duplicates   {}", counts.duplicates);
    println!("unconverged  {unconverged}");
    println!("time         {:.1} s", began.elapsed().as_secs_f64());
    for (seed, why) in failures {
        println!("failed: --nodes {nodes} --seed {seed}: {why}");
    }
    failures.is_empty()
}

/// Runs one seed and prints everything that happens. Returns false if the run failed.
pub fn replay(seed: u64, nodes: u16) -> bool {
    let mut world = World::new(Settings { seed, nodes, sabotage: Sabotage::None, verbose: true });
    let result = world.live();
    let counts = world.counts;
    for (id, host) in &world.hosts {
        let Some(node) = &host.node else { continue };
        let links: Vec<_> = node.links.keys().map(|id| id.get()).collect();
        let known: Vec<_> = node
            .gossip
            .records()
            .map(|it| (it.id.get(), it.links.iter().map(|id| id.get()).collect::<Vec<_>>()))
            .collect();
        println!("{id}: links {links:?}, records {known:?}");
    }
    println!("{counts:?}");
    match result {
        Ok(()) => true,
        Err(why) => {
            println!("{why}");
            false
        }
    }
}
