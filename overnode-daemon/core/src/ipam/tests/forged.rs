//! Tests of members that send forged messages or announce forged records.

use super::*;

#[test]
fn a_liar_cannot_declare_a_live_node_gone() {
    for incarnation in [1002, u64::MAX, 1 << 62] {
        for liar in [2, 5] {
            let mut cluster = Cluster::new("10.1.0.0/24", [1, 2, 3, 5]);
            cluster.run(LONG);
            cluster.allocate(5, 3);
            let lent = cluster.node(5).held().collect::<Vec<_>>();
            for victim in [1, 3, 5].into_iter().filter(|it| *it != liar) {
                for to in [1, 3, 5].into_iter().filter(|it| *it != liar) {
                    send_forged(&mut cluster, liar, to, &reclaimed(victim, incarnation, liar));
                }
            }
            for to in [1, 3, 5] {
                assert_eq!(
                    cluster.node(to).reclaimed().count(),
                    0,
                    "node {to} believes node {liar}"
                );
            }
            cluster.run(LONG);
            for lender in [1, 3] {
                assert!(
                    cluster.node(lender).lends(id(lender)).is_some(),
                    "node {lender} has stopped lending"
                );
                assert!(cluster.problems(lender).is_empty(), "{:?}", cluster.problems(lender));
            }
            if liar != 5 {
                continue;
            }
            assert_eq!(cluster.node(5).held().collect::<Vec<_>>(), lent);
            cluster.check();
        }
    }
}

/// The liar has the ID of a lender and names the very launch that it lies about.
#[test]
fn a_lender_that_most_nodes_vouch_for_does_not_believe_that_it_is_gone() {
    let mut cluster = Cluster::new("10.1.0.0/24", [1, 2, 3, 5]);
    cluster.run(LONG);
    for _ in 0..2 {
        send_forged(&mut cluster, 2, 3, &reclaimed(3, 1003, 2));
    }
    assert!(cluster.node(3).may_lend(id(3)));
    assert_eq!(cluster.problems(3), []);
}

/// A liar declares a node gone that is only away for a while. It says so to a lender that has lent
/// to that node.
#[test]
fn a_liar_cannot_free_what_was_lent_to_a_node_that_is_away() {
    for liar in [2, 6] {
        let mut cluster = Cluster::new("10.1.0.0/26", [1, 2, 5, 6]);
        cluster.run(LONG);
        cluster.allocate(5, 5);
        cluster.cut.insert(id(5));
        cluster.pump();
        cluster.run(LONG);
        let round = Round { incarnation: 1000, count: 1 };
        for incarnation in [1005, u64::MAX] {
            send_forged(&mut cluster, liar, 1, &reclaimed(5, incarnation, liar));
        }
        let asked = Message::Reclaim { of: id(5), incarnation: u64::MAX, round };
        send_forged(&mut cluster, liar, 1, &asked);
        send_forged(&mut cluster, liar, 1, &reclaimed(5, u64::MAX, liar));
        cluster.allocate(1, 7 + 8);
        cluster.run(LONG);
        cluster.check();
        cluster.heal();
        cluster.allocate(5, 4);
        cluster.run(LONG);
        cluster.check();
    }
}

#[test]
fn a_liar_cannot_take_a_quarter_by_claiming_to_hold_it() {
    let mut cluster = Cluster::new("10.1.0.0/24", [1, 2, 5, 6]);
    cluster.run(LONG);
    cluster.allocate(6, 3);
    let serial = cluster.node(1).lends(id(1)).unwrap();
    let title = Title { serial: serial + 5, holder: id(5) };
    for to in [1, 2, 6] {
        send_forged(&mut cluster, 5, to, &Message::Title { quarter: id(1), title });
        send_forged(&mut cluster, 5, to, &Message::Query { quarter: id(1), serial: serial + 5 });
    }
    let forged = Message::Title { quarter: id(1), title: Title { holder: id(2), ..title } };
    send_forged(&mut cluster, 5, 1, &forged);
    let loan = Loan { epoch: 1005, blocks: Vec::new() };
    let (serial, loans) = (serial + 9, vec![(id(5), loan)]);
    let transfer =
        Message::Transfer { quarter: id(1), serial, epoch: 1002, part: 0, parts: 1, loans };
    send_forged(&mut cluster, 5, 2, &transfer);
    cluster.run(LONG);
    assert_eq!(cluster.problems(1), [], "the lender gave way");
    assert!(cluster.node(1).lends(id(1)).is_some());
    assert!(cluster.node(2).lends(id(1)).is_none(), "another node took the quarter");
    cluster.allocate(6, 30);
    cluster.run(LONG);
    assert_eq!(cluster.granted[&id(6)].len(), 33, "only the lender may be asked");
    cluster.check();
}

