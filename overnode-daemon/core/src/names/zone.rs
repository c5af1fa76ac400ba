//! Stores which node announces which name for which address. No I/O, no clock.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use overnode_types::NodeId;
use overnode_types::name::Named;

/// Maximum number of addresses or names in one answer. If there are more, a random selection is
/// returned.
pub const MAX_ANSWERS: usize = 256;

/// The names of all nodes. The addresses of a node whose names are not served are left out.
#[derive(Debug)]
pub struct Zone {
    /// This node. Its addresses come first in answers.
    own: NodeId,
    nodes: BTreeMap<NodeId, Vec<Named>>,
    served: BTreeSet<NodeId>,
    /// Whether there may be names that this node has not learned yet.
    is_incomplete: bool,
    /// Keyed by the name with its labels in reverse order, so that a name is followed by the names
    /// below it.
    forward: BTreeMap<String, BTreeSet<(IpAddr, NodeId)>>,
    reverse: BTreeMap<IpAddr, BTreeSet<(String, NodeId)>>,
    rng: StdRng,
}

/// Tells whether a name exists, as far as this node knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existence {
    /// It has an address, or a name below it has one.
    Exists,
    /// It is not known whether the name exists: a node that cannot be reached announced it, or not
    /// all names are known yet.
    Unknown,
    /// No node announces it.
    Absent,
}

impl Zone {
    /// Creates an empty zone of the node `own`.
    pub fn new(own: NodeId, rng: StdRng) -> Self {
        Self {
            own,
            nodes: BTreeMap::new(),
            served: BTreeSet::new(),
            is_incomplete: false,
            forward: BTreeMap::new(),
            reverse: BTreeMap::new(),
            rng,
        }
    }

    /// Replaces the names that a node announces.
    pub fn set_names(&mut self, node: NodeId, names: &[Named]) {
        if self.nodes.get(&node).map_or(&[][..], Vec::as_slice) == names {
            return;
        }
        for named in self.nodes.remove(&node).unwrap_or_default() {
            remove_value(&mut self.forward, &reversed(&named.name), &(named.address, node));
            remove_value(&mut self.reverse, &named.address, &(named.name, node));
        }
        for named in names {
            self.forward.entry(reversed(&named.name)).or_default().insert((named.address, node));
            self.reverse.entry(named.address).or_default().insert((named.name.clone(), node));
        }
        if !names.is_empty() {
            self.nodes.insert(node, names.to_vec());
        }
    }

    /// Sets the nodes whose names are served: this node and those that packets reach.
    pub fn set_served(&mut self, nodes: BTreeSet<NodeId>) {
        self.served = nodes;
    }

    /// Sets whether there may be names that this node has not learned yet.
    pub fn set_incomplete(&mut self, is_incomplete: bool) {
        self.is_incomplete = is_incomplete;
    }

    /// Returns the addresses of a name: those on this node first, each group in random order.
    pub fn addresses(&mut self, name: &str) -> Vec<IpAddr> {
        let found = self.forward.get(&reversed(name)).into_iter().flatten();
        let (mut here, mut elsewhere) = (BTreeSet::new(), BTreeSet::new());
        for (address, node) in found.filter(|(_, node)| self.served.contains(node)) {
            if *node == self.own {
                here.insert(*address)
            } else {
                elsewhere.insert(*address)
            };
        }
        elsewhere.retain(|address| !here.contains(address));
        let mut addresses = self.shuffled(here);
        addresses.extend(self.shuffled(elsewhere));
        addresses.truncate(MAX_ANSWERS);
        addresses
    }

    /// Returns the names of an address, in random order.
    pub fn names(&mut self, address: IpAddr) -> Vec<String> {
        let found = self.reverse.get(&address).into_iter().flatten();
        let found: BTreeSet<String> = found
            .filter(|(_, node)| self.served.contains(node))
            .map(|(name, _)| name.clone())
            .collect();
        self.shuffled(found)
    }

