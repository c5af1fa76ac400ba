//! Implements `overnode resume`.

use super::require_root;
use crate::client::Client;
use crate::failure::Failure;
use crate::options::Context;
use crate::presence::Presence;
use crate::start;

/// Starts a node that was launched and is not running.
///
/// # Errors
/// Fails if no node was launched, or if it does not start.
pub(super) async fn run(context: &Context) -> Result<String, Failure> {
    require_root("resume")?;
    let client = Client::new(context);
    let never = || Failure::failed(Presence::Never.not_running(client.socket()));
    if let Some(version) = client.running().await? {
        return version.id.map(|id| format!("node {id}: already running\n")).ok_or_else(never);
    }
    match Presence::of(&context.state_dir) {
        Presence::Never => return Err(never()),
        deaf @ Presence::NotListening(_) => {
            return Err(Failure::failed(deaf.not_running(client.socket())));
        }
        Presence::Stopped | Presence::Unknown => {}
    }
    let (started, version) = start::ensure_running(context, &client).await?;
    if let Some(id) = version.id {
        return Ok(format!("node {id}: resumed\n"));
    }
    match started {
        Some(started) => match started.stop().await {
            Ok(()) => Err(never()),
            Err(also) => Err(never().and(also)),
        },
        None => Err(never()),
    }
}
