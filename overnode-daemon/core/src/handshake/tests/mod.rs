//! Simulates two or more nodes with real cryptography. The network loses, repeats, delays and
//! reorders datagrams under a seed, and the test controls the time. [`Plane`] stands for the eBPF
//! programs and their maps.

mod behaviour;
mod hostile;
mod oracle;
mod steady;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use super::gate::Judgment;
use super::*;

pub(crate) const SECOND: Duration = Duration::from_secs(1);

/// Returns the content of a data message: an IPv4 packet whose header has the right length, so that
/// boringtun accepts it, too.
pub(crate) fn inner_packet(payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).expect("the packet is small").to_be_bytes();
    let header =
        [0x45, 0, length[0], length[1], 0, 0, 0, 0, 64, 17, 0, 0, 10, 40, 0, 1, 10, 42, 0, 1];
    [&header, payload].concat()
}

pub(crate) fn seal(keys: &SessionKeys, counter: u64, plaintext: &[u8]) -> Vec<u8> {
    let mut text = plaintext.to_vec();
    text.resize(text.len().next_multiple_of(overnode_ebpf::wire::PADDING), 0);
    key(&keys.tx_key)
        .seal_in_place_append_tag(nonce(counter), Aad::empty(), &mut text)
        .expect("the plaintext is short");
    [&[4, 0, 0, 0][..], &keys.remote_index.to_le_bytes(), &counter.to_le_bytes(), &text].concat()
}

pub(crate) fn open(keys: &SessionKeys, message: &[u8]) -> Option<(u64, Vec<u8>)> {
    let (header, text) = message.split_first_chunk::<16>()?;
    let counter = u64::from_le_bytes(*header.last_chunk()?);
    let mut text = text.to_vec();
    let opened = key(&keys.rx_key).open_in_place(nonce(counter), Aad::empty(), &mut text).ok()?;
    Some((counter, opened.to_vec()))
}

fn slot_of(index: SessionIndex) -> u32 {
    index.get() & 0xfff
}

fn receiver(message: &[u8]) -> Option<SessionIndex> {
    message.get(4..8)?.try_into().ok().map(SessionIndex::from_le_bytes)
}

fn key(secret: &Secret) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &secret.0).expect("the key has 32 bytes"))
}

fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

/// Handshakes behind their gate.
pub(crate) struct Core {
    inner: Handshakes,
    pub gate: Gate,
}

impl Core {
    pub(crate) fn new(secret: Secret, mut rng: StdRng) -> Self {
        let gate = StdRng::seed_from_u64(rng.random());
        let inner = Handshakes::new(secret, rng);
        Self { gate: inner.gate(gate), inner }
    }

    /// Replaces the gate with a new one that has seen nothing yet.
    pub(crate) fn reset_gate(&mut self) {
        self.gate = self.inner.gate(StdRng::seed_from_u64(1));
    }

    pub(crate) fn handle_datagram(
        &mut self,
        now: Instant,
        from: impl Into<PeerAddress>,
        bytes: &[u8],
    ) {
        let from = from.into();
        let is_peer = || self.inner.peers.values().any(|peer| peer.endpoint == Some(from));
        match self.gate.judge(now, from, bytes, is_peer) {
            Judgment::Admit(_) => self.inner.handle_datagram(now, from, bytes),
            Judgment::Reply(bytes) => {
                self.inner.transmits.push_back(Transmit { to: from, peer: None, bytes });
            }
            Judgment::Drop(_) => {}
        }
    }

    pub(crate) fn counters(&self) -> Counters {
        let gate = *self.gate.counters().lock().expect("no thread panicked");
        self.inner.counters().plus(gate)
    }
}

impl std::ops::Deref for Core {
    type Target = Handshakes;

    fn deref(&self) -> &Handshakes {
        &self.inner
    }
}

impl std::ops::DerefMut for Core {
    fn deref_mut(&mut self) -> &mut Handshakes {
        &mut self.inner
    }
}

/// The part of the eBPF programs, for one peer.
#[derive(Default)]
pub(crate) struct Plane {
    pub sessions: BTreeMap<SessionIndex, Held>,
    pub sealing: Option<SessionIndex>,
    pub remote: Option<SocketAddr>,
    pub activity: Activity,
    /// Sessions confirmed since the daemon's last look.
    pub confirmed: Vec<SessionIndex>,
}

pub(crate) struct Held {
    pub keys: SessionKeys,
    pub live: bool,
    pub sent: u64,
    pub received: BTreeSet<u64>,
}

impl Plane {
    fn usable(&self, local_index: SessionIndex, now: Instant) -> Option<&Held> {
        self.sessions.get(&local_index).filter(|held| now < held.keys.created + REJECT_AFTER_TIME)
    }

