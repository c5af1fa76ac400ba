//! Tests interoperability with boringtun, in both roles. boringtun uses the machine's clock, so its
//! timers are not tested. The test makes it initiate.

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey as TheirPublic, StaticSecret};

use super::*;

const OURS: u8 = 1;
const THEIRS: u8 = 2;

/// One overnode core and one boringtun tunnel, on a wire without delay.
struct Mixed {
    core: Core,
    tunn: Tunn,
    now: Instant,
    wall: SystemTime,
    sessions: Vec<SessionKeys>,
}

/// What boringtun does with a message.
#[derive(Debug, PartialEq, Eq)]
enum Theirs {
    Nothing,
    Sends(Vec<u8>),
    Delivers(Vec<u8>),
    Refuses(String),
}

impl Mixed {
    fn new(initiate: Initiate, our_psk: [u8; 32], their_psk: Option<[u8; 32]>) -> Self {
        let secret = StaticSecret::from([THEIRS; 32]);
        let config = PeerConfig {
            public_key: PublicKey(TheirPublic::from(&secret).to_bytes()),
            preshared_key: Secret(our_psk),
            endpoint: Some(Self::there()),
            initiate,
            persistent_keepalive: None,
        };
        let mut core = Core::new(Secret([OURS; 32]), StdRng::seed_from_u64(1));
        let tunn = Tunn::new(secret, core.public_key().0.into(), their_psk, None, 77, None);
        let now = Instant::now();
        core.upsert_peer(PeerIndex(1), config, now);
        Self { core, tunn, now, wall: SystemTime::now(), sessions: Vec::new() }
    }

    fn there() -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 9], 51820))
    }

    /// Lets time pass for our side.
    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.wall += time;
        self.core.handle_timeout(self.now, self.wall);
    }

    fn ours(&mut self, bytes: &[u8]) {
        self.core.handle_datagram(self.now, Self::there(), bytes);
    }

    fn sent(&mut self) -> Option<Vec<u8>> {
        self.core.poll_transmit().map(|transmit| {
            assert_eq!(transmit.to, Self::there().into());
            transmit.bytes
        })
    }

    fn events(&mut self) -> Vec<Event> {
        let events: Vec<_> = std::iter::from_fn(|| self.core.poll_event()).collect();
        for event in &events {
            if let Event::Install { session, .. } = event {
                self.sessions.push(session.clone());
            }
        }
        events
    }

    fn session(&self) -> &SessionKeys {
        self.sessions.last().expect("no session was installed")
    }

    fn theirs(&mut self, message: &[u8]) -> Theirs {
        let mut buffer = [0; 2048];
        let from = "192.0.2.1".parse().ok();
        match self.tunn.decapsulate(from, message, &mut buffer) {
            TunnResult::Done => Theirs::Nothing,
            TunnResult::Err(why) => Theirs::Refuses(format!("{why:?}")),
            TunnResult::WriteToNetwork(bytes) => Theirs::Sends(bytes.to_vec()),
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                Theirs::Delivers(packet.to_vec())
            }
        }
    }

    fn their_initiation(&mut self) -> Vec<u8> {
        let mut buffer = [0; 2048];
        match self.tunn.format_handshake_initiation(&mut buffer, true) {
            TunnResult::WriteToNetwork(bytes) => bytes.to_vec(),
            other => panic!("{other:?}"),
        }
    }

    /// Exchanges one packet in each direction in the newest session.
    fn exchange(&mut self) {
        let packet = inner_packet(b"from us to them!");
        let message = seal(self.session(), 1000, &packet);
        assert_eq!(self.theirs(&message), Theirs::Delivers(packet));

        let packet = inner_packet(b"from them to us!");
        let mut buffer = [0; 2048];
        let TunnResult::WriteToNetwork(message) = self.tunn.encapsulate(&packet, &mut buffer)
        else {
            panic!("boringtun has no session")
        };
        assert_eq!(message[4..8], self.session().local_index.to_le_bytes());
        assert_eq!(open(self.session(), message).map(|(_, text)| text), Some(packet));
    }

    /// Lets us initiate. Returns boringtun's response.
    fn initiate(&mut self) -> Vec<u8> {
        let initiation = self.sent().expect("no initiation was sent");
        let Theirs::Sends(response) = self.theirs(&initiation) else {
            panic!("boringtun does not answer")
        };
        response
    }

    /// Lets boringtun initiate and us answer.
    fn answer(&mut self) {
        while self.sent().is_some() || !self.events().is_empty() {}
        let initiation = self.their_initiation();
        self.ours(&initiation);
        let response = self.sent().expect("no response was sent");
        let installed = self.events();
        assert!(
            matches!(&installed[..], [Event::Install { session, .. }, ..] if !session.initiator)
        );
        let Theirs::Sends(keepalive) = self.theirs(&response) else {
            panic!("boringtun does not confirm")
        };
        assert_eq!(open(self.session(), &keepalive), Some((0, Vec::new())));
        let index = self.session().local_index;
        self.core.handle_confirmed(PeerIndex(1), index, self.now);
    }
}

