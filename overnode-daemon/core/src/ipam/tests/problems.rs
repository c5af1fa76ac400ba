//! Tests that each problem ends when its cause ends.

use super::*;

fn told(cluster: &mut Cluster, number: u16) -> BTreeSet<Problem> {
    let now = cluster.now;
    cluster.node(number).problems(now)
}

#[test]
fn lost_blocks_are_reported_while_in_use_and_the_reclaim_for_a_while() {
    let mut cluster = Cluster::new("10.1.0.0/26", [1, 2, 5]);
    cluster.run(LONG);
    cluster.allocate(1, 9);
    cluster.run(LONG);
    cluster.nodes.remove(&id(1));
    let (old_disk, old_addresses) =
        (cluster.disks[&id(1)].clone(), cluster.granted.remove(&id(1)).unwrap());
    cluster.pump();
    cluster.run(LONG);
    let now = cluster.now;
    cluster.node(2).reclaim(id(1), now).unwrap();
    cluster.run(LONG * 2);
    cluster.allocate(2, 8 + 8 + 8 - 1);
    cluster.run(LONG);
    cluster.disks.insert(id(1), old_disk);
    cluster.granted.insert(id(1), old_addresses);
    cluster.start(1, 2000);
    cluster.run(LONG);
    let is_lost = |problem: &Problem| matches!(problem, Problem::Lost { .. });
    let problems = told(&mut cluster, 1);
    assert!(problems.contains(&Problem::Reclaimed { by: id(2) }), "{problems:?}");
    assert!(problems.iter().any(is_lost), "{problems:?}");
    // A restart does not change the current state.
    cluster.start(1, 3000);
    assert!(told(&mut cluster, 1).iter().any(is_lost));
    // The operator follows the advice and detaches the containers with addresses in the lost
    // blocks.
    let lost: Vec<IpNet> = cluster.node(1).lost().collect();
    let now = cluster.now;
    let in_it = |address: &IpAddr| lost.iter().any(|block| block.contains(address));
    let (gone, kept): (Vec<IpAddr>, Vec<IpAddr>) =
        cluster.granted.remove(&id(1)).unwrap().into_iter().partition(in_it);
    cluster.granted.insert(id(1), kept);
    for address in gone {
        cluster.node(1).release(address, now);
    }
    assert_eq!(told(&mut cluster, 1), BTreeSet::new());
    assert_eq!(cluster.node(1).lost().count(), 0, "the block must be handed back at once");
    cluster.run(LONG);
    cluster.check();
}

#[test]
fn a_reclaim_is_reported_for_ten_minutes_and_names_the_claimant() {
    let mut ipam = node(5);
    let now = Instant::now();
    let titles = [Title { serial: 0, holder: id(1) }; 4];
    let reclaimed = Message::Reclaimed { of: id(5), incarnation: 1000, by: id(1), titles };
    ipam.learn(id(1), Peer { incarnation: 1, ..Peer::default() }, now);
    ipam.learn(id(2), Peer { incarnation: 1, ..Peer::default() }, now);
    ipam.set_reachable(BTreeSet::from([id(2)]), now);
    ipam.handle_message(id(2), &reclaimed.encode(), now).unwrap();
    assert_eq!(ipam.problems(now), BTreeSet::from([Problem::Reclaimed { by: id(1) }]));
    assert!(Problem::Reclaimed { by: id(1) }.to_string().starts_with("node 1 has reclaimed"));
    assert_eq!(ipam.problems(now + Duration::from_secs(600)), BTreeSet::new());
}

#[test]
fn a_contradiction_lasts_until_either_node_releases_the_block() {
    for lets_go in [5, 6] {
        let mut cluster = Cluster::new("10.1.0.0/24", [1, 2]);
        cluster.run(LONG);
        let now = cluster.now;
        let block: IpNet = "10.1.0.32/28".parse().unwrap();
        let serial = cluster.node(1).lends(id(1)).unwrap();
        let says = |cluster: &mut Cluster, of: u16, count, holds: &[IpNet]| {
            let request = Message::Request {
                quarter: id(1),
                serial,
                epoch: 1,
                round: Round { incarnation: 1, count },
                need: 0,
                want: 0,
                holds: holds.to_vec(),
            };
            cluster.node(1).handle_message(id(of), &request.encode(), now).unwrap();
            told(cluster, 1)
        };
        for other in [5, 6] {
            cluster.node(1).learn(id(other), Peer { incarnation: 1, ..Peer::default() }, now);
        }
        assert_eq!(says(&mut cluster, 5, 1, &[block]), BTreeSet::new());
        let problem = Problem::Contradiction { borrower: id(6), block };
        assert_eq!(says(&mut cluster, 6, 1, &[block]), BTreeSet::from([problem]));
        assert_eq!(says(&mut cluster, lets_go, 2, &[]), BTreeSet::new());
    }
}

#[test]
fn an_address_in_another_nodes_block_is_reported_while_both_claim_it() {
    let mut cluster = Cluster::new("10.1.0.0/24", [1, 5]);
    cluster.run(LONG);
    cluster.allocate(5, 1);
    cluster.run(LONG);
    let address = cluster.granted[&id(5)][0];
    let (now, block) = (cluster.now, cluster.node(5).held().next().unwrap());
    let peer =
        |ranges: &[IpNet]| Peer { incarnation: 7, ranges: ranges.to_vec(), ..Peer::default() };
    cluster.node(5).learn(id(7), peer(&[block]), now);
    assert_eq!(told(&mut cluster, 5), BTreeSet::from([Problem::Clash { address, node: id(7) }]));
    cluster.node(5).learn(id(7), peer(&[]), now);
    assert_eq!(told(&mut cluster, 5), BTreeSet::new());
    cluster.node(5).learn(id(7), peer(&[block]), now);
    cluster.node(5).release(address, now);
    assert_eq!(told(&mut cluster, 5), BTreeSet::new());
}
