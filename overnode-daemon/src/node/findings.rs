//! Collects problems that need an operator, for `status`, metrics and `monitor`. Problems are
//! recomputed at each look, so each one ends with its cause. The few causes that no other part
//! remembers are kept here, each with its end.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::docker::DockerSide;
use super::running::Node;
use crate::api::EventKind;
use overnode_core::ipam::IpamError;
use overnode_core::routing::Conflict;
use overnode_types::NodeId;

/// How long an ID clash is remembered. The host that is refused retries several times within it.
const CLASH_MEMORY: Duration = Duration::from_secs(180);
/// Maximum number of ID clashes remembered. Any host can claim any ID.
const MAX_TWINS: usize = 32;

/// Causes that no other part remembers.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// IDs that two hosts use, with a description and the time when the clash was last seen.
    id_clashes: BTreeMap<NodeId, (String, Instant)>,
    /// Nodes whose address space could not be reclaimed, and why.
    unreclaimed: BTreeMap<NodeId, String>,
    /// Problems that were logged and reported to monitors and still exist.
    told: BTreeSet<String>,
}

impl Node {
    /// Notes that two hosts use one ID.
    pub(super) fn note_id_clash(&mut self, id: NodeId, problem: String, now: Instant) {
        let id_clashes = &mut self.findings.id_clashes;
        id_clashes.retain(|_, (_, at)| now < *at + CLASH_MEMORY);
        if id_clashes.len() < MAX_TWINS || id_clashes.contains_key(&id) {
            id_clashes.insert(id, (problem, now));
        }
    }

    /// Notes that reclaiming the address space of a node has failed.
    pub(super) fn note_unreclaimed(&mut self, error: &IpamError) {
        tracing::warn!("{error}");
        if let IpamError::Reclaim { of, .. } = error {
            self.findings.unreclaimed.insert(*of, error.to_string());
        }
    }

    /// Forgets a failed reclaim because a new one was started.
    pub(super) fn forget_unreclaimed(&mut self, of: NodeId) {
        self.findings.unreclaimed.remove(&of);
    }

    /// Returns the problems of this node other than those of addresses and the underlay.
    pub(super) fn problems(&self, now: Instant) -> BTreeSet<String> {
        let id_clashes =
            self.findings.id_clashes.values().filter(|(_, at)| now < *at + CLASH_MEMORY);
        let docker = self.docker.iter().flat_map(DockerSide::problems);
        let known = id_clashes
            .map(|(problem, _)| problem)
            .chain(docker)
            .chain(self.dns.problems())
            .cloned();
        known.chain(self.lack_of_room(now)).collect()
    }

    fn lack_of_room(&self, now: Instant) -> Option<String> {
        self.gossip.is_full(now).then(|| {
            "the records of other nodes have used up their space, and updates were dropped: look \
             in `overnode status --peers` for nodes that are not yours"
                .to_owned()
        })
    }

    /// Returns why messages of other hosts cannot be received on an interface.
    pub(super) fn underlay_problems(&self) -> BTreeSet<String> {
        let of_interface =
            |why: String| format!("this host cannot receive packets from other hosts: {why}");
        self.datapath.underlay().problems.into_iter().map(of_interface).collect()
    }

    /// Returns the problems with addresses.
    pub(super) fn address_problems(&self, now: Instant) -> BTreeSet<String> {
        let problems = self.ipam.problems(now).into_iter().filter(|problem| !problem.is_past());
        let (addresses, problems): (Vec<_>, Vec<_>) =
            problems.map(|problem| (problem.address(), problem.to_string())).unzip();
        let addresses: Vec<_> = addresses.into_iter().flatten().collect();
        // Do not report addresses in use here twice, if the allocation already reports them.
        let is_told = |conflict: &Conflict| {
            let told = |prefix: &IpNet| addresses.iter().any(|address| prefix.contains(address));
            conflict.count == conflict.prefixes.len() && conflict.prefixes.iter().all(told)
        };
        let conflicts = self.routing.conflicts(now).filter(|conflict| !is_told(conflict));
        conflicts.map(|conflict| self.conflict(&conflict)).chain(problems).collect()
    }

    /// Returns recent events of addresses, and reclaims that failed.
    pub(super) fn address_notices(&self, now: Instant) -> BTreeSet<String> {
        let past =
            self.ipam.problems(now).into_iter().filter(overnode_core::ipam::Problem::is_past);
        let unreclaimed =
            self.findings.unreclaimed.iter().filter(|(id, _)| self.is_unreclaimed(**id));
        past.map(|problem| problem.to_string())
            .chain(unreclaimed.map(|(_, why)| why.clone()))
            .collect()
    }

    /// Whether a node still has address space that could be reclaimed.
    fn is_unreclaimed(&self, id: NodeId) -> bool {
        let Some(record) = self.gossip.record(id).filter(|record| !record.left) else {
            return false;
        };
        let is_reachable = self.reach(id).is_some_and(|(reachable, _)| reachable);
        let is_reclaimed =
            self.ipam.reclaimed().any(|(of, up_to, _)| of == id && record.incarnation <= up_to);
        !is_reachable && !is_reclaimed && !self.ipam.reclaims().contains_key(&id)
    }

    /// Runs once a second: logs new problems, and reports new and resolved problems to monitors.
    pub(super) fn follow_problems(&mut self, now: Instant) {
        let unreclaimed: BTreeSet<NodeId> = self
            .findings
            .unreclaimed
            .keys()
            .copied()
            .filter(|id| self.is_unreclaimed(*id))
            .collect();
        self.findings.unreclaimed.retain(|id, _| unreclaimed.contains(id));
        let mut present = self.problems(now);
        present.extend(self.underlay_problems());
        present.extend(self.address_problems(now));
        present.extend(self.address_notices(now));
        let told = std::mem::take(&mut self.findings.told);
        for problem in present.difference(&told) {
            tracing::warn!("{problem}");
            self.tell(|_| EventKind::Problem { problem: problem.clone() });
        }
        for problem in told.difference(&present) {
            tracing::info!("no longer a problem: {problem}");
            self.tell(|_| EventKind::ProblemResolved { problem: problem.clone() });
        }
        self.findings.told = present;
    }
}
