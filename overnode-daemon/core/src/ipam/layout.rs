//! The division of the cluster's addresses by purpose.

use std::net::IpAddr;

use ipnet::IpNet;

use super::IpamError;
use super::space::{from_number, to_number};
use overnode_types::{Network, NodeId};

/// Number of node addresses: one for each possible ID, counted from 0.
const NODE_ADDRESSES: u128 = NodeId::MAX as u128 + 1;
/// Host bits of the smallest range: 16 addresses, four for each of the nodes 1 to 4.
const MIN_HOST_BITS: u8 = 4;

/// The cluster's addresses, checked and divided. Node addresses are in the order of the IDs. They
/// are below the range, or above it if there is no room below.
///
/// | addresses | by default | for |
/// | --- | --- | --- |
/// | the range without its first and last | 10.40.0.1 to 10.47.255.254 | containers |
/// | the 4096 below (or above) the range | 10.39.240.0 to 10.39.255.255 | nodes |
/// | the rest below (or above) these | 10.32.0.1 to 10.39.239.255 | static addresses |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    network: Network,
    nodes: u128,
    statics: (u128, u128),
}

/// A subnet and range that cannot be used. The messages are for operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadNetwork {
    /// The range is not inside the subnet.
    #[error("the range {range} is not inside the subnet {subnet}; choose a --range that is")]
    Outside {
        /// The range.
        range: IpNet,
        /// The subnet.
        subnet: IpNet,
    },
    /// The range is too small to be divided.
    #[error("the range {range} is too small; choose a --range of at least 16 addresses")]
    TooSmall {
        /// The range.
        range: IpNet,
    },
    /// The subnet has no room outside of the range for node addresses and static addresses.
    #[error(
        "the range {range} leaves no room in the subnet {subnet} for the {NODE_ADDRESSES} \
         addresses of nodes and for static addresses; choose a smaller --range or a larger --subnet"
    )]
    NoRoom {
        /// The range.
        range: IpNet,
        /// The subnet.
        subnet: IpNet,
    },
    /// A prefix has host bits set.
    #[error("{given} has host bits set; write {meant}")]
    HostBits {
        /// The prefix as given.
        given: IpNet,
        /// The prefix without host bits.
        meant: IpNet,
    },
}

impl Layout {
    /// Checks and divides the cluster's addresses.
    ///
    /// # Errors
    /// [`BadNetwork`] if the subnet and range cannot be used together.
    pub fn new(network: Network) -> Result<Self, BadNetwork> {
        let Network { subnet, range } = network;
        for given in [subnet, range] {
            if given.trunc() != given {
                return Err(BadNetwork::HostBits { given, meant: given.trunc() });
            }
        }
        if subnet == range {
            return Err(BadNetwork::NoRoom { range, subnet });
        }
        if !subnet.contains(&range) {
            return Err(BadNetwork::Outside { range, subnet });
        }
        if range.max_prefix_len() - range.prefix_len() < MIN_HOST_BITS {
            return Err(BadNetwork::TooSmall { range });
        }
        let (subnet_first, subnet_last) = bounds(subnet);
        let (range_first, range_last) = bounds(range);
        let (nodes, statics) = if range_first - subnet_first >= 2 * NODE_ADDRESSES {
            (range_first - NODE_ADDRESSES, (subnet_first + 1, range_first - NODE_ADDRESSES - 1))
        } else if subnet_last - range_last >= 2 * NODE_ADDRESSES {
            (range_last + 1, (range_last + 1 + NODE_ADDRESSES, subnet_last - 1))
        } else {
            return Err(BadNetwork::NoRoom { range, subnet });
        };
        Ok(Self { network, nodes, statics })
    }

    /// Returns the subnet and range that this layout divides.
    pub fn network(&self) -> Network {
        self.network
    }

    /// Returns a node's own address.
    pub fn node_address(&self, id: NodeId) -> IpAddr {
        self.address(self.nodes + u128::from(id.get()))
    }

