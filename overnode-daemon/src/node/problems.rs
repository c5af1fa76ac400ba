//! Collects problems that need an operator, for `status`, metrics and `monitor`. Problems are
//! recomputed at each look, so each one ends with its cause. The few causes that no other part
//! remembers are kept here, each with its end.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::containers::docker::DockerSide;
use super::view::View;
use overnode_core::ipam::IpamError;
use overnode_core::routing::Conflict;
use overnode_types::NodeId;

/// How long an ID clash is remembered. The host that is refused retries several times within it.
const CLASH_MEMORY: Duration = Duration::from_secs(180);
/// Maximum number of ID clashes remembered. Any host can claim any ID.
const MAX_CLASHES: usize = 32;

/// Causes that no other part remembers.
#[derive(Debug, Default)]
pub(super) struct Problems {
    /// IDs that two hosts use, with a description and the time when the clash was last seen.
    id_clashes: BTreeMap<NodeId, (String, Instant)>,
    /// Nodes whose address space could not be reclaimed, and why.
    unreclaimed: BTreeMap<NodeId, String>,
    /// Problems that were logged and reported to monitors and still exist.
    present: BTreeSet<String>,
}

impl Problems {
    /// Notes that two hosts use one ID.
    pub(super) fn note_id_clash(&mut self, id: NodeId, problem: String, now: Instant) {
        self.id_clashes.retain(|_, (_, at)| now < *at + CLASH_MEMORY);
        if self.id_clashes.len() < MAX_CLASHES || self.id_clashes.contains_key(&id) {
            self.id_clashes.insert(id, (problem, now));
        }
    }

    /// Notes that reclaiming the address space of a node has failed.
    pub(super) fn note_unreclaimed(&mut self, error: &IpamError) {
        tracing::warn!("{error}");
        if let IpamError::Reclaim { of, .. } = error {
            self.unreclaimed.insert(*of, error.to_string());
        }
    }

    /// Forgets a failed reclaim because a new one was started.
    pub(super) fn forget_unreclaimed(&mut self, of: NodeId) {
        self.unreclaimed.remove(&of);
    }

    /// Forgets failed reclaims of nodes that have nothing to reclaim any more.
    pub(super) fn retain_unreclaimed(&mut self, nodes: &BTreeSet<NodeId>) {
        self.unreclaimed.retain(|id, _| nodes.contains(id));
    }

    /// Logs the problems that are new or over, and returns them in this order.
    pub(super) fn update(&mut self, present: BTreeSet<String>) -> (Vec<String>, Vec<String>) {
        let new: Vec<String> = present.difference(&self.present).cloned().collect();
        let over: Vec<String> = self.present.difference(&present).cloned().collect();
        for problem in &new {
            tracing::warn!("{problem}");
        }
        for problem in &over {
            tracing::info!("no longer a problem: {problem}");
        }
        self.present = present;
        (new, over)
    }
}

impl View<'_> {
    /// Returns the problems of this node other than those of addresses and the underlay.
    pub(super) fn node_problems(&self, now: Instant) -> BTreeSet<String> {
        let id_clashes =
            self.problems.id_clashes.values().filter(|(_, at)| now < *at + CLASH_MEMORY);
        let docker = self.containers.docker.iter().flat_map(DockerSide::problems);
        let known = id_clashes
            .map(|(problem, _)| problem)
            .chain(docker)
            .chain(self.names.problems())
            .cloned();
        known.chain(self.lack_of_room(now)).collect()
    }

    fn lack_of_room(&self, now: Instant) -> Option<String> {
        self.control.gossip.is_full(now).then(|| {
            "the records of other nodes have used up their space, and updates were dropped: look \
             in `overnode status --peers` for nodes that are not yours"
                .to_owned()
        })
    }

    /// Returns why messages of other hosts cannot be received on an interface.
    pub(super) fn underlay_problems(&self) -> BTreeSet<String> {
        let of_interface =
            |why: String| format!("this host cannot receive packets from other hosts: {why}");
        self.data.datapath.underlay().problems.into_iter().map(of_interface).collect()
    }

    /// Returns the problems with addresses.
    pub(super) fn address_problems(&self, now: Instant) -> BTreeSet<String> {
        let problems =
            self.addresses.ipam.problems(now).into_iter().filter(|problem| !problem.is_past());
        let (addresses, problems): (Vec<_>, Vec<_>) =
            problems.map(|problem| (problem.address(), problem.to_string())).unzip();
        let addresses: Vec<_> = addresses.into_iter().flatten().collect();
        // Do not report addresses in use here twice, if the allocation already reports them.
        let is_told = |conflict: &Conflict| {
            let told = |prefix: &IpNet| addresses.iter().any(|address| prefix.contains(address));
            conflict.count == conflict.prefixes.len() && conflict.prefixes.iter().all(told)
        };
        let conflicts = self.data.routing.conflicts(now).filter(|conflict| !is_told(conflict));
        conflicts.map(|conflict| self.conflict(&conflict)).chain(problems).collect()
    }

    /// Returns recent events of addresses, and reclaims that failed.
    pub(super) fn address_notices(&self, now: Instant) -> BTreeSet<String> {
        let past = self
            .addresses
            .ipam
            .problems(now)
            .into_iter()
            .filter(overnode_core::ipam::Problem::is_past);
        let unreclaimed =
            self.problems.unreclaimed.iter().filter(|(id, _)| self.is_unreclaimed(**id));
        past.map(|problem| problem.to_string())
            .chain(unreclaimed.map(|(_, why)| why.clone()))
            .collect()
    }

    /// Whether a node still has address space that could be reclaimed.
    fn is_unreclaimed(&self, id: NodeId) -> bool {
        let Some(record) = self.control.gossip.record(id).filter(|record| !record.left) else {
            return false;
        };
        let is_reachable = self.reach(id).is_some_and(|(reachable, _)| reachable);
        let is_reclaimed = self
            .addresses
            .ipam
            .reclaimed()
            .any(|(of, up_to, _)| of == id && record.incarnation <= up_to);
        !is_reachable && !is_reclaimed && !self.addresses.ipam.reclaims().contains_key(&id)
    }

    /// Returns all problems and notices.
    pub(super) fn all_problems(&self, now: Instant) -> BTreeSet<String> {
        let mut all = self.node_problems(now);
        all.extend(self.underlay_problems());
        all.extend(self.address_problems(now));
        all.extend(self.address_notices(now));
        all
    }

    /// Returns the nodes whose reclaim has failed and that still have something to reclaim.
    pub(super) fn unreclaimed(&self) -> BTreeSet<NodeId> {
        let failed = self.problems.unreclaimed.keys().copied();
        failed.filter(|id| self.is_unreclaimed(*id)).collect()
    }

    /// Describes a conflict of addresses that two nodes announce.
    fn conflict(&self, conflict: &Conflict) -> String {
        let name = |id: NodeId| match self.control.gossip.record(id) {
            Some(record) => format!("node {id} ({})", record.nickname),
            None => format!("node {id}"),
        };
        let (holder, claimant) = (name(conflict.holder), name(conflict.claimant));
        let prefixes: Vec<_> = conflict.prefixes.iter().map(ToString::to_string).collect();
        let more = match conflict.count.saturating_sub(prefixes.len()) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!(
            "{claimant} announces {}{more}, which belongs to {holder} (packets still go there): \
             on the host that should not have it, run `overnode reset` or detach the containers \
             that use it",
            prefixes.join(", ")
        )
    }
}
