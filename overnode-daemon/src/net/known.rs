//! The addresses where nodes of the cluster are expected.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;

/// A set of addresses that the node keeps up to date, for those who receive. What comes from them
/// waits apart from what comes from anywhere else; nothing is trusted for its source.
#[derive(Clone, Debug, Default)]
pub struct Known(Arc<ArcSwap<HashSet<IpAddr>>>);

impl Known {
    /// Whether a node is expected there.
    pub fn has(&self, ip: IpAddr) -> bool {
        self.0.load().contains(&ip)
    }

    /// Replaces the set.
    pub fn set(&self, addresses: HashSet<IpAddr>) {
        self.0.store(Arc::new(addresses));
    }
}
