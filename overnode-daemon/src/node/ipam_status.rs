//! Reports which node owns which part of the address space, for `status --ipam`.

use std::collections::BTreeMap;
use std::time::Instant;

use ipnet::IpNet;

use super::running::Node;
use crate::api::{IpamStatus, LoanStatus, RangeOwner, ReclaimStatus};
use overnode_core::ipam;
use overnode_types::NodeId;

impl Node {
    pub(super) fn ipam_status(&self, now: Instant) -> IpamStatus {
        let pool = self.ipam.layout().network().range;
        let total = ipam::size(pool) as f64;
        let said: BTreeMap<NodeId, Vec<IpNet>> = self
            .gossip
            .records()
            .filter(|record| !record.left)
            .map(|record| (record.id, record.ranges.clone()))
            .collect();
        let shares = self.ipam.shares(&said);
        let is_reachable = |id: NodeId| {
            id == self.identity.id || self.reach(id).is_some_and(|(reachable, _)| reachable)
        };
        let owners = shares.owners.into_iter().map(|(id, share)| RangeOwner {
            id,
            nickname: self
                .gossip
                .record(id)
                .map(|record| record.nickname.clone())
                .unwrap_or_default(),
            addresses: count(share.addresses),
            percent: share.addresses as f64 / total * 100.0,
            active: (id == self.identity.id).then(|| self.ipam.active() as u64),
            reachable: Some(is_reachable(id)),
            ranges: share.ranges,
        });
        let loans = shares.loans.into_iter().map(|((lender, borrower), networks)| LoanStatus {
            lender,
            borrower,
            addresses: count(networks.iter().map(|network| ipam::size(*network)).sum()),
            networks,
            lender_reachable: is_reachable(lender),
            borrower_reachable: is_reachable(borrower),
        });
        let waiting_for = self.ipam.check_ready().err().map(|why| why.to_string());
        let reclaims =
            self.ipam.reclaims().into_iter().map(|(id, missing)| ReclaimStatus { id, missing });
        IpamStatus {
            ready: waiting_for.is_none(),
            waiting_for,
            owners: owners.collect(),
            loans: loans.collect(),
            problems: self.address_problems(now).into_iter().collect(),
            notices: self.address_notices(now).into_iter().collect(),
            reclaims: reclaims.collect(),
        }
    }
}

fn count(addresses: u128) -> u64 {
    u64::try_from(addresses).unwrap_or(u64::MAX)
}
