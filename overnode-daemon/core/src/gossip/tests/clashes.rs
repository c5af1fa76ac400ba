use rand::seq::IteratorRandom;

use super::*;

/// Returns a converged chain of six nodes, into which the tests bring a second host with the ID of
/// one of them.
fn divided() -> World {
    let mut world = World::new(6, 1);
    world.chain(6);
    world.assert_converges_within(Duration::from_secs(5), 1);
    world
}

/// Returns what a member without the owner's keys could make of a record.
fn forgeries(truth: &Record) -> Vec<Record> {
    let change = |change: fn(&mut Record)| {
        let mut forged = truth.clone();
        change(&mut forged);
        forged
    };
    vec![
        change(|it| it.version += 1),
        change(|it| it.incarnation += 1),
        change(|it| (it.version, it.nickname) = (it.version + 1, "liar".into())),
        change(|it| (it.version, it.links) = (it.version + 1, Vec::new())),
        change(|it| {
            (it.version, it.ranges) = (it.version + 1, vec!["10.40.0.0/13".parse().unwrap()])
        }),
        change(|it| (it.version, it.public_key) = (it.version + 1, PublicKey([66; 32]))),
        change(|it| (it.version, it.id) = (it.version + 1, id(6))),
        change(|it| (it.version, it.signature) = (it.version + 1, Signature([7; 64]))),
        change(|it| {
            it.version += 1;
            *it = it.clone().into_tombstone();
        }),
        // Signed, but not with the key that the record names.
        change(|it| {
            it.version += 1;
            let honest = it.verifying_key;
            signer(66).sign(it);
            it.verifying_key = honest;
        }),
    ]
}

#[test]
fn a_message_with_a_record_not_signed_by_its_owner_is_refused_whole() {
    let mut world = divided();
    let truth = world.node(1).record(id(3)).unwrap().clone();
    let before: Vec<_> = world.node(1).records().cloned().collect();
    for forged in forgeries(&truth) {
        let news = record(1, 1);
        assert!(sign::is_signed(&news));
        let named = forged.id;
        let message = Message::Delta(vec![forged, signed(blank(7, 1), 7)]).encode();
        let now = world.now;
        let outcome = world.node(1).handle_message(id(2), &message, now);
        assert_eq!(outcome, Err(BadMessage::Signature(named)));
    }
    assert_eq!(world.node(1).records().cloned().collect::<Vec<_>>(), before);
    assert_eq!(world.node(1).poll_action(), None);
}

#[test]
fn a_known_record_is_not_verified_again() {
    let mut world = divided();
    let mut old = world.node(1).record(id(3)).unwrap().clone();
    old.version -= 1;
    let now = world.now;
    let message = Message::Delta(vec![old]).encode();
    assert_eq!(
        world.node(1).handle_message(id(2), &message, now),
        Ok(()),
        "older than the known record"
    );
}

#[test]
fn the_id_of_a_reachable_node_cannot_be_taken_and_both_are_told() {
    for (liar, victim) in [(1, 6), (2, 1), (3, 4), (5, 2)] {
        let mut world = divided();
        let mut usurper = signed(blank(victim, 1000), 66);
        usurper.nickname = "usurper".into();
        let usurper = signed(usurper, 66);
        let to = if liar == 6 { 5 } else { liar + 1 };
        let now = world.now;
        let message = Message::Delta(vec![usurper]).encode();
        world.node(to).handle_message(id(liar), &message, now).unwrap();
        world.collect();
        world.run(OBJECTION * 2);
        world.assert_converges_within(Duration::from_secs(1), 1);
        for number in (1..=6).filter(|number| *number != victim) {
            assert_eq!(
                world.node(number).record(id(victim)).unwrap().nickname,
                format!("host{victim}")
            );
        }
        let is_reported = |number| world.clashes.contains(&(id(number), id(victim)));
        assert!(to == victim || is_reported(to), "{liar} lies about {victim}: {:?}", world.clashes);
        assert_eq!(world.contested, BTreeSet::from([id(victim)]), "{liar} lies about {victim}");
    }
}

#[test]
fn one_incarnation_has_one_identity() {
    let mut world = divided();
    world.cut(id(5), id(6));
    world.run(Duration::from_secs(2));
    let known = world.node(1).record(id(6)).unwrap().clone();
    let mut other = signed(blank(6, known.incarnation), 66);
    other.version = known.version + 10;
    let now = world.now;
    let message = |record| Message::Delta(vec![record]).encode();
    let same_incarnation = message(signed(other.clone(), 66));
    world.node(1).handle_message(id(2), &same_incarnation, now).unwrap();
    assert_eq!(world.node(1).record(id(6)), Some(&known));
    // The node is gone without notice, together with its disk, and is launched again: the ID is
    // free.
    other.incarnation += 1;
    world.node(1).handle_message(id(2), &message(signed(other, 66)), now).unwrap();
    assert_eq!(world.node(1).record(id(6)).unwrap().verifying_key, identity(66));
}

