//! A wire that loses, duplicates, reorders and delays frames.
//!
//! The kernel's own implementation (netem) is not available everywhere. This one needs only packet
//! sockets.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::netns::Netns;
use crate::raw::Tap;

/// Buffer size in bytes: more than any frame of an underlay without segmentation offload.
const LONGEST: usize = 16 << 10;
/// Maximum number of frames that overtake a held frame.
const OVERTAKING: u32 = 40;
/// Held frames are sent when no frame has arrived for this many milliseconds.
const HELD_MS: u8 = 5;

/// What a wire does to frames: fractions of all frames, between 0 and 1, and a delay.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Roughness {
    /// Fraction that never arrives.
    pub lost: f64,
    /// Fraction that arrives twice.
    pub doubled: f64,
    /// Fraction that arrives after up to 40 later frames.
    pub late: f64,
    /// Delay of every frame, in each direction.
    pub delay: Duration,
}

/// Counters of a wire, in frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Frames that entered the wire, whatever became of them.
    pub passed: u64,
    /// Frames that were dropped.
    pub lost: u64,
    /// Frames that were sent twice.
    pub doubled: u64,
    /// Frames that were held to be overtaken.
    pub late: u64,
}

/// A rough wire between two interfaces of a namespace. Dropping it ends it.
#[derive(Debug)]
pub struct Wire {
    stop: Arc<AtomicBool>,
    done: Arc<Mutex<Done>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Wire {
    pub(crate) fn start(
        netns: &Netns,
        ends: [&str; 2],
        roughness: Roughness,
        seed: u64,
    ) -> Result<Self> {
        let taps = [Tap::open(netns, ends[0])?, Tap::open(netns, ends[1])?];
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let thread = std::thread::spawn({
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            move || carry(&taps, roughness, StdRng::seed_from_u64(seed), &stop, &done)
        });
        Ok(Self { stop, done, thread: Some(thread) })
    }

    /// Returns the counters so far.
    pub fn done(&self) -> Done {
        *self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stop(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map_or(Ok(()), |thread| {
            thread.join().map_err(|_| anyhow!("the rough wire panicked"))?
        })
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        // A caller that needs the error calls `stop`.
        drop(self.stop());
    }
}

/// Delayed frames of one direction, each with the time at which it may go on.
type UnderWay = VecDeque<(Instant, Vec<u8>)>;

/// Held frames of one direction, each with the number of frames that must still overtake it.
type Held = VecDeque<(u32, Vec<u8>)>;

fn carry(
    taps: &[Tap; 2],
    roughness: Roughness,
    mut rng: StdRng,
    stop: &AtomicBool,
    done: &Mutex<Done>,
) -> Result<()> {
    let mut buffer = vec![0; LONGEST];
    let mut held = [Held::new(), Held::new()];
    let mut under_way = [UnderWay::new(), UnderWay::new()];
    while !stop.load(Ordering::Relaxed) {
        let mut ready = taps.each_ref().map(|tap| PollFd::new(tap.as_fd(), PollFlags::POLLIN));
        match poll(&mut ready, PollTimeout::from(HELD_MS)) {
            Ok(0) => {
                for (tap, held) in taps.iter().rev().zip(&mut held) {
                    held.drain(..).try_for_each(|(_, frame)| tap.send(&frame))?;
                }
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
        for (number, (held, under_way)) in held.iter_mut().zip(&mut under_way).enumerate() {
            let (from, to) = (&taps[number], &taps[1 - number]);
            let now = Instant::now();
            for _ in 0..64 {
                let Some(length) = from.receive(&mut buffer)? else { break };
                under_way.push_back((now + roughness.delay, buffer[..length].to_vec()));
            }
            while let Some((_, frame)) = under_way.pop_front_if(|(at, _)| *at <= now) {
                pass(&frame, to, roughness, &mut rng, held, &mut done)?;
            }
        }
    }
    Ok(())
}

fn pass(
    frame: &[u8],
    to: &Tap,
    roughness: Roughness,
    rng: &mut StdRng,
    held: &mut Held,
    done: &mut Done,
) -> Result<()> {
    done.passed += 1;
    if rng.random_bool(roughness.lost) {
        done.lost += 1;
        return Ok(());
    }
    if rng.random_bool(roughness.late) {
        done.late += 1;
        held.push_back((rng.random_range(1..=OVERTAKING), frame.to_vec()));
        return Ok(());
    }
    to.send(frame)?;
    if rng.random_bool(roughness.doubled) {
        done.doubled += 1;
        to.send(frame)?;
    }
    for (left, _) in held.iter_mut() {
        *left -= 1;
    }
    while let Some(at) = held.iter().position(|(left, _)| *left == 0) {
        if let Some((_, frame)) = held.remove(at) {
            to.send(&frame)?;
        }
    }
    Ok(())
}
