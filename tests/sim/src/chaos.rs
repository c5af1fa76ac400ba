//! Failures and events that the simulation inflicts on the hosts.

use std::time::Duration;

use overnode_core::ipam::Fact;
use overnode_types::NodeId;
use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};

use crate::host::Disk;
use crate::world::{Event, World};

impl World {
    /// Does one random thing and schedules the next.
    pub(crate) fn chaos(&mut self) {
        match self.rng.random_range(0..100) {
            70.. if self.is_calm && self.rng.random_bool(0.8) => {}
            0..45 => self.some_containers(),
            45..60 => self.fewer_containers(),
            60..64 => self.claim_something(),
            64..72 => self.cut_something(),
            72..75 => self.isolate_something(),
            75..84 => self.crash_something(),
            84..92 => self.reset_something(),
            92..95 => self.kill_something(),
            _ => self.reclaim_something(),
        }
        self.check_routes();
        if self.liar.is_some() && self.rng.random_bool(0.5) {
            self.lie();
        }
        let delay = self.random(0.05, 2.0);
        self.after(delay, Event::Chaos);
    }

    fn pick(&mut self) -> Option<NodeId> {
        self.running().choose(&mut self.rng).copied()
    }

    fn some_containers(&mut self) {
        let Some(id) = self.pick() else { return };
        let most = if self.rng.random_bool(0.1) { 30 } else { 4 };
        for _ in 0..self.rng.random_range(1..=most) {
            self.ask_address(id);
        }
    }

    /// Requests an address for a new container.
    pub(crate) fn ask_address(&mut self, id: NodeId) {
        let now = self.now;
        self.counts.attaches += 1;
        let owner = format!("container {}", self.counts.attaches);
        let Some(node) = self.node(id) else { return };
        if node.leaving {
            return;
        }
        let own_free = id.has_initial_quarter() && node.ipam.check_ready().is_ok();
        let request = node.ipam.allocate(&owner, now);
        node.waiting.insert(request, owner);
        self.pump(id);
        // IDs 1 to 4 allocate without contact to other nodes. Others allocate from the blocks that
        // they hold.
        let Some(node) = self.node(id) else { return };
        if own_free && node.waiting.contains_key(&request) {
            self.violate(format!("{id} has free addresses but lets a container wait"));
        }
    }

    fn fewer_containers(&mut self) {
        let Some(id) = self.pick() else { return };
        let some = self.rng.random_range(1..20);
        self.detach(id, some);
    }

    /// Removes up to `most` containers of a node.
    pub(crate) fn detach(&mut self, id: NodeId, most: usize) {
        let now = self.now;
        let Some(disk) = self.hosts.get_mut(&id).and_then(|host| host.disk.as_mut()) else {
            return;
        };
        let mut chosen: Vec<_> = disk.attachments.keys().copied().collect();
        chosen.shuffle(&mut self.rng);
        for address in chosen.into_iter().take(most) {
            let Some(host) = self.hosts.get_mut(&id) else { return };
            let (Some(disk), Some(node)) = (&mut host.disk, &mut host.node) else { return };
            disk.attachments.remove(&address);
            // Another node can have the address only after another violation, which was noticed
            // then.
            if self.used.get(&address) == Some(&id) {
                self.used.remove(&address);
            }
            node.ipam.release(address, now);
            self.pump(id);
        }
    }

    fn claim_something(&mut self) {
        let Some(id) = self.pick() else { return };
        let address =
            format!("10.200.0.{}", self.rng.random_range(1..6)).parse().expect("an address");
        let now = self.now;
        let Some(node) = self.node(id).filter(|node| !node.leaving) else { return };
        let request = node.ipam.claim(address, "static", now);
        node.waiting.insert(request, "static".into());
        self.pump(id);
    }

