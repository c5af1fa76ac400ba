//! Implements `overnode reclaim`.

use std::time::{Duration, Instant};

use overnode_api::{self as api, Reclaimed, routes};

use super::{listed, require_root};
use crate::client::Client;
use crate::failure::Failure;
use crate::options::{Context, Reclaim};

/// Interval between two requests to the node.
const POLL: Duration = Duration::from_millis(250);

/// Reclaims the address space of a node that is gone for good. Waits until all other nodes have
/// agreed.
///
/// # Errors
/// Fails if that node is reachable or unknown, if another node already reclaims it, if not all
/// nodes agree within the given time, or if the daemon is not running.
pub(super) async fn run(context: &Context, wanted: &Reclaim) -> Result<String, Failure> {
    require_root("reclaim")?;
    let client = Client::new(context);
    let begun = Instant::now();
    loop {
        let reclaimed: Reclaimed =
            client.post::<routes::Reclaim>(&api::Reclaim { id: wanted.id }).await?;
        if reclaimed.done {
            return Ok(format!("this node now owns the address space of node {}\n", reclaimed.id));
        }
        if begun.elapsed() >= wanted.timeout {
            return Err(Failure::failed(format_args!(
                "the address space of node {} is not reclaimed yet: these nodes still have to \
                 agree: {}; the node continues in the background while they are reachable, and \
                 `overnode status --ipam` shows its progress; reclaim those that are gone for \
                 good, too",
                reclaimed.id,
                listed(&reclaimed.missing)
            )));
        }
        tokio::time::sleep(POLL).await;
    }
}
