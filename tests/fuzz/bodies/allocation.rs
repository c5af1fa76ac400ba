//! Fuzzes address allocation: true and false messages from members to a lender or a borrower.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use overnode_core::ipam::{
    Action, Change, Config, Fact, Ipam, Key, Loan, MAX_MESSAGE, Message, Peer, RequestId, Round,
    Timing, Title,
};
use overnode_types::{Network, NodeId};

use super::input::{Input, MAX_STEPS};

/// A node that lends and a node that borrows.
const OWN: [u16; 2] = [1, 5];

/// Runs a node among hostile members, step by step.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input(data);
    let mut world = World::new(OWN[usize::from(input.byte() & 1)]);
    for _ in 0..MAX_STEPS {
        let Some(step) = input.step() else { break };
        world.step(step, &mut input);
        world.check();
    }
}

struct World {
    ipam: Ipam,
    id: NodeId,
    incarnation: u64,
    now: Instant,
    facts: BTreeMap<Key, Fact>,
    waiting: BTreeSet<RequestId>,
    used: BTreeMap<IpAddr, String>,
}

impl World {
    fn new(number: u16) -> Self {
        let now = Instant::now();
        let ipam =
            Ipam::new(config(id(number), 1), [], BTreeMap::new(), now).expect("a valid network");
        let mut world = Self {
            ipam,
            id: id(number),
            incarnation: 1,
            now,
            facts: BTreeMap::new(),
            waiting: BTreeSet::new(),
            used: BTreeMap::new(),
        };
        world.check();
        world
    }

    fn step(&mut self, step: u8, input: &mut Input<'_>) {
        let peer = id(1 + u16::from(step >> 4) % 8);
        match step & 15 {
            0 | 1 => self.message(peer, input.bytes()),
            2 => {
                let left = input.byte() & 1 == 1;
                let peer_now = Peer { incarnation: input.short().into(), left, ..Peer::default() };
                if peer != self.id {
                    self.ipam.learn(peer, peer_now, self.now);
                }
            }
            3 => {
                let bits = input.byte();
                let reachable =
                    (1..=8).map(id).filter(|it| *it != self.id && bits >> (it.get() - 1) & 1 == 1);
                self.ipam.set_reachable(reachable.collect(), self.now);
            }
            4 => {
                self.now += Duration::from_millis(u64::from(input.short()));
                self.ipam.handle_timeout(self.now);
                let next = self.ipam.poll_timeout();
                assert!(next.is_none_or(|next| next > self.now), "the timeout does not advance");
            }
            5 => {
                self.waiting.insert(self.ipam.allocate("container", self.now));
            }
            6 => {
                if let Some(address) = self.used.keys().next().copied() {
                    self.used.remove(&address);
                    assert!(self.ipam.release(address, self.now).is_some());
                }
            }
            7 => self.ipam.set_targets_met(input.byte() & 1 == 1, self.now),
            8 => {
                let _ = self.ipam.reclaim(peer, self.now);
            }
            9 => self.restart(),
            10 => {
                if let Some(request) = self.waiting.pop_first() {
                    assert!(self.ipam.cancel(request));
                }
            }
            11 => {
                let address = IpAddr::V4((0x0a20_0000 | u32::from(input.byte())).into());
                self.waiting.insert(self.ipam.claim(address, "container", self.now));
            }
            _ => {}
        }
    }

    fn message(&mut self, peer: NodeId, bytes: &[u8]) {
        let layout = *self.ipam.layout();
        if let Ok(message) = Message::decode(bytes, &layout) {
            let encoded = message.encode();
            assert!(encoded.len() <= bytes.len(), "the encoding is not the shortest");
            assert_eq!(Message::decode(&encoded, &layout), Ok(message));
        }
        if peer != self.id
            && let Err(error) = self.ipam.handle_message(peer, bytes, self.now)
        {
            assert!(!error.to_string().chars().any(char::is_control));
        }
    }

    /// Restarts the node as after a kill. Only what was persisted is left.
    fn restart(&mut self) {
        self.incarnation += 1;
        self.waiting.clear();
        let config = config(self.id, self.incarnation);
        let ranges = self.ipam.ranges();
        self.ipam = Ipam::new(config, self.facts.values().cloned(), self.used.clone(), self.now)
            .expect("a valid network");
        assert_eq!(self.ipam.ranges(), ranges, "the restart changed the ranges");
    }