/// A newly launched node 1 asks a liar, which answers that node 4 has the title. There is no node
/// 4.
#[test]
fn a_liar_cannot_make_a_new_lender_wait_for_a_node_that_does_not_exist() {
    for serial in [0, 1005] {
        let (mut ipam, now) = (node(1), Instant::now());
        ipam.set_targets_met(true, now);
        ipam.learn(id(6), Peer { incarnation: 1006, ..Peer::default() }, now);
        ipam.set_reachable(BTreeSet::from([id(6)]), now);
        let now = now + LONG;
        ipam.handle_timeout(now);
        let sent = sent_to(&mut ipam, 6);
        let [Message::Ask { round, .. }] = sent[..] else { panic!("{sent:?}") };
        let answer = Message::Answer {
            round,
            epoch: 1006,
            title: Title { serial, holder: id(4) },
            part: LenderRole::None,
            holds: Vec::new(),
            rivals: Vec::new(),
        };
        ipam.handle_message(id(6), &answer.encode(), now).unwrap();
        assert!(ipam.lends(id(1)).is_some(), "{:?}", ipam.pending());
    }
}

#[test]
fn a_liar_cannot_lend_a_quarter_by_announcing_it() {
    let mut cluster = Cluster::new("10.1.0.0/24", [5]);
    let half = cluster.node(5).layout().lendable(id(3)).unwrap();
    let now = cluster.now;
    cluster.node(5).learn(
        id(6),
        Peer { incarnation: 1, ranges: vec![half], ..Peer::default() },
        now,
    );
    cluster.node(5).set_reachable(BTreeSet::from([id(6)]), now);
    cluster.node(5).allocate("container", now);
    let asked = std::iter::from_fn(|| cluster.node(5).poll_action())
        .any(|it| matches!(it, Action::Send { .. }));
    assert!(!asked, "it must not borrow from node 6");
}

/// A liar used the ID of a node while that node was away, with the greatest possible numbers.
#[test]
fn a_liar_that_had_an_id_cannot_keep_its_owner_from_borrowing() {
    let mut cluster = Cluster::new("10.1.0.0/24", [1, 2]);
    cluster.run(LONG);
    let serial = cluster.node(1).lends(id(1)).unwrap();
    cluster.incarnations.insert(id(5), 2000);
    for number in [u64::MAX, 1 << 62, 2001] {
        let round = Round { incarnation: number, count: 1 };
        let holds = Vec::new();
        let request = Message::Request {
            quarter: id(1),
            serial,
            epoch: number,
            round,
            need: 0,
            want: 0,
            holds,
        };
        send_forged(&mut cluster, 5, 1, &request);
    }
    // In gossip, the owner has to exceed what the liar has announced there.
    cluster.start(5, 2001);
    cluster.allocate(5, 1);
    cluster.run(LONG);
    assert_eq!(cluster.granted[&id(5)].len(), 1);
    let half = cluster.node(5).layout().lendable(id(1)).unwrap();
    assert!(half.contains(&cluster.granted[&id(5)][0]), "node 1 must accept its request");
}

/// A liar announces a free block. Packets for that block would be routed to the liar.
#[test]
fn blocks_that_a_liar_announces_are_lent_to_nobody() {
    let mut cluster = Cluster::new("10.1.0.0/24", [1]);
    let half = cluster.node(1).layout().lendable(id(1)).unwrap();
    // The first block is lent to node 5.
    let ranges: Vec<_> = half.subnets(half.prefix_len() + 1).unwrap().skip(1).collect();
    let liar = Peer { incarnation: 1, ranges: ranges.clone(), ..Peer::default() };
    let now = cluster.now;
    cluster.start(5, 1005);
    cluster.run(LONG);
    cluster.node(1).learn(id(6), liar.clone(), now);
    cluster.allocate(5, 16 + 4);
    cluster.allocate(1, 31 + 4);
    assert_eq!(cluster.granted[&id(5)].len() + cluster.granted[&id(1)].len(), 31 + 16);
    let given = cluster.granted.values().flatten().filter(|address| ranges[0].contains(*address));
    assert_eq!(given.count(), 0, "{:?}", cluster.granted);
    // Announcing a whole half changes nothing.
    cluster.node(1).learn(id(6), Peer { ranges: vec![half], ..liar }, now);
    cluster.run(Duration::from_secs(5));
    assert_eq!(cluster.granted.values().flatten().count(), 31 + 4 + 16 + 4);
}