    /// Returns what is known of a name.
    pub fn existence(&self, name: &str) -> Existence {
        let first = reversed(name);
        let prefix = format!("{first}.");
        let below =
            self.forward.range(prefix.clone()..).take_while(|(name, _)| name.starts_with(&prefix));
        let holders = self.forward.get(&first).into_iter().chain(below.map(|(_, holders)| holders));
        let mut is_unknown = self.is_incomplete;
        for (_, node) in holders.flatten() {
            if self.served.contains(node) {
                return Existence::Exists;
            }
            is_unknown = true;
        }
        if is_unknown { Existence::Unknown } else { Existence::Absent }
    }

    /// Returns all entries by name, each with the node that announces it and whether its names are
    /// served.
    pub fn entries(&self) -> Vec<(&Named, NodeId, bool)> {
        let mut entries: Vec<_> = self
            .nodes
            .iter()
            .flat_map(|(node, names)| {
                names.iter().map(|it| (it, *node, self.served.contains(node)))
            })
            .collect();
        entries.sort();
        entries
    }

    fn shuffled<T>(&mut self, found: BTreeSet<T>) -> Vec<T> {
        let mut found: Vec<T> = found.into_iter().collect();
        let count = found.len().min(MAX_ANSWERS);
        found.partial_shuffle(&mut self.rng, count);
        // `partial_shuffle` moves the selected elements to the end.
        found.drain(..found.len() - count);
        found
    }
}

fn reversed(name: &str) -> String {
    name.rsplit('.').collect::<Vec<_>>().join(".")
}

