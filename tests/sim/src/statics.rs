//! Static addresses: an address that was taken twice during a partition gets one owner once the
//! nodes are connected again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use overnode_types::NodeId;

use crate::world::World;

impl World {
    /// Checks that each static address in use is announced by exactly one of the nodes that use it.
    pub(crate) fn check_statics(&self, living: &BTreeSet<NodeId>) -> Result<(), String> {
        let mut users: BTreeMap<IpAddr, Vec<NodeId>> = BTreeMap::new();
        for id in living {
            let disk = self.hosts[id].disk.as_ref();
            let addresses = disk.iter().flat_map(|disk| disk.attachments.keys());
            for address in addresses.filter(|address| !self.network.range.contains(*address)) {
                users.entry(*address).or_default().push(*id);
            }
        }
        for (address, ids) in users {
            let announces = |id: &&NodeId| {
                self.hosts[*id]
                    .node
                    .as_ref()
                    .is_some_and(|node| node.ipam.claims().contains(&address))
            };
            let keepers: Vec<_> = ids.iter().filter(announces).collect();
            if keepers.len() != 1 {
                return Err(format!("{address} is in use on {ids:?} but announced by {keepers:?}"));
            }
        }
        Ok(())
    }
}
