use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;

fn id(id: u16) -> NodeId {
    NodeId::new(id).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn net(subnet: &str, range: &str) -> Network {
    Network { subnet: subnet.parse().unwrap(), range: range.parse().unwrap() }
}

fn node(number: u16) -> Ipam {
    Ipam::new(Network::default(), id(number), BTreeMap::new()).unwrap()
}

#[test]
fn quarters_and_borders_of_the_default_range() {
    let layout = Layout::new(Network::default()).unwrap();
    let expected = [
        ("10.40.0.0/15", "10.40.0.1", "10.41.255.255"),
        ("10.42.0.0/15", "10.42.0.0", "10.43.255.255"),
        ("10.44.0.0/15", "10.44.0.0", "10.45.255.255"),
        ("10.46.0.0/15", "10.46.0.0", "10.47.255.254"),
    ];
    for (number, (quarter, first, last)) in (1..).zip(expected) {
        assert_eq!(layout.quarter(id(number)), Some(quarter.parse().unwrap()));
        assert_eq!(layout.usable(id(number)), Some((ip(first), ip(last))));
        let mut ipam = node(number);
        assert_eq!(ipam.allocate("a"), Ok(ip(first)));
        ipam.resume_after(ip(last));
        assert_eq!(ipam.allocate("b"), Ok(step(ip(first))), "the search goes round");
    }
    assert_eq!(layout.quarter(id(5)), None);
    assert_eq!(layout.statics(), (ip("10.32.0.1"), ip("10.39.239.255")));
    assert_eq!(layout.node_address(id(1)), ip("10.39.240.1"));
    assert_eq!(layout.node_address(id(4095)), ip("10.39.255.255"));
    assert_eq!(
        [1, 2, 3, 4, 5].map(|number| node(number).capacity()),
        [131_071, 131_072, 131_072, 131_071, 0]
    );
}

#[test]
fn a_node_without_space_says_which_have_it() {
    let error = node(5).allocate("a").unwrap_err();
    assert_eq!(error, IpamError::NotYet { id: id(5) });
    assert!(error.to_string().contains("IDs 1, 2, 3 and 4"));
    assert!(node(5).ranges().is_empty());
    assert_eq!(node(5).claim(ip("10.32.0.1"), "a"), Ok(()), "static addresses need no space");
}

#[test]
fn a_released_address_rests() {
    let mut ipam = node(1);
    let first = ipam.allocate("a").unwrap();
    assert_eq!(ipam.release(first), Some("a".into()));
    assert_eq!(ipam.release(first), None);
    assert_eq!(ipam.allocate("b"), Ok(ip("10.40.0.2")));
    let mut restarted = Ipam::new(Network::default(), id(1), ipam.allocated().clone()).unwrap();
    assert_eq!(restarted.allocate("c"), Ok(ip("10.40.0.3")));
    let mut empty = node(1);
    empty.resume_after(ip("10.40.0.7"));
    assert_eq!(empty.allocate("d"), Ok(ip("10.40.0.8")));
    empty.resume_after(ip("10.46.0.7"));
    assert_eq!(
        empty.allocate("e"),
        Ok(ip("10.40.0.9")),
        "an address of another node's quarter means nothing"
    );
}

#[test]
fn a_full_quarter_says_so_and_recovers() {
    let small = net("10.0.0.0/16", "10.0.255.0/28");
    let mut ipam = Ipam::new(small, id(2), BTreeMap::new()).unwrap();
    let given: Vec<_> = (0..4).map(|_| ipam.allocate("a").unwrap()).collect();
    assert_eq!(given, [4, 5, 6, 7].map(|last| IpAddr::from(Ipv4Addr::new(10, 0, 255, last))));
    let error = ipam.allocate("b").unwrap_err();
    assert_eq!(error, IpamError::Exhausted { id: id(2), count: 4, ranges: "10.0.255.4/30".into() });
    assert_eq!(ipam.check_ready(), Err(error));
    ipam.release(given[2]);
    assert_eq!(ipam.allocate("b"), Ok(given[2]));
    for (number, capacity) in [(1, 3), (4, 3)] {
        let mut ipam = Ipam::new(small, id(number), BTreeMap::new()).unwrap();
        assert_eq!(ipam.capacity(), capacity);
        for _ in 0..capacity {
            let address = ipam.allocate("a").unwrap();
            assert!(address != ip("10.0.255.0") && address != ip("10.0.255.15"));
        }
        assert!(matches!(ipam.allocate("a"), Err(IpamError::Exhausted { .. })));
    }
}

#[test]
fn the_whole_default_quarter_can_be_given_out() {
    let mut ipam = node(4);
    let mut seen = BTreeSet::new();
    for _ in 0..ipam.capacity() {
        // Counting for the error would make this quadratic.
        let (first, last) = ipam.layout.usable(ipam.id).unwrap();
        let start = ipam.cursor.map_or(first, step);
        let address = ipam.free_in(start, last).unwrap();
        ipam.allocated.insert(address, String::new());
        ipam.cursor = Some(address);
        assert!(seen.insert(address));
    }
    assert_eq!(seen.first(), Some(&ip("10.46.0.0")));
    assert_eq!(seen.last(), Some(&ip("10.47.255.254")));
    assert!(matches!(ipam.allocate("a"), Err(IpamError::Exhausted { count: 131_071, .. })));
}

#[test]
fn static_addresses_are_checked() {
    let mut ipam = node(1);
    for good in ["10.32.0.1", "10.39.239.255"] {
        assert_eq!(ipam.claim(ip(good), "a"), Ok(()));
        let error = ipam.claim(ip(good), "b").unwrap_err();
        assert_eq!(error, IpamError::InUse { address: ip(good), owner: "a".into() });
    }
    assert_eq!(ipam.claims(), [ip("10.32.0.1"), ip("10.39.239.255")]);
    for reserved in [
        "10.32.0.0",
        "10.39.240.0",
        "10.39.240.1",
        "10.39.255.255",
        "10.40.0.0",
        "10.40.0.1",
        "10.47.255.255",
    ] {
        let error = ipam.claim(ip(reserved), "a").unwrap_err();
        assert!(matches!(error, IpamError::Reserved { .. }), "{reserved}");
        assert!(error.to_string().ends_with("choose one from 10.32.0.1 to 10.39.239.255"), "{error}");
    }
    for outside in ["10.31.255.255", "10.48.0.0", "192.168.0.1", "fd00::1", "::ffff:10.32.0.5"] {
        assert!(matches!(ipam.claim(ip(outside), "a"), Err(IpamError::OutsideSubnet { .. })), "{outside}");
    }
    assert_eq!(ipam.allocated().len(), 2, "nothing was taken by a refused claim");
}

#[test]
fn claims_of_other_nodes_are_respected_and_clashes_found() {
    let mut ipam = node(1);
    let address = ip("10.32.0.9");
    assert!(ipam.handle_claims(id(2), &[address]).is_empty());
    assert_eq!(ipam.claim(address, "a"), Err(IpamError::InUseElsewhere { address, node: id(2) }));
    assert!(ipam.handle_claims(id(2), &[]).is_empty());
    assert_eq!(ipam.claim(address, "a"), Ok(()));
    assert_eq!(ipam.handle_claims(id(3), &[address, ip("10.32.0.10")]), [address]);
    assert!(ipam.handle_claims(id(1), &[address]).is_empty(), "the node's own word");
}

#[test]
fn impossible_networks_are_explained() {
    let refused = |subnet, range| Layout::new(net(subnet, range)).unwrap_err();
    assert!(matches!(refused("10.32.0.0/12", "10.48.0.0/13"), BadNetwork::Outside { .. }));
    assert!(matches!(refused("10.32.0.0/12", "fd00::/64"), BadNetwork::Outside { .. }));
    assert!(matches!(refused("10.40.0.0/13", "10.32.0.0/12"), BadNetwork::Outside { .. }));
    assert!(matches!(refused("10.32.0.0/12", "10.32.0.0/12"), BadNetwork::NoRoom { .. }));
    assert!(matches!(refused("10.0.0.0/24", "10.0.0.128/25"), BadNetwork::NoRoom { .. }));
    assert!(matches!(refused("10.32.0.0/12", "10.40.0.0/29"), BadNetwork::TooSmall { .. }));
    assert!(matches!(refused("10.32.0.0/12", "10.40.0.1/13"), BadNetwork::HostBits { .. }));
}

#[test]
fn other_networks_are_divided_likewise() {
    let above = Layout::new(net("10.0.0.0/8", "10.0.0.0/16")).unwrap();
    assert_eq!(above.node_address(id(1)), ip("10.1.0.1"));
    assert_eq!(above.statics(), (ip("10.1.16.0"), ip("10.255.255.254")));
    let whole_family = Layout::new(net("0.0.0.0/0", "128.0.0.0/1")).unwrap();
    assert_eq!(whole_family.usable(id(4)), Some((ip("224.0.0.0"), ip("255.255.255.254"))));
    let v6 = Layout::new(net("fd00::/16", "fd00:8000::/17")).unwrap();
    assert_eq!(v6.quarter(id(2)), Some("fd00:a000::/19".parse().unwrap()));
    assert_eq!(v6.usable(id(1)).unwrap().0, ip("fd00:8000::1"));
}

#[derive(Clone, Debug)]
enum Step {
    Allocate,
    ReleaseNth(usize),
    Claim(u32),
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => Just(Step::Allocate),
        2 => any::<usize>().prop_map(Step::ReleaseNth),
        1 => any::<u32>().prop_map(Step::Claim),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..200)
}

