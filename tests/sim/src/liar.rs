//! A lying member: it knows everything, and sends and announces what no honest node would.
//!
//! Its ID is 5 or greater. Nodes 1 to 4 are trusted with what they lend
//! (docs/internals/addresses.md).

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use overnode_core::ipam::{
    Fact, Key, LenderRole, Loan, Message, Objection, Round, Title, quarters,
};
use overnode_types::NodeId;
use rand::Rng;
use rand::seq::IndexedRandom;

use crate::world::World;

/// Maximum number of foreign prefixes that it announces at a time. With more, no node could lend
/// anything.
const MOST_FORGED: usize = 4;

impl World {
    pub(crate) fn is_liar(&self, id: NodeId) -> bool {
        self.liar == Some(id)
    }

    /// Tells one lie.
    pub(crate) fn lie(&mut self) {
        let Some(liar) = self.liar.filter(|liar| self.hosts[liar].node.is_some()) else { return };
        if self.rng.random_bool(0.2) {
            self.forged = self.some_ranges();
            self.log(|| format!("{liar} announces {:?}", self.forged));
            return self.pump(liar);
        }
        let honest: Vec<_> = self.running().into_iter().filter(|id| *id != liar).collect();
        let Some(&to) = honest.choose(&mut self.rng) else { return };
        let message = self.some_lie(liar);
        self.counts.lies += 1;
        self.log(|| format!("{liar} lies to {to}: {message:?}"));
        self.send_routed(liar, to, message.encode());
    }

    /// Returns the liar's answer to a question, or `None` if it tells the truth.
    pub(crate) fn false_answer(&mut self, question: &Message) -> Option<Message> {
        let liar = self.liar?;
        if !self.is_rough || self.rng.random_bool(0.5) {
            return None;
        }
        let answer = match question {
            Message::Ask { round, .. } => Message::Answer {
                round: *round,
                epoch: self.some_number(liar),
                title: self.some_title(liar),
                part: if self.rng.random_bool(0.5) { LenderRole::Lends } else { LenderRole::None },
                holds: self.some_blocks(None),
                rivals: Vec::new(),
            },
            Message::Reclaim { of, round, .. } if self.rng.random_bool(0.8) => {
                Message::ReclaimAck {
                    of: *of,
                    round: *round,
                    epoch: self.some_number(liar),
                    titles: std::array::from_fn(|_| self.some_title(liar)),
                    lends: std::array::from_fn(|_| self.rng.random_bool(0.3)),
                    holds: self.some_blocks(None),
                    rivals: Vec::new(),
                }
            }
            Message::Reclaim { of, round, .. } => {
                Message::ReclaimRefused { of: *of, round: *round, why: Objection::Alive }
            }
            Message::Hold { quarter, serial, round, .. } => {
                Message::Vouch { quarter: *quarter, serial: *serial, round: *round, heard: true }
            }
            Message::Request { quarter, serial, round, .. } => Message::Grant {
                quarter: *quarter,
                serial: *serial,
                round: *round,
                blocks: self.some_blocks(Some(*quarter)),
                exhausted: false,
            },
            _ => return None,
        };
        self.counts.lies += 1;
        Some(answer)
    }

    fn some_lie(&mut self, liar: NodeId) -> Message {
        let quarter = self.some_quarter();
        let (serial, number) = (self.some_serial(quarter), self.some_number(liar));
        let round =
            Round { incarnation: self.some_number(liar), count: self.rng.random_range(0..1 << 40) };
        let of = *self.ids().choose(&mut self.rng).expect("there are nodes");
        match self.rng.random_range(0..13) {
            0 | 1 => Message::Reclaimed {
                of,
                incarnation: self.some_number(of),
                by: if self.rng.random_bool(0.5) { liar } else { self.some_quarter() },
                titles: std::array::from_fn(|_| self.some_title(liar)),
            },
            2 | 3 => Message::Title { quarter, title: self.some_title(liar) },
            4 => Message::Query { quarter, serial },
            5 => {
                let blocks = self.some_blocks(Some(quarter));
                Message::Grant { quarter, serial, round, blocks, exhausted: false }
            }
            6 => {
                Message::TransferAck { quarter, serial, part: 0, taken: self.rng.random_bool(0.5) }
            }
            7 => {
                let loan = Loan { epoch: number, blocks: self.some_blocks(Some(quarter)) };
                Message::Transfer {
                    quarter,
                    serial,
                    epoch: number,
                    part: 0,
                    parts: 1,
                    loans: vec![(liar, loan)],
                }
            }
            8 | 9 => Message::Request {
                quarter,
                serial,
                epoch: number,
                round,
                need: self.rng.random_range(0..4),
                want: self.rng.random_range(0..8),
                holds: self.some_blocks(Some(quarter)),
            },
            10 => Message::Reclaim { of, incarnation: self.some_number(of), round },
            11 => Message::ReclaimOver { of, round },
            _ => Message::Hold { quarter, serial, epoch: number, round, sure: true },
        }
    }

    fn some_quarter(&mut self) -> NodeId {
        *quarters().collect::<Vec<_>>().choose(&mut self.rng).expect("there are four")
    }

    /// Returns an incarnation, one slightly greater, or a huge number.
    fn some_number(&mut self, of: NodeId) -> u64 {
        let true_one = self.hosts[&of].disk.as_ref().map_or(0, |disk| disk.incarnation);
        match self.rng.random_range(0..6) {
            0 => 1 << 62,
            1 => u64::MAX,
            2 => true_one + self.rng.random_range(1..1000),
            _ => true_one,
        }
    }

