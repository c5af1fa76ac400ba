//! What needs an operator, told by `status`, metrics and `monitor`. It is computed from what is the
//! case at each look, so it ends when its cause ends; the few causes that nothing else remembers
//! are kept here, each with its end.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::docker::DockerSide;
use super::running::Node;
use crate::api::Happening;
use crate::ipam::IpamError;
use crate::routing::Conflict;
use crate::types::NodeId;

/// Of two hosts with one ID, the one that is refused tries again several times in this time.
const TWINS: Duration = Duration::from_secs(180);
/// IDs that are remembered to be used twice: anybody can claim any.
const MAX_TWINS: usize = 32;

/// Causes that nothing else remembers.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// IDs that two hosts use: in words, and when that was last seen.
    twins: BTreeMap<NodeId, (String, Instant)>,
    /// Nodes whose space could not be taken back, and why.
    unreclaimed: BTreeMap<NodeId, String>,
    /// What was logged and told to monitors, and is not over.
    told: BTreeSet<String>,
}

impl Node {
    /// Two hosts use one ID.
    pub(super) fn note_twins(&mut self, id: NodeId, problem: String, now: Instant) {
        let twins = &mut self.findings.twins;
        twins.retain(|_, (_, at)| now < *at + TWINS);
        if twins.len() < MAX_TWINS || twins.contains_key(&id) {
            twins.insert(id, (problem, now));
        }
    }

    /// Taking back the space of a node has failed.
    pub(super) fn note_unreclaimed(&mut self, error: &IpamError) {
        tracing::warn!("{error}");
        if let IpamError::Reclaim { of, .. } = error {
            self.findings.unreclaimed.insert(*of, error.to_string());
        }
    }

    /// Taking back the space of a node was begun anew.
    pub(super) fn forget_unreclaimed(&mut self, of: NodeId) {
        self.findings.unreclaimed.remove(&of);
    }

    /// What is wrong with this node, but for addresses and the underlay.
    pub(super) fn problems(&self, now: Instant) -> BTreeSet<String> {
        let twins = self.findings.twins.values().filter(|(_, at)| now < *at + TWINS);
        let docker = self.docker.iter().flat_map(DockerSide::problems);
        let known =
            twins.map(|(problem, _)| problem).chain(docker).chain(self.dns.problems()).cloned();
        known.chain(self.lack_of_room(now)).collect()
    }

    fn lack_of_room(&self, now: Instant) -> Option<String> {
        self.gossip.is_full(now).then(|| {
            "what other nodes say takes all the room that there is for it, and news was left out: look \
             in `overnode status --peers` for nodes that are not yours"
                .to_owned()
        })
    }

    /// Why messages of other hosts cannot be taken on some interface.
    pub(super) fn underlay_problems(&self) -> BTreeSet<String> {
        let of_interface =
            |why: String| format!("this host cannot take packets from other hosts: {why}");
        self.datapath.underlay().problems.into_iter().map(of_interface).collect()
    }

    /// What is wrong with addresses.
    pub(super) fn address_problems(&self, now: Instant) -> BTreeSet<String> {
        let problems = self.ipam.problems(now).into_iter().filter(|problem| !problem.is_past());
        let (addresses, problems): (Vec<_>, Vec<_>) =
            problems.map(|problem| (problem.address(), problem.to_string())).unzip();
        let addresses: Vec<_> = addresses.into_iter().flatten().collect();
        // What the allocation says of addresses that are in use here is not said twice.
        let is_told = |conflict: &Conflict| {
            let told = |prefix: &IpNet| addresses.iter().any(|address| prefix.contains(address));
            conflict.count == conflict.prefixes.len() && conflict.prefixes.iter().all(told)
        };
        let conflicts = self.routing.conflicts(now).filter(|conflict| !is_told(conflict));
        conflicts.map(|conflict| self.conflict(&conflict)).chain(problems).collect()
    }

    /// What has happened to addresses lately, or could not be done.
    pub(super) fn address_notices(&self, now: Instant) -> BTreeSet<String> {
        let past = self.ipam.problems(now).into_iter().filter(crate::ipam::Problem::is_past);
        let unreclaimed =
            self.findings.unreclaimed.iter().filter(|(id, _)| self.is_unreclaimed(**id));
        past.map(|problem| problem.to_string())
            .chain(unreclaimed.map(|(_, why)| why.clone()))
            .collect()
    }

    /// Whether a node still has space that could be taken back.
    fn is_unreclaimed(&self, id: NodeId) -> bool {
        let Some(record) = self.gossip.record(id).filter(|record| !record.left) else {
            return false;
        };
        let is_reachable = self.reach(id).is_some_and(|(reachable, _)| reachable);
        let is_buried =
            self.ipam.buried().any(|(of, up_to, _)| of == id && record.incarnation <= up_to);
        !is_reachable && !is_buried && !self.ipam.reclaims().contains_key(&id)
    }

    /// Once a second: logs what begins, and tells monitors what begins and what is over.
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
            self.tell(|_| Happening::Problem { problem: problem.clone() });
        }
        for problem in told.difference(&present) {
            tracing::info!("this is over: {problem}");
            self.tell(|_| Happening::ProblemOver { problem: problem.clone() });
        }
        self.findings.told = present;
    }
}
