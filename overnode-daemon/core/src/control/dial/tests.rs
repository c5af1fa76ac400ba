use std::collections::BTreeSet;

use rand::SeedableRng;

use super::*;
use overnode_types::{Network, PublicKey, VerifyingKey};

struct Bench {
    dialer: Dialer,
    now: Instant,
}

fn id(id: u16) -> NodeId {
    NodeId::new(id).unwrap()
}

fn hello(number: u16, incarnation: u64) -> Hello {
    Hello {
        versions: (1, 1),
        id: id(number),
        incarnation,
        nickname: format!("host{number}"),
        network: Network::default(),
        verifying_key: VerifyingKey::default(),
        process: incarnation,
        public_key: PublicKey([number as u8; 32]),
    }
}

fn address(number: u16) -> SocketAddr {
    format!("192.0.2.{number}:6783").parse().unwrap()
}

fn unreachable() -> Refusal {
    Refusal::TimedOut(10)
}

impl Bench {
    fn new(number: u16) -> Self {
        Self {
            dialer: Dialer::new(id(number), true, StdRng::seed_from_u64(1)),
            now: Instant::now(),
        }
    }

    fn actions(&mut self) -> Vec<Action> {
        std::iter::from_fn(|| self.dialer.poll_action()).collect()
    }

    /// Returns the attempts that were started, with their ID and target.
    fn dials(&mut self) -> Vec<(AttemptId, DialTarget)> {
        let actions = self.actions();
        actions
            .into_iter()
            .map(|action| match action {
                Action::Dial { attempt, place } => (attempt, place),
                Action::Close(id) => panic!("{id:?} closed"),
            })
            .collect()
    }

