//! Which addresses this node has: runs the allocation, and keeps it on disk.
//!
//! [`Addresses`] writes every change to the store before any other part of the node can act on it.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::local::LocalNode;
use crate::api::{self, ApiError, Primed};
use crate::store::{Store, StoreError};
use overnode_core::control::dial::{Phase, TargetStatus};
use overnode_core::gossip::routed::KIND_ALLOCATION;
use overnode_core::gossip::{self, Record, RoutedMessage};
use overnode_core::ipam::{self, Ipam, IpamError, RequestId};
use overnode_types::NodeId;

/// Time after the start from which targets that were never met are considered absent. A target need
/// not exist.
const TARGETS_ABSENT_AFTER: Duration = Duration::from_secs(10);
const _: () = assert!(ipam::MAX_STATIC <= gossip::MAX_CLAIMS);
/// Owner of the probe request that `overnode prime` makes.
const PRIMING: &str = "prime";

/// The allocation, and what waits for it.
pub(super) struct Addresses {
    local: Arc<LocalNode>,
    store: Arc<Store>,
    pub(super) ipam: Ipam,
    /// The request that obtains address space for `overnode prime`, if the node has none.
    priming: Option<RequestId>,
    /// Nodes whose address space this daemon has reclaimed.
    reclaimed: BTreeSet<NodeId>,
    /// Targets that this daemon has been connected with.
    met_targets: BTreeSet<String>,
    /// Why a change could not be written to disk. Nothing is carried out after that.
    broken: Option<anyhow::Error>,
    effects: VecDeque<Effect>,
}

/// A decision of the allocation that another part of the node carries out.
#[derive(Debug)]
pub(super) enum Effect {
    /// Send an allocation message to a node.
    Send(NodeId, Vec<u8>),
    /// A request has ended.
    Found(RequestId, Result<IpAddr, IpamError>),
    /// The node may leave the cluster, or may not.
    Leave(Result<(), IpamError>),
    /// Another node's address space could not be reclaimed.
    ReclaimFailed(IpamError),
    /// The node needs this incarnation. It is on disk.
    Renewed(u64),
}

impl Addresses {
    /// Restores the allocation from the store.
    pub(super) fn restore(
        local: Arc<LocalNode>,
        store: Arc<Store>,
        now: Instant,
    ) -> anyhow::Result<Self> {
        let attachments = store.attachments()?;
        let allocated = attachments.into_iter().map(|it| (it.address, it.target)).collect();
        let config = ipam::Config {
            network: local.identity.network,
            id: local.id(),
            incarnation: local.identity.incarnation,
            timing: ipam::Timing::default(),
        };
        let mut ipam = Ipam::new(config, store.addresses()?, allocated, now)?;
        if let Some(last) = store.cursor()? {
            ipam.resume_after(last);
        }
        Ok(Self {
            local,
            store,
            ipam,
            priming: None,
            reclaimed: BTreeSet::new(),
            met_targets: BTreeSet::new(),
            broken: None,
            effects: VecDeque::new(),
        })
    }

