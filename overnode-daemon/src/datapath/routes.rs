//! Decides which prefix is routed where. This module touches no map.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use overnode_ebpf::map::{
    ENDPOINT_SLOTS, ROUTE_HOST, ROUTE_LOCAL, ROUTE_NONE, ROUTE_PEER, ROUTE_SLOTS, Route,
};

use overnode_types::{InterfaceIndex, PeerIndex};

/// Maximum number of routes that peers may occupy in the map. The rest is reserved for this host's
/// containers and prefixes.
const PEER_ROUTES: usize = (ROUTE_SLOTS - 2 * ENDPOINT_SLOTS) as usize;

/// Where packets for a prefix go. [`Route`] is its form in the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Destination {
    /// The prefix is this node's, but nothing is attached at the address: packets are dropped.
    Unattached,
    /// A container of this host, through its host-side end.
    Container(InterfaceIndex),
    /// The host itself, through the outer end of its veth pair.
    Host(InterfaceIndex),
    /// A peer.
    Peer(PeerIndex),
}

impl From<Destination> for Route {
    fn from(destination: Destination) -> Self {
        let (kind, target) = match destination {
            Destination::Unattached => (ROUTE_NONE, 0),
            Destination::Container(ifindex) => (ROUTE_LOCAL, ifindex.get()),
            Destination::Host(ifindex) => (ROUTE_HOST, ifindex.get()),
            Destination::Peer(peer) => (ROUTE_PEER, peer.0),
        };
        Self { kind, target }
    }
}

/// Decodes an entry of the map. An entry of an unknown kind, which another version wrote, counts
/// as [`Destination::Unattached`].
impl From<Route> for Destination {
    fn from(route: Route) -> Self {
        match route.kind {
            ROUTE_LOCAL => Self::Container(InterfaceIndex::new(route.target)),
            ROUTE_HOST => Self::Host(InterfaceIndex::new(route.target)),
            ROUTE_PEER => Self::Peer(PeerIndex(route.target)),
            _ => Self::Unattached,
        }
    }
}

/// The veth pair behind an address that is attached here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LocalEnd {
    /// The host-side end, or the outer end of the host's own pair.
    pub(super) ifindex: InterfaceIndex,
    /// True if the address is the host's own, not a container's.
    pub(super) is_host: bool,
}

/// The wanted routes, by owner.
///
/// If several owners want the same prefix, an address attached here wins over this node's own
/// prefixes, those win over peers, and the lower peer index wins over the higher. If peers want
/// more routes than the map holds, every peer gets the same number, in the order of its list.
#[derive(Debug, Default)]
pub(super) struct RouteTable {
    local: BTreeMap<IpNet, LocalEnd>,
    own: BTreeSet<IpNet>,
    peers: BTreeMap<PeerIndex, Vec<IpNet>>,
}

/// One difference between the table and the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Put(IpNet, Destination),
    Delete(IpNet),
}

impl RouteTable {
    /// Builds a table from the entries of a map.
    pub(super) fn adopt(entries: &BTreeMap<IpNet, Route>) -> Self {
        let mut table = Self::default();
        for (prefix, route) in entries {
            match Destination::from(*route) {
                Destination::Container(ifindex) => table.set_local(*prefix, ifindex, false),
                Destination::Host(ifindex) => table.set_local(*prefix, ifindex, true),
                Destination::Peer(peer) => table.peers.entry(peer).or_default().push(*prefix),
                Destination::Unattached => _ = table.own.insert(*prefix),
            }
        }
        table
    }

    pub(super) fn set_peer(&mut self, peer: PeerIndex, prefixes: &[IpNet]) {
        let mut seen = BTreeSet::new();
        let prefixes: Vec<IpNet> =
            prefixes.iter().map(IpNet::trunc).filter(|prefix| seen.insert(*prefix)).collect();
        if prefixes.is_empty() {
            self.peers.remove(&peer);
        } else {
            self.peers.insert(peer, prefixes);
        }
    }

