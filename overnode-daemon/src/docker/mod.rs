//! The networks and addresses of a Docker engine: its remote-driver protocols, served on a plugin
//! socket.
//!
//! [`message`] are the documents, [`plan`] decides, [`server`] is the plugin's socket, [`engine`]
//! asks the engine itself (which containers there are, and for the default network). The node
//! carries out what [`plan`] decides.
//!
//! The protocols: moby/moby, `libnetwork/docs/remote.md` and `libnetwork/docs/ipam.md`. The engine
//! asks for an address (it is on disk before it is answered), makes an endpoint of it, joins that
//! to a sandbox (the container's network namespace), and undoes the three one by one. It may ask
//! twice, after a restart of either side it may ask for what is done already or gone already, and
//! what it asks to be removed and nobody knows counts as removed.

pub mod engine;
pub mod message;
pub mod plan;
pub mod server;

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

pub use engine::{News, Order, Report};
pub use message::{Refusal, Request, Response};
pub use plan::{Docker, Settings, Step};

/// The driver's name, for networks and for addresses, and that of the default network.
pub const NAME: &str = "overnode";
/// Where an engine looks for plugins.
pub const PLUGINS: &str = "/run/docker/plugins";
/// Where an engine answers.
pub const ENGINE: &str = "/var/run/docker.sock";

/// A request of the engine, and where its answer goes.
pub type Call = (Request, oneshot::Sender<Result<Response, Refusal>>);

/// Where the two sockets are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// The folder in which the engine looks for plugins.
    pub plugins: PathBuf,
    /// The engine's own socket.
    pub engine: PathBuf,
}

/// The tasks that speak with the engine. They end, and the plugin's socket goes away, when this is
/// dropped.
#[derive(Debug)]
pub struct Service {
    socket: PathBuf,
    /// The inode number of the socket's file; 0 if there is none.
    bound: Arc<AtomicU64>,
    orders: mpsc::UnboundedSender<Order>,
    tasks: [JoinHandle<()>; 2],
}

/// What comes from the engine.
#[derive(Debug)]
pub struct Incoming {
    /// What it asks of the plugin.
    pub calls: mpsc::Receiver<Call>,
    /// What it answered when it was asked.
    pub news: mpsc::Receiver<News>,
}

/// One thing that comes from the engine.
#[derive(Debug)]
pub enum Event {
    /// It asks.
    Call(Call),
    /// It was asked.
    News(News),
}

impl Incoming {
    /// The next thing; never, when the tasks have ended. Cancelling loses nothing.
    pub async fn next(&mut self) -> Event {
        tokio::select! {
            Some(call) = self.calls.recv() => Event::Call(call),
            Some(news) = self.news.recv() => Event::News(news),
            else => std::future::pending().await,
        }
    }
}

impl Service {
    /// Starts the tasks; neither needs an engine to be there.
    pub fn start(places: &Places) -> (Self, Incoming) {
        let (call, calls) = mpsc::channel(64);
        let (tell, news) = mpsc::channel(64);
        let (orders, ordered) = mpsc::unbounded_channel();
        let socket = socket_in(&places.plugins);
        let bound = Arc::default();
        let tasks = [
            tokio::spawn(server::serve(socket.clone(), Arc::clone(&bound), call, tell.clone())),
            tokio::spawn(engine::watch(places.engine.clone(), ordered, tell)),
        ];
        (Self { socket, bound, orders, tasks }, Incoming { calls, news })
    }

    /// Has the engine asked for something.
    pub fn order(&self, order: Order) {
        // Its task ends with this service only.
        let _ = self.orders.send(order);
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        // The task that listens may not have ended yet: whether it is ours, the file itself has to
        // tell.
        let inode = std::fs::metadata(&self.socket).map(|found| found.ino());
        if inode.is_ok_and(|inode| inode == self.bound.load(Ordering::Relaxed)) {
            let _ = std::fs::remove_file(&self.socket);
        }
    }
}

/// The plugin's socket in the folder of plugins.
pub fn socket_in(plugins: &Path) -> PathBuf {
    plugins.join(NAME).with_extension("sock")
}

/// Removes a plugin's socket that a dead daemon left.
pub fn remove_socket(socket: &Path) {
    if std::os::unix::net::UnixStream::connect(socket).is_err() {
        let _ = std::fs::remove_file(socket);
    }
}