    /// Returns the next decision, if any.
    pub(super) fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// Returns when [`Self::handle_timeout`] must be called.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.ipam.poll_timeout()
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        if self.poll_timeout().is_some_and(|at| at <= now) {
            self.ipam.handle_timeout(now);
        }
    }

    /// Learns what a node announces.
    pub(super) fn learn(&mut self, record: &Record, now: Instant) {
        let peer = ipam::Peer {
            incarnation: record.incarnation,
            left: record.left,
            ranges: record.ranges.clone(),
            claims: record.claims.clone(),
        };
        self.ipam.learn(record.id, peer, now);
    }

    /// Learns which nodes messages reach, and whether the node has met all of its targets.
    pub(super) fn set_paths(
        &mut self,
        reachable: BTreeSet<NodeId>,
        targets: &[TargetStatus],
        now: Instant,
    ) {
        self.ipam.set_reachable(reachable, now);
        for view in targets {
            if matches!(view.phase, Phase::Established | Phase::Myself) {
                self.met_targets.insert(view.name.clone());
            }
        }
        let met = now >= self.local.started + TARGETS_ABSENT_AFTER
            || targets.iter().all(|view| self.met_targets.contains(&view.name));
        self.ipam.set_targets_met(met, now);
    }

    /// Handles a routed message for this node.
    pub(super) fn deliver(&mut self, routed: &RoutedMessage, now: Instant) {
        if routed.kind != KIND_ALLOCATION {
            return tracing::debug!(
                "node {} sent a routed message of unknown kind {}",
                routed.from,
                routed.kind
            );
        }
        if let Err(error) = self.ipam.handle_message(routed.from, &routed.body, now) {
            tracing::debug!("node {} sent a malformed allocation message: {error}", routed.from);
        }
    }

    /// Writes the changes of the allocation to disk, and turns its other actions into effects. If
    /// writing fails, no later action is carried out.
    pub(super) fn pump(&mut self, now: Instant) {
        while self.broken.is_none() {
            let Some(action) = self.ipam.poll_action() else { return };
            match action {
                ipam::Action::Persist(changes) => {
                    let written = self.store.change_addresses(&changes);
                    self.must(written, "the list of addresses cannot be written to disk");
                }
                ipam::Action::Send { to, bytes } => {
                    self.effects.push_back(Effect::Send(to, bytes));
                }
                ipam::Action::Granted { request, address } if self.priming == Some(request) => {
                    self.priming = None;
                    self.ipam.release(address, now);
                }
                ipam::Action::Granted { request, address } => {
                    self.effects.push_back(Effect::Found(request, Ok(address)));
                }
                ipam::Action::Failed { request, .. } if self.priming == Some(request) => {
                    self.priming = None
                }
                ipam::Action::Failed { request, error } => {
                    self.effects.push_back(Effect::Found(request, Err(error)));
                }
                // Reported with the other problems while it lasts.
                ipam::Action::Report(problem) => tracing::debug!("{problem}"),
                ipam::Action::Reclaimed(id) => {
                    tracing::info!("this node now owns the address space of node {id}");
                    self.reclaimed.insert(id);
                }
                ipam::Action::ReclaimFailed(error) => {
                    self.effects.push_back(Effect::ReclaimFailed(error));
                }
                ipam::Action::Renewed(incarnation) => {
                    let written = self.store.set_incarnation(incarnation);
                    if self.must(written, "the node's incarnation cannot be written to disk") {
                        self.effects.push_back(Effect::Renewed(incarnation));
                    }
                }
                ipam::Action::MayLeave => self.effects.push_back(Effect::Leave(Ok(()))),
                ipam::Action::CannotLeave(error) => {
                    self.effects.push_back(Effect::Leave(Err(error)))
                }
            }
        }
    }

    /// Stops the allocation unless `written` is a success.
    fn must(&mut self, written: Result<(), StoreError>, problem: &'static str) -> bool {
        if let Err(error) = written {
            self.broken = Some(anyhow::Error::new(error).context(problem));
        }
        self.broken.is_none()
    }

    /// Whether the node cannot continue.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// Returns why the node cannot continue, once.
    pub(super) fn take_broken(&mut self) -> Option<anyhow::Error> {
        self.broken.take()
    }

    /// Returns everything that is routed to this node.
    pub(super) fn own_routes(&self) -> Vec<IpNet> {
        let mut routes = self.ipam.ranges();
        routes.push(self.local.address().into());
        routes
    }

    /// Requests an address for a container, `fixed` if it must be this one.
    pub(super) fn request(
        &mut self,
        fixed: Option<IpAddr>,
        owner: &str,
        now: Instant,
    ) -> RequestId {
        match fixed {
            Some(address) => self.ipam.claim(address, owner, now),
            None => self.ipam.allocate(owner, now),
        }
    }

    /// Releases an address that nothing uses any more. It stays reserved if the disk cannot be
    /// written, as it would after a restart.
    pub(super) fn give_back(&mut self, address: IpAddr, now: Instant) -> Result<(), StoreError> {
        self.store.remove_attachment(address)?;
        self.ipam.release(address, now);
        Ok(())
    }

    /// Tells whether an address for a container is available now. If not, starts to obtain address
    /// space.
    pub(super) fn prime(&mut self, now: Instant) -> Primed {
        match self.ipam.check_ready() {
            Ok(()) => Primed { ready: true, waiting_for: None },
            Err(why) => {
                if self.priming.is_none() {
                    self.priming = Some(self.ipam.allocate(PRIMING, now));
                }
                Primed { ready: false, waiting_for: Some(why.to_string()) }
            }
        }
    }

    /// Starts to reclaim the address space of a node that is gone for good, or repeats that.
    pub(super) fn reclaim(&mut self, id: NodeId, now: Instant) -> Result<(), ApiError> {
        self.reclaimed.remove(&id);
        self.ipam.reclaim(id, now).map_err(ApiError::refused)
    }

    /// Returns the progress of a reclaim.
    pub(super) fn reclaim_progress(&self, id: NodeId) -> api::Reclaimed {
        if self.reclaimed.contains(&id) {
            return api::Reclaimed { id, done: true, missing: Vec::new() };
        }
        let missing = self.ipam.reclaims().remove(&id).unwrap_or_default();
        api::Reclaimed { id, done: false, missing }
    }

    /// Returns the static address that `attach` requests, if any.
    pub(super) fn wanted_address(&self, request: &api::Attach) -> Result<Option<IpAddr>, ApiError> {
        let Some(mut address) = request.address else { return Ok(None) };
        if address.prefix_len() == address.max_prefix_len() {
            address = self.local.with_prefix(address.addr());
        }
        let subnet = self.local.identity.network.subnet;
        if !subnet.contains(&address.addr()) {
            return Err(ApiError::usage(format_args!(
                "{} is outside the subnet {subnet}: give an address inside it",
                address.addr()
            )));
        }
        if address.prefix_len() != subnet.prefix_len() {
            return Err(ApiError::usage(format_args!(
                "the prefix length of {address} is not the subnet's: give {}/{}",
                address.addr(),
                subnet.prefix_len()
            )));
        }
        Ok(Some(address.addr()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::local::tests::local_node;

    fn addresses(id: u16, now: Instant) -> (tempfile::TempDir, Arc<Store>, Addresses) {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&folder.path().join("state")).unwrap());
        let local = local_node(id, now);
        let addresses = Addresses::restore(local, store.clone(), now).unwrap();
        (folder, store, addresses)
    }

    fn found(addresses: &mut Addresses, now: Instant) -> Vec<Result<IpAddr, IpamError>> {
        addresses.pump(now);
        let effects = std::iter::from_fn(|| addresses.poll_effect());
        effects
            .filter_map(|effect| match effect {
                Effect::Found(_, found) => Some(found),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn what_an_address_comes_from_is_on_disk_before_the_address_is_given_out() {
        let start = Instant::now();
        let (_folder, store, mut addresses) = addresses(1, start);
        addresses.request(None, "web", start);
        for second in 0..60 {
            let now = start + Duration::from_secs(second);
            addresses.set_paths([].into(), &[], now);
            addresses.handle_timeout(now);
            let written = store.addresses().unwrap().len();
            if let [Ok(address)] = found(&mut addresses, now)[..] {
                let written = written.max(store.addresses().unwrap().len());
                assert!(written > 0, "{address} was given out, but nothing is on disk");
                assert_eq!(addresses.own_routes().last(), Some(&addresses.local.address().into()));
                return;
            }
        }
        panic!("node 1 got no address in a minute");
    }

    #[test]
    fn priming_gives_no_address_away() {
        let now = Instant::now();
        let (_folder, _store, mut addresses) = addresses(9, now);
        assert!(!addresses.prime(now).ready);
        assert!(!addresses.prime(now).ready);
        assert_eq!(addresses.ipam.waiting(), 1, "a second request was made");
        assert!(found(&mut addresses, now).is_empty());
    }
}
