//! Tests of how the cluster's addresses are divided, and of free and taken blocks.

use proptest::prelude::*;

use super::*;
use crate::ipam::layout::bounds;
use crate::ipam::space::{self, to_number};

#[test]
fn invalid_networks_are_refused_with_the_reason() {
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
fn other_networks_are_divided_the_same_way() {
    let above = Layout::new(net("10.0.0.0/8", "10.0.0.0/16")).unwrap();
    assert_eq!(above.node_address(id(1)), ip("10.1.0.1"));
    assert_eq!(above.statics(), (ip("10.1.16.0"), ip("10.255.255.254")));
    let whole_family = Layout::new(net("0.0.0.0/0", "128.0.0.0/1")).unwrap();
    assert_eq!(whole_family.usable(id(4)), Some((ip("224.0.0.0"), ip("255.255.255.254"))));
    let v6 = Layout::new(net("fd00::/16", "fd00:8000::/17")).unwrap();
    assert_eq!(v6.quarter(id(2)), Some("fd00:a000::/19".parse().unwrap()));
    assert_eq!(v6.usable(id(1)).unwrap().0, ip("fd00:8000::1"));
}

proptest! {
    #[test]
    fn free_and_taken_blocks_cover_the_whole(
        taken in prop::collection::vec((any::<u16>(), 17_u8..=32), 0..30),
    ) {
        let whole: IpNet = "10.1.0.0/16".parse().unwrap();
        let taken: Vec<IpNet> = taken
            .into_iter()
            .map(|(offset, prefix)| {
                let address = IpAddr::V4((0x0a01_0000 | u32::from(offset)).into());
                IpNet::new(address, prefix).unwrap().trunc()
            })
            .collect();
        let free = space::free(whole, taken.iter().copied());
        prop_assert!(free.windows(2).all(|pair| bounds(pair[0]).1 < bounds(pair[1]).0));
        for block in &free {
            prop_assert!(!taken.iter().any(|taken| space::overlap(*taken, *block)));
        }
        let free_size: u128 = free.iter().map(|block| space::size(*block)).sum();
        let taken = IpNet::aggregate(&taken);
        let taken_size: u128 = taken.iter().map(|block| space::size(*block)).sum();
        prop_assert_eq!(free_size + taken_size, 65_536);
    }

    #[test]
    fn chosen_blocks_are_free_and_suffice(
        taken in prop::collection::vec((any::<u8>(), 24_u8..=32), 0..10),
        count in 1_u128..400,
    ) {
        let whole: IpNet = "10.1.0.0/24".parse().unwrap();
        let taken: Vec<IpNet> = taken
            .into_iter()
            .map(|(offset, prefix)| {
                let address = IpAddr::V4((0x0a01_0000 | u32::from(offset)).into());
                IpNet::new(address, prefix).unwrap().trunc()
            })
            .collect();
        let free = space::free(whole, taken.into_iter());
        let left: u128 = free.iter().map(|block| space::size(*block)).sum();
        let chosen = space::choose(&free, count, usize::MAX);
        let size: u128 = chosen.iter().map(|block| space::size(*block)).sum();
        prop_assert!(size >= count.min(left) && size <= left && size < 2 * count.max(1));
        for block in &chosen {
            prop_assert!(free.iter().any(|free| free.contains(block)));
        }
        prop_assert!(chosen.windows(2).all(|pair| bounds(pair[0]).1 < bounds(pair[1]).0));
    }

    #[test]
    fn quarters_are_disjoint_and_cover_the_range(prefix in 13_u8..=28, offset in any::<u32>()) {
        let address = IpAddr::V4((0x0a00_0000 | (offset & 0x00ff_ffff)).into());
        let range = IpNet::new(address, prefix).unwrap().trunc();
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
            for length in [8, 20, 32] {
                let around = IpNet::new(node, length).unwrap().trunc();
                prop_assert!(layout.has_node_addresses(around));
            }
        }
        prop_assert!(!layout.has_node_addresses(range));
        prop_assert!(!layout.has_node_addresses("::/0".parse().unwrap()));
        prop_assert!(!layout.has_node_addresses(IpNet::from(first)));
        prop_assert!(!layout.has_node_addresses(IpNet::from(last)));
        prop_assert!(layout.check_static(first).is_ok() && layout.check_static(last).is_ok());
    }
}
