//! Routing: decides which of the announced prefixes are routed to which node. Deterministic,
//! without I/O or a clock.
//!
//! The data plane has one table that says both where a packet goes and which node may send from an
//! address. This module decides the entries of the other nodes in that table. A member can announce
//! anything, so an announcement alone is worth nothing:
//!
//! 1. A node's own address follows from its ID. So does the first half of a quarter, which only the
//!    node with that ID ever allocates from. Both, and all prefixes inside them, are routed to that
//!    node regardless of what others announce.
//! 2. Blocks inside the second half of a quarter, and static addresses, belong to the node that
//!    announced them **first**, as far as this node has seen. They stay with that node while it
//!    announces them and is present, which means that it is reachable or was reachable less than
//!    [`GRACE`] ago. A later announcement of the same addresses, of a part of them, or of a larger
//!    prefix takes none of them over. If the first node is absent, the next present one gets the
//!    addresses until the first one is back.
//! 3. The whole second half of a quarter is not a route: announcing it says that the node lends it.
//!    The lender also announces the blocks of it that it uses itself
//!    ([`Ipam::ranges`](crate::ipam::Ipam::ranges)), and rule 2 applies to these.
//! 4. Addresses that this node itself has belong to it, in its own table.
//! 5. All other prefixes are rejected: those outside of the subnet, those that cover node
//!    addresses, and those larger than a half.
//! 6. No prefix is routed to a node that has left, or whose space was taken back. If its ID returns
//!    in a later incarnation or under another key, its announcements are the latest of all.
//!
//! Two claims to an address are a [`Conflict`]. It exists while both nodes are reachable and
//! announce the address. Both parties and all other nodes see it.
//!
//! The order of the announcements is a number for each prefix ([`Routing::standing`]). It is stored
//! with the node's record. If a restarted daemon believed the first node to connect, a member could
//! wait for the restart to take over addresses.
//!
//! Any node can claim addresses that no other node has announced yet. Proof of ownership, a grant
//! signed by the lender, will come between rules 1 and 2. It will then outrank any earlier
//! announcement without one. It will be a field of `Claim` before `rank`.
//!
//! Inputs: [`Routing::restore`], [`Routing::learn`], [`Routing::set_own`],
//! [`Routing::set_reachable`], [`Routing::set_reclaimed`]. [`Routing::update`] then decides.
//! Outputs: [`Routing::routes`], [`Routing::conflicts`], [`Routing::poll_timeout`].

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use crate::gossip::Record;
use crate::ipam::{Layout, quarters};
use overnode_types::{NodeId, VerifyingKey};

/// How long a node keeps the addresses that it announced first after it was last reachable. Its
/// sessions carry traffic for no longer (WireGuard's reject-after-time), and a daemon that restarts
/// or is upgraded comes back sooner.
pub const GRACE: Duration = Duration::from_secs(180);
/// Conflicts are reported after this time. While a block changes hands, the new user's record may
/// arrive before that of the old one.
pub const SETTLE: Duration = Duration::from_secs(3);
/// Maximum number of prefixes that are listed for one conflict.
pub const MAX_NAMED: usize = 8;
/// Maximum number of conflicts that are reported at a time, because one member can be many nodes.
pub const MAX_CONFLICTS: usize = 32;

/// Maximum number of earlier announcements that are remembered per node in addition to the current
/// ones.
const MAX_EARLIER: usize = 512;
/// Minimum time between two computations of the table, per prefix in it. Otherwise a member with
/// many changing announcements could keep the node from all other work.
const MIN_UPDATE_TIME: Duration = Duration::from_micros(2);

/// Decides which prefixes are routed to which node.
#[derive(Clone, Debug)]
pub struct Routing {
    own: NodeId,
    layout: Layout,
    own_space: Vec<IpNet>,
    nodes: BTreeMap<NodeId, Node>,
    gone: BTreeMap<NodeId, u64>,
    next_rank: u64,
    is_stale: bool,
    updated: Option<Instant>,
    table: Table,
}

