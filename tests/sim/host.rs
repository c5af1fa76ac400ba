//! One host: what is on its disk, and its node while that runs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use overnode_daemon::gossip::{Gossip, Path, Record, Signature, Signer, Verified};
use overnode_daemon::ipam::{Change, Config, Fact, Ipam, Key, Peer, RequestId, Timing};
use overnode_daemon::routing::Routing;
use overnode_daemon::types::{Network, NodeId, Secret, VerifyingKey};
use rand::rngs::StdRng;

/// What survives a crash, exactly as it was written.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    /// Counts the starts.
    pub incarnation: u64,
    pub facts: BTreeMap<Key, Fact>,
    /// Containers, by address. They run on when the node crashes.
    pub attachments: BTreeMap<IpAddr, String>,
    pub peers: BTreeMap<NodeId, Record>,
    /// Who announced what first.
    pub standing: BTreeMap<NodeId, Vec<(IpNet, u64)>>,
    /// What the last write has replaced, for disks that forget it.
    pub undo: Vec<(Key, Option<Fact>)>,
}

/// A running node: the real cores.
pub struct Node {
    pub gossip: Gossip,
    pub ipam: Ipam,
    /// Which prefixes lead to whom: what the data plane would be given.
    pub routing: Routing,
    /// The connection with each neighbour, by number.
    pub links: BTreeMap<NodeId, u64>,
    pub met: BTreeSet<NodeId>,
    pub paths: BTreeMap<NodeId, Path>,
    /// Since when each node is reached.
    pub reached: BTreeMap<NodeId, Instant>,
    pub paths_are_old: bool,
    pub paths_at: Option<Instant>,
    /// Containers that wait for an address.
    pub waiting: BTreeMap<RequestId, String>,
    /// The process dies before it carries out so many actions more.
    pub crash_after: Option<u32>,
    pub leaving: bool,
    pub timer: Option<Instant>,
}

/// One machine.
#[derive(Default)]
pub struct Host {
    pub disk: Option<Disk>,
    pub node: Option<Node>,
    /// It never comes back with this disk.
    pub is_dead: bool,
    /// The node that its packets for an address went to. Kept from one start to the next, as long
    /// as that node keeps the block.
    pub routed: BTreeMap<IpAddr, NodeId>,
}

impl Disk {
    pub fn write(&mut self, changes: &[Change], loses_loans: bool) {
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

    pub fn forget_last_write(&mut self) {
        for (key, before) in std::mem::take(&mut self.undo).into_iter().rev() {
            match before {
                Some(fact) => self.facts.insert(key, fact),
                None => self.facts.remove(&key),
            };
        }
    }

    /// Whether this node has what another one takes.
    pub fn contradicts(&self, fact: &Fact) -> bool {
        match fact {
            Fact::Held { block, lost: false } => self.facts.values().any(|known| {
                matches!(known, Fact::Held { block: other, lost: false }
                    if other.contains(block) || block.contains(other))
            }),
            Fact::Book { quarter, heir: None, .. } => {
                matches!(self.facts.get(&Key::Book(*quarter)), Some(Fact::Book { heir: None, .. }))
            }
            _ => false,
        }
    }

    /// The launch that the disk is of.
    pub fn epoch(&self) -> u64 {
        match self.facts.get(&Key::Epoch) {
            Some(Fact::Epoch(epoch)) => *epoch,
            _ => 0,
        }
    }

    /// Whether a block with this address is on disk as this node's.
    pub fn holds(&self, address: IpAddr) -> bool {
        self.facts
            .values()
            .any(|fact| matches!(fact, Fact::Held { block, .. } if block.contains(&address)))
    }
}

impl Node {
    pub fn start(
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
        let own = Record {
            id,
            incarnation: disk.incarnation,
            version: 0,
            left: false,
            nickname: String::new(),
            public_key: signer(id).public_key(),
            addresses: Vec::new(),
            links: Vec::new(),
            dark: Vec::new(),
            ranges: ipam.ranges(),
            claims: ipam.claims(),
            names: Vec::new(),
            verifying_key: VerifyingKey::default(),
            signature: Signature::default(),
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

    pub fn poll_timeout(&self, pace: Duration) -> Option<Instant> {
        let paths = self.paths_at.filter(|_| self.paths_are_old).map(|last| last + pace);
        [self.gossip.poll_timeout(), self.ipam.poll_timeout(), paths].into_iter().flatten().min()
    }
}

/// What a node signs with: the same in each of its lives, for keys that change are not what is
/// tried here.
fn signer(id: NodeId) -> Signer {
    let mut seed = [0; 32];
    seed[..2].copy_from_slice(&id.get().to_le_bytes());
    Signer::new(&Secret(seed))
}

/// The identity that a node introduces itself with.
pub fn keys(id: NodeId) -> VerifyingKey {
    signer(id).verifying_key()
}

/// What gossip tells the allocation of a node.
pub fn peer(record: &Record) -> Peer {
    Peer {
        incarnation: record.incarnation,
        left: record.left,
        ranges: record.ranges.clone(),
        claims: record.claims.clone(),
    }
}
