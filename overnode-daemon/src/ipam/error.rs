//! What can go wrong, in words for people.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::types::NodeId;

/// Why there is no address. The words are for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    /// The node holds no free address, and nobody has lent it any yet.
    #[error(
        "node {id} has no free address of its own ({count} in use) and none was lent to it: {lenders}; start one of the nodes 1 to 4, connect \
         to it with `overnode connect HOST`, or detach containers that are no longer needed"
    )]
    NoLender {
        /// This node.
        id: NodeId,
        /// How many it has given out.
        count: usize,
        /// What became of each lender.
        lenders: String,
    },
    /// The node is leaving the cluster.
    #[error("node {id} is leaving the cluster")]
    Leaving {
        /// This node.
        id: NodeId,
    },
    /// The node was told to leave, and what it has lent must not be forgotten.
    #[error(
        "node {id} has lent addresses to {borrowers}, and {heir} to take over the list of them; make one of nodes 1 to 4 reachable and try again, or lose \
         the list with `overnode reset --force`"
    )]
    Heirless {
        /// This node.
        id: NodeId,
        /// To whom addresses were lent.
        borrowers: String,
        /// What is wrong with the node that should take over.
        heir: String,
    },
    /// The space of a node cannot be taken back.
    #[error("the address space of node {of} cannot be taken back: {why}")]
    Reclaim {
        /// The node.
        of: NodeId,
        /// Why, and what to do.
        why: String,
    },
    /// The address is not in the subnet.
    #[error(
        "{address} is outside of the cluster's subnet {subnet}; choose one from {first} to {last}"
    )]
    OutsideSubnet {
        /// The address.
        address: IpAddr,
        /// The subnet.
        subnet: IpNet,
        /// The first static address.
        first: IpAddr,
        /// The last static address.
        last: IpAddr,
    },
    /// The address is one that nodes give out by themselves, or one kept for nodes, or the subnet's
    /// first or last.
    #[error("{address} cannot be a static address: {why}; choose one from {first} to {last}")]
    Reserved {
        /// The address.
        address: IpAddr,
        /// What it is kept for.
        why: &'static str,
        /// The first static address.
        first: IpAddr,
        /// The last static address.
        last: IpAddr,
    },
    /// Attached to this node already.
    #[error("{address} is in use by {owner} on this node; choose another, or detach {owner} first")]
    InUse {
        /// The address.
        address: IpAddr,
        /// Who has it.
        owner: String,
    },
    /// Claimed on another node.
    #[error("{address} is in use on node {node}; choose another, or detach it there first")]
    InUseElsewhere {
        /// The address.
        address: IpAddr,
        /// The node that has it.
        node: NodeId,
    },
    /// Another node asks for it, and goes first.
    #[error(
        "node {node} asks for {address} at this moment and goes first; choose another, or try again"
    )]
    WantedElsewhere {
        /// The address.
        address: IpAddr,
        /// The other node.
        node: NodeId,
    },
    /// The node has as many static addresses as it can tell the others.
    #[error("this node has {count} static addresses, which is the most; detach some first")]
    TooManyStatic {
        /// How many.
        count: usize,
    },
    /// Too many claims wait.
    #[error(
        "{count} static addresses are asked for already, and other nodes have not answered; try again"
    )]
    TooManyClaims {
        /// How many.
        count: usize,
    },
}
