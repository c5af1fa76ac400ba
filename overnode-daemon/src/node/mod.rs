//! The daemon's main task.
//!
//! `Daemon` lives as long as the process and may have no node yet. A launched node has parts that
//! do not know each other, and one loop that joins them:
//!
//! | file | part |
//! | --- | --- |
//! | `event_loop.rs` | the loop: gives each input to a part, and routes the effects of all parts |
//! | `start.rs` | the steps from a stored identity to a running node |
//! | `requests.rs` | gives each request of the command to a part; keeps answers that wait |
//! | `launch.rs`, `settings.rs`, `reset.rs` | requests that start, restart and end a node |
//! | `control_plane.rs` | gossip, control connections, dialing |
//! | `data_plane/` | peers, sessions, paths, routes |
//! | `bulk.rs` | the workers for bulk flows |
//! | `addresses.rs` | the allocation |
//! | `names.rs` | DNS |
//! | `containers.rs`, `containers/docker.rs` | attachments |
//! | `problems.rs` | what needs an operator |
//! | `monitor.rs` | what `overnode monitor` shows |
//! | `view.rs`, `status.rs`, `inspect.rs`, `ipam_status.rs` | all parts, for reading |
//! | `inputs.rs`, `local.rs` | what the loop waits for; facts about this node |

mod addresses;
mod bulk;
mod containers;
mod control_plane;
mod data_plane;
mod event_loop;
mod inputs;
mod inspect;
mod ipam_status;
mod launch;
mod local;
mod monitor;
mod names;
mod problems;
mod requests;
mod reset;
mod settings;
mod start;
mod status;
mod view;

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::api;
use crate::datapath::Datapath;
use crate::metrics;
use crate::monitor::Hub;
use crate::options::Options;
use crate::store::{Store, StoreError};
use overnode_trust as trust;

use event_loop::Node;
use inputs::Input;
use requests::Waiting;
pub use reset::reset_offline;

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
                    if let Some(broken) = node.addresses.take_broken() {
                        return Err(broken.context(
                            "the node stops, because it could otherwise give out an address twice",
                        ));
                    }
                }
                daemon.settle().await;
            }
            _ = alive.tick() => {
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
                if daemon.node.is_none() && daemon.store.identity()?.is_some() {
                    anyhow::bail!("the node could not be started again: see above");
                }
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
        node.names.stop_server(&mut node.data.datapath).await;
    }
    daemon.hub.close();
    // Give the last answer time to reach its reader.
    tokio::time::sleep(Duration::from_millis(100)).await;
    server.abort();
    metrics.inspect(|serving| serving.abort());
    let _ = std::fs::remove_file(daemon.options.run_dir.join(api::SOCKET));
    if daemon.leaving || daemon.store.identity()?.is_none() {
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

/// Waits for the next input of the node, forever if there is no node. Cancel-safe.
async fn next_input(node: &mut Option<Node>) -> Input {
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
