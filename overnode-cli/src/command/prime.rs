//! Implements `overnode prime`.

use std::time::{Duration, Instant};

use overnode_api::{Primed, routes};

use crate::client::Client;
use crate::failure::Failure;
use crate::options::{Context, Prime};

/// Interval between two requests to the node.
const POLL: Duration = Duration::from_millis(250);

/// Waits until this node can give an address to a container.
///
/// # Errors
/// Fails if it cannot within the given time, or the daemon is not running.
pub(super) async fn run(context: &Context, wanted: &Prime) -> Result<String, Failure> {
    let client = Client::new(context);
    let begun = Instant::now();
    loop {
        let primed: Primed = client.get::<routes::Prime>().await?;
        if primed.ready {
            return Ok(String::new());
        }
        if let Some(timeout) = wanted.timeout
            && begun.elapsed() >= timeout
        {
            return Err(Failure::failed(format_args!(
                "this node still cannot allocate addresses after {}: {}; see \
                 `overnode status --ipam --connections`",
                humantime::format_duration(timeout),
                primed.waiting_for.as_deref().unwrap_or("it is waiting for address space")
            )));
        }
        tokio::time::sleep(POLL).await;
    }
}
