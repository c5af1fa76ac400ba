//! Runs WireGuard's handshake for all peers of a node: decides which peers get a session, with
//! which keys, and when it is renewed.
//!
//! The protocol is that of "WireGuard: Next Generation Kernel Network Tunnel" (Donenfeld, revision
//! of 2020), here called "the whitepaper". This module creates and handles handshake messages
//! (types 1 to 3). The eBPF programs ("the programs") handle data messages. The module is
//! deterministic: it does no I/O, reads no clock, and draws random numbers from the generator it is
//! given. Its owner
//!
//! - passes in the datagrams that its [`Gate`] has admitted ([`Handshakes::handle_datagram`]), the
//!   time when [`Handshakes::poll_timeout`] asks for it ([`Handshakes::handle_timeout`]), and what
//!   the programs observed ([`Handshakes::handle_confirmed`], [`Handshakes::handle_activity`]);
//! - after each of these calls, sends the datagrams from [`Handshakes::poll_transmit`] and acts on
//!   the events from [`Handshakes::poll_event`].
//!
//! Two things differ from the use of the protocol in a VPN. Sessions are kept fresh while the peer
//! is configured, whether or not there is traffic. A peer that does not answer is retried forever.
//! Any input from the network may be hostile. No input can make this module panic, allocate without
//! bound, or do more than a bounded amount of work.

mod address;
mod cookie;
pub mod gate;
mod index;
mod message;
mod noise;
mod peer;
#[cfg(test)]
mod tests;
mod timers;
mod timestamp;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use overnode_ebpf::wire::DATA_PORT;
use rand::Rng;
use rand::rngs::StdRng;

pub use self::address::PeerAddress;
pub use self::cookie::mac1_state;
use self::gate::{Awaited, Gate};
use self::index::Slots;
use self::message::{BadMessage, CookieReply, Initiation, Message, Response};
use self::noise::Identity;
use self::peer::{Peer, Pending, Session};
pub use self::timers::REJECT_AFTER_TIME;
use self::timers::{INITIATION_INTERVAL, INITIATIONS_AT_ONCE, JITTER};
use self::timestamp::Stamper;
use overnode_types::{PeerIndex, PublicKey, Secret, SessionIndex};

/// The handshakes of a node with all its peers.
pub struct Handshakes {
    identity: Identity,
    rng: StdRng,
    stamper: Stamper,
    awaited: Awaited,
    slots: Slots,
    peers: BTreeMap<PeerIndex, Peer>,
    by_key: BTreeMap<PublicKey, PeerIndex>,
    deadlines: BTreeSet<(Instant, PeerIndex)>,
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
    counters: Counters,
}

/// Configuration of a peer.
#[derive(Clone, Debug)]
pub struct PeerConfig {
    /// Static public key of the peer.
    pub public_key: PublicKey,
    /// Pre-shared key, mixed into each handshake. All zero means none.
    pub preshared_key: Secret,
    /// Where to send the first message, if known.
    pub endpoint: Option<SocketAddr>,
    /// Whether and when this side sends the first message.
    pub initiate: Initiate,
    /// Interval of keepalives in the absence of traffic, so that a NAT on the path keeps its
    /// mapping.
    pub persistent_keepalive: Option<Duration>,
}

/// Whether this side sends the first message when there is no session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initiate {
    /// As soon as the endpoint is known.
    AtOnce,
    /// After this time, unless the peer has initiated by then.
    After(Duration),
    /// Never, not even to renew a session.
    OnlyAnswer,
}

impl Initiate {
    const fn delay(self) -> Duration {
        match self {
            Self::AtOnce | Self::OnlyAnswer => Duration::ZERO,
            Self::After(delay) => delay,
        }
    }
}

/// A datagram to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// Destination.
    pub to: PeerAddress,
    /// The peer that it is for. `None` for a cookie reply, because the sender of the answered
    /// message is not known.
    pub peer: Option<PeerIndex>,
    /// The UDP payload.
    pub bytes: Vec<u8>,
}