/// Prefixes that two nodes claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The node that they are routed to.
    pub holder: NodeId,
    /// The other node that announces them.
    pub claimant: NodeId,
    /// The first prefixes, at most [`MAX_NAMED`].
    pub prefixes: Vec<IpNet>,
    /// Number of all prefixes.
    pub count: usize,
}

#[derive(Clone, Debug)]
struct Node {
    key: VerifyingKey,
    incarnation: u64,
    reachable: bool,
    /// When it was last reachable. `None` if it never was.
    seen: Option<Instant>,
    /// Announced prefixes inside its own half.
    own: Vec<IpNet>,
    /// The rank of each prefix: an earlier announcement has a lower one. A prefix that was
    /// announced in an earlier shape stays while all of it is still announced.
    standing: BTreeMap<IpNet, u64>,
    /// Announced prefixes that overlap the own half of another node.
    foreign: Vec<(IpNet, NodeId)>,
}

/// The precedence of a claim to a prefix: the least claim wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    absent: bool,
    rank: u64,
    node: NodeId,
    /// True if the node is reachable now.
    reached: bool,
}

#[derive(Clone, Debug, Default)]
struct Table {
    routes: BTreeMap<NodeId, Vec<IpNet>>,
    conflicts: BTreeMap<(NodeId, NodeId), (BTreeSet<IpNet>, usize, Instant)>,
    prefixes: u32,
}

impl Routing {
    /// Creates a state without any known nodes.
    pub fn new(layout: Layout, own: NodeId) -> Self {
        Self {
            own,
            layout,
            own_space: Vec::new(),
            nodes: BTreeMap::new(),
            gone: BTreeMap::new(),
            next_rank: 1,
            is_stale: true,
            updated: None,
            table: Table::default(),
        }
    }

    /// Restores what was known of a node before a restart: its record and its values of
    /// [`Self::standing`]. The node counts as reachable until now.
    pub fn restore(
        &mut self,
        record: &Record,
        standing: impl IntoIterator<Item = (IpNet, u64)>,
        now: Instant,
    ) {
        let mut node = Node::new(record);
        node.standing.extend(standing);
        node.seen = Some(now);
        let last = node.standing.values().copied().max().unwrap_or_default();
        self.next_rank = self.next_rank.max(last.saturating_add(1));
        self.nodes.insert(record.id, node);
        self.learn(record);
    }

    /// Updates the announcements of a node from its record.
    pub fn learn(&mut self, record: &Record) {
        self.is_stale = true;
        if record.left {
            self.nodes.remove(&record.id);
            return;
        }
        let was_gone =
            |node: &Node| self.gone.get(&record.id).is_some_and(|last| node.incarnation <= *last);
        let known = self.nodes.remove(&record.id);
        let known = known.filter(|node| {
            node.key == record.verifying_key
                && (!was_gone(node) || node.incarnation == record.incarnation)
        });
        let mut node = known.unwrap_or_else(|| Node::new(record));
        node.incarnation = record.incarnation;
        node.own.clear();
        node.foreign.clear();
        let mut announced = BTreeSet::new();
        for range in record.ranges.iter().map(IpNet::trunc) {
            match self.classify(record.id, range) {
                RangeKind::Own => node.own.push(range),
                RangeKind::Block => _ = announced.insert(range),
                RangeKind::OwnHalf(other) => node.foreign.push((range, other)),
                RangeKind::LendableHalf | RangeKind::Invalid => {}
            }
        }
        let is_static = |address: &IpAddr| self.layout.check_static(*address).is_ok();
        announced.extend(record.claims.iter().copied().filter(is_static).map(IpNet::from));
        if node.announce(&announced, self.next_rank) {
            self.next_rank = self.next_rank.saturating_add(1);
        }
        self.nodes.insert(record.id, node);
    }