#[test]
fn we_initiate() {
    for (ours, theirs) in [([5; 32], Some([5; 32])), ([0; 32], None)] {
        let mut mixed = Mixed::new(Initiate::AtOnce, ours, theirs);
        mixed.pass(Duration::ZERO);
        let response = mixed.initiate();
        mixed.ours(&response);
        let events = mixed.events();
        let [Event::Install { session, .. }, Event::SendKeepalive { .. }] = &events[..] else {
            panic!("{events:?}")
        };
        assert!(session.initiator);
        let keepalive = seal(mixed.session(), 0, &[]);
        assert_eq!(mixed.theirs(&keepalive), Theirs::Nothing);
        mixed.exchange();
    }
}

#[test]
fn they_initiate() {
    for (ours, theirs) in [([5; 32], Some([5; 32])), ([0; 32], None)] {
        let mut mixed = Mixed::new(Initiate::OnlyAnswer, ours, theirs);
        mixed.answer();
        mixed.exchange();
    }
}

#[test]
fn we_renew_with_them_and_they_with_us() {
    let mut mixed = Mixed::new(Initiate::AtOnce, [5; 32], Some([5; 32]));
    mixed.pass(Duration::ZERO);
    for round in 0..4 {
        let response = mixed.initiate();
        mixed.ours(&response);
        mixed.events();
        let keepalive = seal(mixed.session(), 0, &[]);
        assert_eq!(mixed.theirs(&keepalive), Theirs::Nothing);
        mixed.exchange();
        assert_eq!(mixed.sessions.len(), 1 + round);
        mixed.pass(SECOND * 119);
        assert_eq!(mixed.sent(), None);
        mixed.pass(SECOND);
    }
    let before = mixed.sessions.len();
    mixed.answer();
    mixed.exchange();
    assert_eq!(mixed.sessions.len(), before + 1);
}

#[test]
fn both_initiate_at_once() {
    let mut mixed = Mixed::new(Initiate::AtOnce, [5; 32], Some([5; 32]));
    mixed.pass(Duration::ZERO);
    let (ours, theirs) = (mixed.sent().expect("no initiation was sent"), mixed.their_initiation());
    mixed.ours(&theirs);
    let our_response = mixed.sent().expect("no response was sent");
    let Theirs::Sends(their_response) = mixed.theirs(&ours) else {
        panic!("boringtun does not answer")
    };
    mixed.ours(&their_response);
    assert!(matches!(mixed.theirs(&our_response), Theirs::Sends(_)));
    mixed.events();
    assert_eq!(mixed.sessions.len(), 2);
    for session in mixed.sessions.clone() {
        let packet = inner_packet(&[]);
        let message = seal(&session, 1, &packet);
        assert_eq!(mixed.theirs(&message), Theirs::Delivers(packet));
    }
}

