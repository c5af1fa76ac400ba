//! What the workers know of a peer, and whether its bulk flows are served. Decides; does no I/O and
//! reads no clock.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;

use super::control::{Mode, Report};
use super::message::{Cipher, Hello};
use super::session::Session;
use crate::types::PeerIndex;

/// Longest silence of a peer that gets data, beyond two round trips (ns).
const SILENCE_NS: u64 = 70_000_000;
/// A peer that gets data says hello so often (ns).
pub const FEEDBACK_NS: u64 = 20_000_000;
/// A peer that is not served is asked again after this time (ns).
const ASK_AGAIN_NS: u64 = 500_000_000;
/// A peer that gets nothing for so long (ns) is at rest.
const BUSY_NS: u64 = 500_000_000;
/// Round trip of a peer of which it is not known (ms).
const UNKNOWN_RTT_MS: u32 = 300;

/// Where a peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Where messages go.
    pub remote: SocketAddr,
    /// From which of this host's addresses.
    pub local: Option<IpAddr>,
}

/// A peer, shared by all workers. All times are boot times in ns, 0 for never.
#[derive(Debug)]
pub struct Peer {
    /// Peer index.
    pub index: PeerIndex,
    /// Where it is; follows each authenticated message.
    pub endpoint: ArcSwapOption<Endpoint>,
    /// The session that seals.
    pub current: ArcSwapOption<Session>,
    silence_ns: AtomicU64,
    speeds: [AtomicU32; Cipher::ALL.len()],
    is_served: AtomicBool,
    /// First data sent since it was last heard.
    waiting_since_ns: AtomicU64,
    last_hello_ns: AtomicU64,
    tx_bytes: AtomicU64,
    tx_packets: AtomicU64,
    rx_bytes: AtomicU64,
    rx_packets: AtomicU64,
    last_tx_ns: AtomicU64,
    last_rx_ns: AtomicU64,
    last_data_tx_ns: AtomicU64,
    last_data_rx_ns: AtomicU64,
    silences: AtomicU64,
}

impl Peer {
    /// A peer without a session.
    pub fn new(index: PeerIndex) -> Self {
        Self {
            index,
            endpoint: ArcSwapOption::empty(),
            current: ArcSwapOption::empty(),
            silence_ns: AtomicU64::new(silence_ns(UNKNOWN_RTT_MS)),
            speeds: Default::default(),
            is_served: AtomicBool::new(false),
            waiting_since_ns: AtomicU64::new(0),
            last_hello_ns: AtomicU64::new(0),
            tx_bytes: AtomicU64::new(0),
            tx_packets: AtomicU64::new(0),
            rx_bytes: AtomicU64::new(0),
            rx_packets: AtomicU64::new(0),
            last_tx_ns: AtomicU64::new(0),
            last_rx_ns: AtomicU64::new(0),
            last_data_tx_ns: AtomicU64::new(0),
            last_data_rx_ns: AtomicU64::new(0),
            silences: AtomicU64::new(0),
        }
    }

    /// How long a message to it and back takes.
    pub fn set_rtt(&self, rtt_ms: u32) {
        self.silence_ns.store(silence_ns(rtt_ms), Ordering::Relaxed);
    }

    /// Data was sent. True if none was for a while.
    pub fn sent(&self, packets: u64, bytes: u64, now: u64) -> bool {
        let was_busy = self.is_busy(now);
        self.tx_packets.fetch_add(packets, Ordering::Relaxed);
        self.tx_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.last_tx_ns.store(now, Ordering::Relaxed);
        self.last_data_tx_ns.store(now, Ordering::Relaxed);
        if self.waiting_since_ns.load(Ordering::Relaxed) == 0 {
            self.waiting_since_ns.store(now, Ordering::Relaxed);
        }
        !was_busy
    }

    /// Whether data was sent lately.
    pub fn is_busy(&self, now: u64) -> bool {
        now < self.last_data_tx_ns.load(Ordering::Relaxed) + BUSY_NS
    }

    /// An authenticated message came, with so many bytes of a packet in it (0 for a hello).
    pub fn heard(&self, bytes: u64, now: u64) {
        self.rx_packets.fetch_add(1, Ordering::Relaxed);
        self.last_rx_ns.store(now, Ordering::Relaxed);
        self.waiting_since_ns.store(0, Ordering::Relaxed);
        if bytes != 0 {
            self.rx_bytes.fetch_add(bytes, Ordering::Relaxed);
            self.last_data_rx_ns.store(now, Ordering::Relaxed);
        }
    }

    /// What a peer says of itself.
    pub fn greeted(&self, hello: Hello) {
        for (place, speed) in self.speeds.iter().zip(hello.speeds) {
            place.store(speed, Ordering::Relaxed);
        }
    }

    /// Hello was said.
    pub fn said_hello(&self, now: u64) {
        self.tx_packets.fetch_add(1, Ordering::Relaxed);
        self.last_tx_ns.store(now, Ordering::Relaxed);
        self.last_hello_ns.store(now, Ordering::Relaxed);
    }

    /// When a peer that sends data is to be told that it arrives.
    pub fn feedback_due(&self) -> u64 {
        self.last_hello_ns.load(Ordering::Relaxed) + FEEDBACK_NS
    }

    /// What seals messages to it: what is fastest for the slower of both ends, if it takes that at
    /// all.
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