    /// Sets the ranges and static addresses of this node.
    pub fn set_own(&mut self, ranges: &[IpNet], claims: &[IpAddr]) {
        let blocks = ranges
            .iter()
            .copied()
            .filter(|range| matches!(self.classify(self.own, *range), RangeKind::Block));
        let own: Vec<_> = blocks.chain(claims.iter().copied().map(IpNet::from)).collect();
        if self.own_space != own {
            self.own_space = own;
            self.is_stale = true;
        }
    }

    /// Sets the nodes that are reachable now.
    pub fn set_reachable<'a>(
        &mut self,
        reachable: impl IntoIterator<Item = &'a NodeId>,
        now: Instant,
    ) {
        let reachable: BTreeSet<_> = reachable.into_iter().collect();
        for (id, node) in &mut self.nodes {
            let is_reachable = reachable.contains(id);
            if node.reachable != is_reachable {
                node.reachable = is_reachable;
                node.seen = Some(now);
                self.is_stale = true;
            }
        }
    }

    /// Sets the nodes whose space was taken back, with their last incarnation.
    pub fn set_reclaimed(&mut self, gone: impl IntoIterator<Item = (NodeId, u64)>) {
        let gone: BTreeMap<_, _> = gone.into_iter().collect();
        if self.gone != gone {
            self.gone = gone;
            self.is_stale = true;
        }
    }

    /// Computes the table again if that is due. Returns true if it did.
    pub fn update(&mut self, now: Instant) -> bool {
        if !self.is_due(now) {
            return false;
        }
        self.is_stale = false;
        self.updated = Some(now);
        let mut before = std::mem::take(&mut self.table);
        self.table = self.decide(now);
        for (pair, (_, _, since)) in &mut self.table.conflicts {
            if let Some((_, _, earlier)) = before.conflicts.remove(pair) {
                *since = earlier;
            }
        }
        true
    }

    /// Returns when to call [`Self::update`] next, or when [`Self::conflicts`] may report more.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let updated = self.updated?;
        let old = self.is_stale.then(|| updated + MIN_UPDATE_TIME * self.table.prefixes);
        let ends = self.nodes.values().filter_map(Node::absent_from).filter(|at| *at > updated);
        let settled = self.table.conflicts.values().map(|(_, _, since)| *since + SETTLE);
        let settled = settled.filter(|at| *at > updated);
        old.into_iter().chain(ends).chain(settled).min()
    }

    /// Returns the prefixes that are routed to a node, its own address first. Empty if nothing is
    /// routed to it.
    pub fn routes(&self, id: NodeId) -> &[IpNet] {
        self.table.routes.get(&id).map_or(&[], Vec::as_slice)
    }

    /// Returns true if the space of a node was taken back and the node has not come back since.
    pub fn is_reclaimed(&self, id: NodeId) -> bool {
        self.nodes.get(&id).is_some_and(|node| self.was_taken_back(id, node))
    }

    /// Returns the conflicts that exist now and have lasted for [`SETTLE`].
    pub fn conflicts(&self, now: Instant) -> impl Iterator<Item = Conflict> {
        let lasting =
            self.table.conflicts.iter().filter(move |(_, (_, _, since))| *since + SETTLE <= now);
        lasting.map(|(&(holder, claimant), (prefixes, count, _))| Conflict {
            holder,
            claimant,
            prefixes: prefixes.iter().copied().collect(),
            count: *count,
        })
    }

    /// Returns the ranks that are stored with a node's record for [`Self::restore`].
    pub fn standing(&self, id: NodeId) -> impl Iterator<Item = (IpNet, u64)> {
        self.nodes
            .get(&id)
            .into_iter()
            .flat_map(|node| &node.standing)
            .map(|(prefix, rank)| (*prefix, *rank))
    }

    fn is_due(&self, now: Instant) -> bool {
        let Some(updated) = self.updated else { return true };
        self.poll_timeout().is_some_and(|at| at <= now)
            && (!self.is_stale || updated + MIN_UPDATE_TIME * self.table.prefixes <= now)
    }

    fn was_taken_back(&self, id: NodeId, node: &Node) -> bool {
        self.gone.get(&id).is_some_and(|last| node.incarnation <= *last)
    }

    /// Classifies an announced range by its position in the layout.
    fn classify(&self, announcer: NodeId, range: IpNet) -> RangeKind {
        if self.layout.own_part(announcer).is_some_and(|own| own.contains(&range)) {
            return RangeKind::Own;
        }
        let touches = |quarter: &NodeId| {
            let own = self.layout.own_part(*quarter);
            *quarter != announcer
                && own.is_some_and(|own| own.contains(&range) || range.contains(&own))
        };
        if let Some(other) = quarters().find(touches) {
            return RangeKind::OwnHalf(other);
        }
        match self.layout.quarter_of(range).and_then(|quarter| self.layout.lendable(quarter)) {
            Some(half) if half == range => RangeKind::LendableHalf,
            Some(_) => RangeKind::Block,
            None => RangeKind::Invalid,
        }
    }

    fn decide(&self, now: Instant) -> Table {
        let mut table = Table::default();
        let mut claims: Vec<(IpNet, Claim)> = Vec::new();
        let own = Claim { absent: false, rank: 0, node: self.own, reached: true };
        claims.extend(self.own_space.iter().map(|prefix| (*prefix, own)));
        for (&id, node) in self.nodes.iter().filter(|(id, node)| !self.was_taken_back(**id, node)) {
            let routes = table.routes.entry(id).or_default();
            routes.push(self.layout.node_address(id).into());
            routes.extend(&node.own);
            let (absent, reached) = (!node.is_present(now), node.reachable);
            let claim = |rank| Claim { absent, rank, node: id, reached };
            claims.extend(node.standing.iter().map(|(prefix, rank)| (*prefix, claim(*rank))));
            if reached {
                node.foreign.iter().for_each(|(prefix, of)| table.note(*of, id, *prefix, now));
            }
        }
        claims.sort_unstable();
        table.prefixes = u32::try_from(claims.len()).unwrap_or(u32::MAX);
        table.settle(&claims, self.own, now);
        table
    }
}