    fn cut_something(&mut self) {
        let mut ids = self.ids();
        ids.shuffle(&mut self.rng);
        let time = self.random(0.5, 40.0);
        let directions = match self.rng.random_range(0..4) {
            0 => vec![(ids[0], ids[1])],
            1 => vec![(ids[0], ids[1]), (ids[1], ids[0])],
            _ => {
                let border = self.rng.random_range(1..ids.len());
                let (left, right) = ids.split_at(border);
                let pairs =
                    left.iter().flat_map(|a| right.iter().flat_map(|b| [(*a, *b), (*b, *a)]));
                pairs.collect()
            }
        };
        self.counts.partitions += 1;
        self.log(|| format!("cut {directions:?} for {time:?}"));
        self.block(directions, time);
    }

    /// Cuts a host off from all others for a long time. Its space may be reclaimed before it is
    /// back.
    fn isolate_something(&mut self) {
        // Prefer nodes with a quarter, so that their ledgers move to other nodes.
        let most = if self.rng.random_bool(0.7) { 4 } else { u16::MAX };
        let candidates: Vec<_> = self.running().into_iter().filter(|id| id.get() <= most).collect();
        let Some(&id) = candidates.choose(&mut self.rng) else { return };
        if self.isolated.contains_key(&id) {
            return;
        }
        let time = self.random(10.0, 100.0);
        self.isolate(id, time);
        if self.rng.random_bool(0.7) {
            for _ in 0..3 {
                let delay = self.random(0.0, 60.0);
                self.after(delay, Event::Reclaim(id));
            }
        }
    }

    fn isolate(&mut self, id: NodeId, time: Duration) {
        let others: Vec<_> = self.ids().into_iter().filter(|other| *other != id).collect();
        let directions = others.iter().flat_map(|other| [(id, *other), (*other, id)]).collect();
        self.counts.partitions += 1;
        self.log(|| format!("isolate {id} for {time:?}"));
        let fault = self.block(directions, time);
        self.isolated.insert(id, fault);
    }

    /// Makes some node reclaim the space of a node that is dead, or that is cut off and seems dead.
    pub(crate) fn reclaim_at_some_node(&mut self, of: NodeId) {
        let seems_dead = self.hosts[&of].is_dead || self.may_be_reclaimed_alive(of);
        let lenders: Vec<_> =
            self.running().into_iter().filter(|id| id.has_initial_quarter()).collect();
        if let Some(&id) = lenders.choose(&mut self.rng)
            && id != of
            && seems_dead
        {
            self.reclaim(id, of);
        }
    }

    fn may_be_reclaimed_alive(&self, id: NodeId) -> bool {
        // A liar that agreed to the reclaim can still vouch for the node.
        self.liar.is_none() && self.isolated.contains_key(&id) && self.has_nothing_to_lose(id)
    }

    /// Returns whether a live node can be reclaimed without its addresses in use being given to
    /// others (docs/internals/addresses.md). A borrower keeps using its blocks, and a lender keeps
    /// using what it took from its own lendable half. Two reclaimed nodes that do not know about it
    /// vouch for each other, and lend.
    pub(crate) fn has_nothing_to_lose(&self, id: NodeId) -> bool {
        let Some(disk) = &self.hosts[&id].disk else { return false };
        !self.is_rich(disk) && !self.is_only_witness(id) && !self.is_another_reclaimed_alive(id)
    }

    /// Returns whether a node holds any lent blocks.
    fn is_rich(&self, disk: &Disk) -> bool {
        disk.facts.values().any(|fact| matches!(fact, Fact::Held { .. }))
    }

    fn crash_something(&mut self) {
        let Some(id) = self.pick() else { return };
        if self.rng.random_bool(0.7) {
            // Crash it in the middle of its next actions.
            let count = self.rng.random_range(0..12);
            if let Some(node) = self.node(id) {
                node.crash_after.get_or_insert(count);
            }
        } else {
            self.crash(id);
            let delay = self.random(0.1, 30.0);
            self.after(delay, Event::Restart(id));
        }
    }