    fn dial(&mut self) -> AttemptId {
        match self.dials()[..] {
            [(attempt, _)] => attempt,
            ref other => panic!("expected one attempt, got {other:?}"),
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.dialer.handle_timeout(self.now);
    }

    /// Advances to the next time that the dialer asks for. Returns how far away it was.
    fn pass_to_next(&mut self) -> Duration {
        let next = self.dialer.poll_timeout().unwrap();
        let pause = next - self.now;
        self.now = next;
        self.dialer.handle_timeout(next);
        pause
    }

    fn established(&mut self, attempt: Option<AttemptId>, peer: &Hello) -> (ConnectionId, Verdict) {
        self.dialer.handle_established(attempt, peer, address(peer.id.get()), self.now)
    }

    fn targets(&self) -> Vec<String> {
        self.dialer.target_status().into_iter().map(|target| target.name).collect()
    }

    fn target(&self, name: &str) -> TargetStatus {
        self.dialer.target_status().into_iter().find(|target| target.name == name).unwrap()
    }
}

#[test]
fn a_target_is_retried_forever_with_growing_pauses() {
    let mut bench = Bench::new(1);
    bench.dialer.add_target("host2", bench.now);
    let mut pauses = Vec::new();
    for _ in 0..200 {
        let attempt = bench.dial();
        bench.pass(Duration::from_secs(3));
        assert_eq!(bench.dials(), [], "only one attempt at a time");
        bench.dialer.handle_failed(attempt, &unreachable(), bench.now);
        assert!(matches!(bench.target("host2").phase, Phase::Retrying { .. }));
        pauses.push(bench.pass_to_next());
    }
    assert!(
        pauses[0] >= FIRST_PAUSE / 2 && pauses[0] <= FIRST_PAUSE.mul_f64(1.5),
        "{:?}",
        pauses[0]
    );
    assert!(pauses.iter().all(|pause| *pause <= LONGEST_PAUSE));
    assert!(pauses[20..].iter().all(|pause| *pause >= LONGEST_PAUSE / 2));
    let distinct: BTreeSet<_> = pauses[20..].iter().collect();
    assert!(distinct.len() > 50, "jitter: {} different pauses", distinct.len());
    let (why, at) = bench.target("host2").last_error.unwrap();
    assert!(why.contains("no answer within 10 s") && at < bench.now);
}

#[test]
fn an_unresolvable_name_is_kept_and_connect_retries_it_at_once() {
    let mut bench = Bench::new(1);
    bench.dialer.add_target("nowhere.invalid", bench.now);
    for _ in 0..20 {
        let attempt = bench.dial();
        bench.dialer.handle_unresolved(attempt, "the name does not resolve", bench.now);
        bench.pass_to_next();
    }
    let attempt = bench.dial();
    bench.dialer.handle_unresolved(attempt, "the name does not resolve", bench.now);
    bench.dialer.add_target("nowhere.invalid", bench.now);
    bench.dial();
    assert_eq!(bench.targets(), ["nowhere.invalid"]);
}

#[test]
fn a_node_skips_its_own_address_until_told_to_connect_again() {
    let mut bench = Bench::new(1);
    bench.dialer.add_target("host1", bench.now);
    let attempt = bench.dial();
    bench.dialer.handle_failed(attempt, &Refusal::Myself, bench.now);
    assert_eq!(bench.target("host1").phase, Phase::Myself);
    bench.dialer.handle_refused(address(1), &Refusal::Myself, bench.now);
    assert_eq!(
        bench.dialer.connection_status().len(),
        1,
        "the incoming end of the connection to itself is not shown"
    );
    bench.pass(Duration::from_secs(86_400));
    assert_eq!(bench.dials(), []);
    assert_eq!(bench.dialer.poll_timeout(), None);
    bench.dialer.learn(id(1), vec![address(1)], bench.now);
    assert_eq!(bench.dials(), []);
    bench.dialer.add_target("host1", bench.now);
    bench.dial();
}

#[test]
fn a_lost_connection_is_redialed_at_once_only_if_it_was_long_lived() {
    for (lived, at_once) in [(LONG_LIVED, true), (LONG_LIVED - Duration::from_secs(1), false)] {
        let mut bench = Bench::new(1);
        bench.dialer.add_target("host2", bench.now);
        let attempt = bench.dial();
        let (connection, verdict) = bench.established(Some(attempt), &hello(2, 1));
        assert_eq!(verdict, Verdict::Keep { is_first: true });
        assert_eq!(bench.target("host2").phase, Phase::Established);
        assert_eq!(bench.target("host2").peer, Some(id(2)));
        bench.pass(lived);
        assert_eq!(bench.dials(), []);
        assert_eq!(
            bench.dialer.handle_lost(connection, "reset by peer", bench.now),
            Some((id(2), true))
        );
        assert_eq!(bench.dials().len(), usize::from(at_once));
        assert_eq!(bench.target("host2").last_error.unwrap().0, "reset by peer");
        assert_eq!(bench.dialer.handle_lost(connection, "again", bench.now), None);
    }
}

#[test]
fn learned_nodes_are_dialed_unless_discovery_is_off_or_they_are_connected() {
    let mut bench = Bench::new(1);
    bench.dialer.learn(id(2), vec![address(2)], bench.now);
    let dials = bench.dials();
    assert_eq!(dials[0].1, DialTarget::Addresses(id(2), vec![address(2)]));
    bench.dialer.handle_failed(dials[0].0, &unreachable(), bench.now);
    bench.dialer.learn(id(2), vec![address(2)], bench.now);
    assert_eq!(bench.dials(), [], "no new address");
    bench.dialer.learn(id(2), vec![address(3)], bench.now);
    let attempt = bench.dial();
    bench.dialer.unlearn(id(2));
    bench.dialer.handle_failed(attempt, &unreachable(), bench.now);
    bench.pass(Duration::from_secs(3600));
    assert_eq!(bench.dials(), []);

    bench.established(None, &hello(4, 1));
    bench.dialer.learn(id(4), vec![address(4)], bench.now);
    assert_eq!(bench.dials(), [], "connected from the other side");

    let mut quiet = Dialer::new(id(1), false, StdRng::seed_from_u64(1));
    quiet.learn(id(2), vec![address(2)], bench.now);
    assert_eq!(quiet.poll_action(), None);
}

#[test]
fn targets_are_forgotten_and_replaced() {
    let mut bench = Bench::new(1);
    bench.dialer.add_target("host2", bench.now);
    bench.dialer.add_target("host3", bench.now);
    let dials = bench.dials();
    let (connection, _) = bench.established(Some(dials[0].0), &hello(2, 1));
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    bench.dialer.replace_targets(&names(&["host4", "host3", "host1"]), bench.now);
    assert_eq!(
        bench.targets(),
        ["host3", "host4", "host1"],
        "in the order in which they were added"
    );
    assert_eq!(bench.dialer.connection(id(2)), Some(connection), "it stays connected");
    bench.dialer.handle_lost(connection, "gone", bench.now + LONG_LIVED);
    let targets: Vec<_> = bench.dials().into_iter().map(|(_, target)| target).collect();
    let expected = ["host4", "host1"].map(|name| DialTarget::Name(name.into()));
    assert_eq!(targets, expected, "host3 is being dialed already, host2 is forgotten");
}

#[test]
fn a_refused_connection_is_shown_until_it_expires() {
    let mut bench = Bench::new(1);
    for number in 1..=200 {
        bench.pass(Duration::from_millis(10));
        bench.dialer.handle_refused(address(number), &Refusal::Token, bench.now);
    }
    let status = bench.dialer.connection_status();
    assert_eq!(status.len(), MAX_REFUSED);
    assert!(status.iter().all(|one| one.phase == Phase::Refused && one.direction == Direction::In));
    assert!(status.iter().all(|one| one.last_error.as_ref().unwrap().0.contains("token differs")));
    bench.established(None, &hello(200, 1));
    assert_eq!(
        bench.dialer.connection_status().len(),
        MAX_REFUSED,
        "one of them became a connection"
    );
    bench.pass(REMEMBER_REFUSED);
    assert_eq!(bench.dialer.connection_status().len(), 1);
}

/// Two nodes open connections with each other, in every order in which the two ends can learn of
/// them.
#[test]
fn both_sides_keep_the_same_connection() {
    // For each connection, the node that opens it. `orders` holds the order in which each side
    // learns of them.
    let openings = [
        vec![1, 2],
        vec![2, 1],
        vec![1, 1],
        vec![2, 2],
        vec![1, 2, 1],
        vec![2, 1, 2],
        vec![1, 1, 2, 2],
    ];
    for opened_by in openings {
        let count = opened_by.len();
        for orders in permutations(count)
            .iter()
            .flat_map(|one| permutations(count).into_iter().map(move |other| [one.clone(), other]))
        {
            let mut sides = [Bench::new(1), Bench::new(2)];
            // For each side, its ID of connection n, if it keeps the connection.
            let mut names: [Vec<Option<ConnectionId>>; 2] = [vec![None; count], vec![None; count]];
            let mut closed = BTreeSet::new();
            for (side, order) in orders.iter().enumerate() {
                for &n in order {
                    let is_mine = opened_by[n] == side as u16 + 1;
                    let attempt = is_mine.then(|| {
                        sides[side].dialer.add_target(&format!("name{n}"), Instant::now());
                        match sides[side].actions().into_iter().find_map(|action| match action {
                            Action::Dial { attempt, .. } => Some(attempt),
                            Action::Close(_) => None,
                        }) {
                            Some(attempt) => attempt,
                            None => AttemptId(1000 + n as u64),
                        }
                    });
                    sides[side].now += Duration::from_millis(1);
                    let peer = hello(2 - side as u16, 1);
                    let (id, verdict) = sides[side].established(attempt, &peer);
                    if verdict == Verdict::Close {
                        closed.insert(n);
                    } else {
                        names[side][n] = Some(id);
                    }
                    for action in sides[side].actions() {
                        if let Action::Close(id) = action {
                            closed.insert(
                                names[side].iter().position(|name| *name == Some(id)).unwrap(),
                            );
                        }
                    }
                }
            }
            let left: Vec<_> = (0..count).filter(|n| !closed.contains(n)).collect();
            assert_eq!(left.len(), 1, "{opened_by:?} learned in {orders:?} leaves {left:?}");
            assert_eq!(opened_by[left[0]], *opened_by.iter().min().unwrap());
            for (side, bench) in sides.iter_mut().enumerate() {
                for n in &closed {
                    if let Some(name) = names[side][*n] {
                        bench.dialer.handle_lost(name, "closed", bench.now);
                    }
                }
                let peer = id(2 - side as u16);
                assert_eq!(bench.dialer.connection(peer), names[side][left[0]]);
            }
        }
    }
}

fn permutations(count: usize) -> Vec<Vec<usize>> {
    let mut all = vec![Vec::new()];
    for next in 0..count {
        all = all
            .into_iter()
            .flat_map(|order: Vec<usize>| {
                (0..=order.len()).map(move |at| {
                    let mut longer = order.clone();
                    longer.insert(at, next);
                    longer
                })
            })
            .collect();
    }
    all
}

#[test]
fn a_restarted_node_replaces_its_dead_connection() {
    let mut bench = Bench::new(1);
    bench.dialer.add_target("host2", bench.now);
    let attempt = bench.dial();
    let (old, _) = bench.established(Some(attempt), &hello(2, 1));
    let (new, verdict) = bench.established(None, &hello(2, 2));
    assert_eq!(verdict, Verdict::Keep { is_first: false });
    assert_eq!(bench.actions(), [Action::Close(old)]);
    assert_eq!(bench.dialer.connection(id(2)), Some(new));
    assert_eq!(
        bench.established(None, &hello(2, 1)).1,
        Verdict::Close,
        "an earlier incarnation comes too late"
    );
}

#[test]
fn parallel_connections_are_bounded() {
    let mut bench = Bench::new(1);
    for _ in 0..50 {
        bench.established(None, &hello(2, 1));
    }
    assert_eq!(bench.dialer.connection_status().len(), MAX_PARALLEL);
    assert_eq!(bench.actions().len(), 50 - MAX_PARALLEL);
}

#[test]
fn the_lower_id_dials_first_when_two_nodes_learn_of_each_other() {
    let mut higher = Bench::new(5);
    higher.dialer.learn(id(2), vec![address(2)], higher.now);
    assert_eq!(higher.dials(), []);
    assert_eq!(higher.pass_to_next(), LOWER_ID_HEAD_START);
    higher.dial();
}

#[test]
fn an_address_of_another_node_is_not_dialed_in_a_loop() {
    let mut bench = Bench::new(1);
    bench.dialer.learn(id(5), vec![address(6)], bench.now);
    let mut tries = 0;
    let end = bench.now + Duration::from_secs(600);
    while bench.now < end {
        for (attempt, _) in bench.dials() {
            tries += 1;
            bench.established(Some(attempt), &hello(6, 1));
        }
        bench.pass_to_next();
    }
    assert!((20..60).contains(&tries), "{tries} attempts in 10 minutes");
    let status = bench.dialer.connection_status();
    let why =
        &status.iter().find(|one| one.peer == Some(id(5))).unwrap().last_error.as_ref().unwrap().0;
    assert_eq!(why, "the address that node 5 announces leads to node 6 (host6)");
    assert!(status.iter().any(|one| one.peer == Some(id(6)) && one.phase == Phase::Established));
}

#[test]
fn a_second_host_with_the_same_id_is_reported_and_replaces_nothing() {
    let mut bench = Bench::new(1);
    let (first, _) = bench.established(None, &hello(7, 1));
    let mut second = hello(7, 9);
    second.public_key = PublicKey([0xee; 32]);
    bench.pass(Duration::from_secs(1));
    assert_eq!(bench.established(None, &second).1, Verdict::Close);
    assert_eq!(bench.dialer.connection(id(7)), Some(first));
    assert_eq!(bench.actions(), []);
    let status = bench.dialer.connection_status();
    let refused = status.iter().find(|one| one.phase == Phase::Refused).unwrap();
    let words = &refused.last_error.as_ref().unwrap().0;
    assert!(words.starts_with("ID 7 is used twice: by host7 and by host7"), "{words}");
}
