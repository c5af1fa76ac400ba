//! Protects against denial of service (whitepaper sections 5.3 and 5.4.7): the two MACs, cookies
//! under load, and a rate limit per source address.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Mac, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use chacha20poly1305::XChaCha20Poly1305;
use chacha20poly1305::aead::{Aead, Payload};
use rand::Rng;
use rand::rngs::StdRng;
use zeroize::Zeroize;

use super::PeerAddress;
use super::message::{self, CookieReply, MAC_LEN, Macs};
use crate::sources::{Limit, Sources};
use overnode_types::{PublicKey, SessionIndex};

/// Lifetime of a cookie, and of the secret that cookies are made from.
pub(crate) const COOKIE_LIFETIME: Duration = Duration::from_secs(120);
/// Number of handshake messages with a valid `mac1` per second and [`Class`] above which cookies
/// are demanded. Each message costs up to 0.3 ms, so 500 per second take a sixth of a core.
const LOAD_THRESHOLDS: [u32; 3] = [200, 500, 500];
/// Maximum number of cookie replies per second and [`Class`]. Each costs about 4 µs. Spoofed
/// initiations beyond the limit get no answer. Peers are expected at few addresses, so an attacker
/// who spoofs those leaves the peers a fair chance of an answer.
const COOKIE_REPLIES: [u32; 3] = [2_000, 5_000, 2_000];
/// Maximum number of messages with a valid cookie per second that are admitted from all addresses
/// where no peer is expected. The limit applies to these addresses together.
const STRANGERS_ADMITTED: u32 = 300;
/// How long cookies are demanded after the load last exceeded the threshold.
const LOAD_LINGERS: Duration = Duration::from_secs(1);
/// Average interval of handshake messages that one source address may send under load: from the
/// port that nodes use, and from all its other ports together. Processes and containers that share
/// a node's address cannot send from the node's port, so they cannot use up its allowance.
const SOURCE_INTERVAL: Duration = Duration::from_millis(50);
/// Maximum burst of such messages.
const SOURCE_BURST: u32 = 5;

const LABEL_MAC1: &[u8] = b"mac1----";
const LABEL_COOKIE: &[u8] = b"cookie--";

type Cookie = [u8; MAC_LEN];

/// The receiver's side: decides which messages may cost us a Diffie-Hellman computation.
pub(crate) struct LoadGuard {
    mac1_key: [u8; 32],
    cookie_key: [u8; 32],
    secret: [u8; 32],
    secret_until: Option<Instant>,
    loads: [Load; 3],
    /// The port that nodes send from.
    port: u16,
    /// Sources that send from that port.
    nodes: Sources,
    /// Sources that send from other ports.
    others: Sources,
    /// All nodes behind relays together, since their addresses are unknown.
    relayed: Limit,
}

/// Classes of messages that do not compete with each other. A flood in one class leaves the others
/// their share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// An initiation from an address where no peer is expected.
    Stranger,
    /// An initiation from an address where a peer is expected. The address may be spoofed.
    Peer,
    /// An answer to one of our messages. Its sender knows the receiver index that we drew.
    Answer,
}

/// The decision about an initiation or a response.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Process the message.
    Process,
    /// Send this cookie reply instead.
    Demand(Vec<u8>),
    /// Drop it: the sender does not know our public key.
    Stranger,
    /// Drop it: it exceeds a limit.
    Limited,
}

impl LoadGuard {
    /// Guards the node with this public key, on the given UDP port.
    pub(crate) fn new(own: &PublicKey, port: u16) -> Self {
        let sources = || Sources::new(SOURCE_INTERVAL, SOURCE_BURST);
        Self {
            mac1_key: hash(LABEL_MAC1, own),
            cookie_key: hash(LABEL_COOKIE, own),
            secret: [0; 32],
            secret_until: None,
            loads: LOAD_THRESHOLDS.map(Load::new),
            port,
            nodes: sources(),
            others: sources(),
            relayed: Limit::new(SOURCE_INTERVAL, SOURCE_BURST),
        }
    }

    #[cfg(test)]
    pub(crate) fn set_threshold(&mut self, threshold: u32) {
        for load in &mut self.loads {
            load.threshold = threshold;
        }
    }

