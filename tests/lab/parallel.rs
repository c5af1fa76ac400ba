//! Work on both hosts, and on many containers, at the same time.

use std::panic::resume_unwind;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

/// The same work for both of two hosts at the same time; how long each took.
///
/// # Errors
/// The first host's, or else the other one's.
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

/// Work for each number below `count`, by so many `clients` at a time.
///
/// # Errors
/// That of the first client that fails.
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

/// Milliseconds that each of `count` took of all their time.
pub fn milliseconds_each(took: Duration, count: usize) -> f64 {
    took.as_secs_f64() * 1000.0 / count as f64
}
