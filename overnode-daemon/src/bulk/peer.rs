//! Decides whether a peer's bulk flows are served, from what the workers know of the peer. Does no
//! I/O and reads no clock.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;

use super::control::Report;
use super::message::Hello;
use super::session::Session;
use overnode_api::bulk::Cipher;
use overnode_api::bulk::Mode;
use overnode_types::{BootTime, PeerIndex};

/// Longest accepted silence of a peer that is sent data, on top of two round trips.
const MAX_SILENCE: Duration = Duration::from_millis(70);
/// Interval at which a peer that receives data sends a hello.
pub const FEEDBACK: Duration = Duration::from_millis(20);
/// Interval at which a peer that is not served is sent a hello.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);
/// Time without data after which a peer is idle.
const IDLE_AFTER: Duration = Duration::from_millis(500);
/// Assumed round-trip time while it is unknown, in milliseconds.
const ASSUMED_RTT_MS: u32 = 300;

/// Addresses of the path to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Destination of messages.
    pub remote: SocketAddr,
    /// Local address to send from. `None` leaves the choice to the kernel.
    pub local: Option<IpAddr>,
}

/// A peer, shared by all workers.
#[derive(Debug)]
pub struct Peer {
    /// Peer index.
    pub index: PeerIndex,
    /// Endpoint of the peer. It follows the source of each authenticated message.
    pub endpoint: ArcSwapOption<Endpoint>,
    /// The session that seals messages.
    pub current: ArcSwapOption<Session>,
    /// Longest accepted silence, in nanoseconds.
    silence_ns: AtomicU64,
    speeds: [AtomicU32; Cipher::ALL.len()],
    is_served: AtomicBool,
    /// When data was first sent since the last message from the peer.
    waiting_since: AtomicBootTime,
    last_hello: AtomicBootTime,
    tx_bytes: AtomicU64,
    tx_packets: AtomicU64,
    rx_bytes: AtomicU64,
    rx_packets: AtomicU64,
    last_tx: AtomicBootTime,
    last_rx: AtomicBootTime,
    last_data_tx: AtomicBootTime,
    last_data_rx: AtomicBootTime,
    silences: AtomicU64,
}

impl Peer {
    /// Creates a peer without a session.
    pub fn new(index: PeerIndex) -> Self {
        Self {
            index,
            endpoint: ArcSwapOption::empty(),
            current: ArcSwapOption::empty(),
            silence_ns: AtomicU64::new(silence_ns(ASSUMED_RTT_MS)),
            speeds: Default::default(),
            is_served: AtomicBool::new(false),
            waiting_since: AtomicBootTime::default(),
            last_hello: AtomicBootTime::default(),
            tx_bytes: AtomicU64::new(0),
            tx_packets: AtomicU64::new(0),
            rx_bytes: AtomicU64::new(0),
            rx_packets: AtomicU64::new(0),
            last_tx: AtomicBootTime::default(),
            last_rx: AtomicBootTime::default(),
            last_data_tx: AtomicBootTime::default(),
            last_data_rx: AtomicBootTime::default(),
            silences: AtomicU64::new(0),
        }
    }

    /// Sets the round-trip time, in milliseconds.
    pub fn set_rtt(&self, rtt_ms: u32) {
        self.silence_ns.store(silence_ns(rtt_ms), Ordering::Relaxed);
    }

    /// Records that data was sent. Returns true if none had been sent for a while.
    pub fn record_sent(&self, packets: u64, bytes: u64, now: BootTime) -> bool {
        let was_busy = self.is_busy(now);
        self.tx_packets.fetch_add(packets, Ordering::Relaxed);
        self.tx_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.last_tx.set(now);
        self.last_data_tx.set(now);
        if self.waiting_since.get() == BootTime::NEVER {
            self.waiting_since.set(now);
        }
        !was_busy
    }

    /// Returns true if data was sent recently.
    pub fn is_busy(&self, now: BootTime) -> bool {
        now < self.last_data_tx.get() + IDLE_AFTER
    }

    /// Records an authenticated message. `bytes` is the length of its inner packet, 0 for a hello.
    pub fn record_received(&self, bytes: u64, now: BootTime) {
        self.rx_packets.fetch_add(1, Ordering::Relaxed);
        self.last_rx.set(now);
        self.waiting_since.set(BootTime::NEVER);
        if bytes != 0 {
            self.rx_bytes.fetch_add(bytes, Ordering::Relaxed);
            self.last_data_rx.set(now);
        }
    }