    /// Judges a message that came from `from` and is to be answered at index `sender`. Calls
    /// `class` only if the first MAC is valid.
    pub(crate) fn judge(
        &mut self,
        macs: &Macs<'_>,
        sender: SessionIndex,
        from: PeerAddress,
        class: impl FnOnce() -> Class,
        now: Instant,
        rng: &mut StdRng,
    ) -> Verdict {
        if !is_mac(&self.mac1_key, &[macs.body], macs.mac1) {
            return Verdict::Stranger;
        }
        let class = class();
        if !self.loads[class as usize].note(now) {
            return Verdict::Process;
        }
        let cookie = self.cookie(from, now, rng);
        let load = &mut self.loads[class as usize];
        if !is_mac(&cookie, &[macs.body, macs.mac1], macs.mac2) {
            if load.replies >= COOKIE_REPLIES[class as usize] {
                return Verdict::Limited;
            }
            load.replies += 1;
            let nonce: [u8; 24] = rng.random();
            let sealed = XChaCha20Poly1305::new(&self.cookie_key.into())
                .encrypt(&nonce.into(), Payload { msg: &cookie, aad: macs.mac1 })
                .ok()
                .and_then(|sealed| sealed.try_into().ok());
            return match sealed {
                Some(sealed) => Verdict::Demand(message::cookie_reply(sender, &nonce, &sealed)),
                None => Verdict::Limited,
            };
        }
        let is_full = class == Class::Stranger && load.admitted >= STRANGERS_ADMITTED;
        if is_full || !self.allow(from, now) {
            return Verdict::Limited;
        }
        let load = &mut self.loads[class as usize];
        load.admitted += 1;
        Verdict::Process
    }

    /// Counts a message with a valid cookie. Returns false if its source has used up its allowance.
    fn allow(&mut self, from: PeerAddress, now: Instant) -> bool {
        match from {
            // The cookie proves both address and port.
            PeerAddress::Direct(from) if from.port() == self.port => {
                self.nodes.allow(from.ip(), now)
            }
            PeerAddress::Direct(from) => self.others.allow(from.ip(), now),
            PeerAddress::Relayed(_) => self.relayed.allow(now),
        }
    }

    fn cookie(&mut self, from: PeerAddress, now: Instant, rng: &mut StdRng) -> Cookie {
        if self.secret_until.is_none_or(|until| until <= now) {
            rng.fill(&mut self.secret);
            self.secret_until = Some(now + COOKIE_LIFETIME);
        }
        // The three inputs differ in length, so a cookie of one kind is never valid for another.
        match from {
            PeerAddress::Direct(SocketAddr::V4(v4)) => {
                mac(&self.secret, &[&v4.ip().octets(), &v4.port().to_be_bytes()])
            }
            PeerAddress::Direct(SocketAddr::V6(v6)) => {
                mac(&self.secret, &[&v6.ip().octets(), &v6.port().to_be_bytes()])
            }
            PeerAddress::Relayed(node) => mac(&self.secret, &[&node.get().to_be_bytes()]),
        }
    }
}

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.secret.zeroize();
    }
}

/// The sender's side: the cookies that one peer demands.
pub(crate) struct CookieJar {
    mac1_key: [u8; 32],
    cookie_key: [u8; 32],
    cookie: Option<(Cookie, Instant)>,
    /// Index and `mac1` of the last message sent. A cookie reply must refer to them.
    sent: Option<(SessionIndex, [u8; MAC_LEN])>,
}

impl CookieJar {
    pub(crate) fn new(peer: &PublicKey) -> Self {
        let (mac1_key, cookie_key) = (hash(LABEL_MAC1, peer), hash(LABEL_COOKIE, peer));
        Self { mac1_key, cookie_key, cookie: None, sent: None }
    }

    /// Fills in the MACs of a message that bears our index `sender`. Returns whether there was a
    /// cookie for the second MAC.
    pub(crate) fn seal(&mut self, bytes: &mut [u8], sender: SessionIndex, now: Instant) -> bool {
        let Some((rest, mac2)) = bytes.split_last_chunk_mut::<MAC_LEN>() else { return false };
        let Some((body, mac1)) = rest.split_last_chunk_mut::<MAC_LEN>() else { return false };
        *mac1 = mac(&self.mac1_key, &[body]);
        self.cookie = self.cookie.filter(|(_, until)| *until > now);
        *mac2 = match &self.cookie {
            Some((cookie, _)) => mac(cookie, &[body, mac1]),
            None => [0; MAC_LEN],
        };
        self.sent = Some((sender, *mac1));
        self.cookie.is_some()
    }

