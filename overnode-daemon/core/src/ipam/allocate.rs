//! Allocation of addresses to containers from the space that this node holds.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Instant;

use ipnet::IpNet;

use super::layout::quarters;
use super::space::{next_free, overlap};
use super::{Action, Fact, Ipam, IpamError, Key, Layout, Peer, Problem, RequestId};
use crate::gossip::MAX_RANGES;
use overnode_types::NodeId;

/// The space that this node holds, and the addresses that it has allocated.
#[derive(Clone, Debug)]
pub(super) struct Allocation {
    own: Option<IpNet>,
    own_used: usize,
    allocated: BTreeMap<IpAddr, String>,
    pub(super) blocks: BTreeMap<IpNet, Block>,
    pub(super) waiting: BTreeMap<RequestId, PendingRequest>,
    requests: u64,
    /// The address that was allocated last.
    cursor: Option<IpAddr>,
}

/// A borrowed block, or a block of a quarter that this node lends and uses itself.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) used: usize,
    pub(super) lost: bool,
    pub(super) idle_since: Instant,
}

#[derive(Clone, Debug)]
pub(super) struct PendingRequest {
    owner: String,
    pub(super) deadline: Instant,
}

impl Allocation {
    pub(super) fn new(own: Option<IpNet>) -> Self {
        Self {
            own,
            own_used: 0,
            allocated: BTreeMap::new(),
            blocks: BTreeMap::new(),
            waiting: BTreeMap::new(),
            requests: 0,
            cursor: None,
        }
    }

    pub(super) fn add_block(&mut self, block: IpNet, lost: bool, now: Instant) {
        let used = self.allocated.keys().filter(|address| block.contains(*address)).count();
        self.blocks.insert(block, Block { used, lost, idle_since: now });
    }

    pub(super) fn insert(&mut self, address: IpAddr, owner: String) {
        if self.allocated.insert(address, owner).is_some() {
            return;
        }
        if self.own.is_some_and(|own| own.contains(&address)) {
            self.own_used += 1;
        } else if let Some(block) = self.block_mut(address) {
            block.used += 1;
        }
    }

    fn remove(&mut self, address: IpAddr, now: Instant) -> Option<String> {
        let owner = self.allocated.remove(&address)?;
        if self.own.is_some_and(|own| own.contains(&address)) {
            self.own_used -= 1;
        } else if let Some(block) = self.block_mut(address) {
            block.used -= 1;
            block.idle_since = now;
        }
        Some(owner)
    }

    /// Sets the cursor to the highest address that is allocated from the own half.
    pub(super) fn resume(&mut self) {
        let own = self.own;
        self.cursor =
            self.allocated.keys().rev().copied().find(|it| own.is_some_and(|own| own.contains(it)));
    }

    fn block_mut(&mut self, address: IpAddr) -> Option<&mut Block> {
        self.blocks.iter_mut().find(|(block, _)| block.contains(&address)).map(|(_, block)| block)
    }

    /// Returns the number of addresses in all space that can be allocated from, used ones included.
    pub(super) fn capacity(&self, layout: &Layout) -> u128 {
        let blocks = self.blocks.iter().filter(|(_, block)| !block.lost).map(|(net, _)| *net);
        self.own.into_iter().chain(blocks).map(|net| layout.usable_in(net)).sum()
    }

    pub(super) fn used(&self) -> usize {
        self.own_used
            + self
                .blocks
                .values()
                .filter(|block| !block.lost)
                .map(|block| block.used)
                .sum::<usize>()
    }

    /// Returns the next free address of the own half, or else of the fullest block that has one.
    fn pick(&self, layout: &Layout) -> Option<IpAddr> {
        let has_room = |net: IpNet, used: usize| (used as u128) < layout.usable_in(net);
        let own = self.own.filter(|own| has_room(*own, self.own_used));
        let blocks =
            self.blocks.iter().filter(|(net, block)| !block.lost && has_room(**net, block.used));
        let fullest = || blocks.rev().max_by_key(|(_, block)| block.used).map(|(net, _)| *net);
        let net = own.or_else(fullest)?;
        next_free(net, self.cursor, &self.allocated, |address| layout.is_usable(address))
    }