    pub(crate) fn send(&mut self, plaintext: &[u8], now: Instant) -> Option<(SocketAddr, Vec<u8>)> {
        let index = self.sealing?;
        self.usable(index, now)?;
        let held = self.sessions.get_mut(&index)?;
        assert!(held.live, "an unconfirmed session must not seal");
        let message = seal(&held.keys, held.sent, plaintext);
        held.sent += 1;
        self.activity.last_sent = Some(now);
        if !plaintext.is_empty() {
            self.activity.last_data_sent = Some(now);
        }
        Some((self.remote?, message))
    }

    pub(crate) fn receive(
        &mut self,
        from: SocketAddr,
        message: &[u8],
        now: Instant,
    ) -> Result<Vec<u8>, &'static str> {
        let index = receiver(message).ok_or("short")?;
        self.usable(index, now).ok_or("no session")?;
        let held = self.sessions.get_mut(&index).ok_or("no session")?;
        let (counter, text) = open(&held.keys, message).ok_or("forged")?;
        if !held.received.insert(counter) {
            return Err("replayed");
        }
        if !held.live {
            held.live = true;
            self.sealing = Some(index);
            self.confirmed.push(index);
        }
        self.remote = Some(from);
        self.activity.last_received = Some(now);
        if !text.is_empty() {
            self.activity.last_data_received = Some(now);
        }
        Ok(text)
    }
}

pub(crate) struct Node {
    pub core: Core,
    pub address: SocketAddr,
    pub planes: BTreeMap<PeerIndex, Plane>,
    pub failures: Vec<(PeerIndex, Failure)>,
    /// All sessions ever installed.
    pub installed: Vec<(Instant, PeerIndex, SessionKeys)>,
    /// When each index was withdrawn.
    pub withdrawn: BTreeMap<SessionIndex, Instant>,
    pub keepalives: Vec<Instant>,
    pub delivered: u64,
    pub refused: BTreeMap<&'static str, u64>,
    pub unsent: u64,
}

/// Loss, repetition and delay of datagrams.
#[derive(Clone, Copy)]
pub(crate) struct Weather {
    pub loss: f64,
    pub repeat: f64,
    pub delay: (Duration, Duration),
}

impl Weather {
    pub(crate) const FINE: Self = Self {
        loss: 0.0,
        repeat: 0.0,
        delay: (Duration::from_millis(10), Duration::from_millis(10)),
    };
}

#[derive(Clone, Debug)]
pub(crate) struct Datagram {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub bytes: Vec<u8>,
}

impl Datagram {
    pub(crate) fn kind(&self) -> u8 {
        self.bytes[0]
    }
}

pub(crate) struct World {
    pub now: Instant,
    pub start: Instant,
    pub wall: SystemTime,
    pub rng: StdRng,
    pub weather: Weather,
    pub nodes: Vec<Node>,
    /// All datagrams ever sent.
    pub tapped: Vec<(Instant, Datagram)>,
    /// Datagrams for which this returns true are lost.
    pub lost: Box<dyn Fn(&Datagram) -> bool>,
    flying: BTreeMap<(Instant, u64), Datagram>,
    sequence: u64,
    tick: Instant,
}