    pub(super) fn set_own(&mut self, prefixes: &[IpNet]) {
        self.own = prefixes.iter().map(IpNet::trunc).collect();
    }

    /// Adds an address that is attached here. `is_host` means that it is the host's own address,
    /// not a container's.
    pub(super) fn set_local(&mut self, address: IpNet, ifindex: InterfaceIndex, is_host: bool) {
        self.local.insert(address, LocalEnd { ifindex, is_host });
    }

    pub(super) fn remove_local(&mut self, ifindex: InterfaceIndex) {
        self.local.retain(|_, end| end.ifindex != ifindex);
    }

    /// Returns the addresses attached here and their veth pairs.
    pub(super) fn local(&self) -> &BTreeMap<IpNet, LocalEnd> {
        &self.local
    }

    /// Returns true if the host itself has this address in the container network.
    pub(super) fn is_host_address(&self, address: IpAddr) -> bool {
        self.local.get(&IpNet::from(address)).is_some_and(|end| end.is_host)
    }

    pub(super) fn owned_by(&self, peer: PeerIndex) -> impl Iterator<Item = IpNet> {
        self.peers.get(&peer).into_iter().flatten().copied()
    }

    /// Returns the entries that the map should hold.
    pub(super) fn wanted(&self) -> BTreeMap<IpNet, Destination> {
        let mut wanted: BTreeMap<_, _> = self
            .of_peers()
            .into_iter()
            .map(|(prefix, peer)| (prefix, Destination::Peer(peer)))
            .collect();
        wanted.extend(self.own.iter().map(|prefix| (*prefix, Destination::Unattached)));
        wanted.extend(self.local.iter().map(|(address, end)| {
            let LocalEnd { ifindex, is_host } = *end;
            let destination = match is_host {
                true => Destination::Host(ifindex),
                false => Destination::Container(ifindex),
            };
            (*address, destination)
        }));
        wanted
    }

    /// Returns the prefixes of peers that fit the map, each with the peer that gets it.
    fn of_peers(&self) -> BTreeMap<IpNet, PeerIndex> {
        let mut wanted: BTreeMap<IpNet, PeerIndex> = BTreeMap::new();
        let mut rest: Vec<_> =
            self.peers.iter().map(|(peer, prefixes)| (*peer, prefixes.iter())).collect();
        while !rest.is_empty() {
            rest.retain_mut(|(peer, prefixes)| {
                let Some(prefix) = prefixes.next() else { return false };
                let is_full = wanted.len() >= PEER_ROUTES;
                match wanted.get_mut(prefix) {
                    Some(other) if *other > *peer => *other = *peer,
                    None if !is_full => _ = wanted.insert(*prefix, *peer),
                    Some(_) | None => {}
                }
                true
            });
        }
        wanted
    }
}