#[test]
fn a_neighbor_is_believed_over_what_others_said_about_it() {
    let mut world = World::new(2, 3);
    world.chain(2);
    world.assert_converges_within(Duration::from_secs(5), 3);
    let mut squatter = blank(9, SKEW_MS);
    squatter.version = MAX_STAMP;
    let now = world.now;
    let message = Message::Delta(vec![signed(squatter, 66)]).encode();
    world.node(1).handle_message(id(2), &message, now).unwrap();
    assert_eq!(world.node(1).record(id(9)).unwrap().verifying_key, identity(66));
    world.start(record(9, 5));
    world.connect(id(1), id(9));
    world.run(Duration::from_secs(3));
    assert_eq!(world.node(1).record(id(9)).unwrap().verifying_key, identity(9));
    assert_eq!(world.node(1).living().map(|it| it.id.get()).collect::<Vec<_>>(), [2, 9]);
}

/// Hosts by index, so that two can have the same ID. Messages arrive at once.
struct Hosts {
    now: Instant,
    hosts: Vec<Gossip>,
    links: BTreeSet<(usize, usize)>,
    contested: Vec<u32>,
    clashes: Vec<u32>,
    messages: u32,
}

impl Hosts {
    fn new(own: Vec<Record>) -> Self {
        let now = Instant::now();
        let count = own.len();
        let hosts = own.into_iter().map(|own| gossip(own, now)).collect();
        let (contested, clashes) = (vec![0; count], vec![0; count]);
        Self { now, hosts, links: BTreeSet::new(), contested, clashes, messages: 0 }
    }

    fn connect(&mut self, one: usize, other: usize) {
        for (from, to) in [(one, other), (other, one)] {
            self.links.insert((from, to));
            let (peer, identity) = (self.hosts[to].own().id, self.hosts[to].own().verifying_key);
            self.hosts[from].handle_connected(peer, identity, self.now);
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += Duration::from_millis(10);
            for from in 0..self.hosts.len() {
                self.hosts[from].handle_timeout(self.now);
                while let Some(action) = self.hosts[from].poll_action() {
                    self.carry_out(from, action);
                }
            }
        }
    }

    fn carry_out(&mut self, from: usize, action: Action) {
        let host = &self.hosts[from];
        match action {
            Action::Send { to, message } => {
                self.messages += 1;
                let sender = host.own().id;
                let leads = |index: &usize| {
                    self.links.contains(&(from, *index)) && self.hosts[*index].own().id == to
                };
                if let Some(index) = (0..self.hosts.len()).find(leads) {
                    self.hosts[index].handle_message(sender, &message.encode(), self.now).unwrap();
                }
            }
            Action::Contested(rival) => {
                assert_ne!(rival.verifying_key, host.own().verifying_key);
                self.contested[from] += 1;
            }
            Action::Clash { record, holder } => {
                assert_ne!(record.verifying_key, host.record(record.id).unwrap().verifying_key);
                assert_ne!(record.nickname, holder);
                self.clashes[from] += 1;
            }
            Action::SendRouted { to, routed } => {
                let leads = |index: &usize| {
                    self.links.contains(&(from, *index)) && self.hosts[*index].own().id == to
                };
                if let Some(index) = (0..self.hosts.len()).find(leads) {
                    let sender = self.hosts[from].own().id;
                    self.hosts[index].handle_routed(sender, &routed.encode(), self.now).unwrap();
                }
            }
            Action::Deliver(routed) => panic!("unexpected routed message: {routed:?}"),
            Action::Changed(_) | Action::Removed(_) => {}
        }
    }
}

fn rival() -> Record {
    let mut rival = record(7, 50);
    rival.nickname = "rival".into();
    signed(rival, 66)
}

/// A link between two other nodes joins two clusters that each have a node 7.
#[test]
fn two_hosts_with_one_id_joined_by_gossip_are_told_and_neither_spreads() {
    let mut net = Hosts::new(vec![
        record(1, 1),
        record(2, 1),
        record(3, 1),
        record(4, 1),
        record(7, 1),
        rival(),
    ]);
    for (one, other) in [(4, 0), (0, 1), (2, 3), (3, 5)] {
        net.connect(one, other);
    }
    net.run(Duration::from_secs(5));
    assert_eq!((net.contested.iter().sum::<u32>(), net.clashes.iter().sum::<u32>()), (0, 0));
    net.connect(1, 2);
    let messages = net.messages;
    net.run(Duration::from_secs(5));
    assert!(net.contested[4] > 0 && net.contested[5] > 0, "both must be told: {:?}", net.contested);
    assert!(
        net.clashes[1] > 0 && net.clashes[2] > 0,
        "the nodes that see the clash must be told: {:?}",
        net.clashes
    );
    net.run(Duration::from_secs(295));
    for index in 0..6 {
        let expected = if [0, 1, 4].contains(&index) { identity(7) } else { identity(66) };
        assert_eq!(net.hosts[index].record(id(7)).unwrap().verifying_key, expected, "host {index}");
        assert!(
            net.contested[index] <= 25 && net.clashes[index] <= 25,
            "{:?} {:?}",
            net.contested,
            net.clashes
        );
    }
    assert!(net.messages - messages < 1000, "{} messages in 5 minutes", net.messages - messages);
}