/// The relation of a range to the node that announces it.
enum RangeKind {
    /// Inside its own half.
    Own,
    /// Overlaps the own half of another node.
    OwnHalf(NodeId),
    /// The whole lendable half of a quarter.
    LendableHalf,
    /// A block inside a lendable half.
    Block,
    Invalid,
}

impl Node {
    fn new(record: &Record) -> Self {
        Self {
            key: record.verifying_key,
            incarnation: record.incarnation,
            reachable: false,
            seen: None,
            own: Vec::new(),
            standing: BTreeMap::new(),
            foreign: Vec::new(),
        }
    }

    fn is_present(&self, now: Instant) -> bool {
        self.reachable || self.absent_from().is_some_and(|at| now < at)
    }

    /// Returns the end of its grace period. `None` if it is reachable or never was.
    fn absent_from(&self) -> Option<Instant> {
        self.seen.filter(|_| !self.reachable).map(|seen| seen + GRACE)
    }

    /// Updates the announced prefixes. Those that are new get `rank`. Returns true if there are
    /// any.
    fn announce(&mut self, announced: &BTreeSet<IpNet>, rank: u64) -> bool {
        let mut standing: BTreeMap<IpNet, u64> = BTreeMap::new();
        for (prefix, rank) in std::mem::take(&mut self.standing) {
            if covering(prefix).any(|net| announced.contains(&net)) {
                let known = standing.entry(prefix).or_insert(rank);
                *known = rank.min(*known);
                continue;
            }
            // The node announces less than before. The rest keeps its rank.
            let inside = announced.range(prefix..).take_while(|net| prefix.contains(*net));
            for part in inside {
                let known = standing.entry(*part).or_insert(rank);
                *known = rank.min(*known);
            }
        }
        let mut is_new = false;
        for prefix in announced {
            if !standing.contains_key(prefix) {
                let earlier = covering(*prefix).filter_map(|net| standing.get(&net).copied()).min();
                is_new |= earlier.is_none();
                standing.insert(*prefix, earlier.unwrap_or(rank));
            }
        }
        // An earlier shape matters only where its rank is better than the current one.
        let best = |prefix: IpNet| {
            let present = covering(prefix).filter(|net| announced.contains(net));
            present.filter_map(|net| standing.get(&net).copied()).min()
        };
        let mut earlier: Vec<_> =
            standing.keys().copied().filter(|it| !announced.contains(it)).collect();
        earlier.retain(|prefix| best(*prefix).is_none_or(|best| standing[prefix] < best));
        earlier.truncate(MAX_EARLIER);
        let earlier: BTreeSet<_> = earlier.into_iter().collect();
        standing.retain(|prefix, _| announced.contains(prefix) || earlier.contains(prefix));
        self.standing = standing;
        is_new
    }
}

