//! Reports which node owns which part of the address space, for `status --ipam`.

use std::collections::BTreeMap;
use std::time::Instant;

use ipnet::IpNet;

use super::view::View;
use crate::api::{IpamStatus, LoanStatus, RangeOwner, ReclaimStatus};
use overnode_core::ipam;
use overnode_types::NodeId;

impl View<'_> {
    pub(super) fn ipam_status(&self, now: Instant) -> IpamStatus {
        let pool = self.addresses.ipam.layout().network().range;
        let total = ipam::size(pool) as f64;
        let said: BTreeMap<NodeId, Vec<IpNet>> = self
            .control
            .gossip
            .records()
            .filter(|record| !record.left)
            .map(|record| (record.id, record.ranges.clone()))
            .collect();
        let shares = self.addresses.ipam.shares(&said);
        let is_reachable = |id: NodeId| {
            id == self.local.identity.id || self.reach(id).is_some_and(|(reachable, _)| reachable)
        };
        let owners = shares.owners.into_iter().map(|(id, share)| RangeOwner {
            id,
            nickname: self.nickname(id),
            addresses: count(share.addresses),
            percent: share.addresses as f64 / total * 100.0,
            active: (id == self.local.identity.id).then(|| self.addresses.ipam.active() as u64),
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
        let waiting_for = self.addresses.ipam.check_ready().err().map(|why| why.to_string());
        let reclaims = self
            .addresses
            .ipam
            .reclaims()
            .into_iter()
            .map(|(id, missing)| ReclaimStatus { id, missing });
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
