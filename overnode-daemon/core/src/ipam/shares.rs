//! Division of the range among the nodes, for display: computed from what each node announces.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::layout::{Layout, quarters};
use super::space::{free, size};
use super::{Ipam, NodeId};

/// Division of the range among the nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shares {
    /// Every node that allocates addresses. Space that no node announces counts for its birth
    /// owner.
    pub owners: BTreeMap<NodeId, Share>,
    /// Lent blocks by lender and borrower, in ascending order.
    pub loans: BTreeMap<(NodeId, NodeId), Vec<IpNet>>,
}

/// The share of one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// The prefixes that the node announces, in ascending order. They include what it has lent, for
    /// which a borrower announces a longer prefix.
    pub ranges: Vec<IpNet>,
    /// Number of addresses that the node can allocate: those of its ranges without what it has
    /// lent.
    pub addresses: u128,
}

impl Ipam {
    /// Returns the division of the range. `announced` has the ranges that each node announces, this
    /// one included.
    pub fn shares(&self, announced: &BTreeMap<NodeId, Vec<IpNet>>) -> Shares {
        let ledger = self.ledger().flat_map(|(_, loans)| loans);
        let ledger = ledger.filter(|(borrower, _)| *borrower != self.id);
        shares(&self.layout, self.id, ledger.map(|(id, blocks)| (id, blocks.to_vec())), announced)
    }
}

/// Computes the division of the range. What node `own` has lent is taken from its `ledger`, which
/// never has less than the borrowers announce.
fn shares(
    layout: &Layout,
    own: NodeId,
    ledger: impl Iterator<Item = (NodeId, Vec<IpNet>)>,
    announced: &BTreeMap<NodeId, Vec<IpNet>>,
) -> Shares {
    let pool = layout.network().range;
    let all: Vec<(NodeId, IpNet)> = announced
        .iter()
        .flat_map(|(id, ranges)| ranges.iter().map(|range| (*id, *range)))
        .filter(|(_, range)| pool.contains(range))
        .collect();
    let mut found = Shares::default();
    for (id, range) in &all {
        found.owners.entry(*id).or_default().ranges.push(*range);
        // Only the second half of a quarter is ever lent.
        if layout.quarter_of(*range).is_none() {
            continue;
        }
        let around =
            all.iter().filter(|(other, net)| other != id && net != range && net.contains(range));
        match around.max_by_key(|(_, net)| net.prefix_len()) {
            Some((lender, _)) if *lender != own => {
                found.loans.entry((*lender, *id)).or_default().push(*range);
            }
            Some(_) | None => {}
        }
    }
    for (borrower, blocks) in ledger {
        found.loans.entry((own, borrower)).or_default().extend(blocks);
    }
    for quarter in quarters() {
        for half in [layout.own_part(quarter), layout.lendable(quarter)].into_iter().flatten() {
            let unannounced = free(half, all.iter().map(|(_, range)| *range));
            if !unannounced.is_empty() {
                found.owners.entry(quarter).or_default().ranges.extend(unannounced);
            }
        }
    }
    for blocks in found.loans.values_mut() {
        *blocks = IpNet::aggregate(blocks);
        blocks.sort_unstable();
    }
    for (id, share) in &mut found.owners {
        share.ranges = IpNet::aggregate(&share.ranges);
        share.ranges.sort_unstable();
        let lent = found.loans.iter().filter(|((lender, _), _)| lender == id);
        let lent: u128 = lent.flat_map(|(_, blocks)| blocks).map(|block| size(*block)).sum();
        share.addresses =
            share.ranges.iter().map(|range| size(*range)).sum::<u128>().saturating_sub(lent);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use overnode_types::Network;

    fn id(id: u16) -> NodeId {
        NodeId::new(id).unwrap()
    }

    fn nets(nets: &[&str]) -> Vec<IpNet> {
        nets.iter().map(|net| net.parse().unwrap()).collect()
    }

    fn of(own: u16, ledger: &[(u16, &[&str])], announced: &[(u16, &[&str])]) -> Shares {
        let layout = Layout::new(Network::default()).unwrap();
        let ledger = ledger.iter().map(|(borrower, blocks)| (id(*borrower), nets(blocks)));
        let announced = announced.iter().map(|(of, ranges)| (id(*of), nets(ranges))).collect();
        shares(&layout, id(own), ledger, &announced)
    }

    fn addresses(shares: &Shares) -> Vec<(u16, u128)> {
        shares.owners.iter().map(|(id, share)| (id.get(), share.addresses)).collect()
    }

    #[test]
    fn unknown_nodes_own_their_quarters_by_birth() {
        let alone = of(5, &[], &[]);
        assert_eq!(addresses(&alone), [(1, 131_072), (2, 131_072), (3, 131_072), (4, 131_072)]);
        assert_eq!(alone.owners[&id(3)].ranges, nets(&["10.44.0.0/15"]));
        // Node 2 does not lend its second half yet.
        let young = of(2, &[], &[(2, &["10.42.0.0/16"])]);
        assert_eq!(addresses(&young), addresses(&alone));
        // Node 1 has taken over the second half of quarter 2. The first half stays with node 2.
        let reclaimed = of(1, &[], &[(1, &["10.40.0.0/15", "10.43.0.0/16"])]);
        assert_eq!(addresses(&reclaimed)[..2], [(1, 196_608), (2, 65_536)]);
        assert_eq!(reclaimed.owners[&id(2)].ranges, nets(&["10.42.0.0/16"]));
    }

    #[test]
    fn loans_reported_by_both_sides_are_counted_once() {
        let announced: &[(u16, &[&str])] = &[
            (1, &["10.40.0.0/15"]),
            (2, &["10.42.0.0/15"]),
            (5, &["10.41.0.0/27", "10.43.0.0/28", "10.43.0.16/28"]),
            // Outside of the range.
            (6, &["10.32.0.0/24", "0.0.0.0/0"]),
        ];
        for own in [1, 2, 5] {
            let ledger: &[(u16, &[&str])] = match own {
                1 => &[(5, &["10.41.0.0/27"])],
                // The ledger has more than the borrower has announced so far.
                2 => &[(5, &["10.43.0.0/27"]), (7, &["10.43.1.0/28"])],
                _ => &[],
            };
            let shares = of(own, ledger, announced);
            assert_eq!(shares.loans[&(id(1), id(5))], nets(&["10.41.0.0/27"]));
            assert_eq!(shares.loans[&(id(2), id(5))], nets(&["10.43.0.0/27"]));
            assert_eq!(shares.loans.contains_key(&(id(2), id(7))), own == 2);
            let two = 131_072 - 32 - if own == 2 { 16 } else { 0 };
            let expected = [(1, 131_040), (2, two), (3, 131_072), (4, 131_072), (5, 64)];
            assert_eq!(addresses(&shares), expected, "as reported by node {own}");
        }
    }
}