impl World {
    /// Creates nodes that do not know each other yet.
    pub(crate) fn new(seed: u64, nodes: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let now = Instant::now();
        let nodes = (0..nodes).map(|number| Node::new(number, &mut rng)).collect();
        Self {
            now,
            start: now,
            wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000),
            rng,
            weather: Weather::FINE,
            nodes,
            tapped: Vec::new(),
            lost: Box::new(|_| false),
            flying: BTreeMap::new(),
            sequence: 0,
            tick: now + SECOND,
        }
    }

    /// Creates two nodes that know each other.
    pub(crate) fn pair(seed: u64, first: Initiate, second: Initiate) -> Self {
        let mut world = Self::new(seed, 2);
        world.introduce(0, 1, first);
        world.introduce(1, 0, second);
        world
    }

    pub(crate) fn config(&self, of: usize, initiate: Initiate) -> PeerConfig {
        PeerConfig {
            public_key: self.nodes[of].core.public_key(),
            preshared_key: Secret([0x55; 32]),
            endpoint: Some(self.nodes[of].address),
            initiate,
            persistent_keepalive: None,
        }
    }

    pub(crate) fn introduce(&mut self, to: usize, of: usize, initiate: Initiate) {
        let config = self.config(of, initiate);
        self.upsert(to, of, config);
    }

    pub(crate) fn upsert(&mut self, to: usize, of: usize, config: PeerConfig) {
        let (now, node) = (self.now, &mut self.nodes[to]);
        node.planes.entry(peer(of)).or_default().remote = config.endpoint;
        node.core.upsert_peer(peer(of), config, now);
        self.drain(to);
    }

    pub(crate) fn plane(&self, at: usize, with: usize) -> &Plane {
        &self.nodes[at].planes[&peer(with)]
    }

    /// Whether both nodes can send to each other.
    pub(crate) fn joined(&self, a: usize, b: usize) -> bool {
        [(a, b), (b, a)].into_iter().all(|(from, to)| {
            let (out, into) = (self.plane(from, to), self.plane(to, from));
            let sealing = out.sealing.and_then(|index| out.usable(index, self.now));
            sealing.is_some_and(|held| into.usable(held.keys.remote_index, self.now).is_some())
        })
    }

    pub(crate) fn send_data(&mut self, from: usize, to: usize) {
        let packet = inner_packet(b"data");
        let (now, node) = (self.now, &mut self.nodes[from]);
        let sent = node.planes.get_mut(&peer(to)).and_then(|plane| plane.send(&packet, now));
        node.unsent += u64::from(sent.is_none());
        if let Some((to, bytes)) = sent {
            self.transmit(from, to, bytes);
        }
    }

    /// Puts a datagram on the wire.
    pub(crate) fn transmit(&mut self, from: usize, to: SocketAddr, bytes: Vec<u8>) {
        let datagram = Datagram { from: self.nodes[from].address, to, bytes };
        self.inject(datagram);
    }

    pub(crate) fn inject(&mut self, datagram: Datagram) {
        self.tapped.push((self.now, datagram.clone()));
        if (self.lost)(&datagram) || self.rng.random_bool(self.weather.loss) {
            return;
        }
        let copies = 1 + u32::from(self.rng.random_bool(self.weather.repeat));
        for _ in 0..copies {
            let delay = self.rng.random_range(self.weather.delay.0..=self.weather.delay.1);
            self.sequence += 1;
            self.flying.insert((self.now + delay, self.sequence), datagram.clone());
        }
    }

    pub(crate) fn run(&mut self, duration: Duration) {
        self.run_until(self.now + duration);
    }

    pub(crate) fn run_until(&mut self, end: Instant) {
        while self.step(end) {}
        self.advance(end);
    }

    /// Performs the next thing that is due until `end`. Returns false if nothing is.
    fn step(&mut self, end: Instant) -> bool {
        let arrival = self.flying.first_key_value().map(|((at, _), _)| *at);
        let timers = self.nodes.iter().filter_map(|node| node.core.poll_timeout());
        let Some(next) = timers.chain(arrival).chain([self.tick]).min().filter(|next| *next <= end)
        else {
            return false;
        };
        self.advance(next.max(self.now));
        if arrival.is_some_and(|at| at <= self.now) {
            if let Some((_, datagram)) = self.flying.pop_first() {
                self.arrive(&datagram);
            }
        } else if self.tick <= self.now {
            self.tick += SECOND;
            (0..self.nodes.len()).for_each(|node| self.report(node));
        } else {
            for at in 0..self.nodes.len() {
                if self.nodes[at].core.poll_timeout().is_some_and(|due| due <= self.now) {
                    self.nodes[at].core.handle_timeout(self.now, self.wall);
                    self.drain(at);
                }
            }
        }
        true
    }

    fn advance(&mut self, to: Instant) {
        self.wall += to - self.now;
        self.now = to;
    }

    fn arrive(&mut self, datagram: &Datagram) {
        let Some(at) = self.nodes.iter().position(|node| node.address == datagram.to) else {
            return;
        };
        if datagram.kind() != 4 {
            self.nodes[at].core.handle_datagram(self.now, datagram.from, &datagram.bytes);
            return self.drain(at);
        }
        let node = &mut self.nodes[at];
        let index = receiver(&datagram.bytes);
        let plane = node
            .planes
            .values_mut()
            .find(|p| index.is_some_and(|index| p.sessions.contains_key(&index)));
        match plane
            .map_or(Err("no session"), |p| p.receive(datagram.from, &datagram.bytes, self.now))
        {
            Ok(text) => node.delivered += u64::from(!text.is_empty()),
            Err(why) => *node.refused.entry(why).or_default() += 1,
        }
    }

    /// Reads the maps, as the daemon does once a second.
    fn report(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        for (index, plane) in &mut node.planes {
            for local_index in plane.confirmed.drain(..) {
                node.core.handle_confirmed(*index, local_index, self.now);
            }
            plane.activity.endpoint = plane.remote;
            node.core.handle_activity(*index, &plane.activity);
        }
        self.drain(at);
    }

    /// Carries out what the node's core asks for.
    pub(crate) fn drain(&mut self, at: usize) {
        while let Some(Transmit { to, bytes, .. }) = self.nodes[at].core.poll_transmit() {
            self.transmit(at, to.direct().expect("no node is behind a relay"), bytes);
        }
        while let Some(event) = self.nodes[at].core.poll_event() {
            if let Some((to, bytes)) = self.nodes[at].obey(event, self.now) {
                self.transmit(at, to, bytes);
            }
        }
    }

    /// Restarts the node's daemon while its programs keep running. `adopt` tells whether the new
    /// daemon takes over their sessions.
    pub(crate) fn restart(&mut self, at: usize, with: usize, initiate: Initiate, adopt: bool) {
        let (config, seed) = (self.config(with, initiate), self.rng.random());
        let (now, node) = (self.now, &mut self.nodes[at]);
        node.core = Core::new(node.secret(at), StdRng::seed_from_u64(seed));
        node.core.upsert_peer(peer(with), config, now);
        let plane = node.planes.get_mut(&peer(with)).expect("the two nodes know each other");
        if !adopt {
            plane.sessions.clear();
            plane.sealing = None;
        }
        for (local_index, Held { keys, live, .. }) in &plane.sessions {
            let session = InheritedSession {
                local_index: *local_index,
                remote_index: keys.remote_index,
                initiator: keys.initiator,
                confirmed: *live,
                created: keys.created,
                sealing: plane.sealing == Some(*local_index),
            };
            node.core.adopt(peer(with), session, now);
        }
        self.drain(at);
    }

    /// Returns the times of the initiations that a node has sent.
    pub(crate) fn initiations(&self, from: usize) -> Vec<Instant> {
        let from = self.nodes[from].address;
        self.tapped
            .iter()
            .filter(|(_, d)| d.from == from && d.kind() == 1)
            .map(|(at, _)| *at)
            .collect()
    }
}

