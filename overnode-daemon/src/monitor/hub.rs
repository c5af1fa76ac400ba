//! Distributes events to readers. A reader that is too slow misses events and learns how many. The
//! sender never waits for a reader.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use overnode_api::{EventKind, MonitorEvent};

/// Maximum number of concurrent readers.
pub const MAX_READERS: usize = 16;
/// Maximum number of events queued for the slowest reader.
const QUEUE_LEN: usize = 1024;

/// The hub that events are sent to. Clones share one hub.
#[derive(Clone, Debug)]
pub struct Hub(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// The sender; `None` once the daemon is ending.
    lines: Mutex<Option<broadcast::Sender<Bytes>>>,
    readers: AtomicUsize,
}

/// Why another reader is not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotRead {
    /// There are already [`MAX_READERS`] readers.
    #[error("{MAX_READERS} monitors already watch this node: end one of them first")]
    TooMany,
    /// The daemon is ending.
    #[error("the daemon is stopping: `overnode resume` starts the node again")]
    Ending,
}

impl Default for Hub {
    fn default() -> Self {
        let lines = Mutex::new(Some(broadcast::Sender::new(QUEUE_LEN)));
        Self(Arc::new(Shared { lines, readers: AtomicUsize::new(0) }))
    }
}

impl Hub {
    /// Returns true while there is a reader. Senders need not build an event otherwise.
    pub fn is_watched(&self) -> bool {
        self.0.readers.load(Ordering::Relaxed) > 0
    }

    /// Sends an event that happened now to all readers.
    pub fn tell(&self, what: EventKind) {
        self.tell_of(now(), what);
    }

    /// Sends an event that happened at the given time, in milliseconds since 1970, to all readers.
    pub fn tell_of(&self, unix_milliseconds: u64, what: EventKind) {
        if !self.is_watched() {
            return;
        }
        if let Some(lines) = &*self.0.lines.lock().unwrap_or_else(PoisonError::into_inner) {
            // The last reader may have disconnected in the meantime.
            let _ = lines.send(line(unix_milliseconds, what));
        }
    }

    /// Adds a reader, which gets the events that are sent from now on.
    ///
    /// # Errors
    /// Returns [`NotRead`] if there are too many readers or the daemon is ending.
    pub fn read(&self) -> Result<Reader, NotRead> {
        let lines = self.0.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let lines = lines.as_ref().ok_or(NotRead::Ending)?;
        let more = |readers: usize| (readers < MAX_READERS).then_some(readers + 1);
        let counted = self.0.readers.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        counted.map_err(|_| NotRead::TooMany)?;
        Ok(Reader { lines: lines.subscribe(), hub: self.clone() })
    }

    /// Closes the hub. Readers still get their queued events, and nothing after that.
    pub fn close(&self) {
        self.0.lines.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// A subscription to events, until dropped.
#[derive(Debug)]
pub struct Reader {
    lines: broadcast::Receiver<Bytes>,
    hub: Hub,
}

impl Reader {
    /// Returns the next event as a line with its line break, or `None` after the last event.
    /// Cancel-safe.
    pub async fn next(&mut self) -> Option<Bytes> {
        match self.lines.recv().await {
            Ok(line) => Some(line),
            Err(RecvError::Lagged(count)) => Some(line(now(), EventKind::Missed { count })),
            Err(RecvError::Closed) => None,
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.hub.0.readers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Formats an event that happens now as a line, for a single reader.
pub fn line_now(what: EventKind) -> Bytes {
    line(now(), what)
}

fn line(unix_milliseconds: u64, what: EventKind) -> Bytes {
    // All types in an event have a JSON form, so this cannot fail.
    let mut line =
        serde_json::to_vec(&MonitorEvent { unix_milliseconds, what }).unwrap_or_default();
    line.push(b'\n');
    line.into()
}

/// Returns the current time in milliseconds since 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(n: usize) -> EventKind {
        EventKind::Problem { problem: n.to_string() }
    }

    async fn next(reader: &mut Reader) -> EventKind {
        let line = reader.next().await.unwrap();
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        serde_json::from_slice::<MonitorEvent>(&line).unwrap().what
    }

    #[tokio::test]
    async fn every_reader_gets_every_event_in_order_until_the_end() {
        let hub = Hub::default();
        hub.tell(problem(0));
        let mut readers = [hub.read().unwrap(), hub.read().unwrap()];
        for n in 1..4 {
            hub.tell(problem(n));
        }
        hub.close();
        hub.tell(problem(4));
        for reader in &mut readers {
            for n in 1..4 {
                assert_eq!(next(reader).await, problem(n));
            }
            assert_eq!(reader.next().await, None);
        }
        assert_eq!(hub.read().unwrap_err(), NotRead::Ending);
    }

    #[tokio::test]
    async fn a_slow_reader_learns_how_many_events_it_missed() {
        let hub = Hub::default();
        let mut slow = hub.read().unwrap();
        for n in 0..QUEUE_LEN + 10 {
            hub.tell(problem(n));
        }
        assert_eq!(next(&mut slow).await, EventKind::Missed { count: 10 });
        assert_eq!(next(&mut slow).await, problem(10));
    }

    #[test]
    fn the_number_of_readers_is_limited() {
        let hub = Hub::default();
        assert!(!hub.is_watched());
        let mut readers: Vec<Reader> = (0..MAX_READERS).map(|_| hub.read().unwrap()).collect();
        assert_eq!(hub.read().unwrap_err(), NotRead::TooMany);
        readers.pop();
        assert!(hub.read().is_ok());
        readers.clear();
        assert!(!hub.is_watched());
    }
}
