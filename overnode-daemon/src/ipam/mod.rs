//! Addresses for containers: which ones this node may give out, and which it has. Deterministic; no I/O, no clock.
//!
//! IDs 1 to 4 own a quarter of the cluster's range each by birth and allocate with no contact to anyone. Addresses are given
//! next-fit, so that one that was released rests as long as possible. Static addresses are claimed
//! outside of the range.
//!
//! The caller stores a grant before it uses or answers it, and [`Ipam::release`]s it if it cannot be stored.

mod layout;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

pub use layout::{BadNetwork, Layout};

use crate::types::{Network, NodeId};

/// Why there is no address. The words are for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    /// The node owns no address space.
    #[error(
        "node {id} cannot give addresses: only nodes with the IDs 1, 2, 3 and 4 own address space; attach on one of those, \
         or give a static address with --ip"
    )]
    NotYet {
        /// This node.
        id: NodeId,
    },
    /// All addresses are taken.
    #[error(
        "all {count} addresses of node {id} are in use ({ranges}); detach containers that are no longer needed, or attach \
         on another of the nodes 1 to 4"
    )]
    Exhausted {
        /// This node.
        id: NodeId,
        /// How many there are.
        count: u128,
        /// What this node owns.
        ranges: String,
    },
    /// The address is not in the subnet.
    #[error("{address} is outside of the cluster's subnet {subnet}; choose one from {first} to {last}")]
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
    /// The address is one that nodes give out by themselves, or one kept for nodes, or the subnet's first or last.
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
}

/// The addresses of one node.
#[derive(Clone, Debug)]
pub struct Ipam {
    id: NodeId,
    layout: Layout,
    allocated: BTreeMap<IpAddr, String>,
    claims_elsewhere: BTreeMap<NodeId, BTreeSet<IpAddr>>,
    /// The address given out last.
    cursor: Option<IpAddr>,
}

impl Ipam {
    /// The addresses of node `id`, with those that were given out before a restart, by owner.
    ///
    /// # Errors
    /// [`BadNetwork`] if the cluster's addresses make no sense.
    pub fn new(
        network: Network,
        id: NodeId,
        allocated: BTreeMap<IpAddr, String>,
    ) -> Result<Self, BadNetwork> {
        let layout = Layout::new(network)?;
        let cursor = layout
            .quarter(id)
            .and_then(|quarter| allocated.keys().rev().copied().find(|address| quarter.contains(address)));
        Ok(Self { id, layout, allocated, claims_elsewhere: BTreeMap::new(), cursor })
    }

    /// Goes on behind `last`, the address given out last before the restart, so that those released lately rest.
    pub fn resume_after(&mut self, last: IpAddr) {
        if self.layout.quarter(self.id).is_some_and(|quarter| quarter.contains(&last)) {
            self.cursor = Some(last);
        }
    }

    /// Which addresses of the cluster are for what.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The address space that this node owns: what it tells the others.
    pub fn ranges(&self) -> Vec<IpNet> {
        self.layout.quarter(self.id).into_iter().collect()
    }

    /// The static addresses on this node: what it tells the others besides its ranges.
    pub fn claims(&self) -> Vec<IpAddr> {
        self.allocated.keys().copied().filter(|address| !self.owns(*address)).collect()
    }

    /// Everything given out, by address, with its owner.
    pub fn allocated(&self) -> &BTreeMap<IpAddr, String> {
        &self.allocated
    }

    /// Addresses that this node can give out by itself, used ones included.
    pub fn capacity(&self) -> u128 {
        self.layout.usable(self.id).map_or(0, |(first, last)| to_number(last) - to_number(first) + 1)
    }

    /// Addresses that this node has given out of its own space.
    pub fn active(&self) -> usize {
        self.layout.usable(self.id).map_or(0, |(first, last)| self.allocated.range(first..=last).count())
    }