fn remove_value<K: Ord, V: Ord>(map: &mut BTreeMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(values) = map.get_mut(key) {
        values.remove(value);
        if values.is_empty() {
            map.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn id(id: u16) -> NodeId {
        NodeId::new(id).unwrap()
    }

    fn named(name: &str, address: &str) -> Named {
        Named { name: name.into(), address: address.parse().unwrap() }
    }

    fn zone(nodes: &[(u16, &[(&str, &str)])]) -> Zone {
        let mut zone = Zone::new(id(1), StdRng::seed_from_u64(1));
        for (node, names) in nodes {
            zone.set_names(
                id(*node),
                &names.iter().map(|(name, it)| named(name, it)).collect::<Vec<_>>(),
            );
        }
        zone.set_served(nodes.iter().map(|(node, _)| id(*node)).collect());
        zone
    }

    fn texts(addresses: Vec<IpAddr>) -> Vec<String> {
        let mut texts: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
        texts.sort();
        texts
    }

    #[test]
    fn a_name_has_the_addresses_that_all_nodes_announce() {
        let mut zone = zone(&[
            (1, &[("web", "10.40.0.1"), ("web", "10.40.0.2"), ("db", "10.40.0.3")]),
            (2, &[("web", "10.42.0.1"), ("web", "10.40.0.1")]),
        ]);
        assert_eq!(texts(zone.addresses("web")), ["10.40.0.1", "10.40.0.2", "10.42.0.1"]);
        assert_eq!(texts(zone.addresses("db")), ["10.40.0.3"]);
        assert!(zone.addresses("other").is_empty());
        assert_eq!(zone.existence("other"), Existence::Absent);
        assert_eq!(zone.names("10.40.0.1".parse().unwrap()), ["web"]);
        assert!(zone.names("10.40.0.9".parse().unwrap()).is_empty());
    }

    #[test]
    fn the_order_is_random_and_fair() {
        let mut zone =
            zone(&[(1, &[("web", "10.40.0.1"), ("web", "10.40.0.2"), ("web", "10.40.0.3")])]);
        let mut firsts = BTreeMap::new();
        for _ in 0..3000 {
            *firsts.entry(zone.addresses("web")[0]).or_insert(0) += 1;
        }
        assert_eq!(firsts.len(), 3);
        assert!(firsts.values().all(|count| (850..1150).contains(count)), "{firsts:?}");
    }

    #[test]
    fn too_many_addresses_are_sampled_without_repetition() {
        let mut zone = Zone::new(id(1), StdRng::seed_from_u64(2));
        let all = (0..1000_u32).map(|n| Named {
            name: "web".into(),
            address: std::net::Ipv4Addr::from_bits(0x0a28_0000 + n).into(),
        });
        zone.set_names(id(1), &all.collect::<Vec<_>>());
        zone.set_served([id(1)].into());
        let mut seen = BTreeSet::new();
        for _ in 0..100 {
            let some = zone.addresses("web");
            assert_eq!(some.iter().collect::<BTreeSet<_>>().len(), MAX_ANSWERS);
            seen.extend(some);
        }
        assert_eq!(seen.len(), 1000, "every address is returned at some time");
    }

    #[test]
    fn names_of_an_unreachable_node_are_unknown_until_it_returns() {
        let mut zone = zone(&[
            (1, &[("web", "10.40.0.1")]),
            (2, &[("web", "10.42.0.1"), ("a.b", "10.42.0.2")]),
        ]);
        zone.set_served([id(1)].into());
        assert_eq!(texts(zone.addresses("web")), ["10.40.0.1"]);
        assert_eq!(zone.existence("web"), Existence::Exists, "node 1 has it");
        for name in ["a.b", "b"] {
            assert_eq!(zone.existence(name), Existence::Unknown);
        }
        assert_eq!(zone.existence("c"), Existence::Absent);
        assert!(zone.names("10.42.0.1".parse().unwrap()).is_empty());
        assert_eq!(zone.entries().len(), 3, "they are still shown");
        zone.set_served([id(1), id(2)].into());
        assert_eq!(texts(zone.addresses("web")), ["10.40.0.1", "10.42.0.1"]);
        assert_eq!(zone.existence("a.b"), Existence::Exists);
        zone.set_incomplete(true);
        assert_eq!(zone.existence("a.b"), Existence::Exists);
        assert_eq!(zone.existence("c"), Existence::Unknown);
    }

    #[test]
    fn addresses_on_this_node_come_first() {
        let mut zone = zone(&[
            (1, &[("web", "10.40.0.1"), ("web", "10.40.0.2")]),
            (2, &[("web", "10.42.0.1"), ("web", "10.40.0.1"), ("web", "10.42.0.2")]),
        ]);
        for _ in 0..50 {
            let addresses = zone.addresses("web");
            assert_eq!(texts(addresses[..2].to_vec()), ["10.40.0.1", "10.40.0.2"]);
            assert_eq!(texts(addresses[2..].to_vec()), ["10.42.0.1", "10.42.0.2"]);
        }
    }

    #[test]
    fn names_that_a_node_no_longer_announces_are_gone() {
        let mut zone = zone(&[
            (1, &[("web", "10.40.0.1"), ("db", "10.40.0.1")]),
            (2, &[("web", "10.40.0.1")]),
        ]);
        zone.set_names(id(1), &[named("db", "10.40.0.2")]);
        assert_eq!(texts(zone.addresses("web")), ["10.40.0.1"], "node 2 still announces it");
        assert_eq!(texts(zone.addresses("db")), ["10.40.0.2"]);
        zone.set_names(id(2), &[]);
        assert_eq!(zone.existence("web"), Existence::Absent);
        zone.set_names(id(1), &[]);
        assert!(zone.forward.is_empty() && zone.reverse.is_empty() && zone.nodes.is_empty());
    }

    #[test]
    fn a_name_with_names_below_it_exists() {
        let zone = zone(&[(1, &[("a.b.c", "10.40.0.1"), ("a.bb", "10.40.0.2")])]);
        for name in ["a.b.c", "b.c", "c", "bb", "a.bb"] {
            assert_eq!(zone.existence(name), Existence::Exists, "{name}");
        }
        for name in ["b", "a", "cc", "d.a.b.c", "a.b", "x.c"] {
            assert_eq!(zone.existence(name), Existence::Absent, "{name}");
        }
    }
}
