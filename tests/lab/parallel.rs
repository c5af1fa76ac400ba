//! Runs work for two hosts, or for many containers, at the same time.

use std::panic::resume_unwind;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

/// Runs the same work for two hosts at the same time. Returns how long each took.
///
/// # Errors
/// Fails with the first host's error, or otherwise with the second's.
pub fn both<T: Sync>(
    one: &T,
    two: &T,
    work: impl Fn(&T) -> Result<()> + Sync,
) -> Result<[Duration; 2]> {
    let timed = |host: &T| -> Result<Duration> {
        let started = Instant::now();
        work(host)?;
        Ok(started.elapsed())
    };
    thread::scope(|scope| {
        let there = scope.spawn(|| timed(two));
        let here = timed(one);
        Ok([here?, there.join().unwrap_or_else(|panic| resume_unwind(panic))?])
    })
}

/// Runs work for each number below `count`, with `clients` threads.
///
/// # Errors
/// Fails with the error of the first client that failed.
pub fn each(count: usize, clients: usize, work: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let work = &work;
        let clients: Vec<_> = (0..clients)
            .map(|client| scope.spawn(move || (client..count).step_by(clients).try_for_each(work)))
            .collect();
        for client in clients {
            client.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        }
        Ok(())
    })
}

/// Returns the mean time of one of `count` items, in milliseconds.
pub fn milliseconds_each(took: Duration, count: usize) -> f64 {
    took.as_secs_f64() * 1000.0 / count as f64
}
