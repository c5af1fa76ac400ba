//! Handles `reset`: leaves the cluster and removes everything of overnode from this host.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::Daemon;
use crate::api::{self, ApiError, WasReset};
use crate::bulk;
use crate::datapath::Datapath;
use crate::docker;
use crate::failpoint;
use crate::options::{DOCKER_PLUGINS, docker_plugins};
use crate::store::{Store, StoreError};
use overnode_core::attachment::{Attachment, Kind};

/// How long the node waits for its neighbors to receive its departure.
const FAREWELL: Duration = Duration::from_millis(200);

impl Daemon {
    /// Fails if containers are attached.
    pub(super) fn check_reset(&self) -> Result<(), ApiError> {
        refuse_attached(&self.store).map_err(ApiError::refused)
    }

    /// Leaves the cluster and tears down the node. `left` describes what could not be removed
    /// earlier.
    pub(super) async fn reset(
        &mut self,
        request: api::Reset,
        left: Option<String>,
    ) -> Result<WasReset, ApiError> {
        if self.node.is_some() && !request.force {
            self.check_reset()?;
        }
        let Some(node) = &mut self.node else {
            self.leaving = true;
            return Ok(WasReset { id: None, left: Vec::new() });
        };
        let id = node.local.id();
        node.control.gossip.leave();
        node.control.pump_gossip(Instant::now());
        tokio::time::sleep(FAREWELL).await;
        node.bulk.stop().await;
        failpoint::reached("farewell");
        self.node = None;
        let errors = Datapath::tear_down(&self.options.state_dir).await;
        failpoint::reached("torn down");
        self.leaving = true;
        let left =
            left.into_iter().chain(errors.iter().map(|error| format!("{error:#}"))).collect();
        Ok(WasReset { id: Some(id), left })
    }
}

/// Resets a node whose daemon does not run. The other nodes are not notified.
///
/// # Errors
/// If containers are attached and `force` is false, or if something cannot be removed.
pub async fn reset_offline(state_dir: &Path, run_dir: &Path, force: bool) -> anyhow::Result<()> {
    // A missing state directory does not prevent the cleanup. With `force`, neither does one that
    // this version cannot read.
    let store = match Store::open_existing(state_dir) {
        Ok(store) => Some(store),
        Err(StoreError::Missing { .. }) => None,
        Err(error @ StoreError::Locked { .. }) => return Err(error.into()),
        Err(error) if force => {
            tracing::warn!("{error:#}");
            None
        }
        Err(error) => return Err(error.into()),
    };
    if let Some(store) = &store
        && !force
    {
        refuse_attached(store).map_err(anyhow::Error::msg)?;
    }
    if let Ok(Some(workers)) = bulk::ipc::WorkersConnection::connect(run_dir) {
        workers.stop().await;
    }
    let errors = Datapath::tear_down(state_dir).await;
    match store {
        Some(store) => store.destroy(),
        None => Store::wipe(state_dir),
    }
    .context("the state directory cannot be removed")?;
    for file in [api::SOCKET, bulk::control::SOCKET, "overnoded.log"] {
        let _ = std::fs::remove_file(run_dir.join(file));
    }
    let given = std::env::var_os(DOCKER_PLUGINS).map(PathBuf::from);
    if let Some(plugins) = docker_plugins(state_dir, run_dir, given.as_deref()) {
        docker::remove_socket(&docker::socket_in(&plugins));
    }
    match errors.into_iter().next() {
        Some(error) => Err(error.context("not everything could be removed")),
        None => Ok(()),
    }
}

fn refuse_attached(store: &Store) -> Result<(), String> {
    let mut attached = store.attachments().map_err(|error| error.to_string())?;
    // Stopped containers of an engine are not affected by the loss of the network.
    attached.retain(Attachment::has_interface);
    if attached.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = attached
        .iter()
        .map(|it| match (it.kind(), &it.name) {
            (Kind::Docker, Some(name)) => format!("{name} ({})", it.address),
            (Kind::Docker, None) => format!("a Docker container ({})", it.address),
            (Kind::Host, _) => format!("this host ({})", it.address),
            (Kind::Netns | Kind::Cni, _) => format!("{} ({})", it.target, it.address),
        })
        .collect();
    let how = if attached.iter().all(|it| it.kind() == Kind::Host) {
        "hide it first with `overnode hide`"
    } else if attached.iter().any(|it| it.kind() == Kind::Docker) {
        "stop the Docker containers and detach the others with `overnode detach TARGET` first"
    } else {
        "detach them first with `overnode detach TARGET`"
    };
    Err(format!(
        "containers are attached: {}: {how}, or cut them off with `overnode reset --force`",
        names.join(", ")
    ))
}
