//! Tests of claims for static addresses, with messages reordered, repeated and lost.

use proptest::prelude::*;

use super::*;

const ADDRESSES: [&str; 2] = ["10.32.0.9", "10.33.7.5"];

/// A few nodes. Messages arrive only when the test delivers them.
struct Bench {
    now: Instant,
    start: u64,
    nodes: BTreeMap<NodeId, Ipam>,
    incarnations: BTreeMap<NodeId, u64>,
    cut: BTreeSet<NodeId>,
    messages: Vec<(NodeId, NodeId, Vec<u8>)>,
    /// Addresses that were granted and are on disk.
    disks: BTreeMap<NodeId, BTreeMap<IpAddr, String>>,
    answers: Vec<(NodeId, RequestId, Result<IpAddr, IpamError>)>,
}

impl Bench {
    fn new(ids: impl IntoIterator<Item = u16>) -> Self {
        let mut bench = Self {
            now: Instant::now(),
            start: 1000,
            nodes: BTreeMap::new(),
            incarnations: BTreeMap::new(),
            cut: BTreeSet::new(),
            messages: Vec::new(),
            disks: BTreeMap::new(),
            answers: Vec::new(),
        };
        for number in ids {
            bench.restart(id(number));
        }
        bench.gossip_all();
        bench
    }

    /// Starts a node, or kills and restarts it.
    fn restart(&mut self, id: NodeId) {
        self.start += 1;
        let config = Config {
            network: Network::default(),
            id,
            incarnation: self.start,
            timing: Timing::default(),
        };
        let allocated = self.disks.entry(id).or_default().clone();
        self.nodes.insert(id, Ipam::new(config, [], allocated, self.now).unwrap());
        self.incarnations.insert(id, self.start);
        self.messages.retain(|(from, ..)| *from != id);
        self.pump();
    }

    fn ids(&self) -> Vec<NodeId> {
        self.nodes.keys().copied().collect()
    }

    fn node(&mut self, number: u16) -> &mut Ipam {
        self.nodes.get_mut(&id(number)).unwrap()
    }

    fn talk(&self, one: NodeId, other: NodeId) -> bool {
        one != other && self.cut.contains(&one) == self.cut.contains(&other)
    }

    /// Delivers the latest record of `of` to `to`, if the two can communicate.
    fn gossip(&mut self, of: NodeId, to: NodeId) {
        if !self.talk(of, to) {
            return;
        }
        let peer = Peer {
            incarnation: self.incarnations[&of],
            claims: self.nodes[&of].claims(),
            ..Peer::default()
        };
        self.nodes.get_mut(&to).unwrap().learn(of, peer, self.now);
        self.pump();
    }

    fn gossip_all(&mut self) {
        for one in self.ids() {
            for other in self.ids() {
                self.gossip(one, other);
            }
        }
        self.follow_paths();
    }

    fn follow_paths(&mut self) {
        for one in self.ids() {
            let others = self.ids().into_iter().filter(|other| self.talk(one, *other)).collect();
            self.nodes.get_mut(&one).unwrap().set_reachable(others, self.now);
        }
        self.pump();
    }

    fn pump(&mut self) {
        for (&own, node) in &mut self.nodes {
            while let Some(action) = node.poll_action() {
                match action {
                    Action::Send { to, bytes } => self.messages.push((own, to, bytes)),
                    Action::Granted { request, address } => {
                        self.disks.get_mut(&own).unwrap().insert(address, "c".to_owned());
                        self.answers.push((own, request, Ok(address)));
                    }
                    Action::Failed { request, error } => {
                        self.answers.push((own, request, Err(error)))
                    }
                    _ => {}
                }
            }
        }
    }

    fn claim(&mut self, number: u16, address: IpAddr) -> RequestId {
        let now = self.now;
        let request = self.node(number).claim(address, "c", now);
        self.pump();
        request
    }

    fn release(&mut self, of: NodeId, address: IpAddr) {
        self.disks.get_mut(&of).unwrap().remove(&address);
        self.nodes.get_mut(&of).unwrap().release(address, self.now);
        self.pump();
    }