#[test]
fn two_hosts_with_one_id_that_hear_each_other_are_told_at_a_bounded_rate() {
    let mut now = Instant::now();
    let mut hosts = [record(7, 1), rival()].map(|own| gossip(own, now));
    for host in &mut hosts {
        host.handle_connected(id(1), identity(1), now);
    }
    let (mut reports, mut messages) = ([0, 0], 0);
    for _ in 0..1000 {
        now += Duration::from_millis(10);
        for (from, to) in [(0, 1), (1, 0)] {
            hosts[from].handle_timeout(now);
            while let Some(action) = hosts[from].poll_action() {
                match action {
                    Action::Send { message, .. } => {
                        messages += 1;
                        hosts[to].handle_message(id(1), &message.encode(), now).unwrap();
                    }
                    Action::Contested(_) => reports[from] += 1,
                    other => panic!("{other:?}"),
                }
            }
        }
    }
    assert!(reports.iter().all(|times| (3..=11).contains(times)), "{reports:?} reports in 10 s");
    assert!(messages < 60, "{messages} messages in 10 s");
}

#[test]
fn a_restored_disk_raises_no_alarm_but_a_copy_does() {
    let mut world = World::new(2, 5);
    world.chain(2);
    world.assert_converges_within(Duration::from_secs(5), 5);
    let past = signed(record(2, 0), 2);
    world.kill(id(2));
    world.start(past);
    world.connect(id(1), id(2));
    world.assert_converges_within(Duration::from_secs(5), 5);
    assert_eq!(world.contested, BTreeSet::new());
    // Another host goes on with the same keys.
    let mut copy = world.node(2).own().clone();
    copy.incarnation += 1;
    let now = world.now;
    let message = Message::Delta(vec![signed(copy, 2)]).encode();
    world.node(2).handle_message(id(1), &message, now).unwrap();
    world.run(Duration::from_secs(3));
    assert_eq!(world.contested, BTreeSet::from([id(2)]));
}

#[test]
fn a_stream_of_forged_records_is_answered_once_a_second() {
    let mut world = World::new(2, 8);
    world.chain(2);
    world.assert_converges_within(Duration::from_secs(5), 8);
    let records = world.records;
    for _ in 0..1000 {
        let mut lie = world.node(2).own().clone();
        lie.version += 5;
        let now = world.now;
        let lie = Message::Delta(vec![signed(lie, 66)]).encode();
        world.node(2).handle_message(id(1), &lie, now).unwrap();
        world.collect();
        world.run(Duration::from_millis(10));
    }
    let answers = world.records - records;
    assert!((8..=12).contains(&answers), "{answers} answers in 10 s");
}

/// Returns what a holder of the token could claim about another node, signed with its own keys.
fn lie(victim: &Record, rng: &mut StdRng) -> Record {
    let mut lie = victim.clone();
    match rng.random_range(0..5) {
        0 => lie.version += rng.random_range(1..100),
        1 => lie.incarnation += rng.random_range(1..1 << 40),
        2 => {
            lie.incarnation += 1;
            lie = lie.into_tombstone();
        }
        3 => lie.nickname = "no new version".into(),
        _ => (lie.incarnation, lie.links) = (MAX_STAMP, Vec::new()),
    }
    lie.version = lie.version.min(MAX_STAMP);
    lie.incarnation = lie.incarnation.min(MAX_STAMP);
    signed(lie, rng.random_range(60..70))
}

#[test]
fn forged_records_about_present_nodes_change_nothing() {
    for seed in 0..60 {
        let mut world = World::new(7, seed);
        world.chain(7);
        world.connect(id(1), id(7));
        world.assert_converges_within(Duration::from_secs(10), seed);
        for _ in 0..15 {
            let (from, to) = *world.links.keys().choose(&mut world.rng).unwrap();
            let victim =
                (1..=7).map(id).filter(|node| *node != from).choose(&mut world.rng).unwrap();
            let truth = world.nodes[&from].record(victim).unwrap().clone();
            let lie = Message::Delta(vec![lie(&truth, &mut world.rng)]).encode();
            let now = world.now;
            world.nodes.get_mut(&to).unwrap().handle_message(from, &lie, now).unwrap();
            world.collect();
            let pause = Duration::from_millis(world.rng.random_range(0..800));
            world.run(pause);
            for (own, node) in &world.nodes {
                for record in node.records() {
                    assert_eq!(
                        record.public_key, world.keys[&record.id],
                        "seed {seed}: {own} believes the forged record"
                    );
                }
                assert_eq!(node.reachable().len(), 6, "seed {seed}: {own}");
            }
        }
        world.assert_converges_within(COMPARE_INTERVAL * 8, seed);
    }
}
