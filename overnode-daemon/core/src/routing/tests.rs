use std::net::Ipv4Addr;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::*;
use overnode_types::{Network, PublicKey};

const OWN: u16 = 1;

fn id(number: u16) -> NodeId {
    NodeId::new(number).unwrap()
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn record(number: u16, ranges: &[&str], claims: &[&str]) -> Record {
    Record {
        version: 1,
        ranges: nets(ranges),
        claims: claims.iter().map(|text| text.parse().unwrap()).collect(),
        verifying_key: VerifyingKey([number as u8; 32]),
        ..Record::blank(id(number), 10, String::new(), PublicKey([number as u8; 32]))
    }
}

/// Node 1's view of a cluster with the default addresses. Quarter 2 is 10.42.0.0/15, of which
/// 10.43.0.0/16 is lent.
struct View {
    routing: Routing,
    now: Instant,
    reached: BTreeSet<NodeId>,
}

impl View {
    fn new() -> Self {
        let layout = Layout::new(Network::default()).unwrap();
        Self {
            routing: Routing::new(layout, id(OWN)),
            now: Instant::now(),
            reached: BTreeSet::new(),
        }
    }

    /// A reachable node announces these ranges and claims.
    fn says(&mut self, number: u16, ranges: &[&str], claims: &[&str]) {
        self.reached.insert(id(number));
        self.learn(&record(number, ranges, claims));
    }

    fn learn(&mut self, record: &Record) {
        self.routing.learn(record);
        self.look();
    }

    fn reach(&mut self, number: u16, is_reached: bool) {
        if is_reached {
            self.reached.insert(id(number));
        } else {
            self.reached.remove(&id(number));
        }
        self.look();
    }

    fn look(&mut self) {
        self.routing.set_reachable(&self.reached, self.now);
        self.pass(Duration::from_millis(10));
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.routing.update(self.now);
    }

    /// Returns the node that packets for an address are routed to.
    fn to(&self, address: &str) -> Option<u16> {
        let address: IpAddr = address.parse().unwrap();
        let all = self.routing.nodes.keys();
        let routes = all.flat_map(|id| self.routing.routes(*id).iter().map(move |net| (*net, *id)));
        let matching: Vec<_> = routes.filter(|(net, _)| net.contains(&address)).collect();
        let longest = matching.iter().map(|(net, _)| net.prefix_len()).max()?;
        let best: Vec<_> = matching.iter().filter(|(net, _)| net.prefix_len() == longest).collect();
        assert_eq!(best.len(), 1, "{address} is routed to several nodes: {best:?}");
        Some(best[0].1.get())
    }

    fn conflicts(&self) -> Vec<(u16, u16, Vec<String>)> {
        let conflicts = self.routing.conflicts(self.now);
        let prefixes = |it: &Conflict| it.prefixes.iter().map(ToString::to_string).collect();
        conflicts.map(|it| (it.holder.get(), it.claimant.get(), prefixes(&it))).collect()
    }
}

#[test]
fn no_node_takes_over_a_part_of_another_nodes_own_half() {
    let mut view = View::new();
    view.says(2, &["10.42.0.0/16", "10.43.0.0/16"], &[]);
    let lies = ["10.42.7.7/32", "10.42.0.0/16", "10.42.0.0/15", "10.40.0.0/13", "0.0.0.0/0"];
    view.says(9, &lies, &["10.42.7.8"]);
    assert_eq!(view.to("10.42.7.7"), Some(2));
    assert_eq!(view.to("10.42.7.8"), Some(2));
    assert_eq!(view.routing.routes(id(9)), nets(&["10.39.240.9/32"]));
    view.pass(SETTLE);
    let named: Vec<_> =
        view.conflicts().into_iter().map(|(holder, claimant, _)| (holder, claimant)).collect();
    // A prefix that covers several halves is reported for the first of them, which belongs to this
    // node.
    assert_eq!(named, [(1, 9), (2, 9)]);
    // The same holds when the owner is away for a long time.
    view.reach(2, false);
    view.pass(2 * GRACE);
    assert_eq!(view.to("10.42.7.7"), Some(2));
}

#[test]
fn no_node_takes_node_addresses_or_addresses_out_of_bounds() {
    let mut view = View::new();
    view.says(2, &[], &[]);
    view.says(
        9,
        &["10.39.240.2/32", "192.168.0.0/16", "10.32.0.0/24"],
        &["10.39.240.2", "192.168.0.1", "10.40.0.9"],
    );
    assert_eq!(view.to("10.39.240.2"), Some(2));
    assert_eq!(view.routing.routes(id(9)), nets(&["10.39.240.9/32"]));
}

#[test]
fn a_later_announcement_of_within_or_around_a_block_does_not_take_it() {
    for lie in ["10.43.0.4/32", "10.43.0.0/27", "10.43.0.0/24"] {
        let mut view = View::new();
        view.says(2, &["10.42.0.0/16", "10.43.0.0/16"], &[]);
        view.says(5, &["10.43.0.0/27"], &[]);
        view.says(9, &[lie], &[]);
        assert_eq!(view.to("10.43.0.4"), Some(5), "{lie}");
        assert!(view.conflicts().is_empty(), "the block may be about to change hands");
        view.pass(SETTLE);
        assert_eq!(view.conflicts().len(), 1, "{lie}");
        assert_eq!(view.conflicts()[0].0, 5);
        assert_eq!(view.conflicts()[0].1, 9);
        // The holder announces something new, restarts, and aggregates its block with another one.
        view.learn(&Record { incarnation: 11, ..record(5, &["10.43.0.0/26"], &["10.32.0.1"]) });
        view.learn(&record(5, &["10.43.0.0/27"], &[]));
        assert_eq!(view.to("10.43.0.4"), Some(5), "{lie}");
        // The first node to announce a free address gets it.
        assert_eq!(view.to("10.43.0.77"), (lie == "10.43.0.0/24").then_some(9));
        // The conflict ends with the claim.
        view.says(9, &[], &[]);
        assert!(view.conflicts().is_empty());
    }
}

#[test]
fn blocks_that_a_lender_uses_itself_belong_to_it() {
    let mut view = View::new();
    view.says(2, &["10.42.0.0/16", "10.43.0.0/16", "10.43.4.0/24"], &[]);
    view.says(9, &["10.43.4.9/32", "10.43.5.0/24"], &[]);
    assert_eq!(view.to("10.43.4.9"), Some(2));
    // Announcing the whole half only says that the node lends it. Borrowers announce parts of it.
    assert_eq!(view.to("10.43.5.1"), Some(9));
    assert_eq!(view.to("10.43.200.1"), None);
}

#[test]
fn a_static_address_stays_with_the_node_that_announced_it_first() {
    let mut view = View::new();
    view.says(7, &[], &["10.32.0.1"]);
    view.says(3, &[], &["10.32.0.1", "10.32.0.2"]);
    view.pass(SETTLE);
    assert_eq!((view.to("10.32.0.1"), view.to("10.32.0.2")), (Some(7), Some(3)));
    assert_eq!(view.conflicts(), [(7, 3, vec!["10.32.0.1/32".to_owned()])]);
    view.says(7, &[], &[]);
    assert_eq!(view.to("10.32.0.1"), Some(3));
}

#[test]
fn the_addresses_of_this_node_cannot_be_taken() {
    let mut view = View::new();
    view.says(9, &["10.43.0.4/32"], &["10.32.0.1"]);
    view.routing.set_own(
        &nets(&["10.40.0.0/16", "10.41.0.0/16", "10.43.0.0/27"]),
        &["10.32.0.1".parse().unwrap()],
    );
    view.pass(SETTLE);
    view.pass(SETTLE);
    assert_eq!((view.to("10.43.0.4"), view.to("10.32.0.1")), (None, None));
    assert_eq!(view.conflicts().len(), 1);
    assert_eq!((view.conflicts()[0].0, view.conflicts()[0].1), (1, 9));
}

#[test]
fn an_absent_holder_keeps_its_block_for_a_while_and_regains_it_later() {
    let mut view = View::new();
    view.says(5, &["10.43.0.0/27"], &[]);
    view.says(9, &["10.43.0.4/32"], &[]);
    view.reach(5, false);
    view.pass(GRACE - Duration::from_secs(1));
    assert_eq!(view.to("10.43.0.4"), Some(5), "its daemon may be restarting");
    view.pass(Duration::from_secs(2));
    assert_eq!(view.to("10.43.0.4"), Some(9), "no other claimant is present");
    view.reach(5, true);
    assert_eq!(view.to("10.43.0.4"), Some(5), "it announced the block first");
}

#[test]
fn a_node_that_was_never_reached_takes_nothing_from_one_that_was() {
    let mut view = View::new();
    view.learn(&record(9, &["10.43.0.4/32"], &[]));
    view.says(5, &["10.43.0.0/27"], &[]);
    assert_eq!(view.to("10.43.0.4"), Some(5));
}

#[test]
fn a_departed_node_loses_its_routes_and_its_successor_ranks_last() {
    let left = Record { left: true, ranges: Vec::new(), version: 2, ..record(5, &[], &[]) };
    let steps: [&dyn Fn(&mut View); 2] =
        [&|view| view.learn(&left), &|view| view.routing.set_reclaimed([(id(5), 10)])];
    for step in steps {
        let mut view = View::new();
        view.says(5, &["10.43.0.0/27"], &["10.32.0.5"]);
        view.says(9, &["10.43.0.4/32"], &["10.32.0.5"]);
        step(&mut view);
        view.look();
        assert_eq!(view.routing.routes(id(5)), []);
        assert_eq!((view.to("10.43.0.4"), view.to("10.32.0.5")), (Some(9), Some(9)));
        view.learn(&Record { incarnation: 11, ..record(5, &["10.43.0.0/27"], &["10.32.0.5"]) });
        assert_eq!((view.to("10.43.0.4"), view.to("10.43.0.5")), (Some(9), Some(5)));
        assert_eq!(view.to("10.32.0.5"), Some(9));
    }
    // The same holds for another node with the same ID.
    let mut view = View::new();
    view.says(5, &["10.43.0.0/27"], &[]);
    view.says(9, &["10.43.0.4/32"], &[]);
    view.learn(&Record {
        verifying_key: VerifyingKey([55; 32]),
        ..record(5, &["10.43.0.0/27"], &[])
    });
    assert_eq!(view.to("10.43.0.4"), Some(9));
}

#[test]
fn the_order_of_announcements_survives_a_restart_of_the_daemon() {
    let mut view = View::new();
    let (first, second) = (
        record(5, &["10.43.0.0/26"], &["10.32.0.5"]),
        record(9, &["10.43.0.4/32"], &["10.32.0.5"]),
    );
    view.says(5, &["10.43.0.0/27"], &["10.32.0.5"]);
    view.says(9, &["10.43.0.4/32"], &["10.32.0.5"]);
    view.learn(&first);
    let stored: Vec<_> = [second, first]
        .into_iter()
        .map(|it| (view.routing.standing(it.id).collect::<Vec<_>>(), it))
        .collect();
    let mut again = View::new();
    for (standing, record) in &stored {
        again.routing.restore(record, standing.iter().copied(), again.now);
    }
    // The liar is reachable at once, the first node is not.
    again.reach(9, true);
    assert_eq!((again.to("10.43.0.4"), again.to("10.32.0.5")), (Some(5), Some(5)));
    again.reach(5, true);
    again.says(7, &["10.43.0.40/32"], &["10.32.0.5"]);
    assert_eq!((again.to("10.43.0.40"), again.to("10.32.0.5")), (Some(5), Some(5)));
    again.learn(&Record { left: true, ..record(5, &[], &[]) });
    assert_eq!(again.to("10.32.0.5"), Some(9), "ranks continue where they left off");
}

#[test]
fn many_announcements_do_not_rebuild_the_table_too_often() {
    let mut view = View::new();
    let many: Vec<String> = (0..200).map(|n| format!("10.43.{n}.0/24")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    for number in 5..45 {
        view.says(number, &many, &[]);
    }
    view.pass(2 * SETTLE);
    let now = view.now;
    view.routing.learn(&record(5, &many[1..], &[]));
    let due = view.routing.poll_timeout().unwrap();
    assert!(due > now && due < now + Duration::from_millis(100), "{:?}", due - now);
    assert!(!view.routing.update(now + Duration::from_micros(1)));
    assert!(view.routing.update(due));
}

#[test]
fn a_member_with_many_ids_fills_no_list_and_takes_nothing() {
    let mut view = View::new();
    view.says(5, &["10.43.0.0/27"], &[]);
    for number in 100..400 {
        view.says(number, &["10.43.0.4/32", "10.43.0.0/24"], &[]);
    }
    view.pass(Duration::from_secs(1));
    view.pass(SETTLE);
    assert_eq!(view.to("10.43.0.4"), Some(5));
    assert_eq!(view.conflicts().len(), MAX_CONFLICTS);
}

/// The rules for one address, computed from every announcement.
#[derive(Default)]
struct Model {
    /// By node: the step since which it has announced the address.
    since: BTreeMap<u16, u64>,
}

#[test]
fn each_address_belongs_to_the_first_present_node() {
    // Some addresses of quarter 2's lendable half, and blocks of all sizes around them.
    let addresses: Vec<Ipv4Addr> = (0..32).map(|last| Ipv4Addr::new(10, 43, 9, last)).collect();
    for seed in 0..300 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut view = View::new();
        let mut models: BTreeMap<Ipv4Addr, Model> = BTreeMap::new();
        let mut announced: BTreeMap<u16, Vec<IpNet>> = BTreeMap::new();
        for step in 1..60 {
            let number = rng.random_range(5..10);
            match rng.random_range(0..10) {
                0 => view.reach(number, false),
                1 if announced.contains_key(&number) => view.reach(number, true),
                2 => view.pass(GRACE),
                _ => {
                    let count = rng.random_range(0..4);
                    let mut ranges: Vec<IpNet> = (0..count)
                        .map(|_| {
                            let address = *addresses.choose(&mut rng).unwrap();
                            let length = rng.random_range(26..=32);
                            IpNet::new(address.into(), length).unwrap().trunc()
                        })
                        .collect();
                    if rng.random_bool(0.5) {
                        ranges.extend(announced.get(&number).into_iter().flatten().copied());
                    }
                    if rng.random_bool(0.5) {
                        ranges = IpNet::aggregate(&ranges);
                    }
                    ranges.truncate(20);
                    for address in &addresses {
                        let model = models.entry(*address).or_default();
                        if ranges.iter().any(|net| net.contains(&IpAddr::from(*address))) {
                            model.since.entry(number).or_insert(step);
                        } else {
                            model.since.remove(&number);
                        }
                    }
                    let record = Record { ranges: ranges.clone(), ..record(number, &[], &[]) };
                    announced.insert(number, ranges);
                    view.reached.insert(id(number));
                    view.learn(&record);
                }
            }
            for (address, model) in &models {
                let first = model.since.iter().min_by_key(|(number, since)| {
                    (!view.routing.nodes[&id(**number)].is_present(view.now), **since)
                });
                let expected = first.map(|(number, _)| *number);
                assert_eq!(
                    view.to(&address.to_string()),
                    expected,
                    "seed {seed}, step {step}: {address}"
                );
            }
        }
    }
}