    fn deliver(&mut self, place: usize, keep: bool) {
        if self.messages.is_empty() {
            return;
        }
        let place = place % self.messages.len();
        let (from, to, bytes) =
            if keep { self.messages[place].clone() } else { self.messages.swap_remove(place) };
        if self.talk(from, to) {
            self.nodes.get_mut(&to).unwrap().handle_message(from, &bytes, self.now).unwrap();
            self.pump();
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        for id in self.ids() {
            self.nodes.get_mut(&id).unwrap().handle_timeout(self.now);
        }
        self.pump();
    }

    /// Delivers all messages and all records to all nodes until no consequences are left.
    fn calm_down(&mut self) {
        self.cut.clear();
        for _ in 0..8 {
            self.gossip_all();
            while !self.messages.is_empty() {
                self.deliver(0, false);
            }
            self.pass(Duration::from_millis(500));
        }
    }

    fn holders(&self, address: IpAddr) -> Vec<NodeId> {
        let has = |(_, disk): &(&NodeId, &BTreeMap<IpAddr, String>)| disk.contains_key(&address);
        self.disks.iter().filter(has).map(|(id, _)| *id).collect()
    }

    fn answer(&self, number: u16, request: RequestId) -> Option<Result<IpAddr, IpamError>> {
        let asked = self.answers.iter().find(|(of, it, _)| *of == id(number) && *it == request);
        asked.map(|(.., answer)| answer.clone())
    }

    /// Checks that of the nodes that share an address, one announces it and reports no problem, and
    /// the others name it.
    fn check_decided(&self) {
        for address in ADDRESSES.map(ip) {
            let holders = self.holders(address);
            if holders.is_empty() {
                continue;
            }
            let announces = |id: &&NodeId| self.nodes[*id].claims().contains(&address);
            let keepers: Vec<_> = holders.iter().filter(announces).copied().collect();
            let [keeper] = keepers[..] else { panic!("{address} is announced by {keepers:?}") };
            for holder in holders {
                let node = &self.nodes[&holder];
                let told: Vec<_> = node
                    .problems(self.now)
                    .into_iter()
                    .filter(|it| is_about(it, address))
                    .collect();
                if holder == keeper {
                    assert_eq!(told, [], "node {holder} keeps {address}");
                } else {
                    let owner = "c".to_owned();
                    assert_eq!(told, [Problem::Yielded { address, owner, node: keeper }]);
                }
            }
        }
    }
}

fn is_about(problem: &Problem, wanted: IpAddr) -> bool {
    match problem {
        Problem::Clash { address, .. }
        | Problem::Yielded { address, .. }
        | Problem::Contested { address, .. } => *address == wanted,
        _ => false,
    }
}

#[test]
fn of_two_simultaneous_claims_one_wins_and_is_named_to_the_other() {
    let address = ip(ADDRESSES[0]);
    for order in 0..24 {
        let mut bench = Bench::new([2, 3]);
        let requests = [(3, bench.claim(3, address)), (2, bench.claim(2, address))];
        for step in 0..8 {
            bench.deliver(order >> (step % 5), false);
        }
        bench.calm_down();
        let answers = requests.map(|(number, request)| bench.answer(number, request).unwrap());
        let [three, two] = &answers;
        assert_eq!(bench.holders(address).len(), 1, "{answers:?}");
        assert_eq!(two, &Ok(address), "of two simultaneous claims, that of the lower ID wins");
        let refused = three.clone().unwrap_err().to_string();
        assert!(refused.contains("node 2 "), "{refused}");
    }
}

#[test]
fn a_holder_objects_to_a_claim_before_gossip_does() {
    let address = ip(ADDRESSES[0]);
    let mut bench = Bench::new([2, 3]);
    let first = bench.claim(3, address);
    while !bench.messages.is_empty() {
        bench.deliver(0, false);
    }
    assert_eq!(bench.answer(3, first), Some(Ok(address)), "one round trip must suffice");
    // Node 2, which has the lower ID, has heard nothing of it.
    let second = bench.claim(2, address);
    while !bench.messages.is_empty() {
        bench.deliver(0, false);
    }
    assert_eq!(
        bench.answer(2, second),
        Some(Err(IpamError::InUseElsewhere { address, node: id(3) }))
    );
}

#[test]
fn a_silent_node_delays_a_claim_by_at_most_a_second() {
    let address = ip(ADDRESSES[0]);
    let mut bench = Bench::new([1, 2, 3]);
    let request = bench.claim(1, address);
    bench.messages.retain(|(_, to, _)| *to == id(2));
    bench.deliver(0, false);
    bench.deliver(0, false);
    bench.messages.clear();
    bench.pass(Duration::from_millis(990));
    assert_eq!(bench.answer(1, request), None);
    assert!(
        bench.messages.iter().all(|(_, to, _)| *to == id(3)),
        "a node that has answered must not be asked again"
    );
    assert!(!bench.messages.is_empty(), "a node that has not answered must be asked again");
    bench.pass(Duration::from_millis(10));
    assert_eq!(bench.answer(1, request), Some(Ok(address)));
    let alone = bench.claim(1, ip(ADDRESSES[1]));
    bench.cut.insert(id(1));
    bench.follow_paths();
    assert_eq!(bench.answer(1, alone), Some(Ok(ip(ADDRESSES[1]))), "no node is reachable any more");
}

#[test]
fn a_node_that_was_not_asked_can_neither_grant_nor_refuse() {
    let address = ip(ADDRESSES[0]);
    let mut bench = Bench::new([1, 2, 3]);
    let request = bench.claim(1, address);
    let Ok(Message::Claim { round, .. }) =
        Message::decode(&bench.messages[0].2, &Layout::new(Network::default()).unwrap())
    else {
        panic!("no claim was sent")
    };
    let now = bench.now;
    let other = Round { count: round.count + 1, ..round };
    for (from, round, verdict) in
        [(2, other, Verdict::Taken), (4, round, Verdict::Free), (2, other, Verdict::Free)]
    {
        let bytes = Message::ClaimAnswer { address, round, verdict }.encode();
        bench.node(1).handle_message(id(from), &bytes, now).unwrap();
    }
    let elsewhere =
        Message::ClaimAnswer { address: ip(ADDRESSES[1]), round, verdict: Verdict::Taken };
    bench.node(1).handle_message(id(2), &elsewhere.encode(), now).unwrap();
    bench.pump();
    assert_eq!(bench.answer(1, request), None);
    bench.calm_down();
    assert_eq!(bench.answer(1, request), Some(Ok(address)));
}

#[test]
fn claims_are_limited_in_number_and_to_static_addresses() {
    let mut bench = Bench::new([1, 2]);
    let now = bench.now;
    for number in 0..MAX_CLAIMS + 1 {
        let address = IpAddr::V4((0x0a20_0100 + number as u32).into());
        bench.node(1).claim(address, "c", now);
    }
    bench.pump();
    assert_eq!(bench.node(1).waiting(), MAX_CLAIMS);
    let [(_, _, Err(error))] = &bench.answers[..] else { panic!("{:?}", bench.answers) };
    assert_eq!(*error, IpamError::TooManyClaims { count: MAX_CLAIMS });
    bench.messages.clear();
    for address in ["10.40.0.1", "10.39.240.1", "192.0.2.1", "fd00::1"] {
        let bytes = Message::Claim { address: ip(address), round: Round::default() }.encode();
        let refused = bench.node(1).handle_message(id(2), &bytes, now);
        assert_eq!(refused, Err(BadMessage::Bounds("an address that is not static")), "{address}");
    }
    let mut full = Bench::new([1]);
    let now = full.now;
    for number in 0..=MAX_STATIC {
        full.node(1).claim(IpAddr::V4((0x0a20_0100 + number as u32).into()), "c", now);
    }
    full.pump();
    assert_eq!(
        full.node(1).claims().len(),
        MAX_STATIC,
        "an address that cannot be announced must not be granted"
    );
    let (_, _, last) = full.answers.last().unwrap();
    assert_eq!(*last, Err(IpamError::TooManyStatic { count: MAX_STATIC }));
}

#[test]
fn an_address_taken_on_both_sides_of_a_partition_stays_with_the_lower_id() {
    let address = ip(ADDRESSES[0]);
    let mut bench = Bench::new([2, 3, 4]);
    bench.cut.insert(id(3));
    bench.follow_paths();
    let apart = [bench.claim(2, address), bench.claim(3, address)];
    while !bench.messages.is_empty() {
        bench.deliver(0, false);
    }
    assert_eq!(
        [2, 3].map(|number| bench.answer(number, apart[usize::from(number) - 2])),
        [Some(Ok(address)), Some(Ok(address))]
    );
    bench.calm_down();
    bench.check_decided();
    assert_eq!(bench.node(3).keeper(address), Some(id(2)));
    // Both refuse a third claimant.
    let late = bench.claim(4, address);
    assert_eq!(
        bench.answer(4, late),
        Some(Err(IpamError::InUseElsewhere { address, node: id(2) }))
    );
    // The operator follows the advice, either way. Then nothing is reported any more, and the
    // address is routed to the remaining node.
    let mut other = Bench::new([2, 3, 4]);
    other.disks.clone_from(&bench.disks);
    for node in [2, 3] {
        other.restart(id(node));
    }
    other.calm_down();
    other.check_decided();
    bench.release(id(3), address);
    other.release(id(2), address);
    for (bench, left) in [(&mut bench, 2), (&mut other, 3)] {
        bench.calm_down();
        bench.check_decided();
        assert_eq!(bench.node(left).claims(), [address]);
        for number in [2, 3, 4] {
            let now = bench.now;
            assert_eq!(bench.node(number).problems(now), BTreeSet::new(), "node {number}");
        }
    }
}

/// A member with a lower ID wants an address that a container of another node has had for a while.
#[test]
fn a_known_claim_cannot_be_taken_over_by_a_record() {
    let address = ip(ADDRESSES[0]);
    let mut bench = Bench::new([2, 3]);
    bench.claim(3, address);
    bench.calm_down();
    bench.pass(Duration::from_secs(61));
    let now = bench.now;
    let forged =
        Peer { incarnation: bench.incarnations[&id(2)], claims: vec![address], ..Peer::default() };
    bench.node(3).learn(id(2), forged, now);
    assert_eq!(bench.node(3).claims(), [address], "the address must still be announced");
    bench.pass(Duration::from_secs(2));
    let now = bench.now;
    let problems: Vec<_> = bench.node(3).problems(now).into_iter().collect();
    assert_eq!(problems, [Problem::Contested { address, owner: "c".into(), node: id(2) }]);
    bench.gossip(id(2), id(3));
    let now = bench.now;
    assert_eq!(bench.node(3).problems(now), BTreeSet::new(), "the problem must have ended");
}

#[test]
fn a_leaving_node_claims_nothing() {
    let mut bench = Bench::new([5, 6]);
    let request = bench.claim(5, ip(ADDRESSES[0]));
    let now = bench.now;
    bench.node(5).leave(now);
    bench.pump();
    assert_eq!(bench.answer(5, request), Some(Err(IpamError::Leaving { id: id(5) })));
    let request = bench.claim(5, ip(ADDRESSES[0]));
    assert_eq!(bench.answer(5, request), Some(Err(IpamError::Leaving { id: id(5) })));
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Claim(u16, usize),
    Release(u16, usize),
    Deliver(usize),
    Double(usize),
    Lose(usize),
    Gossip(u16, u16),
    Pass(u64),
    Cut(u16),
    Heal,
    Crash(u16),
}

const NODES: u16 = 4;

/// Nodes 2 and 3 have the same address, and node 3 has given way. Node 2 is cut off when node 1
/// takes the address as well. Node 3 did not announce it then, so node 1 could not know of it and
/// keeps it.
#[test]
fn a_node_that_yielded_mistakes_no_claim_for_a_late_one() {
    let mut bench = Bench::new(1..=NODES);
    for op in [
        Op::Claim(2, 1),
        Op::Claim(3, 1),
        Op::Pass(5000),
        Op::Crash(1),
        Op::Cut(2),
        Op::Pass(15_000),
        Op::Pass(45_000),
        Op::Claim(1, 1),
        Op::Pass(5000),
    ] {
        carry_out(&mut bench, op);
    }
    assert_eq!(bench.holders(ip(ADDRESSES[1])), [id(1), id(2), id(3)]);
    bench.calm_down();
    bench.check_decided();
}

fn talking() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (1..=NODES, 0..ADDRESSES.len()).prop_map(|(node, address)| Op::Claim(node, address)),
        1 => (1..=NODES, 0..ADDRESSES.len()).prop_map(|(node, address)| Op::Release(node, address)),
        12 => any::<usize>().prop_map(Op::Deliver),
        1 => any::<usize>().prop_map(Op::Double),
        3 => (1..=NODES, 1..=NODES).prop_map(|(of, to)| Op::Gossip(of, to)),
        2 => Just(Op::Pass(2)),
    ]
}

