//! Packets that programs dropped and recorded.

use anyhow::{Context as _, Result};
use aya::maps::{MapData, RingBuf};
use tokio::io::unix::AsyncFd;

use super::Datapath;
use super::clock::Clock;
use crate::monitor::decode::{Seen, record};

/// Records that are taken at a time, at most.
const BATCH: usize = 64;

/// The dropped packets that the programs hand up.
pub struct Drops(AsyncFd<RingBuf<MapData>>);

impl Drops {
    /// The next ones, at least one. Cancelling loses nothing.
    ///
    /// # Errors
    /// The kernel refuses to wait.
    pub async fn recv(&mut self) -> Result<Vec<Seen>> {
        loop {
            let mut ready =
                self.0.readable_mut().await.context("no dropped packets can be received")?;
            let batch = take(ready.get_inner_mut());
            if !batch.is_empty() {
                return Ok(batch);
            }
            ready.clear_ready();
        }
    }

    /// Those that wait, at most as many as [`Drops::recv`] gives.
    pub fn try_recv(&mut self) -> Vec<Seen> {
        take(self.0.get_mut())
    }
}

fn take(ring: &mut RingBuf<MapData>) -> Vec<Seen> {
    let mut batch = Vec::new();
    while batch.len() < BATCH
        && let Some(item) = ring.next()
    {
        batch.extend(record(&item));
    }
    batch
}

impl Datapath {
    /// The dropped packets. Once: who has them has all.
    ///
    /// # Errors
    /// They are taken already; the event loop refuses.
    pub fn drops(&mut self) -> Result<Drops> {
        let mut ring =
            self.maps.drops.take().context("somebody else receives the dropped packets already")?;
        // What an earlier daemon was told is old by now.
        while ring.next().is_some() {}
        // SAFETY: the ring owns its descriptor, always names the same, and is owned by what is
        // returned.
        let ring = unsafe { AsyncFd::register(ring) };
        Ok(Drops(ring.context("no dropped packets can be received")?))
    }

    /// Lets programs record so many dropped packets for each reason from now on, whatever was left
    /// before.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn allow_records(&mut self, each: u32) -> Result<()> {
        self.maps.allow_records(each)
    }

    /// How long ago a program saw something, in milliseconds.
    pub fn milliseconds_since(&self, boot_ns: u64) -> u64 {
        Clock::now().boot_now().saturating_sub(boot_ns) / 1_000_000
    }

    /// The name of an interface that packets come in by; `None` if it is none of those.
    pub fn interface_name(&self, ifindex: u32) -> Option<&str> {
        let endpoint =
            self.endpoints.iter().find(|(_, index)| **index == ifindex).map(|(name, _)| &**name);
        let underlay = || Some(&*self.underlay.interfaces.get(&ifindex)?.name);
        let normaliser = || {
            let second = &self.normaliser.second;
            (second.index == ifindex).then_some(&*second.name)
        };
        endpoint.or_else(underlay).or_else(normaliser)
    }
}
