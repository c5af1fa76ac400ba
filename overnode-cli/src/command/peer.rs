//! Implements `overnode peer`.

use overnode_api::{
    self as api, ExternalPeerAdded, ExternalPeerRemoved, ExternalPeerStatus, routes,
};

use super::{listed, read_secret, require_root};
use crate::client::Client;
use crate::failure::Failure;
use crate::options::{AddPeer, Context, Peer};
use crate::render::{self, Style};

/// Adds, removes or lists WireGuard peers that are not nodes.
///
/// # Errors
/// Fails if the daemon is not running or refuses.
pub(super) async fn run(context: &Context, wanted: Peer) -> Result<String, Failure> {
    let client = Client::new(context);
    match wanted {
        Peer::Add(wanted) => add(&client, wanted).await,
        Peer::Remove { public_key } => {
            require_root("peer remove")?;
            let request = api::RemoveExternalPeer { public_key };
            let removed: ExternalPeerRemoved =
                client.post::<routes::RemoveExternalPeer>(&request).await?;
            Ok(format!("removed; its allowed IPs were {}\n", listed(&removed.allowed_ips)))
        }
        Peer::List { json: true } => {
            Ok(render::json(&client.document::<routes::ExternalPeers>().await?))
        }
        Peer::List { json: false } => {
            let peers: Vec<ExternalPeerStatus> = client.get::<routes::ExternalPeers>().await?;
            Ok(render::external_peers(&peers, Style::of(context)))
        }
    }
}

async fn add(client: &Client, wanted: AddPeer) -> Result<String, Failure> {
    let preshared_key = match &wanted.preshared_key_file {
        None => None,
        Some(file) => {
            let key = read_secret("--preshared-key-file", file)?;
            let bad = |error| {
                Failure::usage(format_args!("--preshared-key-file {}: {error}", file.display()))
            };
            Some(key.trim().parse().map_err(bad)?)
        }
    };
    require_root("peer add")?;
    let request = api::AddExternalPeer {
        public_key: wanted.public_key,
        preshared_key,
        endpoint: wanted.endpoint,
        allowed_ips: wanted.allowed_ips,
        persistent_keepalive_seconds: wanted.keepalive,
        name: wanted.name,
    };
    let added: ExternalPeerAdded = client.post::<routes::AddExternalPeer>(&request).await?;
    let ExternalPeerAdded { public_key, port, subnet, replaced } = added;
    let what = if replaced { "changed" } else { "added" };
    let psk = if request.preshared_key.is_some() { "PresharedKey = (the same key)\n" } else { "" };
    Ok(format!(
        "# {what}; add this to the peer's configuration:\n\
         [Peer]\nPublicKey = {public_key}\n{psk}AllowedIPs = {subnet}\n\
         # Endpoint = an address of this host, with port {port}\n"
    ))
}
