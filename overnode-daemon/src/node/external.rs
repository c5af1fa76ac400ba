//! Manages WireGuard peers that are not nodes of the cluster.

use std::time::{Duration, Instant};

use ipnet::IpNet;
use overnode_ebpf::map::{FIRST_EXTERNAL_PEER, PEER_SLOTS};
use overnode_ebpf::wire::DATA_PORT;

use super::data::Wanted;
use super::running::Node;
use crate::api::{
    self, AddExternalPeer, ApiError, ExternalPeerAdded, ExternalPeerRemoved, ExternalPeerStatus,
};
use crate::store::ExternalPeer;
use overnode_core::handshake::Initiate;
use overnode_types::{PeerIndex, Secret};

/// A configured WireGuard peer that is not a node.
pub(super) type External = ExternalPeer;

impl Node {
    pub(super) async fn add_external(
        &mut self,
        request: AddExternalPeer,
    ) -> Result<ExternalPeerAdded, ApiError> {
        let now = Instant::now();
        if request.public_key == self.public_key
            || self.gossip.records().any(|it| it.public_key == request.public_key)
        {
            return Err(ApiError::refused(format_args!(
                "{} is the key of a node of this cluster: give the key of a WireGuard peer that \
                 is not a node",
                request.public_key
            )));
        }
        self.check_allowed(&request)?;
        let known = self
            .externals
            .values()
            .find(|it| it.public_key == request.public_key)
            .map(|it| it.index);
        let index = known.or_else(|| self.free_index()).ok_or_else(|| {
            ApiError::refused(
                "there are too many WireGuard peers: remove one with `overnode peer remove`",
            )
        })?;
        let peer = ExternalPeer {
            index,
            public_key: request.public_key,
            preshared_key: request.preshared_key,
            endpoint: request.endpoint,
            allowed: request.allowed_ips,
            keepalive: request.persistent_keepalive_seconds,
            name: request.name,
        };
        self.store.set_external_peer(&peer).map_err(ApiError::failed)?;
        if let Err(error) = self.configure_external(peer, now).await {
            let _ = self.store.remove_external_peer(index);
            self.externals.remove(&index);
            self.remove_data_peer(index, now);
            return Err(ApiError::failed(format_args!("the peer was not added: {error:#}")));
        }
        self.pump(now).await;
        Ok(ExternalPeerAdded {
            public_key: self.public_key,
            port: DATA_PORT,
            subnet: self.identity.network.subnet,
            replaced: known.is_some(),
        })
    }

    pub(super) async fn configure_external(
        &mut self,
        peer: ExternalPeer,
        now: Instant,
    ) -> anyhow::Result<()> {
        let wanted = Wanted {
            public_key: peer.public_key,
            preshared_key: peer.preshared_key.clone().unwrap_or(Secret([0; 32])),
            candidates: peer.endpoint.into_iter().collect(),
            initiate: if peer.endpoint.is_some() { Initiate::AtOnce } else { Initiate::OnlyAnswer },
            persistent_keepalive: peer.keepalive.map(|seconds| Duration::from_secs(seconds.into())),
            routes: Some(peer.allowed.clone()),
        };
        self.configure(peer.index, wanted, now).await?;
        self.externals.insert(peer.index, peer);
        Ok(())
    }

    pub(super) fn remove_external(
        &mut self,
        request: &api::RemoveExternalPeer,
    ) -> Result<ExternalPeerRemoved, ApiError> {
        let Some(peer) =
            self.externals.values().find(|it| it.public_key == request.public_key).cloned()
        else {
            return Err(ApiError::missing(format_args!(
                "no WireGuard peer has the key {}: `overnode peer list` shows them",
                request.public_key
            )));
        };
        self.store.remove_external_peer(peer.index).map_err(ApiError::failed)?;
        self.externals.remove(&peer.index);
        self.remove_data_peer(peer.index, Instant::now());
        Ok(ExternalPeerRemoved { allowed_ips: peer.allowed })
    }

    pub(super) fn externals(&self) -> Result<Vec<ExternalPeerStatus>, ApiError> {
        let now = Instant::now();
        Ok(self
            .externals
            .values()
            .map(|peer| ExternalPeerStatus {
                public_key: peer.public_key,
                name: peer.name.clone(),
                preshared_key: peer.preshared_key.is_some(),
                allowed_ips: peer.allowed.clone(),
                persistent_keepalive_seconds: peer.keepalive,
                data: self.data_status(peer.index, now),
            })
            .collect())
    }

    fn free_index(&self) -> Option<PeerIndex> {
        (FIRST_EXTERNAL_PEER..PEER_SLOTS)
            .map(PeerIndex)
            .find(|index| !self.externals.contains_key(index))
    }

    /// Checks the allowed addresses. They may be outside the subnet, in which case only this host's
    /// containers reach them, but they must not belong to another owner.
    fn check_allowed(&self, request: &AddExternalPeer) -> Result<(), ApiError> {
        if request.allowed_ips.is_empty() {
            return Err(ApiError::usage(
                "a WireGuard peer needs at least one address: give --allowed-ips",
            ));
        }
        let range = self.identity.network.range;
        for allowed in &request.allowed_ips {
            if overlaps(allowed, &range) {
                return Err(ApiError::refused(format_args!(
                    "{allowed} overlaps the range {range}, from which nodes allocate container \
                     addresses: choose other addresses"
                )));
            }
            if let Some((address, owner)) =
                self.ipam.allocated().iter().find(|(address, _)| allowed.contains(*address))
            {
                return Err(ApiError::refused(format_args!(
                    "{allowed} contains {address}, which belongs to {owner} on this host: choose \
                     other addresses"
                )));
            }
            if self.ipam.layout().has_node_addresses(*allowed) {
                return Err(ApiError::refused(format_args!(
                    "{allowed} contains addresses that are reserved for the nodes themselves: \
                     choose other addresses"
                )));
            }
            let taken = self
                .externals
                .values()
                .filter(|it| it.public_key != request.public_key)
                .find(|it| it.allowed.iter().any(|theirs| overlaps(theirs, allowed)));
            if let Some(other) = taken {
                return Err(ApiError::refused(format_args!(
                    "{allowed} overlaps the addresses of the WireGuard peer {}: choose other \
                     addresses",
                    other.public_key
                )));
            }
        }
        Ok(())
    }
}

fn overlaps(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}