    fn some_serial(&mut self, quarter: NodeId) -> u64 {
        let disks = self.hosts.values().filter_map(|host| host.disk.as_ref());
        let ledgers = disks.filter_map(|disk| match disk.facts.get(&Key::Ledger(quarter)) {
            Some(Fact::Ledger { serial, .. }) => Some(*serial),
            _ => None,
        });
        let true_one = ledgers.max().unwrap_or(0);
        match self.rng.random_range(0..6) {
            0 => 1 << 62,
            1 | 2 => true_one + self.rng.random_range(1..5),
            _ => true_one,
        }
    }

    fn some_title(&mut self, liar: NodeId) -> Title {
        let quarter = self.some_quarter();
        let holder = if self.rng.random_bool(0.6) { liar } else { self.some_quarter() };
        Title { serial: self.some_serial(quarter), holder }
    }

    /// Returns blocks that other nodes hold, or a block that may be free.
    fn some_blocks(&mut self, quarter: Option<NodeId>) -> Vec<IpNet> {
        let quarter = quarter.unwrap_or(NodeId::new(1).expect("a valid ID"));
        let Some(half) = self.layout.lendable(quarter) else { return Vec::new() };
        let disks = self.hosts.values().filter_map(|host| host.disk.as_ref());
        let held = disks.flat_map(|disk| disk.facts.values()).filter_map(|fact| match fact {
            Fact::Held { block, .. } if half.contains(block) => Some(*block),
            _ => None,
        });
        let held: Vec<_> = held.collect();
        let mut blocks: Vec<_> = held.choose_multiple(&mut self.rng, 2).copied().collect();
        if self.rng.random_bool(0.3) {
            blocks = half
                .subnets((half.prefix_len() + 2).min(32))
                .into_iter()
                .flatten()
                .take(1)
                .collect();
        }
        let mut blocks = IpNet::aggregate(&blocks);
        blocks.sort_unstable();
        blocks
    }

    /// Returns foreign prefixes: addresses in use, halves of the quarters, and lent or free blocks.
    fn some_ranges(&mut self) -> Vec<IpNet> {
        let used: Vec<IpNet> = self.used.keys().map(|address| IpNet::from(*address)).collect();
        let mut ranges: Vec<_> = used.choose_multiple(&mut self.rng, 2).copied().collect();
        let quarter = self.some_quarter();
        if self.rng.random_bool(0.3) {
            ranges.extend(self.layout.own_part(quarter));
        }
        if self.rng.random_bool(0.2) {
            ranges.extend(self.layout.lendable(quarter));
        }
        ranges.extend(self.some_blocks(Some(quarter)));
        ranges.truncate(MOST_FORGED);
        ranges
    }
}

/// Maximum time that news takes between nodes that reach each other.
const NEWS: Duration = Duration::from_secs(5);

impl World {
    /// Forgets the routes to a node that gave up a block, or everything if `block` is `None`. The
    /// node no longer announces them, so the liar may announce them first before the node gets them
    /// again. Stopped nodes still have the earlier route on their disks. That route ends as well,
    /// because after the restart they hear both announcements at once.
    pub(crate) fn end_routes(&mut self, owner: NodeId, block: Option<IpNet>) {
        for host in self.hosts.values_mut() {
            let is_in = |address: &IpAddr| block.is_none_or(|block| block.contains(address));
            host.routed.retain(|address, holder| *holder != owner || !is_in(address));
        }
    }

    /// Checks routes to the liar. If a node once routed an address to its honest owner, it must not
    /// route it to the liar later while the owner is reachable and has the address.
    pub(crate) fn check_routes(&mut self) {
        let Some(liar) = self.liar else { return };
        let now = self.now;
        // A node does not announce a block that it lost, even if containers still use addresses
        // from it.
        let is_announced = |address: &IpAddr, owner: &NodeId| {
            let facts = self.hosts[owner].disk.iter().flat_map(|disk| disk.facts.values());
            let mut lost = facts.filter_map(|fact| match fact {
                Fact::Held { block, lost: true } => Some(block),
                _ => None,
            });
            !lost.any(|block| block.contains(address))
        };
        let used = self.used.iter().filter(|(address, owner)| is_announced(address, owner));
        let used: Vec<(IpAddr, NodeId)> = used.map(|(address, owner)| (*address, *owner)).collect();
        let mut violations = Vec::new();
        for (&id, host) in self.hosts.iter_mut().filter(|(id, _)| **id != liar) {
            let Some(node) = &mut host.node else { continue };
            node.routing.set_own(&node.ipam.ranges(), &node.ipam.claims());
            node.routing.set_reclaimed(node.ipam.reclaimed().map(|(id, up_to, _)| (id, up_to)));
            node.routing.update(now);
            let length = |of: NodeId, address: &IpAddr| {
                let routes =
                    node.routing.routes(of).iter().filter(|prefix| prefix.contains(address));
                routes.map(IpNet::prefix_len).max()
            };
            let knows_liar = node.reached.get(&liar).is_some_and(|since| *since + NEWS <= now);
            for (address, owner) in used.iter().filter(|(_, owner)| *owner != id && *owner != liar)
            {
                let is_near = node.reached.get(owner).is_some_and(|since| *since + NEWS <= now);
                let (right, wrong) = (length(*owner, address), length(liar, address));
                // A node that was just launched hears both announcements at once, and cannot know
                // which came first.
                if right > wrong {
                    if knows_liar {
                        host.routed.insert(*address, *owner);
                    }
                } else if wrong.is_some() && host.routed.get(address) == Some(owner) && is_near {
                    violations.push(format!("{id} routes {address} of {owner} to the liar {liar}"));
                } else if wrong.is_some() {
                    self.counts.lost_races += 1;
                }
            }
        }
        for violation in violations {
            self.violate(violation);
        }
    }
}