    fn reset_something(&mut self) {
        let Some(id) = self.pick() else { return };
        if self.node(id).is_some_and(|node| node.leaving) {
            return;
        }
        self.log(|| format!("reset {id}"));
        // A lender must not lose its disk here, because it must not forget its loans. All others
        // may.
        let lends = self.hosts[&id].disk.as_ref().is_some_and(|disk| {
            disk.facts.values().any(|fact| matches!(fact, Fact::Ledger { .. }))
        });
        if !lends && self.rng.random_bool(0.3) {
            self.counts.resets += 1;
            self.wipe(id);
            let delay = self.random(0.1, 20.0);
            self.after(delay, Event::Launch(id));
            return;
        }
        self.detach(id, usize::MAX);
        let now = self.now;
        let Some(node) = self.node(id) else { return };
        node.leaving = true;
        node.ipam.leave(now);
        self.pump(id);
    }

    /// Kills a host for good.
    fn kill_something(&mut self) {
        let dead = self.hosts.values().filter(|host| host.is_dead).count();
        let Some(id) = self.pick() else { return };
        if dead < 2 && self.hosts.len() > 5 && !self.is_only_witness(id) {
            self.log(|| format!("kill {id}"));
            self.wipe(id);
            if let Some(host) = self.hosts.get_mut(&id) {
                host.is_dead = true;
            }
        }
    }

    /// Returns whether a node lends to an incarnation of another node that some third node has not
    /// heard of. If the lender were gone for good, the other nodes could reclaim its space without
    /// knowing that borrower. The design cannot prevent that (docs/internals/addresses.md).
    fn is_only_witness(&self, id: NodeId) -> bool {
        let Some(disk) = &self.hosts[&id].disk else { return false };
        let lives = disk.facts.values().filter_map(|fact| match fact {
            Fact::Loan { borrower, loan, .. } if !loan.blocks.is_empty() => {
                Some((*borrower, loan.epoch))
            }
            _ => None,
        });
        let is_known = |disk: &Disk, (borrower, epoch)| {
            disk.peers
                .get(&borrower)
                .is_some_and(|record| !record.left && record.incarnation >= epoch)
        };
        lives.filter(|(borrower, _)| *borrower != id).any(|life| {
            let others = self
                .hosts
                .iter()
                .filter(|(other, host)| **other != id && **other != life.0 && !host.is_dead);
            others.filter_map(|(_, host)| host.disk.as_ref()).any(|disk| !is_known(disk, life))
        })
    }

    fn reclaim_something(&mut self) {
        let dead: Vec<_> =
            self.hosts.iter().filter(|(_, host)| host.is_dead).map(|(id, _)| *id).collect();
        let Some(&of) = dead.choose(&mut self.rng) else { return };
        for _ in 0..self.rng.random_range(1..3) {
            self.reclaim_at_some_node(of);
        }
        if self.rng.random_bool(0.3) {
            let delay = self.random(0.0, 30.0);
            self.after(delay, Event::Launch(of));
        }
    }

    pub(crate) fn reclaim(&mut self, id: NodeId, of: NodeId) {
        let now = self.now;
        let Some(node) = self.node(id).filter(|node| !node.leaving) else { return };
        let outcome = node.ipam.reclaim(of, now);
        self.counts.reclaims += 1;
        self.log(|| format!("{id} is asked to reclaim {of}: {outcome:?}"));
        self.pump(id);
    }

    /// Ends all failures and starts all hosts that are not dead.
    pub(crate) fn heal(&mut self) {
        self.log(|| "heal".into());
        self.blocked.clear();
        self.isolated.clear();
        self.is_rough = false;
        for id in self.ids() {
            let host = &self.hosts[&id];
            if host.is_dead {
                continue;
            }
            if host.disk.is_none() {
                self.launch(id);
            } else {
                self.restart(id);
            }
            if let Some(node) = self.node(id) {
                node.crash_after = None;
            }
        }
        self.redial();
    }

