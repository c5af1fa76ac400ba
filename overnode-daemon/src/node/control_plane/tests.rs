//! Two control planes that exchange messages through queues: no socket, no kernel, no disk.

use std::sync::Mutex;

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::sync::mpsc;

use super::*;
use crate::net::mesh::QueuedMessage;
use crate::node::local::tests::local_node;
use overnode_core::gossip::Signer;

struct Side {
    local: Arc<LocalNode>,
    control: ControlPlane,
    /// Messages to the other side.
    sent: Option<mpsc::Receiver<Vec<u8>>>,
}

const STREAM: StreamId = StreamId(1);

fn side(id: u16, now: Instant) -> Side {
    let local = local_node(id, now);
    let nickname = local.identity.nickname.clone();
    let own = Record::blank(local.id(), 1, nickname, local.public_key);
    let random = || StdRng::seed_from_u64(id.into());
    let gossip = Gossip::new(own, Signer::new(&local.identity.seed), random(), now);
    let dialer = Dialer::new(local.id(), true, random());
    let live_nodes: LiveNodes = Arc::new(Mutex::default());
    let control = ControlPlane::new(local.clone(), gossip, dialer, live_nodes);
    Side { local, control, sent: None }
}

impl Side {
    /// Tells this side that a connection with `other` is open.
    fn open(&mut self, other: &Side, now: Instant) {
        let (outbox, sent) = Outbox::pair(64);
        self.sent = Some(sent);
        let at = |side: &Side| SocketAddr::from(([192, 0, 2, side.local.id().get() as u8], 6783));
        let opened = Opened {
            id: STREAM,
            attempt: None,
            remote: at(other),
            local: at(self),
            hello: other.local.identity.local_identity().hello,
            version: 1,
            outbox,
        };
        self.control.handle_mesh(MeshEvent::Opened(Box::new(opened)), now);
    }

    fn effects(&mut self, now: Instant) -> Vec<Effect> {
        self.control.pump_gossip(now);
        self.control.pump_dialer();
        std::iter::from_fn(|| self.control.poll_effect()).collect()
    }

    /// Passes everything that the other side has sent to this one.
    fn receive(&mut self, from: &mut Side, now: Instant) {
        while let Some(bytes) = from.sent.as_mut().and_then(|sent| sent.try_recv().ok()) {
            let event = match Packet::decode(&bytes).expect("a packet") {
                Packet::Gossip(bytes) => MeshEvent::Received(STREAM, QueuedMessage::new(bytes)),
                Packet::RoutedMessage(bytes) => {
                    MeshEvent::RoutedMessage(STREAM, QueuedMessage::new(bytes))
                }
                _ => continue,
            };
            self.control.handle_mesh(event, now);
        }
    }
}

/// Two sides with a connection, and the effects of opening it.
fn connected() -> (Side, Side, Instant, Vec<Effect>) {
    let now = Instant::now();
    let (mut one, mut two) = (side(1, now), side(2, now));
    one.open(&two, now);
    two.open(&one, now);
    let mut effects = one.effects(now);
    two.effects(now);
    for step in 1..20 {
        let now = now + Duration::from_millis(100 * step);
        one.control.handle_timeout(now);
        two.control.handle_timeout(now);
        two.receive(&mut one, now);
        one.receive(&mut two, now);
        effects.extend(one.effects(now));
        two.effects(now);
    }
    (one, two, now + Duration::from_secs(2), effects)
}

#[test]
fn a_connection_is_reported_before_the_record_that_it_brings() {
    let (one, two, now, effects) = connected();
    let at = |is_it: &dyn Fn(&Effect) -> bool| effects.iter().position(is_it).expect("an effect");
    let other = two.local.id();
    let connected = at(&|it| matches!(it, Effect::Connected(id, _) if *id == other));
    let learned = at(&|it| matches!(it, Effect::Learned(record) if record.id == other));
    assert!(connected < learned, "{effects:?}");
    assert!(one.control.is_unsaved(other));
    assert_eq!(one.control.neighbors(), [other].into());
    assert_eq!(one.control.steadily_reachable(now), [other].into());
}

#[test]
fn a_malformed_message_ends_the_connection() {
    let (mut one, two, now, _) = connected();
    one.control.handle_mesh(MeshEvent::Received(STREAM, QueuedMessage::new(vec![0xff; 40])), now);
    let effects = one.effects(now);
    assert!(matches!(effects[0], Effect::Disconnected), "{effects:?}");
    assert!(one.control.neighbors().is_empty());
    assert_eq!(one.control.remote_of(two.local.id()), None);
    // Its record stays known, so that the data plane keeps its session.
    assert!(one.control.gossip.record(two.local.id()).is_some());
}

#[test]
fn a_node_that_does_not_read_its_messages_is_disconnected() {
    let (mut one, two, now, _) = connected();
    // Nobody takes messages from the queue any more.
    for step in 0..200_u64 {
        let now = now + Duration::from_secs(step);
        let nodes = if step % 2 == 0 { [two.local.id()].into() } else { BTreeSet::new() };
        one.control.set_no_direct_path(nodes, now);
        one.control.handle_timeout(now);
        if one.effects(now).iter().any(|it| matches!(it, Effect::Disconnected)) {
            return;
        }
    }
    panic!("the connection is still open");
}

#[test]
fn nodes_become_reachable_and_unreachable_once() {
    let (mut one, two, now, _) = connected();
    one.control.note_reachability(|_| true, now);
    assert_eq!(one.control.reach(two.local.id()), Some((true, now)));
    one.control.handle_mesh(MeshEvent::Closed(STREAM, Refusal::Misconduct("test".into())), now);
    one.effects(now);
    let later = now + Duration::from_secs(1);
    one.control.note_reachability(|_| true, later);
    one.control.note_reachability(|_| true, later + Duration::from_secs(1));
    assert_eq!(one.control.reach(two.local.id()), Some((false, later)));
    let reports = one.effects(later);
    let unreachable =
        |it: &&Effect| matches!(it, Effect::Report(EventKind::NodeUnreachable { .. }));
    assert_eq!(reports.iter().filter(unreachable).count(), 1, "{reports:?}");
}