    /// Returns the blocks that are held of one quarter.
    pub(super) fn blocks_in(&self, half: Option<IpNet>) -> impl Iterator<Item = (IpNet, &Block)> {
        let in_half = move |net: &IpNet| half.is_some_and(|half| half.contains(net));
        self.blocks.iter().filter(move |(net, _)| in_half(net)).map(|(net, block)| (*net, block))
    }
}

impl Ipam {
    /// Requests an address for `owner`. The answer is [`Action::Granted`], at once if this node has
    /// a free address, or [`Action::Failed`].
    pub fn allocate(&mut self, owner: &str, now: Instant) -> RequestId {
        let request = self.next_request_id();
        let waiting =
            PendingRequest { owner: owner.to_owned(), deadline: now + self.timing.request };
        self.allocation.waiting.insert(request, waiting);
        self.finish(now);
        request
    }

    pub(super) fn next_request_id(&mut self) -> RequestId {
        self.allocation.requests += 1;
        RequestId(self.allocation.requests)
    }

    /// Cancels a request. Returns false if it was already answered.
    pub fn cancel(&mut self, request: RequestId) -> bool {
        self.allocation.waiting.remove(&request).is_some() || self.cancel_claim(request)
    }

    /// Releases an address and returns its owner.
    pub fn release(&mut self, address: IpAddr, now: Instant) -> Option<String> {
        let owner = self.allocation.remove(address, now);
        self.forget_static(address);
        self.finish(now);
        owner
    }

    /// Sets the cursor to `last`, the address that was allocated last before the restart. Recently
    /// released addresses are then not reused at once.
    pub fn resume_after(&mut self, last: IpAddr) {
        if self.allocation.own.is_some_and(|own| own.contains(&last)) {
            self.allocation.cursor = Some(last);
        }
    }

    /// Returns all allocated addresses with their owners.
    pub fn allocated(&self) -> &BTreeMap<IpAddr, String> {
        &self.allocation.allocated
    }

    /// Returns the address space that this node announces: its own half, the halves that it lends,
    /// and the blocks that it uses itself, whether borrowed or from a quarter that it lends.
    /// Announcing a whole half only says that the node lends it: only blocks are routed to a node.
    pub fn ranges(&self) -> Vec<IpNet> {
        let mut ranges: Vec<IpNet> = self.allocation.own.into_iter().collect();
        let lent = self.lent_halves();
        ranges.extend(&lent);
        let held = self.held().collect::<Vec<_>>();
        let mut blocks: Vec<IpNet> = IpNet::aggregate(&held)
            .into_iter()
            .flat_map(|block| if self.is_half(block) { halves(block) } else { vec![block] })
            .collect();
        if ranges.len() + blocks.len() > MAX_RANGES {
            // If not all fit, unused blocks are left out first.
            blocks.sort_by_key(|block| self.addresses_in(*block).next().is_none());
        }
        ranges.extend(blocks);
        ranges.truncate(MAX_RANGES);
        ranges
    }

    fn is_half(&self, block: IpNet) -> bool {
        quarters().any(|quarter| self.layout.lendable(quarter) == Some(block))
    }

    /// Returns the blocks that this node has borrowed, or uses of a quarter that it lends.
    pub fn held(&self) -> impl Iterator<Item = IpNet> {
        self.allocation.blocks.iter().filter(|(_, block)| !block.lost).map(|(net, _)| *net)
    }

    /// Returns the blocks that other nodes have now and in which addresses are in use here.
    pub fn lost(&self) -> impl Iterator<Item = IpNet> {
        self.allocation.blocks.iter().filter(|(_, block)| block.lost).map(|(net, _)| *net)
    }

    /// Returns the number of addresses that this node can allocate without borrowing, used ones
    /// included.
    pub fn capacity(&self) -> u128 {
        self.allocation.capacity(&self.layout) + self.lendable_free()
    }

    /// Returns the number of addresses that this node has allocated from the space that it holds.
    pub fn active(&self) -> usize {
        self.allocation.used()
    }

    /// Returns the number of requests that are not answered yet.
    pub fn waiting(&self) -> usize {
        self.allocation.waiting.len() + self.pending_claims()
    }

    /// Checks whether [`Self::allocate`] can grant an address now.
    ///
    /// # Errors
    /// The error that the request would fail with if nothing changes.
    pub fn check_ready(&self) -> Result<(), IpamError> {
        if self.leaving.is_some() {
            return Err(IpamError::Leaving { id: self.id });
        }
        if self.capacity() > self.active() as u128 { Ok(()) } else { Err(self.no_lender()) }
    }