fn anything() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => talking(),
        2 => any::<usize>().prop_map(Op::Lose),
        2 => (1_u64..90_000).prop_map(Op::Pass),
        1 => (1..=NODES).prop_map(Op::Cut),
        1 => Just(Op::Heal),
        1 => (1..=NODES).prop_map(Op::Crash),
    ]
}

fn carry_out(bench: &mut Bench, op: Op) {
    match op {
        Op::Claim(node, address) => drop(bench.claim(node, ip(ADDRESSES[address]))),
        Op::Release(node, address) => bench.release(id(node), ip(ADDRESSES[address])),
        Op::Deliver(place) => bench.deliver(place, false),
        Op::Double(place) => bench.deliver(place, true),
        Op::Lose(place) => {
            if !bench.messages.is_empty() {
                bench.messages.swap_remove(place % bench.messages.len());
            }
        }
        Op::Gossip(of, to) => bench.gossip(id(of), id(to)),
        // Connected nodes hear of each other at least every 30 seconds.
        Op::Pass(milliseconds @ ..5000) => bench.pass(Duration::from_millis(milliseconds)),
        Op::Pass(milliseconds) => {
            for _ in 0..milliseconds / 5000 {
                bench.pass(Duration::from_secs(5));
                bench.gossip_all();
            }
        }
        Op::Cut(node) => {
            bench.cut.insert(id(node));
            bench.follow_paths();
        }
        Op::Heal => {
            bench.cut.clear();
            bench.gossip_all();
        }
        Op::Crash(node) => {
            bench.restart(id(node));
            bench.follow_paths();
        }
    }
}