    /// Takes the cookie from a reply. Returns false if the reply matches no message of ours or is
    /// forged.
    pub(crate) fn put(&mut self, reply: &CookieReply<'_>, now: Instant) -> bool {
        let Some((_, mac1)) = self.sent.filter(|(index, _)| *index == reply.receiver) else {
            return false;
        };
        let opened = XChaCha20Poly1305::new(&self.cookie_key.into())
            .decrypt(reply.nonce.into(), Payload { msg: reply.cookie, aad: &mac1 });
        let Some(cookie) = opened.ok().and_then(|cookie| cookie.try_into().ok()) else {
            return false;
        };
        self.cookie = Some((cookie, now + COOKIE_LIFETIME));
        self.sent = None;
        true
    }
}

/// Counts messages of one class per second.
struct Load {
    threshold: u32,
    window: Option<Instant>,
    count: u32,
    /// Cookie replies in this second.
    replies: u32,
    /// Messages admitted with a cookie in this second.
    admitted: u32,
    until: Option<Instant>,
}

impl Load {
    const fn new(threshold: u32) -> Self {
        Self { threshold, window: None, count: 0, replies: 0, admitted: 0, until: None }
    }

    /// Counts one message. Returns true under load.
    fn note(&mut self, now: Instant) -> bool {
        if self
            .window
            .is_none_or(|start| now.saturating_duration_since(start) >= Duration::from_secs(1))
        {
            self.window = Some(now);
            (self.count, self.replies, self.admitted) = (0, 0, 0);
        }
        self.count = self.count.saturating_add(1);
        if self.count > self.threshold {
            self.until = Some(now + LOAD_LINGERS);
        }
        self.until.is_some_and(|until| now < until)
    }
}

/// Returns the initial state with which the eBPF programs check the first MAC of messages to the
/// node with this public key.
pub fn mac1_state(own: &PublicKey) -> overnode_ebpf::mac1::State {
    overnode_ebpf::mac1::keyed(&hash(LABEL_MAC1, own))
}

fn hash(label: &[u8], key: &PublicKey) -> [u8; 32] {
    Blake2s256::new().chain_update(label).chain_update(key.0).finalize().into()
}

fn mac(key: &[u8], parts: &[&[u8]]) -> [u8; MAC_LEN] {
    keyed(key, parts).finalize_fixed().into()
}

/// Compares in constant time.
fn is_mac(key: &[u8], parts: &[&[u8]], mac: &[u8; MAC_LEN]) -> bool {
    keyed(key, parts).verify(mac.into()).is_ok()
}

