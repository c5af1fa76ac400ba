//! Implements `overnode reset`.

use overnode_daemon::api::{self, WasReset};
use overnode_daemon::node;

use super::demand_root;
use crate::client::Client;
use crate::failure::Failure;
use crate::options::{Context, Reset};
use crate::presence::Presence;
use crate::start;

/// Makes the daemon reset the node, or resets it directly if no daemon is running.
///
/// # Errors
/// Fails if containers are attached and `force` was not given, or if something could not be
/// removed.
pub async fn run(context: &Context, wanted: &Reset) -> Result<String, Failure> {
    demand_root("reset")?;
    let client = Client::new(context);
    let Some(version) = client.running().await? else {
        return without_daemon(context, &client, wanted.force).await;
    };
    let reset: WasReset = client.post("/v1/reset", &api::Reset { force: wanted.force }).await?;
    start::ended(context, &client, version.pid).await?;
    if !reset.left.is_empty() {
        return Err(Failure::failed(format_args!(
            "the node was reset, but something was left: {}; run `overnode reset` again",
            reset.left.join("; ")
        )));
    }
    Ok(match reset.id {
        Some(id) => {
            format!(
                "node {id}: reset; tell the nodes that had it as a target: `overnode forget HOST`\n"
            )
        }
        None => "nothing was launched on this host; its daemon was stopped\n".to_owned(),
    })
}

async fn without_daemon(
    context: &Context,
    client: &Client,
    force: bool,
) -> Result<String, Failure> {
    let presence = Presence::of(&context.state_dir);
    if let Presence::Deaf(_) = presence {
        return Err(Failure::failed(presence.not_running(client.socket())));
    }
    node::reset_offline(&context.state_dir, &context.run_dir, force)
        .await
        .map_err(|error| Failure::failed(format_args!("{error:#}")))?;
    start::forget_start(context)?;
    Ok(match presence {
        Presence::Never => "no node was launched on this host; nothing is left of any\n",
        Presence::Stopped | Presence::Unknown | Presence::Deaf(_) => {
            "the node, which was not running: reset; tell the nodes that had it as a target: `overnode forget HOST`\n"
        }
    }
    .to_owned())
}