/// Nodes 2 and 3 have yielded to node 1. Node 3 restarted where it did not hear of node 1, and
/// announces the address. Once node 1 releases the address, node 2 could announce it as well, and
/// node 3 would treat that claim as late.
#[test]
fn a_node_that_yielded_leaves_the_address_to_its_new_announcer() {
    let mut bench = Bench::new(1..=NODES);
    for node in [1, 3, 2] {
        bench.claim(node, ip(ADDRESSES[1]));
    }
    carry_out(&mut bench, Op::Pass(5000));
    carry_out(&mut bench, Op::Cut(1));
    bench.release(id(1), ip(ADDRESSES[1]));
    carry_out(&mut bench, Op::Crash(3));
    carry_out(&mut bench, Op::Pass(60_000));
    carry_out(&mut bench, Op::Heal);
    bench.calm_down();
    bench.check_decided();
    assert_eq!(bench.node(2).keeper(ip(ADDRESSES[1])), Some(id(3)));
    bench.release(id(3), ip(ADDRESSES[1]));
    bench.calm_down();
    bench.check_decided();
    assert!(bench.node(2).claims().contains(&ip(ADDRESSES[1])), "node 2 must get the address back");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn connected_nodes_never_share_a_static_address(
        ops in prop::collection::vec(talking(), 0..120),
    ) {
        let mut bench = Bench::new(1..=NODES);
        let lets_go = ops.iter().any(|op| matches!(op, Op::Release(..)));
        let mut passed = 0;
        for op in ops {
            // No answer takes longer than the time that a claimant waits for a silent node.
            passed += u64::from(matches!(op, Op::Pass(_))) * 2;
            if passed < 900 {
                carry_out(&mut bench, op);
            }
            for address in ADDRESSES.map(ip) {
                let holders = bench.holders(address);
                prop_assert!(holders.len() <= 1, "{} is in use on {:?}", address, holders);
            }
        }
        let wanted: BTreeSet<_> =
            bench.nodes.values().flat_map(|node| node.statics.wanted()).collect();
        bench.calm_down();
        // An address that was released meanwhile may have been refused to another node a moment
        // before.
        for address in wanted.into_iter().filter(|_| !lets_go) {
            let holders = bench.holders(address).len();
            prop_assert_eq!(holders, 1, "one of several claimants must get the address");
        }
        bench.check_decided();
        for node in bench.nodes.values() {
            prop_assert_eq!(node.waiting(), 0);
            prop_assert_eq!(node.problems(bench.now), BTreeSet::new());
        }
    }

    #[test]
    fn every_conflict_is_decided_after_contact(ops in prop::collection::vec(anything(), 0..150)) {
        let mut bench = Bench::new(1..=NODES);
        for op in ops {
            carry_out(&mut bench, op);
        }
        bench.calm_down();
        bench.check_decided();
    }
}
