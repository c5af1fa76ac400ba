//! All parts of the node, for reading: what `status`, `inspect`, metrics and monitors show.

use std::time::Instant;

use super::addresses::Addresses;
use super::bulk::BulkPath;
use super::containers::Containers;
use super::control_plane::ControlPlane;
use super::data_plane::DataPlane;
use super::data_plane::arrivals::Arrivals;
use super::local::LocalNode;
use super::names::Names;
use super::problems::Problems;
use crate::api::PeerRef;
use crate::store::Store;
use overnode_core::path::route::Route;
use overnode_types::{NodeId, PeerIndex};

/// The parts of the node.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) local: &'a LocalNode,
    pub(super) store: &'a Store,
    pub(super) control: &'a ControlPlane,
    pub(super) data: &'a DataPlane,
    pub(super) arrivals: &'a Arrivals,
    pub(super) bulk: &'a BulkPath,
    pub(super) addresses: &'a Addresses,
    pub(super) names: &'a Names,
    pub(super) containers: &'a Containers,
    pub(super) problems: &'a Problems,
}

impl View<'_> {
    /// Returns the names of a peer.
    pub(super) fn peer_ref(&self, index: PeerIndex) -> PeerRef {
        if let Some(id) = index.node() {
            return self.control.peer_ref(id);
        }
        let external = self.data.external(index);
        PeerRef {
            id: None,
            public_key: external.map(|it| it.public_key),
            name: external.and_then(|it| it.name.clone()),
        }
    }

    /// Returns whether a node is reachable, and since when. When a node is cut off, its connections
    /// notice it only after seconds, but probes notice it at once. So a node without a route is
    /// unreachable.
    pub(super) fn reach(&self, id: NodeId) -> Option<(bool, Instant)> {
        let (connected, since) = self.control.reach(id)?;
        match self.data.relay_routes.route(id) {
            Some((Route::Unreachable, since)) if connected => Some((false, since)),
            Some(_) | None => Some((connected, since)),
        }
    }

    /// Returns the nickname of a node, empty if it is unknown.
    pub(super) fn nickname(&self, id: NodeId) -> String {
        let record = self.control.gossip.record(id);
        record.map(|record| record.nickname.clone()).unwrap_or_default()
    }
}
