//! Implements `overnode dns-add`, `overnode dns-remove` and `overnode dns-lookup`.

use overnode_api::{self as api, DnsAddresses, routes};

use super::{listed, require_root};
use crate::client::Client;
use crate::failure::Failure;
use crate::options::{Context, DnsAdd, DnsLookup, DnsRemove};

/// Adds addresses to a name.
///
/// # Errors
/// Fails if the daemon is not running or refuses.
pub(super) async fn add(context: &Context, wanted: DnsAdd) -> Result<String, Failure> {
    require_root("dns-add")?;
    let request = api::DnsAdd { name: wanted.name, addresses: wanted.addresses };
    Client::new(context).post::<routes::DnsAdd>(&request).await.map(|now| describe(&now))
}

/// Removes addresses from a name.
///
/// # Errors
/// Fails if they were not added on this node, or the daemon is not running or refuses.
pub(super) async fn remove(context: &Context, wanted: DnsRemove) -> Result<String, Failure> {
    require_root("dns-remove")?;
    let request = api::DnsRemove { name: wanted.name, addresses: wanted.addresses };
    Client::new(context).post::<routes::DnsRemove>(&request).await.map(|now| describe(&now))
}

/// Returns the addresses of a name, one per line.
///
/// # Errors
/// Fails if the name has no address, or the daemon is not running.
pub(super) async fn lookup(context: &Context, wanted: DnsLookup) -> Result<String, Failure> {
    let found: DnsAddresses = Client::new(context)
        .post::<routes::DnsLookup>(&api::DnsLookup { name: wanted.name })
        .await?;
    Ok(found.addresses.iter().map(|address| format!("{address}\n")).collect())
}

fn describe(now: &DnsAddresses) -> String {
    format!("{}: added on this node: {}\n", now.name, listed(&now.addresses))
}