#[test]
fn preshared_keys_must_be_the_same() {
    for (ours, theirs) in [([5; 32], Some([6; 32])), ([5; 32], None), ([0; 32], Some([6; 32]))] {
        let mut mixed = Mixed::new(Initiate::AtOnce, ours, theirs);
        mixed.pass(Duration::ZERO);
        let response = mixed.initiate();
        mixed.ours(&response);
        mixed.ours(&response);
        let failed = Event::Failed { peer: PeerIndex(1), why: Failure::BadResponse };
        assert_eq!(mixed.events(), [failed], "reported once");
        assert_eq!(mixed.core.counters().forged, 2);

        let mut mixed = Mixed::new(Initiate::OnlyAnswer, ours, theirs);
        let initiation = mixed.their_initiation();
        mixed.ours(&initiation);
        let response = mixed.sent().expect("no response, although the responder cannot know");
        assert_eq!(
            mixed.theirs(&response),
            Theirs::Refuses(format!("{:?}", WireGuardError::InvalidAeadTag))
        );
    }
}

#[test]
fn we_present_the_cookie_that_they_demand() {
    let mut mixed = Mixed::new(Initiate::AtOnce, [5; 32], Some([5; 32]));
    // boringtun demands cookies from the eleventh handshake message in a second on.
    let junk = mixed.their_initiation();
    for _ in 0..10 {
        assert!(matches!(mixed.theirs(&junk), Theirs::Refuses(_)));
    }
    let mut other = Mixed::new(Initiate::AtOnce, [5; 32], None);
    other.pass(Duration::ZERO);
    let good = other.sent().expect("no initiation was sent");
    for _ in 0..10 {
        mixed.theirs(&good);
    }
    mixed.pass(Duration::ZERO);
    let initiation = mixed.sent().expect("no initiation was sent");
    assert_eq!(initiation[132..], [0; 16]);
    let Theirs::Sends(reply) = mixed.theirs(&initiation) else { panic!("no cookie was demanded") };
    assert_eq!((reply[0], reply.len()), (3, 64));
    mixed.ours(&reply);
    assert_eq!(mixed.core.counters().cookies_received, 1);
    mixed.pass(Duration::ZERO);
    let initiation = mixed.sent().expect("no immediate retry");
    assert_ne!(initiation[132..], [0; 16]);
    let Theirs::Sends(response) = mixed.theirs(&initiation) else {
        panic!("the cookie was not accepted")
    };
    mixed.ours(&response);
    mixed.events();
    let keepalive = seal(mixed.session(), 0, &[]);
    assert_eq!(mixed.theirs(&keepalive), Theirs::Nothing);
    mixed.exchange();
}

#[test]
fn they_present_the_cookie_that_we_demand() {
    let mut mixed = Mixed::new(Initiate::OnlyAnswer, [5; 32], Some([5; 32]));
    mixed.core.gate.set_threshold(0);
    let initiation = mixed.their_initiation();
    mixed.ours(&initiation);
    let reply = mixed.sent().expect("no cookie reply was sent");
    assert_eq!((reply[0], reply.len()), (3, 64));
    assert_eq!(mixed.events(), []);
    assert_eq!(mixed.theirs(&reply), Theirs::Nothing);
    mixed.answer();
    mixed.exchange();
}

#[test]
fn both_refuse_replayed_initiations() {
    let mut mixed = Mixed::new(Initiate::AtOnce, [5; 32], Some([5; 32]));
    mixed.pass(Duration::ZERO);
    let ours = mixed.sent().expect("no initiation was sent");
    assert!(matches!(mixed.theirs(&ours), Theirs::Sends(_)));
    assert_eq!(
        mixed.theirs(&ours),
        Theirs::Refuses(format!("{:?}", WireGuardError::WrongTai64nTimestamp))
    );

    let theirs = mixed.their_initiation();
    mixed.ours(&theirs);
    mixed.sent().expect("no response was sent");
    mixed.now += SECOND;
    mixed.ours(&theirs);
    assert_eq!((mixed.sent(), mixed.core.counters().replayed), (None, 1));
}
