//! One host: its disk, and its node while that runs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use overnode_core::gossip::{Gossip, Path, Record, Signer, Verified};
use overnode_core::ipam::{Change, Config, Fact, Ipam, Key, Peer, RequestId, Timing};
use overnode_core::routing::Routing;
use overnode_types::{Network, NodeId, Secret, VerifyingKey};
use rand::rngs::StdRng;

/// The data that survives a crash, exactly as it was written.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    /// Increases with each start.
    pub incarnation: u64,
    pub facts: BTreeMap<Key, Fact>,
    /// Owners of the containers, by address. Containers keep running when the node crashes.
    pub attachments: BTreeMap<IpAddr, String>,
    pub peers: BTreeMap<NodeId, Record>,
    /// The rank of each node's announced prefixes, which decides which node announced a prefix
    /// first.
    pub standing: BTreeMap<NodeId, Vec<(IpNet, u64)>>,
    /// The facts that the last write replaced, for disks that lose the last write.
    pub undo: Vec<(Key, Option<Fact>)>,
}

/// A running node: the real cores.
pub(crate) struct Node {
    pub gossip: Gossip,
    pub ipam: Ipam,
    /// The routes that the data plane would get.
    pub routing: Routing,
    /// The number of the connection with each neighbor.
    pub links: BTreeMap<NodeId, u64>,
    pub met: BTreeSet<NodeId>,
    pub paths: BTreeMap<NodeId, Path>,
    /// The time since when each node has been reachable.
    pub reached: BTreeMap<NodeId, Instant>,
    pub paths_are_old: bool,
    pub paths_at: Option<Instant>,
    /// Owners of the containers that wait for an address.
    pub waiting: BTreeMap<RequestId, String>,
    /// Number of actions that the process still carries out before it dies.
    pub crash_after: Option<u32>,
    pub leaving: bool,
    pub timer: Option<Instant>,
}

/// One machine.
#[derive(Default)]
pub(crate) struct Host {
    pub disk: Option<Disk>,
    pub node: Option<Node>,
    /// Whether the host is gone for good with this disk.
    pub is_dead: bool,
    /// The node that this host last routed each address to. Kept across restarts as long as that
    /// node keeps the block.
    pub routed: BTreeMap<IpAddr, NodeId>,
}

impl Disk {
    pub(crate) fn write(&mut self, changes: &[Change], loses_loans: bool) {
        self.undo.clear();
        for change in changes {
            let (key, before) = match change {
                Change::Put(Fact::Loan { .. }) if loses_loans => continue,
                Change::Put(fact) => (fact.key(), self.facts.insert(fact.key(), fact.clone())),
                Change::Forget(key) => (*key, self.facts.remove(key)),
            };
            self.undo.push((key, before));
        }
    }

    pub(crate) fn forget_last_write(&mut self) {
        for (key, before) in std::mem::take(&mut self.undo).into_iter().rev() {
            match before {
                Some(fact) => self.facts.insert(key, fact),
                None => self.facts.remove(&key),
            };
        }
    }

    /// Returns whether this disk has the block or the ledger that another node's fact claims.
    pub(crate) fn contradicts(&self, fact: &Fact) -> bool {
        match fact {
            Fact::Held { block, lost: false } => self.facts.values().any(|known| {
                matches!(known, Fact::Held { block: other, lost: false }
                    if other.contains(block) || block.contains(other))
            }),
            Fact::Ledger { quarter, successor: None, .. } => {
                matches!(
                    self.facts.get(&Key::Ledger(*quarter)),
                    Some(Fact::Ledger { successor: None, .. })
                )
            }
            _ => false,
        }
    }

    /// Returns the launch that the disk belongs to.
    pub(crate) fn epoch(&self) -> u64 {
        match self.facts.get(&Key::Epoch) {
            Some(Fact::Epoch(epoch)) => *epoch,
            _ => 0,
        }
    }

    /// Returns whether the disk has a block of this node that contains the address.
    pub(crate) fn holds(&self, address: IpAddr) -> bool {
        self.facts
            .values()
            .any(|fact| matches!(fact, Fact::Held { block, .. } if block.contains(&address)))
    }
}

impl Node {
    pub(crate) fn start(
        id: NodeId,
        disk: &mut Disk,
        network: Network,
        timing: Timing,
        rng: StdRng,
        verified: Verified,
        now: Instant,
    ) -> Self {
        disk.incarnation += 1;
        let config = Config { network, id, incarnation: disk.incarnation, timing };
        let facts = disk.facts.values().cloned().collect::<Vec<_>>();
        let mut ipam =
            Ipam::new(config, facts, disk.attachments.clone(), now).expect("the network is valid");
        for record in disk.peers.values() {
            ipam.learn(record.id, peer(record), now);
        }
        let mut routing = Routing::new(*ipam.layout(), id);
        for record in disk.peers.values() {
            routing.restore(
                record,
                disk.standing.get(&record.id).cloned().unwrap_or_default(),
                now,
            );
        }
        let public_key = signer(id).public_key();
        let own = Record {
            ranges: ipam.ranges(),
            claims: ipam.claims(),
            ..Record::blank(id, disk.incarnation, String::new(), public_key)
        };
        let mut gossip = Gossip::new(own, signer(id), rng, now);
        gossip.share_verified(verified);
        gossip.restore(disk.peers.values().cloned().map(|record| (record, true)));
        Self {
            gossip,
            ipam,
            routing,
            links: BTreeMap::new(),
            met: BTreeSet::new(),
            paths: BTreeMap::new(),
            reached: BTreeMap::new(),
            paths_are_old: true,
            paths_at: None,
            waiting: BTreeMap::new(),
            crash_after: None,
            leaving: false,
            timer: None,
        }
    }

    pub(crate) fn poll_timeout(&self, pace: Duration) -> Option<Instant> {
        let paths = self.paths_at.filter(|_| self.paths_are_old).map(|last| last + pace);
        [self.gossip.poll_timeout(), self.ipam.poll_timeout(), paths].into_iter().flatten().min()
    }
}

/// Returns a node's signer, which is the same after each launch. This simulation does not test
/// changed keys.
fn signer(id: NodeId) -> Signer {
    let mut seed = [0; 32];
    seed[..2].copy_from_slice(&id.get().to_le_bytes());
    Signer::new(&Secret(seed))
}

/// Returns the identity that a node introduces itself with.
pub(crate) fn keys(id: NodeId) -> VerifyingKey {
    signer(id).verifying_key()
}

/// Returns what gossip tells the allocation about a node.
pub(crate) fn peer(record: &Record) -> Peer {
    Peer {
        incarnation: record.incarnation,
        left: record.left,
        ranges: record.ranges.clone(),
        claims: record.claims.clone(),
    }
}