    /// Grants addresses to waiting requests as long as there are free ones.
    pub(super) fn serve(&mut self) {
        if self.leaving.is_some() {
            for request in std::mem::take(&mut self.allocation.waiting).into_keys() {
                self.effects
                    .push(Action::Failed { request, error: IpamError::Leaving { id: self.id } });
            }
        }
        while !self.allocation.waiting.is_empty()
            && let Some(address) = self.allocation.pick(&self.layout)
            && let Some((request, waiting)) = self.allocation.waiting.pop_first()
        {
            self.allocation.insert(address, waiting.owner);
            self.allocation.cursor = Some(address);
            self.effects.push(Action::Granted { request, address });
        }
    }

    pub(super) fn fail_overdue(&mut self, now: Instant) {
        let overdue = |waiting: &PendingRequest| waiting.deadline <= now;
        let requests: Vec<_> = self
            .allocation
            .waiting
            .iter()
            .filter(|(_, waiting)| overdue(waiting))
            .map(|(id, _)| *id)
            .collect();
        for request in requests {
            self.allocation.waiting.remove(&request);
            let error = self.no_lender();
            self.effects.push(Action::Failed { request, error });
        }
    }

    pub(super) fn hold(&mut self, block: IpNet, now: Instant) {
        self.allocation.add_block(block, false, now);
        self.put(Fact::Held { block, lost: false });
    }

    pub(super) fn unhold(&mut self, block: IpNet) {
        self.allocation.blocks.remove(&block);
        self.forget(Key::Held(block));
    }

    /// Marks a block as lost to another node. Addresses in use stay allocated, and no more are
    /// allocated.
    pub(super) fn lose(&mut self, block: IpNet, lender: NodeId) {
        let Some(held) = self.allocation.blocks.get_mut(&block) else { return };
        if held.used == 0 {
            self.unhold(block);
        } else if !std::mem::replace(&mut held.lost, true) {
            self.put(Fact::Held { block, lost: true });
            self.report(Problem::Lost { block, lender });
        }
    }

    /// Reports what [`Self::shared_blocks`] finds in the ranges that a node newly announces.
    pub(super) fn report_ranges(&mut self, node: NodeId, peer: &Peer) {
        let known = self.peers.get(&node).map(|known| known.ranges.as_slice()).unwrap_or_default();
        let new = peer.ranges.iter().filter(|range| !known.contains(range));
        let clashes: Vec<_> = new.flat_map(|range| self.shared_with(node, *range)).collect();
        self.effects.extend(clashes.into_iter().map(Action::Report));
    }

    /// Returns a clash for each address in use here that is in a block which this node holds and
    /// another node announces.
    pub(super) fn shared_blocks(&self) -> impl Iterator<Item = Problem> {
        let others = self.peers.iter().filter(|(id, _)| self.counts(**id));
        let ranges = others.flat_map(|(id, peer)| peer.ranges.iter().map(|range| (*id, *range)));
        ranges.flat_map(|(node, range)| self.shared_with(node, range))
    }

    fn shared_with(&self, node: NodeId, range: IpNet) -> Vec<Problem> {
        let mut shared =
            self.allocation.blocks.keys().filter(|block| overlap(**block, range)).peekable();
        if shared.peek().is_none() || !self.is_block(range) {
            return Vec::new();
        }
        let addresses = shared.flat_map(|block| self.addresses_in(*block));
        addresses
            .filter(|it| range.contains(it))
            .map(|address| Problem::Clash { address, node })
            .collect()
    }

    fn is_block(&self, range: IpNet) -> bool {
        let half = self.layout.quarter_of(range).and_then(|quarter| self.layout.lendable(quarter));
        half.is_some_and(|half| half != range)
    }

    pub(super) fn addresses_in(&self, block: IpNet) -> impl Iterator<Item = IpAddr> {
        self.allocation
            .allocated
            .range(block.network()..=block.broadcast())
            .map(|(address, _)| *address)
    }
}

fn halves(net: IpNet) -> Vec<IpNet> {
    net.subnets(net.prefix_len() + 1).into_iter().flatten().collect()
}
