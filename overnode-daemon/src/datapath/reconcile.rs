//! Finds what belongs to nobody and removes it: at the start and each minute.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::Result;
use ipnet::IpNet;
use tracing::{info, warn};

use super::Datapath;
use super::bpffs::Pin;
use super::endpoint::is_ours;
use super::links::Link;
use super::netns::NetnsRef;
use super::normaliser::{FIRST, Normaliser, SECOND};
use super::programs::{FROM_BULK, FROM_CONTAINER, FROM_UNDERLAY, SEAL};
use crate::types::from_map;

/// A container that the node believes to be attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownEndpoint {
    /// Name of the host's end.
    pub host_interface: String,
    /// Its address.
    pub address: IpAddr,
    /// Where it was attached; none: the host itself.
    pub netns: Option<NetnsRef>,
}

/// A container that is not attached any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Name of the host's end that it had.
    pub host_interface: String,
    /// Its address.
    pub address: IpAddr,
    /// True if its network namespace is still there, so that it can be attached again. Never for a
    /// process's: its number may be another's by now.
    pub netns_exists: bool,
}

impl Datapath {
    /// Removes this node's interfaces, pins and map entries that none of `known` needs; repairs
    /// what can be repaired (programs, the normaliser, local addresses); tells which of `known` are
    /// gone. Other people's interfaces are never touched.
    ///
    /// # Errors
    /// Netlink cannot be asked. What cannot be removed is logged, and tried again the next time.
    pub async fn reconcile(&mut self, known: &[KnownEndpoint]) -> Result<Vec<Lost>> {
        self.repair_normaliser().await?;
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
            if is_wanted && link.is_up && self.keep_program(FROM_CONTAINER, link) {
                whole.insert(link.name.as_str());
                self.endpoints.insert(link.name.clone(), link.index);
                continue;
            }
            info!(interface = link.name, "removing an interface that belongs to no container");
            if let Err(error) = self.detach(&link.name).await {
                warn!(%error, interface = link.name, "it cannot be removed");
            }
        }

        let mut in_use: BTreeSet<u32> = links
            .iter()
            .filter(|link| whole.contains(link.name.as_str()))
            .map(|link| link.index)
            .collect();
        let of_routes: Vec<u32> = self.routes.local().values().map(|route| route.target).collect();
        for ifindex in
            in_map.keys().copied().chain(of_routes).filter(|ifindex| !in_use.contains(ifindex))
        {
            if let Err(error) = self.forget_endpoint(ifindex) {
                warn!(%error, ifindex, "what the maps hold of an interface that is gone cannot be removed");
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
            warn!(%error, "not every route can be entered");
        }

        in_use.extend(links.iter().map(|link| link.index));
        for pin in self.pins.list().into_iter().filter(|pin| !in_use.contains(&pin.ifindex())) {
            if let Err(error) = self.pins.remove(&pin) {
                warn!(%error, ?pin, "a pin of an interface that is gone cannot be removed");
            }
        }
        self.clean_sessions();
        self.refresh_host().await?;
        let underlay: Vec<u32> = self.underlay.interfaces.keys().copied().collect();
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

    /// Attaches anew, which replaces what is there without a gap: anybody may have removed a
    /// filter, or detached a link that is still pinned. False if the interface has no program.
    fn keep_program(&mut self, program: &'static str, link: &Link) -> bool {
        let Err(error) = self.programs.attach(program, link, &self.pins) else { return true };
        warn!(%error, interface = link.name, "its program cannot be attached anew");
        [
            Pin::Link { ifindex: link.index, program: program.into() },
            Pin::Filter { ifindex: link.index, program: program.into() },
        ]
        .iter()
        .any(|pin| self.pins.is_there(pin))
    }

    /// Somebody may delete the pair or turn its offloads on.
    async fn repair_normaliser(&mut self) -> Result<()> {
        let normaliser = Normaliser::ensure(&self.netlink, &self.alias, &self.node).await?;
        self.programs.attach(SEAL, &normaliser.second, &self.pins)?;
        normaliser.set_up(&self.netlink).await?;
        self.normaliser = normaliser;
        self.write_config()
    }
}
