//! Manages WireGuard peers that are not nodes of the cluster.

use std::time::{Duration, Instant};

use ipnet::IpNet;
use overnode_ebpf::map::{FIRST_EXTERNAL_PEER, PEER_SLOTS};

use super::{DataPlane, Wanted};
use crate::api::{AddExternalPeer, ApiError};
use crate::store::ExternalPeer;
use overnode_core::handshake::Initiate;
use overnode_core::ipam::Ipam;
use overnode_types::{PeerIndex, PublicKey, Secret};

impl DataPlane {
    /// Returns the configured WireGuard peers that are not nodes.
    pub(in crate::node) fn externals(&self) -> impl Iterator<Item = &ExternalPeer> {
        self.externals.values()
    }

    /// Returns the external peer with an index or with a key.
    pub(in crate::node) fn external(&self, index: PeerIndex) -> Option<&ExternalPeer> {
        self.externals.get(&index)
    }

    pub(in crate::node) fn external_with(&self, key: &PublicKey) -> Option<&ExternalPeer> {
        self.externals.values().find(|it| it.public_key == *key)
    }

    /// Checks a request for an external peer and gives the peer an index.
    pub(in crate::node) fn plan_external(
        &self,
        request: AddExternalPeer,
        ipam: &Ipam,
    ) -> Result<ExternalPeer, ApiError> {
        self.check_allowed(&request, ipam)?;
        let known = self.external_with(&request.public_key).map(|it| it.index);
        let index = known.or_else(|| self.free_index()).ok_or_else(|| {
            ApiError::refused(
                "there are too many WireGuard peers: remove one with `overnode peer remove`",
            )
        })?;
        Ok(ExternalPeer {
            index,
            public_key: request.public_key,
            preshared_key: request.preshared_key,
            endpoint: request.endpoint,
            allowed: request.allowed_ips,
            keepalive: request.persistent_keepalive_seconds,
            name: request.name,
        })
    }

    /// Adds or changes an external peer.
    pub(in crate::node) async fn configure_external(
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

    pub(in crate::node) fn remove_external(&mut self, index: PeerIndex, now: Instant) {
        self.externals.remove(&index);
        self.remove_data_peer(index, now);
    }

    fn free_index(&self) -> Option<PeerIndex> {
        (FIRST_EXTERNAL_PEER..PEER_SLOTS)
            .map(PeerIndex)
            .find(|index| !self.externals.contains_key(index))
    }

    /// Checks the allowed addresses. They may be outside the subnet, in which case only this host's
    /// containers reach them, but they must not belong to another owner.
    fn check_allowed(&self, request: &AddExternalPeer, ipam: &Ipam) -> Result<(), ApiError> {
        if request.allowed_ips.is_empty() {
            return Err(ApiError::usage(
                "a WireGuard peer needs at least one address: give --allowed-ips",
            ));
        }
        let range = self.local.identity.network.range;
        for allowed in &request.allowed_ips {
            if overlaps(allowed, &range) {
                return Err(ApiError::refused(format_args!(
                    "{allowed} overlaps the range {range}, from which nodes allocate container \
                     addresses: choose other addresses"
                )));
            }
            if let Some((address, owner)) =
                ipam.allocated().iter().find(|(address, _)| allowed.contains(*address))
            {
                return Err(ApiError::refused(format_args!(
                    "{allowed} contains {address}, which belongs to {owner} on this host: choose \
                     other addresses"
                )));
            }
            if self.local.layout.has_node_addresses(*allowed) {
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