proptest! {
    #[test]
    fn no_address_is_given_twice_or_to_the_wrong_node(steps in steps(), number in 1_u16..=4, bits in 0_u8..4) {
        let range: IpNet = format!("10.1.0.0/{}", 28 - bits).parse().unwrap();
        let network = Network { subnet: "10.0.0.0/8".parse().unwrap(), range };
        let layout = Layout::new(network).unwrap();
        let quarter = layout.quarter(id(number)).unwrap();
        let (first, last) = layout.statics();
        let mut ipam = Ipam::new(network, id(number), BTreeMap::new()).unwrap();
        let mut model: BTreeMap<IpAddr, String> = BTreeMap::new();
        for (index, step) in steps.into_iter().enumerate() {
            let owner = format!("owner{index}");
            match step {
                Step::Allocate => match ipam.allocate(&owner) {
                    Ok(address) => {
                        prop_assert!(quarter.contains(&address));
                        prop_assert!(address != range.network() && address != range.broadcast());
                        prop_assert_eq!(model.insert(address, owner), None, "given twice");
                    }
                    Err(error) => {
                        prop_assert!(matches!(error, IpamError::Exhausted { .. }), "{}", error);
                        let used = model.keys().filter(|address| quarter.contains(*address)).count();
                        prop_assert_eq!(used as u128, ipam.capacity());
                    }
                },
                Step::ReleaseNth(nth) => {
                    let chosen = model.keys().nth(nth % model.len().max(1)).copied();
                    if let Some(address) = chosen {
                        prop_assert_eq!(ipam.release(address), model.remove(&address));
                    }
                }
                Step::Claim(bits) => {
                    // Mostly near the static addresses' borders.
                    let address = from_number(first, to_number(first) - 20 + u128::from(bits % 64));
                    let free = !model.contains_key(&address) && (first..=last).contains(&address);
                    prop_assert_eq!(ipam.claim(address, &owner).is_ok(), free);
                    if free {
                        model.insert(address, owner);
                    }
                }
                Step::Restart => {
                    ipam = Ipam::new(network, id(number), ipam.allocated().clone()).unwrap();
                }
            }
            prop_assert_eq!(ipam.allocated(), &model);
        }
    }

    #[test]
    fn quarters_are_disjoint_and_cover_the_range(prefix in 13_u8..=28, offset in any::<u32>()) {
        let range = IpNet::new(IpAddr::V4((0x0a00_0000 | (offset & 0x00ff_ffff)).into()), prefix).unwrap().trunc();
        let network = Network { subnet: "10.0.0.0/8".parse().unwrap(), range };
        let layout = Layout::new(network).unwrap();
        let usable: Vec<_> = (1..=4).map(|number| layout.usable(id(number)).unwrap()).collect();
        prop_assert_eq!(to_number(usable[0].0), to_number(range.network()) + 1);
        prop_assert_eq!(to_number(usable[3].1), to_number(range.broadcast()) - 1);
        for pair in usable.windows(2) {
            prop_assert_eq!(to_number(pair[0].1) + 1, to_number(pair[1].0));
        }
        let (first, last) = layout.statics();
        for number in [1, 4095] {
            let node = layout.node_address(id(number));
            prop_assert!(!range.contains(&node) && !(first..=last).contains(&node));
            prop_assert!(layout.check_static(node).is_err());
        }
        prop_assert!(layout.check_static(first).is_ok() && layout.check_static(last).is_ok());
    }
}
