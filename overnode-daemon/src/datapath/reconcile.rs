//! Finds and removes leftovers at startup and every minute.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::Result;
use ipnet::IpNet;
use tracing::{info, warn};

use super::Datapath;
use super::address::from_map;
use super::bpffs::Pin;
use super::endpoint::is_ours;
use super::interfaces::Link;
use super::netns::NetnsRef;
use super::offload_veth::{FIRST, OffloadVeth, SECOND};
use super::programs::{FROM_BULK, FROM_CONTAINER, FROM_UNDERLAY, SEAL, TO_CONTAINER};
use overnode_types::InterfaceIndex;

/// A container that the node considers attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownEndpoint {
    /// Name of the host-side end.
    pub host_interface: String,
    /// Overlay address.
    pub address: IpAddr,
    /// Network namespace that it was attached in. `None` for the host itself.
    pub netns: Option<NetnsRef>,
}

/// A container that is no longer attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Name of its former host-side end.
    pub host_interface: String,
    /// Overlay address.
    pub address: IpAddr,
    /// True if its network namespace still exists, so that the container can be attached again.
    /// Always false for a namespace that is named by a process ID, since the ID may have been
    /// reused.
    pub netns_exists: bool,
}

impl Datapath {
    /// Removes interfaces, pins and map entries of this node that no container in `known` needs.
    /// Repairs programs, the offload veth and local addresses. Returns the containers in `known`
    /// that are gone. Interfaces of other owners are never touched.
    ///
    /// # Errors
    /// Fails if netlink requests fail. Failures to remove something are logged, and the next run
    /// retries them.
    pub async fn reconcile(&mut self, known: &[KnownEndpoint]) -> Result<Vec<Lost>> {
        self.repair_offload_veth().await?;
        let links = self.netlink.links().await?;
        let in_map = self.maps.endpoints()?;
        let known_names: BTreeMap<&str, &KnownEndpoint> =
            known.iter().map(|endpoint| (endpoint.host_interface.as_str(), endpoint)).collect();

        let (alias, node) = (self.alias.clone(), self.node.clone());
        self.bulk_devices.retain(|ifindex| links.iter().any(|link| link.index == *ifindex));
        let bulk_devices = self.bulk_devices.clone();
        let mut whole = BTreeSet::new();
        for link in links
            .iter()
            .filter(|link| {
                is_ours(link, &alias, &node) && link.name != FIRST && link.name != SECOND
            })
            .filter(|link| !bulk_devices.contains(&link.index))
        {
            let entry = in_map.get(&link.index).map(|endpoint| from_map(endpoint.address));
            let is_wanted = known_names
                .get(link.name.as_str())
                .is_some_and(|known| Some(known.address) == entry);
            if is_wanted
                && link.is_up
                && self.keep_program(FROM_CONTAINER, link)
                && self.keep_program(TO_CONTAINER, link)
            {
                whole.insert(link.name.as_str());
                self.endpoints.insert(link.name.clone(), link.index);
                continue;
            }
            info!(interface = link.name, "removing an interface that belongs to no container");
            if let Err(error) = self.detach(&link.name).await {
                warn!(
                    %error,
                    interface = link.name,
                    "an interface that belongs to no container cannot be removed"
                );
            }
        }

        let mut in_use: BTreeSet<InterfaceIndex> = links
            .iter()
            .filter(|link| whole.contains(link.name.as_str()))
            .map(|link| link.index)
            .collect();
        let of_routes: Vec<InterfaceIndex> =
            self.routes.local().values().map(|end| end.ifindex).collect();
        for ifindex in
            in_map.keys().copied().chain(of_routes).filter(|ifindex| !in_use.contains(ifindex))
        {
            if let Err(error) = self.forget_endpoint(ifindex) {
                warn!(
                    %error,
                    %ifindex,
                    "the map entries of an interface that is gone cannot be removed"
                );
            }
        }
        self.endpoints.retain(|_, ifindex| in_use.contains(ifindex));

        for link in links.iter().filter(|link| whole.contains(link.name.as_str())) {
            if let Some(known) = known_names.get(link.name.as_str()) {
                self.routes.set_local(
                    IpNet::from(known.address),
                    link.index,
                    known.netns.is_none(),
                );
            }
        }
        if let Err(error) = self.sync_routes() {
            warn!(%error, "not every route can be installed");
        }

        in_use.extend(links.iter().map(|link| link.index));
        for pin in self.pins.list().into_iter().filter(|pin| !in_use.contains(&pin.ifindex())) {
            if let Err(error) = self.pins.remove(&pin) {
                warn!(%error, ?pin, "a pin of an interface that is gone cannot be removed");
            }
        }
        self.clean_sessions();
        self.refresh_host().await?;
        let underlay: Vec<InterfaceIndex> = self.underlay.interfaces.keys().copied().collect();
        for link in links.iter().filter(|link| underlay.contains(&link.index)) {
            self.keep_program(FROM_UNDERLAY, link);
        }

        for link in links.iter().filter(|link| bulk_devices.contains(&link.index)) {
            self.keep_program(FROM_BULK, link);
        }

        Ok(known
            .iter()
            .filter(|endpoint| !whole.contains(endpoint.host_interface.as_str()))
            .map(|endpoint| Lost {
                host_interface: endpoint.host_interface.clone(),
                address: endpoint.address,
                netns_exists: endpoint
                    .netns
                    .as_ref()
                    .is_none_or(|netns| netns.is_lasting() && netns.id().is_ok()),
            })
            .collect())
    }

    /// Attaches a program again, which replaces the current one without a gap. The filter may have
    /// been removed, or a link that is still pinned may have been detached. Returns false if the
    /// interface has no program.
    fn keep_program(&mut self, program: &'static str, link: &Link) -> bool {
        let Err(error) = self.programs.attach(program, link, &self.pins) else { return true };
        warn!(%error, interface = link.name, "the program cannot be attached again");
        [
            Pin::Link { ifindex: link.index, program: program.into() },
            Pin::Filter { ifindex: link.index, program: program.into() },
        ]
        .iter()
        .any(|pin| self.pins.is_there(pin))
    }

    /// Restores the offload veth if it was deleted or its offloads were turned on.
    async fn repair_offload_veth(&mut self) -> Result<()> {
        let offload_veth = OffloadVeth::ensure(&self.netlink, &self.alias, &self.node).await?;
        self.programs.attach(SEAL, &offload_veth.second, &self.pins)?;
        offload_veth.set_up(&self.netlink).await?;
        self.offload_veth = offload_veth;
        self.write_config()
    }
}
