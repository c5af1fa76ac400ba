//! Holds the addresses where nodes of the cluster are expected.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;

/// A set of addresses that the node keeps current for the receivers of traffic. Traffic from these
/// addresses is queued separately from other traffic. The source address alone earns no trust.
#[derive(Clone, Debug, Default)]
pub struct Known(Arc<ArcSwap<HashSet<IpAddr>>>);

impl Known {
    /// Whether a node is expected at `ip`.
    pub fn has(&self, ip: IpAddr) -> bool {
        self.0.load().contains(&ip)
    }

    /// Replaces the set.
    pub fn set(&self, addresses: HashSet<IpAddr>) {
        self.0.store(Arc::new(addresses));
    }
}