/// Returns the changes that turn `installed` into `wanted`. Additions come first, so that no
/// destination is briefly without a route.
pub(super) fn difference(
    installed: &BTreeMap<IpNet, Route>,
    wanted: &BTreeMap<IpNet, Destination>,
) -> Vec<Change> {
    let put = wanted
        .iter()
        .filter(|(prefix, wanted)| installed.get(prefix) != Some(&Route::from(**wanted)))
        .map(|(prefix, wanted)| Change::Put(*prefix, *wanted));
    let delete = installed
        .keys()
        .filter(|prefix| !wanted.contains_key(prefix))
        .map(|prefix| Change::Delete(*prefix));
    put.chain(delete).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn in_map(wanted: &BTreeMap<IpNet, Destination>) -> BTreeMap<IpNet, Route> {
        wanted.iter().map(|(prefix, destination)| (*prefix, (*destination).into())).collect()
    }

    #[test]
    fn a_local_attachment_wins_until_it_is_detached() {
        let mut table = RouteTable::default();
        table.set_peer(PeerIndex(2), &[net("10.40.0.1/32"), net("10.42.7.7/15")]);
        table.set_local(net("10.40.0.1/32"), InterfaceIndex::new(9), false);
        let before = table.wanted();
        assert_eq!(before[&net("10.40.0.1/32")], Destination::Container(InterfaceIndex::new(9)));
        assert_eq!(before[&net("10.42.0.0/15")], Destination::Peer(PeerIndex(2)));
        table.remove_local(InterfaceIndex::new(9));
        assert_eq!(
            difference(&in_map(&before), &table.wanted()),
            [Change::Put(net("10.40.0.1/32"), Destination::Peer(PeerIndex(2)))]
        );
    }

    #[test]
    fn the_lower_peer_index_wins_and_own_prefixes_beat_both() {
        let mut table = RouteTable::default();
        table.set_peer(PeerIndex(3), &[net("10.44.0.0/16")]);
        table.set_peer(PeerIndex(2), &[net("10.44.0.0/16")]);
        assert_eq!(table.wanted()[&net("10.44.0.0/16")], Destination::Peer(PeerIndex(2)));
        table.set_own(&[net("10.44.0.0/16")]);
        assert_eq!(table.wanted()[&net("10.44.0.0/16")], Destination::Unattached);
    }

    #[test]
    fn a_peer_with_very_many_prefixes_leaves_room_for_the_others() {
        let mut table = RouteTable::default();
        table.set_own(&[net("10.40.0.0/15")]);
        table.set_local(net("10.40.0.1/32"), InterfaceIndex::new(9), false);
        for peer in 1..=100_u8 {
            let claims = (0..=255).flat_map(|c| (0..4).map(move |d| [c, d]));
            let claims = claims.map(|[c, d]| format!("10.{peer}.{c}.{d}/32").parse().unwrap());
            let own = net(&format!("192.168.{peer}.0/24"));
            table.set_peer(
                PeerIndex(peer.into()),
                &[own].into_iter().chain(claims).collect::<Vec<_>>(),
            );
        }
        let wanted = table.wanted();
        assert!(wanted.len() <= ROUTE_SLOTS as usize, "{}", wanted.len());
        assert_eq!(wanted[&net("10.40.0.1/32")], Destination::Container(InterfaceIndex::new(9)));
        for peer in 1..=100 {
            let own = net(&format!("192.168.{peer}.0/24"));
            assert_eq!(wanted[&own], Destination::Peer(PeerIndex(peer)));
        }
        // A peer with few prefixes gets all of them, however late it comes.
        table.set_peer(PeerIndex(4000), &[net("172.16.0.0/16"), net("172.17.0.0/16")]);
        assert_eq!(table.wanted()[&net("172.17.0.0/16")], Destination::Peer(PeerIndex(4000)));
    }

    #[test]
    fn an_adopted_map_gives_the_same_table() {
        let mut table = RouteTable::default();
        table.set_peer(PeerIndex(4), &[net("10.46.0.0/15"), net("fd00::/64")]);
        table.set_own(&[net("10.40.0.0/15")]);
        table.set_local(net("10.40.0.1/32"), InterfaceIndex::new(12), false);
        table.set_local(net("10.40.0.2/32"), InterfaceIndex::new(13), true);
        let wanted = table.wanted();
        let installed = in_map(&wanted);
        assert_eq!(difference(&installed, &RouteTable::adopt(&installed).wanted()), []);
    }

    #[test]
    fn an_entry_of_an_unknown_kind_is_replaced() {
        let prefix = net("10.40.0.0/15");
        let installed = BTreeMap::from([(prefix, Route { kind: 99, target: 7 })]);
        let table = RouteTable::adopt(&installed);
        let replaced = [Change::Put(prefix, Destination::Unattached)];
        assert_eq!(difference(&installed, &table.wanted()), replaced);
    }

    #[test]
    fn additions_come_before_removals() {
        let old = BTreeMap::from([(net("10.40.0.0/16"), Route::default())]);
        let new = BTreeMap::from([(net("10.41.0.0/16"), Destination::Unattached)]);
        assert_eq!(
            difference(&old, &new),
            [
                Change::Put(net("10.41.0.0/16"), Destination::Unattached),
                Change::Delete(net("10.40.0.0/16"))
            ]
        );
    }
}
