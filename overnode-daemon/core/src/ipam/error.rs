//! Errors of address allocation, with messages for operators.

use std::net::IpAddr;

use ipnet::IpNet;

use overnode_types::NodeId;

/// The reason why an address request, a reclaim or leaving failed. The messages are for operators.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    /// The node holds no free address, and no lender has lent it any yet.
    #[error(
        "node {id} has no free address of its own ({count} in use), and no node has lent it any: \
         {lenders}; start one of nodes 1 to 4, connect to it with `overnode connect HOST`, or \
         detach containers that are no longer needed"
    )]
    NoLender {
        /// This node.
        id: NodeId,
        /// Number of addresses that it has allocated.
        count: usize,
        /// The status of each lender.
        lenders: String,
    },
    /// The node is leaving the cluster.
    #[error("node {id} is leaving the cluster")]
    Leaving {
        /// This node.
        id: NodeId,
    },
    /// The node cannot leave: it has lent addresses, and no other node has taken over the ledger.
    #[error(
        "node {id} has lent addresses to {borrowers}, and no other node has taken over its ledger: \
         {successor}; make one of nodes 1 to 4 reachable and try again, or discard the ledger with \
         `overnode reset --force`"
    )]
    NoSuccessor {
        /// This node.
        id: NodeId,
        /// The nodes that addresses were lent to.
        borrowers: String,
        /// Why the chosen successor has not taken over.
        successor: String,
    },
    /// The space of a node cannot be taken back.
    #[error("the address space of node {of} cannot be reclaimed: {why}")]
    Reclaim {
        /// The node whose space was to be taken back.
        of: NodeId,
        /// The reason, and what to do.
        why: String,
    },
    /// The address is outside of the subnet.
    #[error(
        "{address} is outside the cluster's subnet {subnet}; choose an address from {first} to \
         {last}"
    )]
    OutsideSubnet {
        /// The address.
        address: IpAddr,
        /// The cluster's subnet.
        subnet: IpNet,
        /// The first static address.
        first: IpAddr,
        /// The last static address.
        last: IpAddr,
    },
    /// The address is in the range that nodes allocate from, reserved for nodes, or the first or
    /// last of the subnet.
    #[error("{address} cannot be a static address: {why}; choose one from {first} to {last}")]
    Reserved {
        /// The address.
        address: IpAddr,
        /// What the address is reserved for.
        why: &'static str,
        /// The first static address.
        first: IpAddr,
        /// The last static address.
        last: IpAddr,
    },
    /// The address is in use on this node.
    #[error(
        "{address} is in use by {owner} on this node; choose another address, or detach {owner} \
         first"
    )]
    InUse {
        /// The address.
        address: IpAddr,
        /// The container that has the address.
        owner: String,
    },
    /// The address is claimed on another node.
    #[error(
        "{address} is in use on node {node}; choose another address, or detach its container there \
         first"
    )]
    InUseElsewhere {
        /// The address.
        address: IpAddr,
        /// The node that has it.
        node: NodeId,
    },
    /// Another node asks for the address at the same time, and its lower ID takes precedence.
    #[error(
        "node {node} requests {address} at the same time and takes precedence; choose another \
         address, or try again"
    )]
    WantedElsewhere {
        /// The address.
        address: IpAddr,
        /// The other node.
        node: NodeId,
    },
    /// The node has the maximum number of static addresses that it can announce.
    #[error(
        "this node has {count} static addresses, which is the maximum; detach some containers first"
    )]
    TooManyStatic {
        /// The maximum.
        count: usize,
    },
    /// Too many claims are waiting for answers.
    #[error(
        "{count} requests for static addresses still wait for answers of other nodes; try again"
    )]
    TooManyClaims {
        /// The maximum.
        count: usize,
    },
}