fn keyed(key: &[u8], parts: &[&[u8]]) -> Blake2sMac<U16> {
    let mut state =
        <Blake2sMac<U16> as KeyInit>::new_from_slice(key).expect("keys are at most 32 bytes long");
    for part in parts {
        Update::update(&mut state, part);
    }
    state
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;
    use overnode_types::NodeId;

    const KEY: PublicKey = PublicKey([7; 32]);
    /// The port that nodes send from.
    const PORT: u16 = 6784;

    fn from(port: u16) -> PeerAddress {
        PeerAddress::Direct(([192, 0, 2, 1], port).into())
    }

    fn sealed(jar: &mut CookieJar, now: Instant) -> Vec<u8> {
        let mut bytes =
            message::initiation(SessionIndex::new(42), &[5; message::INITIATION_NOISE_LEN]);
        jar.seal(&mut bytes, SessionIndex::new(42), now);
        bytes
    }

    fn judge(
        guard: &mut LoadGuard,
        bytes: &[u8],
        from: PeerAddress,
        now: Instant,
        rng: &mut StdRng,
    ) -> Verdict {
        let Ok(message::Message::Initiation(parsed)) = message::parse(bytes) else {
            panic!("not an initiation")
        };
        guard.judge(&parsed.macs, parsed.sender, from, || Class::Peer, now, rng)
    }

    fn cookie(verdict: Verdict) -> Vec<u8> {
        let Verdict::Demand(reply) = verdict else { panic!("{verdict:?}") };
        reply
    }

    #[test]
    fn a_wrong_mac1_marks_a_stranger() {
        let (mut guard, mut jar) =
            (LoadGuard::new(&KEY, PORT), CookieJar::new(&PublicKey([8; 32])));
        let (now, mut rng) = (Instant::now(), StdRng::seed_from_u64(1));
        let bytes = sealed(&mut jar, now);
        assert_eq!(judge(&mut guard, &bytes, from(1), now, &mut rng), Verdict::Stranger);
        let good = sealed(&mut CookieJar::new(&KEY), now);
        assert_eq!(judge(&mut guard, &good, from(1), now, &mut rng), Verdict::Process);
        for position in 0..132 {
            let mut bytes = good.clone();
            bytes[position] ^= 0x10;
            if message::parse(&bytes).is_ok() {
                assert_eq!(
                    judge(&mut guard, &bytes, from(1), now, &mut rng),
                    Verdict::Stranger,
                    "byte {position}"
                );
            }
        }
    }

    #[test]
    fn under_load_a_cookie_is_demanded_and_its_bearer_admitted() {
        let (mut guard, mut jar) = (LoadGuard::new(&KEY, PORT), CookieJar::new(&KEY));
        let (now, mut rng) = (Instant::now(), StdRng::seed_from_u64(1));
        guard.set_threshold(0);
        let bytes = sealed(&mut jar, now);
        let reply = cookie(judge(&mut guard, &bytes, from(1), now, &mut rng));
        let Ok(message::Message::CookieReply(mut parsed)) = message::parse(&reply) else {
            panic!("{reply:?}")
        };
        let forged = [0; 32];
        assert!(!jar.put(&CookieReply { cookie: &forged, ..parsed }, now));
        parsed.receiver = SessionIndex::new(43);
        assert!(!jar.put(&parsed, now), "not the index that was sent");
        parsed.receiver = SessionIndex::new(42);
        assert!(jar.put(&parsed, now));
        assert!(!jar.put(&parsed, now), "only one reply is accepted");

        let bytes = sealed(&mut jar, now);
        assert_eq!(judge(&mut guard, &bytes, from(1), now, &mut rng), Verdict::Process);
        cookie(judge(&mut guard, &bytes, from(2), now, &mut rng));
        cookie(judge(
            &mut guard,
            &bytes,
            PeerAddress::Direct(([192, 0, 2, 2], 1).into()),
            now,
            &mut rng,
        ));
        let later = now + COOKIE_LIFETIME;
        cookie(judge(&mut guard, &bytes, from(1), later, &mut rng));
        let bytes = sealed(&mut jar, later);
        assert_eq!(bytes[132..], [0; 16], "the cookie has expired");
    }

    #[test]
    fn load_is_measured_per_second() {
        let mut guard = LoadGuard::new(&KEY, PORT);
        guard.set_threshold(10);
        let (start, mut rng) = (Instant::now(), StdRng::seed_from_u64(1));
        let bytes = sealed(&mut CookieJar::new(&KEY), start);
        let mut judge =
            |at| judge(&mut guard, &bytes, from(1), start + Duration::from_millis(at), &mut rng);
        for at in 0..10 {
            assert_eq!(judge(at), Verdict::Process);
        }
        cookie(judge(10));
        cookie(judge(1009));
        assert_eq!(judge(1010), Verdict::Process);
    }

    #[test]
    fn nodes_behind_relays_need_their_own_cookies_and_share_one_limit() {
        let (mut guard, mut rng) = (LoadGuard::new(&KEY, PORT), StdRng::seed_from_u64(1));
        let now = Instant::now();
        guard.set_threshold(0);
        let node = |id| PeerAddress::Relayed(NodeId::new(id).unwrap());
        let mut jars = [1, 2].map(|id| {
            let mut jar = CookieJar::new(&KEY);
            let bytes = sealed(&mut jar, now);
            let reply = cookie(judge(&mut guard, &bytes, node(id), now, &mut rng));
            let Ok(message::Message::CookieReply(reply)) = message::parse(&reply) else { panic!() };
            assert!(jar.put(&reply, now));
            jar
        });
        let bytes = sealed(&mut jars[0], now);
        cookie(judge(&mut guard, &bytes, node(2), now, &mut rng));
        for _ in 0..SOURCE_BURST {
            assert_eq!(judge(&mut guard, &bytes, node(1), now, &mut rng), Verdict::Process);
        }
        let bytes = sealed(&mut jars[1], now);
        assert_eq!(judge(&mut guard, &bytes, node(2), now, &mut rng), Verdict::Limited);
    }

    #[test]
    fn a_flood_of_one_class_leaves_the_others_their_share() {
        let (mut guard, mut rng) = (LoadGuard::new(&KEY, PORT), StdRng::seed_from_u64(1));
        let now = Instant::now();
        let bytes = sealed(&mut CookieJar::new(&KEY), now);
        let Ok(message::Message::Initiation(parsed)) = message::parse(&bytes) else {
            panic!("not an initiation")
        };
        let mut judge = |class, port| {
            guard.judge(&parsed.macs, parsed.sender, from(port), || class, now, &mut rng)
        };
        let verdicts: Vec<_> = (0..50_000).map(|port| judge(Class::Stranger, port)).collect();
        let count = |wanted: fn(&Verdict) -> bool| {
            verdicts.iter().filter(|verdict| wanted(verdict)).count()
        };
        assert_eq!(count(|verdict| *verdict == Verdict::Process), 200);
        assert_eq!(count(|verdict| matches!(verdict, Verdict::Demand(_))), 2_000);
        assert_eq!(judge(Class::Peer, 1), Verdict::Process);
        assert_eq!(judge(Class::Answer, 1), Verdict::Process);
    }

    #[test]
    fn many_sources_with_cookies_get_no_more_than_their_class_allows() {
        let (mut guard, mut rng) = (LoadGuard::new(&KEY, PORT), StdRng::seed_from_u64(1));
        let now = Instant::now();
        guard.set_threshold(0);
        let mut admitted = 0;
        for number in 0..1_000_u32 {
            let (mut jar, from) =
                (CookieJar::new(&KEY), PeerAddress::Direct((number.to_be_bytes(), 1).into()));
            let mut judge = |bytes: &[u8]| {
                let Ok(message::Message::Initiation(parsed)) = message::parse(bytes) else {
                    panic!()
                };
                guard.judge(&parsed.macs, parsed.sender, from, || Class::Stranger, now, &mut rng)
            };
            let reply = cookie(judge(&sealed(&mut jar, now)));
            let Ok(message::Message::CookieReply(reply)) = message::parse(&reply) else { panic!() };
            assert!(jar.put(&reply, now));
            admitted += u32::from(judge(&sealed(&mut jar, now)) == Verdict::Process);
        }
        assert_eq!(admitted, STRANGERS_ADMITTED);
    }

    /// A process of the node's host, or a container behind its address, has real cookies.
    #[test]
    fn other_ports_of_an_address_cannot_use_up_the_nodes_allowance() {
        let (mut guard, mut rng) = (LoadGuard::new(&KEY, PORT), StdRng::seed_from_u64(1));
        let now = Instant::now();
        guard.set_threshold(0);
        let mut with_cookie = |port| {
            let mut jar = CookieJar::new(&KEY);
            let asked = sealed(&mut jar, now);
            let reply = cookie(judge(&mut guard, &asked, from(port), now, &mut rng));
            let Ok(message::Message::CookieReply(reply)) = message::parse(&reply) else { panic!() };
            assert!(jar.put(&reply, now));
            judge(&mut guard, &sealed(&mut jar, now), from(port), now, &mut rng)
        };
        let verdicts: Vec<_> = (1..1_000).map(&mut with_cookie).collect();
        let admitted = verdicts.iter().filter(|it| **it == Verdict::Process).count();
        assert_eq!(admitted, SOURCE_BURST as usize);
        for _ in 0..SOURCE_BURST {
            assert_eq!(with_cookie(PORT), Verdict::Process);
        }
        assert_eq!(with_cookie(PORT), Verdict::Limited);
    }
}