    fn redial(&mut self) {
        for a in self.ids() {
            for b in self.ids().into_iter().filter(|b| a < *b) {
                let delay = self.random(0.01, 2.0);
                self.after(delay, Event::Dial(a, b));
            }
        }
    }

    /// Reclaims dead nodes, as an administrator does with nodes that stay unreachable.
    pub(crate) fn reclaim_dead_nodes(&mut self) {
        let dead: Vec<_> =
            self.hosts.iter().filter(|(_, host)| host.is_dead).map(|(id, _)| *id).collect();
        for of in dead {
            let reclaimed = |world: &Self, id: &NodeId| {
                let node = world.hosts[id].node.as_ref();
                node.is_none_or(|node| {
                    node.gossip.record(of).is_none_or(|record| {
                        let up_to = node
                            .ipam
                            .reclaimed()
                            .find(|(id, ..)| *id == of)
                            .map(|(_, up_to, _)| up_to);
                        record.left || up_to.is_some_and(|up_to| record.incarnation <= up_to)
                    })
                })
            };
            let running = self.running();
            let lends = |id: &NodeId| {
                self.hosts[id].node.as_ref().is_some_and(|node| node.ipam.lends(of).is_some())
            };
            let is_orphaned = of.has_initial_quarter() && !running.iter().any(lends);
            let knows = |id: &NodeId| {
                self.hosts[id].node.as_ref().is_some_and(|node| node.gossip.record(of).is_some())
            };
            let mut lenders = running.iter().filter(|id| id.has_initial_quarter());
            let ignorant = lenders.find(|id| !reclaimed(self, id) || (is_orphaned && knows(id)));
            if let Some(id) = ignorant.copied() {
                self.reclaim(id, of);
            }
        }
    }

    /// Cuts off a lender in an otherwise healthy cluster until it seems dead. Little else happens
    /// while its space is reclaimed, others borrow from it, and it returns unchanged.
    fn reclaim_one_alive(&mut self) {
        self.heal();
        self.reclaim_dead_nodes();
        let time = self.random(5.0, 20.0);
        self.run(time);
        let candidates: Vec<_> =
            self.running().into_iter().filter(|id| id.has_initial_quarter()).collect();
        let Some(&id) = candidates.choose(&mut self.rng) else { return };
        self.is_calm = true;
        let time = self.random(40.0, 90.0);
        self.isolate(id, time);
        self.after(Duration::ZERO, Event::Chaos);
        let end = self.now + time + self.random(5.0, 40.0);
        while self.violations.is_empty() && self.now < end {
            self.run(Duration::from_secs(5));
            self.reclaim_dead_nodes();
            if self.rng.random_bool(0.5) {
                self.reclaim_at_some_node(id);
            }
            if self.rng.random_bool(0.5) {
                for _ in 0..self.rng.random_range(1..10) {
                    self.ask_address(id);
                }
            }
        }
        self.is_calm = false;
    }

    /// Runs random events for a while, then heals everything. Returns an error if something went
    /// wrong.
    pub(crate) fn live(&mut self) -> Result<(), String> {
        for id in self.ids() {
            let delay = if self.rng.random_bool(0.8) { 0.0 } else { 20.0 };
            let delay = self.random(0.0, delay + 3.0);
            self.after(delay, Event::Launch(id));
        }
        let delay = self.random(1.0, 10.0);
        self.after(delay, Event::Chaos);
        let time = self.random(30.0, 150.0);
        self.run(time);
        self.drop_chaos();
        if self.violations.is_empty() && self.rng.random_bool(0.4) {
            self.reclaim_one_alive();
            self.drop_chaos();
        }
        for _ in 0..120 {
            if !self.violations.is_empty() {
                break;
            }
            self.heal();
            self.reclaim_dead_nodes();
            self.run(Duration::from_secs(5));
            self.check_routes();
            if self.converged().is_ok() {
                break;
            }
        }
        match self.violations.first() {
            Some(violation) => Err(violation.clone()),
            None => self.converged(),
        }
    }
}
