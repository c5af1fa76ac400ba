//! Consumes a worker's receive ring: messages that the programs put into shared memory. Each ring
//! has one consumer, its worker. [`overnode_ebpf::map::BulkRing`] documents the layout and the
//! rules.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use overnode_ebpf::map::{
    BULK_MESSAGE_LEN, BULK_MESSAGE_SLOTS, BULK_WORKER_SLOTS, BulkMessage, BulkRing, RING_ASLEEP,
    RING_CLOSED, RING_OPEN,
};

use super::address::from_map;
use super::maps::{Cell, Slots};

/// Time to wait after a ring is closed. Programs that were writing to it are done by then.
const SETTLED: Duration = Duration::from_millis(5);

/// The worker's end of its receive ring.
pub struct ReceiveRing {
    rings: Slots<BulkRing>,
    messages: Slots<BulkMessage>,
    number: u32,
    first: u32,
    len: u32,
    /// Number of messages taken out, modulo 2^32.
    tail: u32,
}

/// Source, destination and ECN codepoint of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Source address of the datagram.
    pub remote: SocketAddr,
    /// Address of this host that it was sent to, if the kernel reports it.
    pub local: Option<IpAddr>,
    /// ECN codepoint of the IP header.
    pub ecn: u8,
}

impl ReceiveRing {
    /// Returns the receive rings of `count` workers (at least 1), empty and closed.
    ///
    /// # Errors
    /// Fails if the descriptors are not those of `BULK_RINGS` and `BULK_MESSAGES`, or if there
    /// are fewer rings than workers.
    pub fn take_over(
        rings: BorrowedFd<'_>,
        messages: BorrowedFd<'_>,
        count: u32,
    ) -> Result<Vec<Self>> {
        let len = 1 << (BULK_MESSAGE_SLOTS / count.max(1)).ilog2();
        let mut all = Vec::new();
        for number in 0..count {
            let rings = Slots::map(rings, BULK_WORKER_SLOTS)?;
            let messages = Slots::map(messages, BULK_MESSAGE_SLOTS)?;
            let ring = Self { rings, messages, number, first: number * len, len, tail: 0 };
            ring.cell()
                .context("there are not that many receive rings")?
                .state()
                .store(RING_CLOSED, Ordering::SeqCst);
            all.push(ring);
        }
        std::thread::sleep(SETTLED);
        for ring in &mut all {
            let Some(cell) = ring.cell() else { continue };
            cell.rings().store(count, Ordering::Relaxed);
            cell.first().store(ring.first, Ordering::Relaxed);
            cell.len().store(len, Ordering::Relaxed);
            let taken = cell.head().load(Ordering::Relaxed);
            for number in (0..len).map(|ahead| taken.wrapping_add(ahead)) {
                let place = ring.place(number).context("a receive ring is too short")?;
                place.sequence().store(number, Ordering::Release);
            }
            ring.tail = taken;
        }
        Ok(all)
    }

    fn cell(&self) -> Option<Cell<'_, BulkRing>> {
        self.rings.at(self.number)
    }

    fn state(&self) -> Option<&AtomicU32> {
        Some(self.cell()?.state())
    }

    fn place(&self, number: u32) -> Option<Cell<'_, BulkMessage>> {
        self.messages.at(self.first + (number & (self.len - 1)))
    }

    /// Returns true if messages go to the sockets. The programs close a ring when a message arrives
    /// that does not fit into it.
    pub fn is_closed(&self) -> bool {
        self.state().is_none_or(|state| state.load(Ordering::Relaxed) == RING_CLOSED)
    }

    /// Opens the ring: messages go into it from now on.
    pub fn open(&self) {
        if let Some(state) = self.state() {
            state.store(RING_OPEN, Ordering::SeqCst);
        }
    }

    /// Announces that the worker is about to wait for its sockets. Returns false if it must not
    /// wait, because the ring is not empty.
    pub fn sleep(&self) -> bool {
        let Some(cell) = self.cell() else { return true };
        let slept = cell.state().compare_exchange(
            RING_OPEN,
            RING_ASLEEP,
            Ordering::SeqCst,
            Ordering::SeqCst,
        );
        // Load the head after the exchange above. A program that does not see the worker asleep has
        // reserved its slot, and so advanced the head, before the exchange.
        if cell.head().load(Ordering::SeqCst) == self.tail {
            return true;
        }
        if slept.is_ok() {
            self.wake();
        }
        false
    }

    /// Announces that the worker no longer waits.
    pub fn wake(&self) {
        if let Some(state) = self.state() {
            // The exchange fails if a program opened the ring already when its message went to the
            // socket.
            let _ =
                state.compare_exchange(RING_ASLEEP, RING_OPEN, Ordering::SeqCst, Ordering::SeqCst);
        }
    }

    /// Takes the next message out of the ring into `buffer`, which must have at least
    /// [`BULK_MESSAGE_LEN`] bytes. Returns `None` if the ring is empty.
    pub fn take<'a>(&mut self, buffer: &'a mut [u8]) -> Option<(&'a mut [u8], Origin)> {
        loop {
            let place = self.place(self.tail)?;
            if place.sequence().load(Ordering::Acquire) != self.tail.wrapping_add(1) {
                return None;
            }
            // SAFETY: programs do not touch the slot until its sequence is stored below.
            let message = unsafe { &*place.as_ptr() };
            let len = (message.len as usize).min(BULK_MESSAGE_LEN);
            let origin = Origin {
                remote: SocketAddr::new(
                    from_map(message.remote),
                    u16::from_be(message.remote_port_be),
                ),
                local: Some(from_map(message.local)),
                ecn: message.ecn as u8,
            };
            let to = buffer.get_mut(..len)?;
            to.copy_from_slice(message.bytes.get(..len)?);
            place.sequence().store(self.tail.wrapping_add(self.len), Ordering::Release);
            self.tail = self.tail.wrapping_add(1);
            if len > 0 {
                return buffer.get_mut(..len).map(|bytes| (bytes, origin));
            }
        }
    }
}