    /// Records the contents of a peer's hello.
    pub fn record_hello_received(&self, hello: Hello) {
        for (current, speed) in self.speeds.iter().zip(hello.speeds) {
            current.store(speed, Ordering::Relaxed);
        }
    }

    /// Records that a hello was sent.
    pub fn record_hello_sent(&self, now: BootTime) {
        self.tx_packets.fetch_add(1, Ordering::Relaxed);
        self.last_tx.set(now);
        self.last_hello.set(now);
    }

    /// Returns the time from which the next hello to a peer that sends data is due.
    pub fn feedback_due(&self) -> BootTime {
        self.last_hello.get() + FEEDBACK
    }

    /// Returns the cipher that seals messages to the peer. In automatic mode this is the cipher
    /// with the higher speed at the slower of both ends. A cipher that one end does not accept has
    /// speed 0.
    pub fn cipher(&self, mode: Mode, own: [u32; Cipher::ALL.len()]) -> Cipher {
        match mode {
            Mode::ChaCha => Cipher::ChaCha,
            Mode::Aes => Cipher::Aes,
            Mode::Off | Mode::Auto => {
                let slower = |cipher: Cipher| {
                    let theirs = self.speeds[cipher as usize].load(Ordering::Relaxed);
                    theirs.min(own[cipher as usize])
                };
                if slower(Cipher::Aes) > slower(Cipher::ChaCha) {
                    Cipher::Aes
                } else {
                    Cipher::ChaCha
                }
            }
        }
    }

    /// Returns true if the peer's bulk flows are served from now on. The peer must have sent a
    /// hello, its sealing session must be confirmed and live, and it must not have fallen silent.
    /// Call it every few milliseconds.
    pub fn update_served(&self, now: BootTime) -> bool {
        let has_session = self
            .current
            .load()
            .as_ref()
            .is_some_and(|session| session.is_confirmed() && now < session.expires);
        let was_served = self.is_served.load(Ordering::Relaxed);
        let waiting_since = self.waiting_since.get();
        let silence = Duration::from_nanos(self.silence_ns.load(Ordering::Relaxed));
        let is_silent = waiting_since != BootTime::NEVER && now > waiting_since + silence;
        let has_greeted = self.speeds.iter().any(|speed| speed.load(Ordering::Relaxed) != 0);
        if is_silent && was_served {
            self.silences.fetch_add(1, Ordering::Relaxed);
        }
        let is_served = has_session && has_greeted && !is_silent;
        self.is_served.store(is_served, Ordering::Relaxed);
        is_served
    }

    /// Returns true if a hello should be sent now to a peer that could be served but is not.
    pub fn should_send_hello(&self, now: BootTime) -> bool {
        !self.is_served.load(Ordering::Relaxed)
            && now > self.last_hello.get() + PROBE_INTERVAL
            && self.current.load().as_ref().is_some_and(|session| session.is_confirmed())
    }

    /// Clears the state of a peer that has no session any more. The speeds in its hello may not
    /// hold for the next session.
    pub fn forget(&self) {
        self.current.store(None);
        self.waiting_since.set(BootTime::NEVER);
        for speed in &self.speeds {
            speed.store(0, Ordering::Relaxed);
        }
    }

    /// Sets the endpoint to the source of an authenticated message.
    pub fn follow(&self, remote: SocketAddr, local: Option<IpAddr>) {
        let endpoint = Endpoint { remote, local };
        if self.endpoint.load().as_deref() != Some(&endpoint) {
            self.endpoint.store(Some(Arc::new(endpoint)));
        }
    }

    /// Returns the report for the daemon.
    pub fn report(&self, mode: Mode, own: [u32; Cipher::ALL.len()]) -> Report {
        let get = |value: &AtomicU64| value.load(Ordering::Relaxed);
        Report {
            peer: self.index.0,
            endpoint: self.endpoint.load().as_ref().map(|endpoint| endpoint.remote),
            is_served: self.is_served.load(Ordering::Relaxed),
            cipher: self.cipher(mode, own),
            tx_bytes: get(&self.tx_bytes),
            tx_packets: get(&self.tx_packets),
            rx_bytes: get(&self.rx_bytes),
            rx_packets: get(&self.rx_packets),
            last_tx_ns: self.last_tx.get(),
            last_rx_ns: self.last_rx.get(),
            last_data_tx_ns: self.last_data_tx.get(),
            last_data_rx_ns: self.last_data_rx.get(),
            silences: get(&self.silences),
        }
    }
}