    /// Carries out the node's actions and checks the invariants.
    fn check(&mut self) {
        let layout = *self.ipam.layout();
        while let Some(action) = self.ipam.poll_action() {
            match action {
                Action::Persist(changes) => {
                    for change in changes {
                        match change {
                            Change::Put(fact) => self.facts.insert(fact.key(), fact),
                            Change::Forget(key) => self.facts.remove(&key),
                        };
                    }
                }
                Action::Send { to, bytes } => {
                    assert_ne!(to, self.id);
                    assert!(bytes.len() <= MAX_MESSAGE);
                    assert!(
                        Message::decode(&bytes, &layout).is_ok(),
                        "other nodes cannot decode the message"
                    );
                }
                Action::Granted { request, address } => {
                    assert!(self.waiting.remove(&request), "answer to an unknown request");
                    assert!(layout.is_usable(address));
                    let is_kept =
                        layout.own_part(self.id).is_some_and(|own| own.contains(&address))
                            || layout.check_static(address).is_ok()
                            || self.holds(address);
                    assert!(is_kept, "{address} is not on disk");
                    assert!(
                        self.used.insert(address, "container".into()).is_none(),
                        "{address} was given twice"
                    );
                }
                Action::Failed { request, error } => {
                    assert!(self.waiting.remove(&request), "answer to an unknown request");
                    assert!(!error.to_string().chars().any(char::is_control));
                }
                Action::Report(problem) => assert!(!problem.to_string().is_empty()),
                Action::Reclaimed(of) => assert_ne!(of, self.id),
                Action::ReclaimFailed(_) | Action::Renewed(_) => {}
                Action::MayLeave | Action::CannotLeave(_) => {
                    panic!("the node was not asked to leave")
                }
            }
        }
        let known: Vec<_> = self.ipam.held().collect();
        assert!(known.iter().all(|block| layout.quarter_of(*block).is_some()));
    }

    fn holds(&self, address: IpAddr) -> bool {
        self.facts.values().any(
            |fact| matches!(fact, Fact::Held { block, lost: false } if block.contains(&address)),
        )
    }
}

fn id(number: u16) -> NodeId {
    NodeId::new(number).expect("in range")
}

fn config(id: NodeId, incarnation: u64) -> Config {
    Config { network: Network::default(), id, incarnation, timing: Timing::default() }
}

pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let message = |from: u8, message: &Message| {
        [vec![(from - 1) << 4], Input::framed(&message.encode())].concat()
    };
    let wait = |milliseconds: u16| [&[4], &milliseconds.to_le_bytes()[..]].concat();
    let learn = |number: u8| vec![(number - 1) << 4 | 2, 0, 1, 0];
    let block = |text: &str| -> IpNet { text.parse().expect("a block") };
    let round = Round { incarnation: 1, count: 1 };
    let request = Message::Request {
        quarter: id(1),
        serial: 0,
        epoch: 1,
        round,
        need: 1,
        want: 16,
        holds: vec![block("10.41.0.0/28")],
    };
    let grant = Message::Grant {
        quarter: id(1),
        serial: 0,
        round,
        blocks: vec![block("10.41.0.0/28")],
        exhausted: false,
    };
    let title = Title { serial: 3, holder: id(2) };
    let loan = Loan { epoch: 1, blocks: vec![block("10.41.0.16/28")] };
    let transfer = Message::Transfer {
        quarter: id(1),
        serial: 1,
        epoch: 1,
        part: 0,
        parts: 1,
        loans: vec![(id(7), loan)],
    };
    let reclaimed = Message::Reclaimed { of: id(1), incarnation: 1, by: id(2), titles: [title; 4] };
    let lender = |steps: &[Vec<u8>]| [vec![0], steps.concat()].concat();
    let borrower = |steps: &[Vec<u8>]| [vec![1], steps.concat()].concat();
    let everybody = vec![3, 0xff];
    vec![
        (
            "lend",
            lender(&[learn(5), everybody.clone(), vec![7, 1], wait(11_000), message(5, &request)]),
        ),
        (
            "borrow",
            borrower(&[
                learn(1),
                everybody.clone(),
                vec![7, 1, 5],
                message(1, &grant),
                wait(600),
                vec![5, 9, 6],
            ]),
        ),
        (
            "poke",
            borrower(&[
                learn(1),
                everybody.clone(),
                message(1, &Message::Query { quarter: id(1), serial: 0 }),
            ]),
        ),
        (
            "vouch",
            borrower(&[
                learn(1),
                everybody.clone(),
                message(
                    1,
                    &Message::Hold { quarter: id(1), serial: 1, epoch: 1, round, sure: true },
                ),
                message(1, &Message::Vouch { quarter: id(1), serial: 1, round, heard: true }),
            ]),
        ),
        ("title", lender(&[learn(2), message(2, &Message::Title { quarter: id(1), title })])),
        ("ask", borrower(&[learn(1), message(1, &Message::Ask { epoch: 1, round })])),
        ("transfer", borrower(&[learn(1), everybody.clone(), message(1, &transfer), vec![9]])),
        (
            "reclaim",
            lender(&[
                learn(2),
                learn(3),
                vec![3, 4],
                vec![0x18],
                message(3, &Message::Reclaim { of: id(2), incarnation: 1, round }),
                wait(600),
            ]),
        ),
        (
            "claim",
            lender(&[
                learn(2),
                everybody.clone(),
                vec![11, 9],
                message(
                    2,
                    &Message::Claim { address: "10.32.0.9".parse().expect("an address"), round },
                ),
                wait(1100),
            ]),
        ),
        ("tombstone", lender(&[learn(2), message(2, &reclaimed), vec![5, 9, 5]])),
    ]
}
