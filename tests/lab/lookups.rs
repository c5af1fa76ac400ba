//! A client that looks a name up at a fixed rate, with the patience of an ordinary resolver.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};

/// Time after which a resolver repeats a query, as in `resolv.conf(5)`: `timeout`.
const REPEAT: Duration = Duration::from_secs(5);
/// Queries before it gives up: `attempts`.
const ATTEMPTS: u32 = 2;

/// Look-ups that are going on.
#[derive(Debug)]
pub struct Lookups {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Outcome>>,
}

/// The results of the look-ups.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Number of look-ups.
    pub asked: u32,
    /// Those that a program would have seen fail: when they began, and how they ended.
    pub failed: Vec<(Duration, String)>,
    /// The longest time until an answer.
    pub slowest: Duration,
    /// Those that were answered after more than 100 ms.
    pub slow: u32,
}

struct Pending {
    began: Instant,
    sent: Instant,
    attempts: u32,
}

impl Lookups {
    /// Starts to look up the IPv4 addresses of a name at `server`. `socket` decides the network
    /// namespace.
    ///
    /// # Errors
    /// Fails if the name is not valid, or if the socket cannot be changed.
    pub fn start(
        socket: UdpSocket,
        server: SocketAddr,
        name: &str,
        interval: Duration,
    ) -> Result<Self> {
        let name = Name::from_ascii(name)?;
        socket.set_read_timeout(Some(Duration::from_millis(1)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || run(&socket, server, &name, interval, &stopped));
        Ok(Self { stop, thread })
    }

    /// Stops, and waits for the answers to what was asked.
    ///
    /// # Errors
    /// Fails if the socket failed.
    pub fn stop(self) -> Result<Outcome> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the client panicked"))?
    }
}

fn run(
    socket: &UdpSocket,
    server: SocketAddr,
    name: &Name,
    interval: Duration,
    stop: &AtomicBool,
) -> Result<Outcome> {
    let began = Instant::now();
    let mut outcome = Outcome::default();
    let mut pending: BTreeMap<u16, Pending> = BTreeMap::new();
    let query = |id: u16| -> Result<Vec<u8>> {
        let mut message = Message::query();
        message.metadata.id = id;
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(name.clone(), RecordType::A));
        Ok(message.to_vec()?)
    };
    let mut buffer = [0; 4096];
    let mut next = began;
    loop {
        let now = Instant::now();
        let stops = stop.load(Ordering::Relaxed);
        if stops && pending.is_empty() {
            return Ok(outcome);
        }
        if !stops && now >= next {
            next += interval;
            let id = outcome.asked as u16;
            outcome.asked += 1;
            // An error, such as a refused port, is seen by the resolver as no answer.
            let _ = socket.send_to(&query(id)?, server);
            pending.insert(id, Pending { began: now, sent: now, attempts: 1 });
        }
        for (id, waiting) in &mut pending {
            if now >= waiting.sent + REPEAT && waiting.attempts < ATTEMPTS {
                let _ = socket.send_to(&query(*id)?, server);
                (waiting.sent, waiting.attempts) = (now, waiting.attempts + 1);
            }
        }
        for (_, lost) in pending.extract_if(.., |_, waiting| now >= waiting.sent + REPEAT) {
            outcome.failed.push((lost.began - began, "no answer".to_owned()));
        }
        let Ok((len, from)) = socket.recv_from(&mut buffer) else { continue };
        let answer = Message::from_vec(&buffer[..len])?;
        let Some(asked) = pending.remove(&answer.metadata.id) else { continue };
        let took = asked.began.elapsed();
        outcome.slowest = outcome.slowest.max(took);
        outcome.slow += u32::from(took > Duration::from_millis(100));
        let code = answer.metadata.response_code;
        if from != server {
            outcome.failed.push((asked.began - began, format!("an answer from {from}")));
        } else if code != ResponseCode::NoError || answer.answers.is_empty() {
            outcome.failed.push((asked.began - began, format!("{code}")));
        }
    }
}