/// Returns the index by which every node knows node `number`.
pub(crate) fn peer(number: usize) -> PeerIndex {
    PeerIndex(number as u32 + 1)
}

pub(crate) fn address(number: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, (number / 250) as u8, (number % 250) as u8 + 1], 6784))
}

impl Node {
    fn new(number: usize, rng: &mut StdRng) -> Self {
        let mut node = Self {
            core: Core::new(Secret([0; 32]), StdRng::seed_from_u64(rng.random())),
            address: address(number),
            planes: BTreeMap::new(),
            failures: Vec::new(),
            installed: Vec::new(),
            withdrawn: BTreeMap::new(),
            keepalives: Vec::new(),
            delivered: 0,
            refused: BTreeMap::new(),
            unsent: 0,
        };
        node.core = Core::new(node.secret(number), StdRng::seed_from_u64(rng.random()));
        node
    }

    pub(crate) fn secret(&self, number: usize) -> Secret {
        Secret(std::array::from_fn(|i| [(number + 1) as u8, (number >> 8) as u8][i % 2]))
    }

    fn obey(&mut self, event: Event, now: Instant) -> Option<(SocketAddr, Vec<u8>)> {
        match event {
            Event::Install { peer, session } => {
                let index = session.local_index;
                if let Some(withdrawn) =
                    self.withdrawn.iter().find(|(old, _)| slot_of(**old) == slot_of(index))
                {
                    assert!(now >= *withdrawn.1 + index::QUARANTINE, "slot reused too soon");
                }
                self.withdrawn.retain(|old, _| slot_of(*old) != slot_of(index));
                let plane = self.planes.get_mut(&peer)?;
                assert!(
                    !plane.sessions.keys().any(|old| slot_of(*old) == slot_of(index)),
                    "slot in use"
                );
                self.installed.push((now, peer, session.clone()));
                if session.initiator {
                    plane.sealing = Some(index);
                }
                let live = session.initiator;
                plane.sessions.insert(
                    index,
                    Held { keys: session, live, sent: 0, received: BTreeSet::new() },
                );
            }
            Event::Withdraw { peer, local_index } => {
                self.withdrawn.insert(local_index, now);
                let plane = self.planes.get_mut(&peer)?;
                assert!(
                    plane.sessions.remove(&local_index).is_some(),
                    "a session that was not installed was withdrawn"
                );
                plane.sealing = plane.sealing.filter(|index| *index != local_index);
            }
            Event::SendKeepalive { peer } => {
                self.keepalives.push(now);
                return self.planes.get_mut(&peer)?.send(&[], now);
            }
            Event::EndpointChanged { peer, endpoint } => {
                self.planes.get_mut(&peer)?.remote = Some(endpoint);
            }
            Event::Failed { peer, why } => self.failures.push((peer, why)),
        }
        None
    }
}