    /// Whether its bulk flows are served from now on: it was heard under the session that seals,
    /// and has not kept silent since. To be asked every few milliseconds.
    pub fn judge(&self, now: u64) -> bool {
        let has_session = self
            .current
            .load()
            .as_ref()
            .is_some_and(|session| session.is_confirmed() && now < session.expires_ns);
        let was_served = self.is_served.load(Ordering::Relaxed);
        let waiting_since = self.waiting_since_ns.load(Ordering::Relaxed);
        let is_silent =
            waiting_since != 0 && now > waiting_since + self.silence_ns.load(Ordering::Relaxed);
        let has_greeted = self.speeds.iter().any(|speed| speed.load(Ordering::Relaxed) != 0);
        if is_silent && was_served {
            self.silences.fetch_add(1, Ordering::Relaxed);
        }
        let is_served = has_session && has_greeted && !is_silent;
        self.is_served.store(is_served, Ordering::Relaxed);
        is_served
    }

    /// Whether to ask now a peer that could be served and is not.
    pub fn is_to_be_asked(&self, now: u64) -> bool {
        !self.is_served.load(Ordering::Relaxed)
            && now > self.last_hello_ns.load(Ordering::Relaxed) + ASK_AGAIN_NS
            && self.current.load().as_ref().is_some_and(|session| session.is_confirmed())
    }

    /// The peer has no session any more: what it said of itself may not hold for the next one.
    pub fn forget(&self) {
        self.current.store(None);
        self.waiting_since_ns.store(0, Ordering::Relaxed);
        for speed in &self.speeds {
            speed.store(0, Ordering::Relaxed);
        }
    }

    /// Follows where an authenticated message came from.
    pub fn follow(&self, remote: SocketAddr, local: Option<IpAddr>) {
        let endpoint = Endpoint { remote, local };
        if self.endpoint.load().as_deref() != Some(&endpoint) {
            self.endpoint.store(Some(Arc::new(endpoint)));
        }
    }

    /// For the daemon.
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
            last_tx_ns: get(&self.last_tx_ns),
            last_rx_ns: get(&self.last_rx_ns),
            last_data_tx_ns: get(&self.last_data_tx_ns),
            last_data_rx_ns: get(&self.last_data_rx_ns),
            silences: get(&self.silences),
        }
    }
}

fn silence_ns(rtt_ms: u32) -> u64 {
    SILENCE_NS + 2 * u64::from(rtt_ms) * 1_000_000
}

#[cfg(test)]
mod tests {
    use super::super::control::Keys;
    use super::*;

    const MS: u64 = 1_000_000;

    fn served() -> Peer {
        let peer = Peer::new(PeerIndex(2));
        peer.set_rtt(1);
        peer.greeted(Hello { wants_answer: false, speeds: [100, 200] });
        peer.current.store(Some(Arc::new(Session::new(&Keys {
            peer: 2,
            local_index: 1,
            remote_index: 1,
            tx: [1; 32],
            rx: [2; 32],
            created_ns: 0,
            expires_ns: 10_000 * MS,
            is_initiator: true,
        }))));
        assert!(peer.judge(MS));
        peer
    }

    #[test]
    fn a_peer_that_does_not_answer_is_given_up_within_100_ms_and_asked_again() {
        let peer = served();
        peer.sent(1, 100, 1000 * MS);
        peer.sent(1, 100, 1050 * MS);
        assert!(peer.judge(1072 * MS));
        assert!(!peer.judge(1073 * MS));
        assert!(peer.is_to_be_asked(1073 * MS));
        peer.said_hello(1073 * MS);
        assert!(!peer.is_to_be_asked(1573 * MS));
        assert!(peer.is_to_be_asked(1574 * MS));
        peer.heard(0, 1600 * MS);
        assert!(peer.judge(1600 * MS));
        assert_eq!(peer.report(Mode::Auto, [1, 1]).silences, 1);
    }

    #[test]
    fn a_peer_that_answers_is_served_however_long_the_flow_lasts() {
        let peer = served();
        for ms in (1000..9000).step_by(20) {
            peer.sent(1, 100, ms * MS);
            peer.heard(0, (ms + 10) * MS);
            peer.sent(1, 100, (ms + 15) * MS);
            assert!(peer.judge((ms + 19) * MS));
        }
        assert!(peer.judge(9050 * MS));
    }

    #[test]
    fn nothing_is_served_without_a_live_session_or_a_hello() {
        let peer = served();
        assert!(!peer.judge(10_000 * MS), "expired");
        let peer = served();
        peer.forget();
        assert!(!peer.judge(MS) && !peer.is_to_be_asked(1000 * MS));
        let fresh = Peer::new(PeerIndex(2));
        fresh.current.store(served().current.load_full());
        assert!(!fresh.judge(MS), "never greeted");
        assert!(fresh.is_to_be_asked(1000 * MS));
    }

    #[test]
    fn the_cipher_is_what_the_slower_end_does_fastest() {
        let peer = served();
        for (own, theirs, expected) in [
            ([1880, 3980], [1880, 3980], Cipher::Aes),
            ([1880, 3980], [1000, 200], Cipher::ChaCha),
            ([1000, 150], [1880, 3980], Cipher::ChaCha),
            ([1000, 3000], [900, 1200], Cipher::Aes),
        ] {
            peer.greeted(Hello { wants_answer: false, speeds: theirs });
            assert_eq!(peer.cipher(Mode::Auto, own), expected);
            assert_eq!(peer.cipher(Mode::ChaCha, own), Cipher::ChaCha);
            assert_eq!(peer.cipher(Mode::Aes, own), Cipher::Aes);
        }
    }
}