/// An action for the owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Install a session in the programs' maps. An initiator's session seals at once, a responder's
    /// once it is confirmed.
    Install {
        /// The peer.
        peer: PeerIndex,
        /// Receiver indices and keys.
        session: SessionKeys,
    },
    /// Remove a session from the programs' maps. Its slot is not reused for 5 seconds.
    Withdraw {
        /// The peer.
        peer: PeerIndex,
        /// Receiver index of the session in messages to us.
        local_index: SessionIndex,
    },
    /// Send a keepalive in the session that seals.
    SendKeepalive {
        /// The peer.
        peer: PeerIndex,
    },
    /// The peer sent a valid handshake message from another address: send its data there. Not
    /// emitted for an initiation that might be a replay from before this daemon started. In that
    /// case, the programs follow the source of the peer's data. Not emitted for a relayed message,
    /// which does not reveal its sender's address.
    EndpointChanged {
        /// The peer.
        peer: PeerIndex,
        /// Its new endpoint.
        endpoint: SocketAddr,
    },
    /// A failure to report to the operator. Attempts continue.
    Failed {
        /// The peer.
        peer: PeerIndex,
        /// The cause.
        why: Failure,
    },
}

/// The keys and receiver indices of a session, for the data plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionKeys {
    /// Receiver index in messages to us. The low 12 bits are the slot.
    pub local_index: SessionIndex,
    /// Receiver index in messages to the peer.
    pub remote_index: SessionIndex,
    /// Key that seals what we send.
    pub tx_key: Secret,
    /// Key that opens what we receive.
    pub rx_key: Secret,
    /// Whether we initiated. The initiator may seal at once. The responder may not seal before it
    /// has received a message in this session.
    pub initiator: bool,
    /// When the handshake completed. The session expires [`REJECT_AFTER_TIME`] later.
    pub created: Instant,
}

/// Why there is no session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// No response to 90 seconds of attempts.
    #[error("the peer does not answer handshakes: is it running, and does UDP port 6784 reach it?")]
    Unanswered,
    /// The response does not authenticate.
    #[error("the peer's answer does not authenticate: the pre-shared keys (or the tokens) differ")]
    BadResponse,
    /// The public key is a point of low order, so no secret key matches it.
    #[error("the peer's public key is not a valid key")]
    BadKey,
    /// Another peer has the same public key.
    #[error("the peer's public key already belongs to peer {0}")]
    DuplicateKey(PeerIndex),
    /// All receiver indices are in use.
    #[error("no session slot is free (4095 is the limit)")]
    NoSlot,
}

/// Traffic of a peer as the programs observed it, from their maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// When the last non-empty message was sent.
    pub last_data_sent: Option<Instant>,
    /// When the last message was sent.
    pub last_sent: Option<Instant>,
    /// When the last authenticated, non-empty message was received.
    pub last_data_received: Option<Instant>,
    /// When the last authenticated message was received.
    pub last_received: Option<Instant>,
    /// The endpoint that the programs currently send to.
    pub endpoint: Option<SocketAddr>,
}

/// A session that the programs have held since before a restart of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InheritedSession {
    /// Receiver index in messages to us.
    pub local_index: SessionIndex,
    /// Receiver index in messages to the peer.
    pub remote_index: SessionIndex,
    /// Whether we initiated.
    pub initiator: bool,
    /// False while the session waits for the peer's first message.
    pub confirmed: bool,
    /// When the handshake completed.
    pub created: Instant,
    /// Whether this is the session that seals.
    pub sealing: bool,
}

/// The state of a peer's handshakes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerView {
    /// Where messages are sent to.
    pub endpoint: Option<PeerAddress>,
    /// When the sealing session was established.
    pub last_handshake: Option<Instant>,
    /// Whether an initiation awaits its response.
    pub waiting: bool,
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $field:ident = $name:literal;)+) => {
        /// Counts of messages by outcome.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counters { $($(#[doc = $doc])+ pub $field: u64),+ }

        impl Counters {
            /// Returns the counters with their names, as status and metrics print them.
            pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$(($name, self.$field)),+].into_iter()
            }

            /// Returns the sums of these counters and `other`.
            pub fn plus(self, other: Self) -> Self {
                Self { $($field: self.$field + other.$field),+ }
            }
        }
    };
}

