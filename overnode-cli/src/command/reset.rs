//! Implements `overnode reset`.

use overnode_api::{self as api, WasReset, routes};

use super::require_root;
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
pub(super) async fn run(context: &Context, wanted: &Reset) -> Result<String, Failure> {
    require_root("reset")?;
    let client = Client::new(context);
    let Some(version) = client.running().await? else {
        return without_daemon(context, &client, wanted.force).await;
    };
    let reset: WasReset = client.post::<routes::Reset>(&api::Reset { force: wanted.force }).await?;
    start::ended(context, &client, version.pid).await?;
    if !reset.left.is_empty() {
        return Err(Failure::failed(format_args!(
            "the node was reset, but some things could not be removed: {}; run \
             `overnode reset` again",
            reset.left.join("; ")
        )));
    }
    Ok(match reset.id {
        Some(id) => {
            format!(
                "node {id}: reset; on the nodes that have it as a target, run \
                 `overnode forget HOST`\n"
            )
        }
        None => "no node was launched on this host; the daemon was stopped\n".to_owned(),
    })
}

async fn without_daemon(
    context: &Context,
    client: &Client,
    force: bool,
) -> Result<String, Failure> {
    let presence = Presence::of(&context.state_dir);
    if let Presence::NotListening(_) = presence {
        return Err(Failure::failed(presence.not_running(client.socket())));
    }
    start::offline(context, if force { &["reset", "--force"] } else { &["reset"] })
        .map_err(Failure::failed)?;
    start::forget_start(context)?;
    Ok(match presence {
        Presence::Never => "no node was launched on this host; any leftovers were removed\n",
        Presence::Stopped | Presence::Unknown | Presence::NotListening(_) => {
            "the node was not running: reset; on the nodes that have it as a target, run \
             `overnode forget HOST`\n"
        }
    }
    .to_owned())
}