/// Returns a prefix and all prefixes that contain it.
fn covering(prefix: IpNet) -> impl Iterator<Item = IpNet> {
    std::iter::successors(Some(prefix), IpNet::supernet)
}

/// A prefix on the path to the current one. Has the claims to it, and the two best claims of
/// different nodes to it or to a prefix that contains it.
struct Level<'a> {
    net: IpNet,
    claims: &'a [(IpNet, Claim)],
    best: [Option<Claim>; 2],
}

impl Level<'_> {
    fn add(&mut self, claim: Claim) {
        let [first, second] = &mut self.best;
        match first {
            Some(known) if known.node == claim.node => *known = claim.min(*known),
            Some(known) if claim < *known => {
                *second = Some(*known);
                *known = claim;
            }
            Some(_) if second.is_none_or(|known| claim < known) => *second = Some(claim),
            Some(_) => {}
            None => *first = Some(claim),
        }
    }

    fn best_of_others(&self, node: NodeId) -> Option<Claim> {
        self.best.into_iter().flatten().find(|claim| claim.node != node)
    }
}

impl Table {
    /// Processes all claims in the order of their prefixes: a prefix comes before those that it
    /// contains.
    fn settle(&mut self, claims: &[(IpNet, Claim)], own: NodeId, now: Instant) {
        let mut stack: Vec<Level<'_>> = Vec::new();
        for group in claims.chunk_by(|(one, _), (other, _)| one == other) {
            let net = group[0].0;
            while stack.last().is_some_and(|level| !level.net.contains(&net)) {
                stack.pop();
            }
            let best = stack.last().map(|level| level.best).unwrap_or_default();
            let mut level = Level { net, claims: group, best };
            group.iter().for_each(|(_, claim)| level.add(*claim));
            for (_, claim) in group {
                if let Some(better) =
                    level.best_of_others(claim.node).filter(|better| better < claim)
                {
                    if better.reached && claim.reached {
                        self.note(better.node, claim.node, net, now);
                    }
                    continue;
                }
                if claim.node != own {
                    self.routes.entry(claim.node).or_default().push(net);
                }
                for (_, worse) in stack.iter().flat_map(|level| level.claims) {
                    if worse.node != claim.node && worse.reached && claim.reached {
                        self.note(claim.node, worse.node, net, now);
                    }
                }
            }
            stack.push(level);
        }
    }

    fn note(&mut self, holder: NodeId, claimant: NodeId, prefix: IpNet, now: Instant) {
        if self.conflicts.len() >= MAX_CONFLICTS
            && !self.conflicts.contains_key(&(holder, claimant))
        {
            return;
        }
        let (prefixes, count, _) =
            self.conflicts.entry((holder, claimant)).or_insert_with(|| (BTreeSet::new(), 0, now));
        *count += 1;
        if prefixes.len() < MAX_NAMED {
            prefixes.insert(prefix);
        }
    }
}
