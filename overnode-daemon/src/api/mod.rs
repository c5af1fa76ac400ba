//! What the command line, and any other program on this host, may ask of the node: HTTP with JSON
//! over a unix socket.
//!
//! [`types`] are the documents, [`error`] the refusals, [`server`] the routes. Nothing here decides
//! anything: each request is handed to the node as a [`Call`], and its answer is sent back.
//!
//! | route | request | answer |
//! | --- | --- | --- |
//! | `GET /v1/version` | | [`Version`] |
//! | `GET /v1/status` | | [`Status`] |
//! | `GET /v1/inspect` | | one document, without secrets |
//! | `GET /v1/metrics` | | the same for Prometheus ([`crate::metrics`]) |
//! | `GET /v1/prime` | | [`Primed`] |
//! | `GET /v1/monitor` | | lines without end, each a [`MonitorEvent`] |
//! | `POST /v1/launch` | [`Launch`] | [`Launched`] |
//! | `POST /v1/connect` | [`Connect`] | [`Targets`] |
//! | `POST /v1/forget` | [`Forget`] | [`Targets`] |
//! | `POST /v1/attach` | [`Attach`] | [`Attached`] |
//! | `POST /v1/detach` | [`Detach`] | [`Detached`] |
//! | `POST /v1/reset` | [`Reset`] | [`WasReset`] |
//! | `GET /v1/external-peers` | | list of [`ExternalPeerStatus`] |
//! | `POST /v1/external-peers` | [`AddExternalPeer`] | [`ExternalPeerAdded`] |
//! | `POST /v1/reclaim` | [`Reclaim`] | [`Reclaimed`], at once |
//! | `POST /v1/dns/add` | [`DnsAdd`] | [`DnsAddresses`] |
//! | `POST /v1/dns/remove` | [`DnsRemove`] | [`DnsAddresses`] |
//! | `POST /v1/dns/lookup` | [`DnsLookup`] | [`DnsAddresses`] |
//! | `POST /v1/external-peers/remove` | [`RemoveExternalPeer`] | [`ExternalPeerRemoved`] |
//!
//! A refusal has the status code of its [`ErrorKind`] and the body
//! `{"error": "what: why: what to do"}`.

pub mod error;
pub mod health;
pub mod monitor;
pub mod server;
pub mod status;
pub mod target;
pub mod types;

use serde::Serialize;
use tokio::sync::oneshot;

pub use error::{ApiError, ErrorKind};
pub use health::{Finding, Health, Level};
pub use monitor::*;
pub use server::serve;
pub use status::*;
pub use target::{BadHost, BadTarget, Host, Netns, Target};
pub use types::*;

/// A request and where its answer goes.
pub type Call = (Request, oneshot::Sender<Result<Reply, ApiError>>);

/// The file name of the socket inside the run directory.
pub const SOCKET: &str = "overnode.sock";

/// The largest request body that is read, in bytes.
pub const BODY_LIMIT: usize = 256 * 1024;

/// Everything that may be asked. Each variant is answered by the variant of [`Reply`] named beside
/// it.
#[derive(Debug)]
pub enum Request {
    /// Start the node: [`Reply::Launched`].
    Launch(Launch),
    /// Add targets: [`Reply::Targets`].
    Connect(Connect),
    /// Remove targets: [`Reply::Targets`].
    Forget(Forget),
    /// Plug a network namespace in: [`Reply::Attached`].
    Attach(Attach),
    /// Plug a network namespace out: [`Reply::Detached`].
    Detach(Detach),
    /// [`Reply::Status`].
    Status,
    /// [`Reply::Inspect`].
    Inspect,
    /// Who is watched: [`Reply::Watching`], at once. Whoever asks reads already.
    Monitor,
    /// Can an address be given to a container now? [`Reply::Primed`], at once.
    Prime,
    /// Take back the address space of a node that is gone for good: [`Reply::Reclaimed`], at once.
    Reclaim(Reclaim),
    /// Leave the cluster and remove everything: [`Reply::WasReset`], after which the daemon exits.
    Reset(Reset),
    /// Make a name stand for addresses: [`Reply::DnsAddresses`].
    DnsAdd(DnsAdd),
    /// Undo that: [`Reply::DnsAddresses`].
    DnsRemove(DnsRemove),
    /// What a name stands for: [`Reply::DnsAddresses`].
    DnsLookup(DnsLookup),
    /// [`Reply::ExternalPeerAdded`].
    AddExternalPeer(AddExternalPeer),
    /// [`Reply::ExternalPeerRemoved`].
    RemoveExternalPeer(RemoveExternalPeer),
    /// [`Reply::ExternalPeers`].
    ListExternalPeers,
    /// [`Reply::Version`].
    Version,
}

/// The answers. In JSON only the content is seen, not the variant.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Reply {
    /// To [`Request::Launch`].
    Launched(Launched),
    /// To [`Request::Connect`] and [`Request::Forget`].
    Targets(Targets),
    /// To [`Request::Attach`].
    Attached(Attached),
    /// To [`Request::Detach`].
    Detached(Detached),
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::Inspect`]: an object of any shape, without secrets.
    Inspect(serde_json::Value),
    /// To [`Request::Monitor`].
    Watching(Watching),
    /// To [`Request::Prime`].
    Primed(Primed),
    /// To [`Request::Reclaim`].
    Reclaimed(Reclaimed),
    /// To [`Request::Reset`].
    WasReset(WasReset),
    /// To [`Request::DnsAdd`], [`Request::DnsRemove`] and [`Request::DnsLookup`].
    DnsAddresses(DnsAddresses),
    /// To [`Request::AddExternalPeer`].
    ExternalPeerAdded(ExternalPeerAdded),
    /// To [`Request::RemoveExternalPeer`].
    ExternalPeerRemoved(ExternalPeerRemoved),
    /// To [`Request::ListExternalPeers`].
    ExternalPeers(Vec<ExternalPeerStatus>),
    /// To [`Request::Version`].
    Version(Version),
}
