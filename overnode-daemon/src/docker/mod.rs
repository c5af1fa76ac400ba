//! Serves a Docker engine as a remote driver for networks and addresses, on a plugin socket.
//!
//! [`overnode_core::docker`] decides the answers. [`server`] serves the plugin socket. [`engine`]
//! is a client of the engine itself: it lists containers and manages the default network.
//!
//! Protocols: moby/moby, `libnetwork/docs/remote.md` and `libnetwork/docs/ipam.md`. The engine
//! requests an address, creates an endpoint for it, and joins the endpoint to a sandbox (the
//! container's network namespace). Later it undoes these three steps one by one. An address is on
//! disk before the request is answered. The engine may repeat a request. After a restart of either
//! side, it may also request what is already done or already gone. Removing something unknown
//! succeeds.

pub mod engine;
pub mod server;

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

pub use engine::{EngineEvent, Order};
use overnode_core::docker::{NAME, Refusal, Request, Response};

/// Directory in which an engine looks for plugins.
pub const PLUGINS: &str = "/run/docker/plugins";
/// Path of the engine's own socket.
pub const ENGINE: &str = "/var/run/docker.sock";

/// A request from the engine and the channel for its answer.
pub type Call = (Request, oneshot::Sender<Result<Response, Refusal>>);

/// The locations of the two sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketPaths {
    /// The directory in which the engine looks for plugins.
    pub plugins: PathBuf,
    /// The engine's own socket.
    pub engine: PathBuf,
}

/// The tasks that communicate with the engine. Dropping this stops them and removes the plugin
/// socket.
#[derive(Debug)]
pub struct Service {
    socket: PathBuf,
    /// The inode number of the socket's file; 0 if there is none.
    bound: Arc<AtomicU64>,
    orders: mpsc::UnboundedSender<Order>,
    tasks: [JoinHandle<()>; 3],
}

/// The channels on which the engine's requests and the results of orders arrive.
#[derive(Debug)]
pub struct Incoming {
    /// Requests of the engine to the plugin.
    pub calls: mpsc::Receiver<Call>,
    /// Results of the requests to the engine.
    pub news: mpsc::Receiver<EngineEvent>,
}

/// A message from the tasks.
#[derive(Debug)]
pub enum Event {
    /// The engine sent a request.
    Call(Call),
    /// A task reports a result.
    EngineEvent(EngineEvent),
}

impl Incoming {
    /// Returns the next event. Never completes once the tasks have ended. Cancel-safe.
    pub async fn next(&mut self) -> Event {
        tokio::select! {
            Some(call) = self.calls.recv() => Event::Call(call),
            Some(event) = self.news.recv() => Event::EngineEvent(event),
            else => std::future::pending().await,
        }
    }
}

impl Service {
    /// Starts the tasks. The engine need not be running.
    pub fn start(paths: &SocketPaths) -> (Self, Incoming) {
        let (call, calls) = mpsc::channel(64);
        let (events, news) = mpsc::channel(64);
        let (orders, ordered) = mpsc::unbounded_channel();
        let socket = socket_in(&paths.plugins);
        let bound = Arc::default();
        let tasks = [
            tokio::spawn(server::serve(socket.clone(), Arc::clone(&bound), call, events.clone())),
            tokio::spawn(engine::watch(paths.engine.clone(), ordered, events)),
            tokio::spawn(engine::follow_events(paths.engine.clone(), orders.clone())),
        ];
        (Self { socket, bound, orders, tasks }, Incoming { calls, news })
    }

    /// Sends an order to the task that talks to the engine.
    pub fn order(&self, order: Order) {
        // The receiving task only ends with this service.
        let _ = self.orders.send(order);
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        // The listening task may not have ended yet. The inode tells whether the file is still
        // ours.
        let inode = std::fs::metadata(&self.socket).map(|found| found.ino());
        if inode.is_ok_and(|inode| inode == self.bound.load(Ordering::Relaxed)) {
            let _ = std::fs::remove_file(&self.socket);
        }
    }
}

/// Returns the path of the plugin socket in the plugin directory.
pub fn socket_in(plugins: &Path) -> PathBuf {
    plugins.join(NAME).with_extension("sock")
}

/// Removes a plugin socket that a dead daemon left behind.
pub fn remove_socket(socket: &Path) {
    if std::os::unix::net::UnixStream::connect(socket).is_err() {
        let _ = std::fs::remove_file(socket);
    }
}