    /// Whether [`Self::allocate`] can give an address now.
    ///
    /// # Errors
    /// The error that it would return.
    pub fn check_ready(&self) -> Result<(), IpamError> {
        let id = self.id;
        if self.layout.usable(id).is_none() {
            return Err(IpamError::NotYet { id });
        }
        if self.active() as u128 == self.capacity() {
            let ranges = self.ranges().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(IpamError::Exhausted { id, count: self.capacity(), ranges });
        }
        Ok(())
    }

    /// Gives an address of the node's own space to `owner`: the next free one behind the last given.
    ///
    /// # Errors
    /// [`IpamError::NotYet`] on IDs from 5, [`IpamError::Exhausted`].
    pub fn allocate(&mut self, owner: &str) -> Result<IpAddr, IpamError> {
        self.check_ready()?;
        let Some((first, last)) = self.layout.usable(self.id) else {
            return Err(IpamError::NotYet { id: self.id });
        };
        let start = match self.cursor {
            Some(cursor) if (first..last).contains(&cursor) => step(cursor),
            Some(_) | None => first,
        };
        // Not both can be full: `check_ready` has counted.
        let address = self.free_in(start, last).or_else(|| self.free_in(first, last));
        let Some(address) = address else { return Err(IpamError::NotYet { id: self.id }) };
        self.allocated.insert(address, owner.to_owned());
        self.cursor = Some(address);
        Ok(address)
    }

    /// Gives a static address to `owner`.
    ///
    /// # Errors
    /// [`IpamError`] if it is no static address, or in use here or, as far as is known, elsewhere.
    pub fn claim(&mut self, address: IpAddr, owner: &str) -> Result<(), IpamError> {
        self.layout.check_static(address)?;
        if let Some(owner) = self.allocated.get(&address) {
            return Err(IpamError::InUse { address, owner: owner.clone() });
        }
        let elsewhere = self.claims_elsewhere.iter().find(|(_, claims)| claims.contains(&address));
        if let Some((&node, _)) = elsewhere {
            return Err(IpamError::InUseElsewhere { address, node });
        }
        self.allocated.insert(address, owner.to_owned());
        Ok(())
    }

    /// Takes an address back. Returns who had it.
    pub fn release(&mut self, address: IpAddr) -> Option<String> {
        self.allocated.remove(&address)
    }

    /// What another node says of its static addresses. Returns those that are attached here too: a clash to be
    /// reported.
    pub fn handle_claims(&mut self, node: NodeId, claims: &[IpAddr]) -> Vec<IpAddr> {
        if node == self.id {
            return Vec::new();
        }
        if claims.is_empty() {
            self.claims_elsewhere.remove(&node);
        } else {
            self.claims_elsewhere.insert(node, claims.iter().copied().collect());
        }
        claims.iter().copied().filter(|address| self.allocated.contains_key(address)).collect()
    }

    fn owns(&self, address: IpAddr) -> bool {
        self.layout.quarter(self.id).is_some_and(|quarter| quarter.contains(&address))
    }

    fn free_in(&self, first: IpAddr, last: IpAddr) -> Option<IpAddr> {
        let mut candidate = first;
        for taken in self.allocated.range(first..=last).map(|(address, _)| *address) {
            if taken != candidate {
                break;
            }
            if taken == last {
                return None;
            }
            candidate = step(candidate);
        }
        Some(candidate)
    }
}

/// The next address. Never called with the last one of a family: ranges end before it.
fn step(address: IpAddr) -> IpAddr {
    from_number(address, to_number(address).saturating_add(1))
}

fn to_number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// The address of the same family as `like` with this number.
fn from_number(like: IpAddr, number: u128) -> IpAddr {
    match like {
        IpAddr::V4(_) => IpAddr::V4(u32::try_from(number).unwrap_or(u32::MAX).into()),
        IpAddr::V6(_) => IpAddr::V6(number.into()),
    }
}
