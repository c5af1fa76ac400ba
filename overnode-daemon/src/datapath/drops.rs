//! Receives the records of packets that the programs dropped.

use anyhow::{Context as _, Result};
use aya::maps::{MapData, RingBuf};
use tokio::io::unix::AsyncFd;

use super::Datapath;
use super::clock::boot_now;
use crate::monitor::decode::{Seen, record};
use overnode_types::{BootTime, InterfaceIndex};

/// Maximum number of records returned at a time.
const BATCH: usize = 64;

/// Receiver of the records of dropped packets.
pub struct Drops(AsyncFd<RingBuf<MapData>>);

impl Drops {
    /// Waits for at least one record and returns the pending ones, at most 64. This method is
    /// cancel safe.
    ///
    /// # Errors
    /// Fails if the ring buffer cannot be polled.
    pub async fn recv(&mut self) -> Result<Vec<Seen>> {
        loop {
            let mut ready =
                self.0.readable_mut().await.context("dropped packets cannot be received")?;
            let batch = take(ready.get_inner_mut());
            if !batch.is_empty() {
                return Ok(batch);
            }
            ready.clear_ready();
        }
    }

    /// Returns pending records without waiting, at most as many as [`Drops::recv`] returns.
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
    /// Returns the receiver of dropped packets. It can be taken only once.
    ///
    /// # Errors
    /// Fails if it was taken already, or if the descriptor cannot be registered with the event
    /// loop.
    pub fn drops(&mut self) -> Result<Drops> {
        let mut ring =
            self.maps.drops.take().context("the receiver of dropped packets was already taken")?;
        // Records left over from an earlier daemon are stale.
        while ring.next().is_some() {}
        // SAFETY: the ring owns its descriptor, which never changes. The returned value owns the
        // ring.
        let ring = unsafe { AsyncFd::register(ring) };
        Ok(Drops(ring.context("dropped packets cannot be received")?))
    }

    /// Sets how many more dropped packets the programs may record for each reason. This replaces
    /// whatever is left of an earlier allowance.
    ///
    /// # Errors
    /// Fails if the map cannot be written.
    pub fn set_record_allowance(&mut self, each: u32) -> Result<()> {
        self.maps.set_record_allowance(each)
    }

    /// Returns how long ago a time of the programs' clock was, in milliseconds.
    pub fn milliseconds_since(&self, time: BootTime) -> u64 {
        boot_now().saturating_duration_since(time).as_millis() as u64
    }

    /// Returns the name of an interface at which packets enter the programs: a host-side end, an
    /// underlay interface, or the second end of the offload veth. Returns `None` for any other
    /// interface.
    pub fn interface_name(&self, ifindex: InterfaceIndex) -> Option<&str> {
        let endpoint =
            self.endpoints.iter().find(|(_, index)| **index == ifindex).map(|(name, _)| &**name);
        let underlay = || Some(&*self.underlay.interfaces.get(&ifindex)?.name);
        let offload_veth = || {
            let second = &self.offload_veth.second;
            (second.index == ifindex).then_some(&*second.name)
        };
        endpoint.or_else(underlay).or_else(offload_veth)
    }
}