counters! {
    /// Initiations sent.
    initiations_sent = "handshake-initiations-sent";
    /// Initiations answered.
    initiations_answered = "handshake-initiations-answered";
    /// Responses that completed a handshake.
    responses_accepted = "handshake-responses-accepted";
    /// Cookies demanded under load (by the gate).
    cookies_demanded = "handshake-cookies-demanded";
    /// Cookies received from peers that are under load.
    cookies_received = "handshake-cookies-received";
    /// Datagrams that are not handshake messages (at the gate).
    malformed = "handshake-malformed";
    /// Data messages, which the programs should have handled (at the gate).
    data = "handshake-data";
    /// Messages with a wrong first MAC: the sender does not know our public key (at the gate).
    strangers = "handshake-strangers";
    /// Messages with a relay header from an address that is not a node's (at the gate).
    foreign_relay = "handshake-foreign-relay";
    /// Messages over the limit, under load, of one source address or of all together (at the gate).
    limited = "handshake-limited";
    /// Initiations and responses that do not authenticate.
    forged = "handshake-forged";
    /// Initiations with the static key of no configured peer.
    unknown_peer = "handshake-unknown-peer";
    /// Initiations whose timestamp is not greater than the greatest of that peer.
    replayed = "handshake-replayed";
    /// Initiations of one peer less than 20 ms apart.
    flooded = "handshake-flooded";
    /// Responses and cookie replies that match no message of ours.
    unexpected = "handshake-unexpected";
    /// Handshakes abandoned because no session slot was free.
    no_slot = "handshake-no-slot";
}

impl Handshakes {
    /// Creates the handshakes of a node without peers. Outside of tests, `rng` must be seeded by
    /// the operating system, because keys are drawn from it.
    pub fn new(static_secret: Secret, rng: StdRng) -> Self {
        Self::with(Identity::new(static_secret, noise::WIREGUARD), rng)
    }

    /// Creates the handshakes of the bulk path, whose sessions are separate. Messages of one kind
    /// of handshake are invalid in the other.
    pub fn for_bulk(static_secret: Secret, rng: StdRng) -> Self {
        Self::with(Identity::new(static_secret, noise::BULK), rng)
    }

