//! `overnode dns-add`, `overnode dns-remove`, `overnode dns-lookup`

use overnode_daemon::api::{self, DnsAddresses};

use super::{demand_root, listed};
use crate::client::Client;
use crate::failure::Failure;
use crate::options::{Context, DnsAdd, DnsLookup, DnsRemove};

/// Makes a name stand for addresses.
///
/// # Errors
/// When the daemon does not run or refuses.
pub async fn add(context: &Context, wanted: DnsAdd) -> Result<String, Failure> {
    demand_root("dns-add")?;
    let request = api::DnsAdd { name: wanted.name, addresses: wanted.addresses };
    Client::new(context).post("/v1/dns/add", &request).await.map(|now| describe(&now))
}

/// Undoes that.
///
/// # Errors
/// When it was not added on this node, or the daemon does not run or refuses.
pub async fn remove(context: &Context, wanted: DnsRemove) -> Result<String, Failure> {
    demand_root("dns-remove")?;
    let request = api::DnsRemove { name: wanted.name, addresses: wanted.addresses };
    Client::new(context).post("/v1/dns/remove", &request).await.map(|now| describe(&now))
}

/// What a name stands for: addresses, one a line.
///
/// # Errors
/// When it stands for nothing, or the daemon does not run.
pub async fn lookup(context: &Context, wanted: DnsLookup) -> Result<String, Failure> {
    let found: DnsAddresses =
        Client::new(context).post("/v1/dns/lookup", &api::DnsLookup { name: wanted.name }).await?;
    Ok(found.addresses.iter().map(|address| format!("{address}\n")).collect())
}

fn describe(now: &DnsAddresses) -> String {
    format!("{}: added on this node: {}\n", now.name, listed(&now.addresses))
}
