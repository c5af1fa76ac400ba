//! Tests of lenders that leave and hand their ledgers over.

use super::*;

#[test]
fn a_lender_that_leaves_hands_its_ledger_over_and_gets_it_back() {
    let mut cluster = Cluster::new("10.1.0.0/24", [1, 2, 5]);
    cluster.run(LONG);
    cluster.allocate(5, 3);
    let lent = cluster.node(5).held().collect::<Vec<_>>();
    let lender =
        if cluster.node(1).layout().lendable(id(1)).unwrap().contains(&lent[0]) { 1 } else { 2 };
    let now = cluster.now;
    cluster.node(lender).leave(now);
    cluster.pump();
    assert!(cluster.answers.contains(&(id(lender), Action::MayLeave)));
    let other = 3 - lender;
    assert!(cluster.node(other).lends(id(lender)).is_some());
    cluster.left.insert(id(lender));
    cluster.remove(lender);
    cluster.run(LONG);
    assert_eq!(cluster.node(5).held().collect::<Vec<_>>(), lent);
    cluster.start(lender, 9000);
    cluster.run(LONG);
    assert!(cluster.node(lender).lends(id(lender)).is_some(), "the lender must lend again");
    assert!(cluster.node(other).lends(id(lender)).is_none());
    let ledger: Vec<_> =
        cluster.node(lender).ledger().flat_map(|(_, loans)| loans).map(|(id, _)| id).collect();
    assert_eq!(ledger, [id(5)], "the ledger must have the earlier loans");
    cluster.check();
}

#[test]
fn a_lender_without_a_successor_cannot_leave() {
    let mut cluster = Cluster::new("10.1.0.0/24", [1, 5]);
    cluster.run(LONG);
    cluster.cut.insert(id(5));
    cluster.pump();
    let now = cluster.now;
    cluster.node(1).leave(now);
    cluster.run(LONG);
    let error = cluster.errors().pop().unwrap();
    assert!(
        error.contains("node 1 has lent addresses to node 5")
            && error.contains("none of nodes 1 to 4 is reachable"),
        "{error}"
    );
    cluster.cut.clear();
    cluster.allocate(1, 1);
    assert_eq!(cluster.granted[&id(1)].len(), 1, "the node must continue");
}

#[test]
fn nothing_stays_lent_to_a_borrower_that_has_left() {
    let mut cluster = Cluster::new("10.1.0.0/24", [1, 5]);
    cluster.run(LONG);
    assert!(cluster.held(5) > 0);
    cluster.left.insert(id(5));
    cluster.remove(5);
    assert_eq!(cluster.node(1).ledger().flat_map(|(_, loans)| loans).count(), 0);
}

/// The holder of the next title may have asked what is lent before this node got its block.
#[test]
fn a_borrower_tells_the_holder_of_a_later_title_what_it_holds() {
    let mut borrower = node(6);
    let (now, quarter) = (Instant::now(), id(3));
    let half = borrower.layout().lendable(quarter).unwrap();
    let peer = |incarnation, ranges| Peer { incarnation, ranges, ..Peer::default() };
    borrower.learn(id(1), peer(1001, vec![]), now);
    borrower.learn(quarter, peer(1003, vec![half]), now);
    borrower.set_reachable(BTreeSet::from([id(1), quarter]), now);
    let title = Title { serial: 5001, holder: quarter };
    borrower.handle_message(quarter, &Message::Title { quarter, title }.encode(), now).unwrap();
    borrower.allocate("container", now);
    let sent = sent_to(&mut borrower, 3);
    let Some(Message::Request { serial, round, .. }) = sent.last() else { panic!("{sent:?}") };
    let block = half.subnets(28).unwrap().next().unwrap();
    let grant = Message::Grant {
        quarter,
        serial: *serial,
        round: *round,
        blocks: vec![block],
        exhausted: false,
    };
    borrower.handle_message(quarter, &grant.encode(), now).unwrap();
    assert_eq!(borrower.held().collect::<Vec<_>>(), [block]);
    let title = Title { serial: 5002, holder: quarter };
    borrower.handle_message(quarter, &Message::Title { quarter, title }.encode(), now).unwrap();
    let told = sent_to(&mut borrower, 3).into_iter().find_map(|message| match message {
        Message::Request { quarter: of, holds, .. } if of == quarter => Some(holds),
        _ => None,
    });
    assert_eq!(told, Some(vec![block]));
}