    /// Returns true if a prefix contains an address that is reserved for a node, known or not.
    pub fn has_node_addresses(&self, prefix: IpNet) -> bool {
        let (first, last) = bounds(prefix);
        prefix.addr().is_ipv4() == self.network.subnet.addr().is_ipv4()
            && first < self.nodes + NODE_ADDRESSES
            && last >= self.nodes
    }

    /// Returns the quarter of the range that a node owns by birth. `None` from ID 5 on.
    pub fn quarter(&self, id: NodeId) -> Option<IpNet> {
        if !id.has_initial_quarter() {
            return None;
        }
        let range = self.network.range;
        range.subnets(range.prefix_len() + 2).ok()?.nth(usize::from(id.get() - 1))
    }

    /// Returns the first and last address that a node can allocate from its quarter. The first and
    /// last address of the range are never allocated.
    pub fn usable(&self, id: NodeId) -> Option<(IpAddr, IpAddr)> {
        let (first, last) = bounds(self.quarter(id)?);
        let (range_first, range_last) = bounds(self.network.range);
        Some((self.address(first.max(range_first + 1)), self.address(last.min(range_last - 1))))
    }

    /// Returns the half of a quarter that only the node with its ID ever allocates from. `None`
    /// from ID 5 on.
    pub fn own_part(&self, id: NodeId) -> Option<IpNet> {
        self.half(id, 0)
    }

    /// Returns the half of a quarter that is lent to other nodes. `None` from ID 5 on.
    pub fn lendable(&self, quarter: NodeId) -> Option<IpNet> {
        self.half(quarter, 1)
    }

    /// Returns the quarter whose lendable half contains all of `block`.
    pub fn quarter_of(&self, block: IpNet) -> Option<NodeId> {
        quarters().find(|quarter| self.lendable(*quarter).is_some_and(|half| half.contains(&block)))
    }

    /// Returns false for the first and last address of the range, which are never allocated.
    pub fn is_usable(&self, address: IpAddr) -> bool {
        let range = self.network.range;
        address != range.network() && address != range.broadcast()
    }

    /// Returns the number of addresses of `block` that can be allocated.
    pub fn usable_in(&self, block: IpNet) -> u128 {
        let (first, last) = bounds(block);
        let range = self.network.range;
        let lost =
            [range.network(), range.broadcast()].iter().filter(|ip| block.contains(*ip)).count();
        (last - first).saturating_add(1).saturating_sub(lost as u128)
    }

    /// Returns the first and last static address.
    pub fn statics(&self) -> (IpAddr, IpAddr) {
        (self.address(self.statics.0), self.address(self.statics.1))
    }

    /// Checks that an address may be chosen as a static address.
    ///
    /// # Errors
    /// [`IpamError::OutsideSubnet`] or [`IpamError::Reserved`].
    pub fn check_static(&self, address: IpAddr) -> Result<(), IpamError> {
        let Network { subnet, range } = self.network;
        let (first, last) = self.statics();
        if !subnet.contains(&address) {
            return Err(IpamError::OutsideSubnet { address, subnet, first, last });
        }
        let number = to_number(address);
        let why = if (self.statics.0..=self.statics.1).contains(&number) {
            return Ok(());
        } else if range.contains(&address) {
            "nodes allocate the addresses of the range themselves"
        } else if (self.nodes..self.nodes + NODE_ADDRESSES).contains(&number) {
            "it is reserved for the nodes themselves"
        } else {
            "it is outside the static addresses"
        };
        Err(IpamError::Reserved { address, why, first, last })
    }

    fn half(&self, id: NodeId, which: usize) -> Option<IpNet> {
        let quarter = self.quarter(id)?;
        quarter.subnets(quarter.prefix_len() + 1).ok()?.nth(which)
    }

    fn address(&self, number: u128) -> IpAddr {
        from_number(self.network.subnet.addr(), number)
    }
}

/// Returns the IDs 1 to 4 of the nodes that own a quarter by birth. They name the quarters.
pub fn quarters() -> impl Iterator<Item = NodeId> {
    (1..=4).filter_map(|number| NodeId::new(number).ok())
}

/// Returns the first and last address of a network as numbers.
pub(super) fn bounds(net: IpNet) -> (u128, u128) {
    (to_number(net.network()), to_number(net.broadcast()))
}
