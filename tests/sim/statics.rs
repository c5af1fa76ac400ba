//! Static addresses: what was taken twice while nodes were apart is decided once they talk.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use overnode_daemon::types::NodeId;

use crate::world::World;

impl World {
    /// Each static address is announced by one node: of those that have it, by the one with the
    /// lowest ID.
    pub fn check_statics(&self, living: &BTreeSet<NodeId>) -> Result<(), String> {
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
                return Err(format!(
                    "{address} is in use on {ids:?}, and announced by {keepers:?}"
                ));
            }
        }
        Ok(())
    }
}
