//! Facts about this node that do not change while its daemon runs.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use crate::store::Identity;
use overnode_core::handshake::Initiate;
use overnode_core::ipam::Layout;
use overnode_types::{NodeId, PublicKey, Secret};

/// How much longer the node with the higher ID waits before it initiates than the node with the
/// lower ID.
const INITIATION_DELAY: Duration = Duration::from_millis(1500);

/// What every part of the node may know about the node itself.
#[derive(Debug)]
pub(super) struct LocalNode {
    pub(super) identity: Identity,
    /// Its public key in WireGuard's handshakes.
    pub(super) public_key: PublicKey,
    pub(super) layout: Layout,
    /// When the process started.
    pub(super) started: Instant,
}

impl LocalNode {
    pub(super) fn id(&self) -> NodeId {
        self.identity.id
    }

    /// Returns the key that the token was turned into.
    pub(super) fn cluster_key(&self) -> &Secret {
        &self.identity.cluster_key
    }

    /// Returns the node's own address in the container network.
    pub(super) fn address(&self) -> IpAddr {
        self.layout.node_address(self.id())
    }

    /// Returns an address with the prefix length of the subnet.
    pub(super) fn with_prefix(&self, address: IpAddr) -> IpNet {
        IpNet::new(address, self.identity.network.subnet.prefix_len())
            .unwrap_or_else(|_| address.into())
    }

    /// Decides which of two nodes initiates the handshakes between them.
    pub(super) fn initiative(&self, other: NodeId) -> Initiate {
        if self.id() < other { Initiate::AtOnce } else { Initiate::After(INITIATION_DELAY) }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::*;
    use overnode_api::bulk::Mode;
    use overnode_core::control::key;
    use overnode_types::Network;

    /// Returns a node of a cluster that all calls share.
    pub(in crate::node) fn local_node(id: u16, started: Instant) -> Arc<LocalNode> {
        let network = Network::default();
        let identity = Identity {
            id: NodeId::new(id).unwrap(),
            instance: id.into(),
            seed: Secret([id as u8; 32]),
            cluster_key: Secret([77; 32]),
            network,
            nickname: format!("host{id}"),
            interface: None,
            mtu: None,
            discovery: true,
            xdp: false,
            dns: true,
            dns_domain: None,
            docker: false,
            bulk: Mode::Off,
            bulk_workers: None,
            incarnation: 1,
        };
        let public_key = key::public_key(&identity.exchange_secret());
        let layout = Layout::new(network).unwrap();
        Arc::new(LocalNode { identity, public_key, layout, started })
    }

    #[test]
    fn of_two_nodes_the_one_with_the_lower_id_initiates_at_once() {
        let now = Instant::now();
        let (one, two) = (local_node(1, now), local_node(2, now));
        assert_eq!(one.initiative(two.id()), Initiate::AtOnce);
        assert_eq!(two.initiative(one.id()), Initiate::After(INITIATION_DELAY));
    }
}
