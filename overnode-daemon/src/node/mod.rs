//! Runs the daemon's main task. It waits for the next input, passes it to the cores that make the
//! decisions, and carries out their actions.
//!
//! `Daemon` lives as long as the process and may have no node yet. `running::Node` is a launched
//! node.

mod addresses;
mod arrivals;
mod bulk;
mod connections;
mod data;
mod dns;
mod docker;
mod endpoints;
mod external;
mod findings;
mod inspect;
mod ipam_status;
mod launch;
mod monitor;
mod paths;
mod reset;
mod running;
mod status;

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::api::{self, ApiError, Reply, Request};
use crate::datapath::Datapath;
use crate::metrics;
use crate::monitor::Hub;
use crate::options::Options;
use crate::store::{Store, StoreError};
use overnode_trust as trust;

use addresses::Waiting;
pub use reset::reset_offline;
use running::Node;

/// Time limit for a killed daemon to release its lock and its socket.
const RELEASE_TIMEOUT: Duration = Duration::from_millis(1500);
/// A daemon that is not launched within this time exits.
const UNLAUNCHED: Duration = Duration::from_secs(120);

/// Runs the daemon until it is told to stop or its node is reset.
///
/// # Errors
/// If another daemon uses the state or the socket, or if the stored node cannot be started.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let store = Arc::new(
        retry_briefly(
            || Store::open(&options.state_dir),
            |error| matches!(error, StoreError::Locked { .. }),
        )
        .await?,
    );
    let listener = retry_briefly(|| listen(&options.run_dir), |_| true).await?;
    let (calls, mut requests) = mpsc::channel(64);
    let metrics =
        options.metrics.map(|address| tokio::spawn(metrics::serve(address, calls.clone())));
    let hub = Hub::default();
    let server = tokio::spawn(api::serve(listener, calls, hub.clone()));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let waiting = Waiting::default();
    let started = Instant::now();
    let mut daemon = Daemon { options, store, node: None, hub, started, leaving: false, waiting };
    if let Some(identity) = daemon.store.identity()? {
        let node =
            Node::start(&daemon.options, &daemon.store, identity, daemon.started, &daemon.hub)
                .await;
        daemon.node = Some(node.context("the node cannot start")?);
    } else {
        // Remnants of a node whose state is gone belong to no node.
        for left in Datapath::tear_down(&daemon.options.state_dir).await {
            tracing::warn!("the remains of an earlier node cannot be removed: {left:#}");
        }
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let watchdog = sd_notify::watchdog_enabled().map_or(UNLAUNCHED / 4, |period| period / 2);
    let mut alive = tokio::time::interval(watchdog);

    while !daemon.leaving {
        tokio::select! {
            Some((request, answer)) = requests.recv() => daemon.begin(request, answer).await,
            input = next_input(&mut daemon.node) => {
                if let Some(node) = &mut daemon.node {
                    node.handle_input(input).await;
                    if let Some(broken) = node.broken.take() {
                        return Err(broken.context(
                            "the node stops, because it could otherwise give out an address twice",
                        ));
                    }
                }
                daemon.settle().await;
            }
            _ = alive.tick() => {
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
                if daemon.node.is_none() && daemon.started.elapsed() > UNLAUNCHED {
                    break;
                }
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    if let Some(node) = &mut daemon.node {
        node.stop_dns().await;
    }
    daemon.hub.close();
    // Give the last answer time to reach its reader.
    tokio::time::sleep(Duration::from_millis(100)).await;
    server.abort();
    metrics.inspect(|serving| serving.abort());
    let _ = std::fs::remove_file(daemon.options.run_dir.join(api::SOCKET));
    if daemon.leaving || daemon.node.is_none() {
        drop(daemon.node);
        let store = Arc::into_inner(daemon.store).context("the state is still in use")?;
        store.destroy().context("the state directory cannot be removed")?;
    }
    Ok(())
}

/// The state of the process, with or without a node.
struct Daemon {
    options: Options,
    store: Arc<Store>,
    node: Option<Node>,
    hub: Hub,
    started: Instant,
    leaving: bool,
    waiting: Waiting,
}

impl Daemon {
    async fn handle(&mut self, request: Request) -> Result<Reply, ApiError> {
        match request {
            Request::Launch(launch) => self.launch(launch).await.map(Reply::Launched),
            Request::Reset(reset) => self.reset(reset, None).await.map(Reply::WasReset),
            Request::Version => Ok(Reply::Version(self.version())),
            Request::Connect(connect) => self.node()?.connect(connect).await.map(Reply::Targets),
            Request::Forget(forget) => self.node()?.forget(forget).await.map(Reply::Targets),
            // Attaching takes a while, so `begin` answers it later.
            Request::Attach(_) => {
                Err(ApiError::failed("an attach request cannot be answered at once"))
            }
            Request::Detach(detach) => self.node()?.detach(detach).await.map(Reply::Detached),
            Request::Status => self.node()?.status().map(|status| Reply::Status(Box::new(status))),
            Request::Inspect => self.node()?.inspect().map(Reply::Inspect),
            Request::Monitor => self.node()?.watched().map(Reply::Watching),
            Request::Prime => Ok(Reply::Primed(self.node()?.prime().await)),
            Request::Reclaim(reclaim) => self.node()?.reclaim(reclaim).await.map(Reply::Reclaimed),
            Request::DnsAdd(add) => self.node()?.dns_add(add).await.map(Reply::DnsAddresses),
            Request::DnsRemove(remove) => {
                self.node()?.dns_remove(remove).await.map(Reply::DnsAddresses)
            }
            Request::DnsLookup(lookup) => self.node()?.dns_lookup(&lookup).map(Reply::DnsAddresses),
            Request::AddExternalPeer(peer) => {
                self.node()?.add_external(peer).await.map(Reply::ExternalPeerAdded)
            }
            Request::RemoveExternalPeer(peer) => {
                self.node()?.remove_external(&peer).map(Reply::ExternalPeerRemoved)
            }
            Request::ListExternalPeers => self.node()?.externals().map(Reply::ExternalPeers),
        }
    }

    fn node(&mut self) -> Result<&mut Node, ApiError> {
        self.node.as_mut().ok_or_else(|| {
            ApiError::refused(
                "no node was launched on this host: run \
                 `overnode launch --id ID --token-file FILE HOST...` first",
            )
        })
    }

    fn version(&self) -> api::Version {
        api::Version {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocols: Some(launch::PROTOCOLS),
            kernel: nix::sys::utsname::uname()
                .ok()
                .map(|name| name.release().to_string_lossy().into_owned()),
            pid: std::process::id(),
            id: self.node.as_ref().map(Node::id),
            state_dir: Some(self.options.state_dir.clone()),
        }
    }
}

/// Waits for the next input of the node, forever if there is no node. Cancel-safe.
async fn next_input(node: &mut Option<Node>) -> running::Input {
    match node {
        Some(node) => node.next_input().await,
        None => std::future::pending().await,
    }
}

/// Retries a failing attempt for a short time. A daemon that was just killed holds its lock and its
/// socket until the kernel has cleaned up after it.
async fn retry_briefly<T, E>(
    mut attempt: impl FnMut() -> Result<T, E>,
    may_pass: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let deadline = Instant::now() + RELEASE_TIMEOUT;
    loop {
        match attempt() {
            Err(error) if may_pass(&error) && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(50)).await
            }
            outcome => return outcome,
        }
    }
}

fn listen(run_dir: &Path) -> anyhow::Result<UnixListener> {
    let untrusted = "the run directory cannot be used (choose another with --run-dir)";
    trust::check_path(run_dir).context(untrusted)?;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(run_dir)
        .with_context(|| format!("the run directory {} cannot be created", run_dir.display()))?;
    trust::check_directory(run_dir).context(untrusted)?;
    let path = run_dir.join(api::SOCKET);
    // The lock of the state directory shows that no other daemon uses this state. Another daemon
    // may still use this run directory.
    if std::os::unix::net::UnixStream::connect(&path).is_ok() {
        anyhow::bail!(
            "another daemon answers on {}: one host runs one node; give this one another \
             --run-dir, or stop the other one",
            path.display()
        );
    }
    api::server::bind(&path)
        .with_context(|| format!("the socket {} cannot be created", path.display()))
}