fn silence_ns(rtt_ms: u32) -> u64 {
    let round_trips = 2 * Duration::from_millis(rtt_ms.into());
    (MAX_SILENCE + round_trips).as_nanos() as u64
}

/// A [`BootTime`] that threads share. [`BootTime::NEVER`] at first.
#[derive(Debug, Default)]
struct AtomicBootTime(AtomicU64);

impl AtomicBootTime {
    fn get(&self) -> BootTime {
        BootTime::from_nanos(self.0.load(Ordering::Relaxed))
    }

    fn set(&self, time: BootTime) {
        self.0.store(time.as_nanos(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::control::Keys;
    use super::*;
    use overnode_types::SessionIndex;

    const fn at(ms: u64) -> BootTime {
        BootTime::from_nanos(ms * 1_000_000)
    }

    fn served() -> Peer {
        let peer = Peer::new(PeerIndex(2));
        peer.set_rtt(1);
        peer.record_hello_received(Hello { wants_answer: false, speeds: [100, 200] });
        peer.current.store(Some(Arc::new(Session::new(&Keys {
            peer: 2,
            local_index: SessionIndex::new(1),
            remote_index: SessionIndex::new(1),
            tx: [1; 32],
            rx: [2; 32],
            created_ns: BootTime::NEVER,
            expires_ns: at(10_000),
            is_initiator: true,
        }))));
        assert!(peer.update_served(at(1)));
        peer
    }

    #[test]
    fn a_silent_peer_is_given_up_within_100_ms_and_asked_again() {
        let peer = served();
        peer.record_sent(1, 100, at(1000));
        peer.record_sent(1, 100, at(1050));
        assert!(peer.update_served(at(1072)));
        assert!(!peer.update_served(at(1073)));
        assert!(peer.should_send_hello(at(1073)));
        peer.record_hello_sent(at(1073));
        assert!(!peer.should_send_hello(at(1573)));
        assert!(peer.should_send_hello(at(1574)));
        peer.record_received(0, at(1600));
        assert!(peer.update_served(at(1600)));
        assert_eq!(peer.report(Mode::Auto, [1, 1]).silences, 1);
    }

    #[test]
    fn a_peer_that_answers_is_served_however_long_the_flow_lasts() {
        let peer = served();
        for ms in (1000..9000).step_by(20) {
            peer.record_sent(1, 100, at(ms));
            peer.record_received(0, at(ms + 10));
            peer.record_sent(1, 100, at(ms + 15));
            assert!(peer.update_served(at(ms + 19)));
        }
        assert!(peer.update_served(at(9050)));
    }

    #[test]
    fn no_peer_is_served_without_a_live_session_and_a_hello() {
        let peer = served();
        assert!(!peer.update_served(at(10_000)), "expired");
        let peer = served();
        peer.forget();
        assert!(!peer.update_served(at(1)) && !peer.should_send_hello(at(1000)));
        let fresh = Peer::new(PeerIndex(2));
        fresh.current.store(served().current.load_full());
        assert!(!fresh.update_served(at(1)), "no hello received");
        assert!(fresh.should_send_hello(at(1000)));
    }

    #[test]
    fn the_cipher_is_the_one_that_the_slower_end_runs_fastest() {
        let peer = served();
        for (own, theirs, expected) in [
            ([1880, 3980], [1880, 3980], Cipher::Aes),
            ([1880, 3980], [1000, 200], Cipher::ChaCha),
            ([1000, 150], [1880, 3980], Cipher::ChaCha),
            ([1000, 3000], [900, 1200], Cipher::Aes),
        ] {
            peer.record_hello_received(Hello { wants_answer: false, speeds: theirs });
            assert_eq!(peer.cipher(Mode::Auto, own), expected);
            assert_eq!(peer.cipher(Mode::ChaCha, own), Cipher::ChaCha);
            assert_eq!(peer.cipher(Mode::Aes, own), Cipher::Aes);
        }
    }
}