    fn with(identity: Identity, mut rng: StdRng) -> Self {
        Self {
            awaited: Awaited::default(),
            identity,
            stamper: Stamper::default(),
            slots: Slots::new(&mut rng),
            rng,
            peers: BTreeMap::new(),
            by_key: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            transmits: VecDeque::new(),
            events: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    /// Creates a gate for datagrams to these handshakes. Outside of tests, `rng` must be seeded by
    /// the operating system.
    pub fn gate(&self, rng: StdRng) -> Gate {
        Gate::new(&self.identity.public(), DATA_PORT, self.awaited.clone(), rng)
    }

    /// Returns this node's public key.
    pub fn public_key(&self) -> PublicKey {
        self.identity.public()
    }

    /// Adds or changes a peer. A changed endpoint restarts the attempts, a changed public key ends
    /// the peer's sessions, and a changed pre-shared key applies from the next handshake on. If the
    /// configured endpoint is the same as before, the peer's current endpoint stays, even if the
    /// peer has roamed.
    pub fn upsert_peer(&mut self, index: PeerIndex, config: PeerConfig, now: Instant) {
        if let Some(other) = self.by_key.get(&config.public_key).filter(|other| **other != index) {
            let why = Failure::DuplicateKey(*other);
            return self.events.push_back(Event::Failed { peer: index, why });
        }
        let same =
            self.peers.get(&index).is_some_and(|peer| peer.config.public_key == config.public_key);
        if !same {
            self.drop_peer(index, now, true);
            self.by_key.insert(config.public_key, index);
            self.peers.insert(index, Peer::new(config, now));
            return self.schedule(index);
        }
        let Some(peer) = self.peers.get_mut(&index) else { return };
        let moved = config.endpoint.is_some() && config.endpoint != peer.config.endpoint;
        if moved {
            peer.endpoint = config.endpoint.map(PeerAddress::Direct);
        }
        if config.preshared_key != peer.config.preshared_key
            && let Some(pending) = peer.pending.take()
        {
            self.slots.discard(pending.local_index);
        }
        if config.initiate != peer.config.initiate {
            peer.start_at = now + config.initiate.delay();
        }
        peer.config = config;
        if moved {
            peer.reset_attempts();
        }
        self.schedule(index);
    }

    /// Removes a peer. Its sessions are not withdrawn one by one, because removing the peer from
    /// the data plane removes them.
    pub fn remove_peer(&mut self, index: PeerIndex, now: Instant) {
        self.drop_peer(index, now, false);
    }

    /// Retries now a peer that has not answered for a while, because there is reason to believe
    /// that it is reachable again. The attempt is still at least 5 seconds after the previous one.
    pub fn retry(&mut self, index: PeerIndex) {
        if let Some(peer) = self.peers.get_mut(&index) {
            peer.reset_attempts();
            self.schedule(index);
        }
    }

    /// Tries a peer that does not answer at another of its addresses.
    pub fn set_endpoint(&mut self, index: PeerIndex, endpoint: SocketAddr) {
        if let Some(peer) = self.peers.get_mut(&index) {
            peer.endpoint = Some(endpoint.into());
            peer.reset_attempts();
            self.schedule(index);
        }
    }

    /// Takes over a session that the programs have held since before a restart. Call this after
    /// [`Self::upsert_peer`] and before any time passes. A session that cannot be kept is returned
    /// as [`Event::Withdraw`].
    pub fn adopt(&mut self, index: PeerIndex, session: InheritedSession, now: Instant) {
        let InheritedSession { local_index, initiator, confirmed, created, sealing, .. } = session;
        let session = Session::new(local_index, initiator, created, self.jitter());
        let keep = self.peers.contains_key(&index) && session.expires() > now;
        if !self.slots.reserve(local_index, index) {
            return self.events.push_back(Event::Withdraw { peer: index, local_index });
        }
        let ended = match self.peers.get_mut(&index) {
            Some(peer) if keep => peer.adopt(session, confirmed, sealing),
            _ => vec![session],
        };
        self.withdraw(index, ended, now);
        self.schedule(index);
    }

    /// Handles a UDP payload that a [`Gate`] has admitted. Apart from the gate's checks, the
    /// content is untrusted.
    pub fn handle_datagram(&mut self, now: Instant, from: PeerAddress, bytes: &[u8]) {
        match message::parse(bytes) {
            Ok(Message::Initiation(initiation)) => self.handle_initiation(now, from, &initiation),
            Ok(Message::Response(response)) => self.handle_response(now, from, &response),
            Ok(Message::CookieReply(reply)) => self.handle_cookie_reply(now, &reply),
            Err(BadMessage::Malformed) => self.counters.malformed += 1,
            Err(BadMessage::Data) => self.counters.data += 1,
        }
    }

    /// Performs what is due. `wall` is the time of day, which only has to increase. Sends at most
    /// `INITIATIONS_AT_ONCE` initiations per call. If more are due, [`Self::poll_timeout`] still
    /// returns a time in the past.
    pub fn handle_timeout(&mut self, now: Instant, wall: SystemTime) {
        let due: Vec<_> =
            self.deadlines.range(..=(now, PeerIndex(u32::MAX))).map(|(_, index)| *index).collect();
        let mut initiations = INITIATIONS_AT_ONCE;
        for index in due {
            let Some(peer) = self.peers.get_mut(&index) else { continue };
            let ended = peer.expire(now);
            if peer.keepalive_due().is_some_and(|due| due <= now) {
                peer.kept_alive(now);
                self.events.push_back(Event::SendKeepalive { peer: index });
            }
            let initiate = initiations > 0 && peer.initiation_due().is_some_and(|due| due <= now);
            self.withdraw(index, ended, now);
            if initiate {
                initiations -= 1;
                self.initiate(index, now, wall);
            }
            self.schedule(index);
        }
    }

    /// Returns when to call [`Self::handle_timeout`] next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Returns the next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// Returns the next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Handles the first message that the programs received in a session that awaited confirmation.
    pub fn handle_confirmed(&mut self, index: PeerIndex, local_index: SessionIndex, now: Instant) {
        let Some(peer) = self.peers.get_mut(&index) else { return };
        let leads = self.identity.public() < peer.config.public_key;
        let Some(ended) = peer.confirm(local_index, leads, now) else { return };
        if let Some(pending) = peer.pending.take() {
            self.slots.discard(pending.local_index);
        }
        self.withdraw(index, ended, now);
        self.schedule(index);
    }

    /// Takes the programs' observations of a peer. Call this about once a second.
    pub fn handle_activity(&mut self, index: PeerIndex, activity: &Activity) {
        if let Some(peer) = self.peers.get_mut(&index) {
            peer.observe(activity);
            self.schedule(index);
        }
    }

    /// Returns the state of a peer's handshakes.
    pub fn peer(&self, index: PeerIndex) -> Option<PeerView> {
        self.peers.get(&index).map(|peer| PeerView {
            endpoint: peer.endpoint,
            last_handshake: peer.current.map(|session| session.created),
            waiting: peer.pending.is_some(),
        })
    }

    /// Returns the counts of messages by outcome.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Returns the number of session slots in use, of 4095.
    pub fn slots_used(&self) -> usize {
        self.slots.used()
    }

    fn handle_initiation(&mut self, now: Instant, from: PeerAddress, initiation: &Initiation<'_>) {
        let ephemeral = Secret(self.rng.random());
        let Ok(received) = self.identity.receive(ephemeral, initiation.noise) else {
            self.counters.forged += 1;
            return;
        };
        let Some((&index, peer)) = self
            .by_key
            .get(&received.remote)
            .and_then(|index| Some((index, self.peers.get_mut(index)?)))
        else {
            self.counters.unknown_peer += 1;
            return;
        };
        if peer.greatest.is_some_and(|greatest| received.timestamp <= greatest) {
            self.counters.replayed += 1;
            return;
        }
        if peer
            .consumed
            .is_some_and(|last| now.saturating_duration_since(last) < INITIATION_INTERVAL)
        {
            self.counters.flooded += 1;
            return;
        }
        let Some(local_index) = self.slots.allocate(index, now, &mut self.rng) else {
            return self.out_of_slots(index);
        };
        // Until the peer has confirmed a session since our start, the initiation may be a replay. A
        // replay must not redirect our traffic. If the initiation is genuine, the programs follow
        // the message that confirms it.
        let follow = peer.proven || peer.endpoint.is_none();
        (peer.greatest, peer.consumed) = (Some(received.timestamp), Some(now));
        let Ok((noise, keys)) = received.respond(&peer.config.preshared_key) else {
            self.counters.forged += 1;
            return self.slots.discard(local_index);
        };
        let mut bytes = message::response(local_index, initiation.sender, &noise);
        peer.jar.seal(&mut bytes, local_index, now);
        self.awaited.note(&bytes);
        self.transmits.push_back(Transmit { to: from, peer: Some(index), bytes });
        self.counters.initiations_answered += 1;
        if follow {
            self.follow(index, from);
        }
        let session = SessionKeys {
            local_index,
            remote_index: initiation.sender,
            tx_key: keys.tx,
            rx_key: keys.rx,
            initiator: false,
            created: now,
        };
        self.install(index, session, now);
    }

    fn handle_response(&mut self, now: Instant, from: PeerAddress, response: &Response<'_>) {
        let waits =
            |peer: &Peer| peer.pending.as_ref().is_some_and(|p| p.local_index == response.receiver);
        let owner = self.slots.owner(response.receiver);
        let Some(index) = owner.filter(|index| self.peers.get(index).is_some_and(waits)) else {
            self.counters.unexpected += 1;
            return;
        };
        let Some(peer) = self.peers.get_mut(&index) else { return };
        let Some(mut pending) = peer.pending.take() else { return };
        let Ok(keys) = pending.noise.finish(response.noise) else {
            self.counters.forged += 1;
            if !std::mem::replace(&mut pending.bad_response_reported, true) {
                self.events.push_back(Event::Failed { peer: index, why: Failure::BadResponse });
            }
            peer.pending = Some(pending);
            return;
        };
        self.counters.responses_accepted += 1;
        self.follow(index, from);
        let session = SessionKeys {
            local_index: pending.local_index,
            remote_index: response.sender,
            tx_key: keys.tx,
            rx_key: keys.rx,
            initiator: true,
            created: now,
        };
        self.install(index, session, now);
        self.events.push_back(Event::SendKeepalive { peer: index });
    }

    fn handle_cookie_reply(&mut self, now: Instant, reply: &CookieReply<'_>) {
        let owner = self.slots.owner(reply.receiver);
        let Some((index, peer)) =
            owner.and_then(|index| Some((index, self.peers.get_mut(&index)?)))
        else {
            self.counters.unexpected += 1;
            return;
        };
        if !peer.jar.put(reply, now) {
            self.counters.unexpected += 1;
            return;
        }
        self.counters.cookies_received += 1;
        // The next attempt carries a cookie. So a peer that answers each attempt with another
        // cookie reply triggers only one immediate attempt.
        let is_first =
            |pending: &Pending| pending.local_index == reply.receiver && !pending.has_cookie;
        if peer.pending.as_ref().is_some_and(is_first) {
            peer.retry_now(now);
            self.schedule(index);
        }
    }

    fn initiate(&mut self, index: PeerIndex, now: Instant, wall: SystemTime) {
        let jitter = self.jitter();
        let Some(peer) = self.peers.get_mut(&index) else { return };
        let Some(to) = peer.endpoint else { return };
        if peer.attempted(now, jitter) {
            self.events.push_back(Event::Failed { peer: index, why: Failure::Unanswered });
        }
        if let Some(pending) = peer.pending.take() {
            self.slots.discard(pending.local_index);
        }
        let Some(local_index) = self.slots.allocate(index, now, &mut self.rng) else {
            return self.out_of_slots(index);
        };
        let ephemeral = Secret(self.rng.random());
        let timestamp = self.stamper.next(wall);
        let PeerConfig { public_key, preshared_key, .. } = &peer.config;
        let Ok((noise, message)) =
            self.identity.initiate(public_key, preshared_key, ephemeral, &timestamp)
        else {
            self.slots.discard(local_index);
            return self.events.push_back(Event::Failed { peer: index, why: Failure::BadKey });
        };
        let mut bytes = message::initiation(local_index, &message);
        let has_cookie = peer.jar.seal(&mut bytes, local_index, now);
        self.awaited.note(&bytes);
        peer.pending =
            Some(Pending { local_index, noise, bad_response_reported: false, has_cookie });
        self.counters.initiations_sent += 1;
        self.transmits.push_back(Transmit { to, peer: Some(index), bytes });
    }

    fn install(&mut self, index: PeerIndex, keys: SessionKeys, now: Instant) {
        let session = Session::new(keys.local_index, keys.initiator, keys.created, self.jitter());
        let Some(peer) = self.peers.get_mut(&index) else { return };
        let ended = if keys.initiator {
            peer.install_initiated(session, now)
        } else {
            peer.install_answered(session, now)
        };
        self.events.push_back(Event::Install { peer: index, session: keys });
        self.withdraw(index, ended, now);
        self.schedule(index);
    }

    fn withdraw(&mut self, index: PeerIndex, ended: Vec<Session>, now: Instant) {
        for Session { local_index, .. } in ended {
            self.slots.retire(local_index, now);
            self.events.push_back(Event::Withdraw { peer: index, local_index });
        }
    }

    fn follow(&mut self, index: PeerIndex, from: PeerAddress) {
        let Some(peer) = self.peers.get_mut(&index) else { return };
        if peer.endpoint.replace(from) != Some(from)
            && let PeerAddress::Direct(endpoint) = from
        {
            self.events.push_back(Event::EndpointChanged { peer: index, endpoint });
        }
    }

    fn out_of_slots(&mut self, index: PeerIndex) {
        self.counters.no_slot += 1;
        self.events.push_back(Event::Failed { peer: index, why: Failure::NoSlot });
    }

    fn drop_peer(&mut self, index: PeerIndex, now: Instant, withdraw: bool) {
        let Some(mut peer) = self.peers.remove(&index) else { return };
        self.by_key.remove(&peer.config.public_key);
        if let Some(deadline) = peer.deadline {
            self.deadlines.remove(&(deadline, index));
        }
        if let Some(pending) = peer.pending.take() {
            self.slots.discard(pending.local_index);
        }
        let ended = peer.clear();
        if withdraw {
            return self.withdraw(index, ended, now);
        }
        ended.iter().for_each(|session| self.slots.retire(session.local_index, now));
    }

    fn schedule(&mut self, index: PeerIndex) {
        let Some(peer) = self.peers.get_mut(&index) else { return };
        let next = peer.next_deadline();
        let before = std::mem::replace(&mut peer.deadline, next);
        if before == next {
            return;
        }
        if let Some(before) = before {
            self.deadlines.remove(&(before, index));
        }
        self.deadlines.extend(next.map(|next| (next, index)));
    }

    fn jitter(&mut self) -> Duration {
        self.rng.random_range(Duration::ZERO..=JITTER)
    }
}
