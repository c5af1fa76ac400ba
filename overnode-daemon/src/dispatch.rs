//! Requests to the node, and how its answers become HTTP responses.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use overnode_api::error::ErrorBody;
use overnode_api::*;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

/// A request and the channel for its answer.
pub type Call = (Request, oneshot::Sender<Result<Reply, ApiError>>);

/// The socket's file name in the run directory.
pub const SOCKET: &str = "overnode.sock";

/// The largest accepted request body, in bytes.
pub const BODY_LIMIT: usize = 256 * 1024;

/// All requests to the node. Each variant links to the [`Reply`] variant that answers it.
#[derive(Debug)]
pub enum Request {
    /// Starts the node: [`Reply::Launched`].
    Launch(Launch),
    /// Adds targets: [`Reply::Targets`].
    Connect(Connect),
    /// Removes targets: [`Reply::Targets`].
    Forget(Forget),
    /// Attaches a network namespace: [`Reply::Attached`].
    Attach(Attach),
    /// Detaches a network namespace: [`Reply::Detached`].
    Detach(Detach),
    /// Returns the node's status: [`Reply::Status`].
    Status,
    /// Returns the node's internal state: [`Reply::Inspect`].
    Inspect,
    /// Returns which node is being watched: [`Reply::Watching`], immediately. The caller has
    /// already subscribed to the events.
    Monitor,
    /// Asks whether the node can allocate an address for a container now: [`Reply::Primed`],
    /// immediately.
    Prime,
    /// Reclaims the address space of a node that is gone for good: [`Reply::Reclaimed`],
    /// immediately.
    Reclaim(Reclaim),
    /// Leaves the cluster and removes everything: [`Reply::WasReset`]. The daemon then exits.
    Reset(Reset),
    /// Adds addresses to a DNS name: [`Reply::DnsAddresses`].
    DnsAdd(DnsAdd),
    /// Removes addresses from a DNS name: [`Reply::DnsAddresses`].
    DnsRemove(DnsRemove),
    /// Looks up a DNS name: [`Reply::DnsAddresses`].
    DnsLookup(DnsLookup),
    /// Adds or changes an external WireGuard peer: [`Reply::ExternalPeerAdded`].
    AddExternalPeer(AddExternalPeer),
    /// Removes an external WireGuard peer: [`Reply::ExternalPeerRemoved`].
    RemoveExternalPeer(RemoveExternalPeer),
    /// Lists the external WireGuard peers: [`Reply::ExternalPeers`].
    ListExternalPeers,
    /// Returns the versions of daemon and host: [`Reply::Version`].
    Version,
}

/// The answers. The JSON form is the content of the variant, without its name.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Reply {
    /// Answers [`Request::Launch`].
    Launched(Launched),
    /// Answers [`Request::Connect`] and [`Request::Forget`].
    Targets(Targets),
    /// Answers [`Request::Attach`].
    Attached(Attached),
    /// Answers [`Request::Detach`].
    Detached(Detached),
    /// Answers [`Request::Status`].
    Status(Box<Status>),
    /// Answers [`Request::Inspect`]: an object of unspecified shape, without secrets.
    Inspect(serde_json::Value),
    /// Answers [`Request::Monitor`].
    Watching(Watching),
    /// Answers [`Request::Prime`].
    Primed(Primed),
    /// Answers [`Request::Reclaim`].
    Reclaimed(Reclaimed),
    /// Answers [`Request::Reset`].
    WasReset(WasReset),
    /// Answers [`Request::DnsAdd`], [`Request::DnsRemove`] and [`Request::DnsLookup`].
    DnsAddresses(DnsAddresses),
    /// Answers [`Request::AddExternalPeer`].
    ExternalPeerAdded(ExternalPeerAdded),
    /// Answers [`Request::RemoveExternalPeer`].
    ExternalPeerRemoved(ExternalPeerRemoved),
    /// Answers [`Request::ListExternalPeers`].
    ExternalPeers(Vec<ExternalPeerStatus>),
    /// Answers [`Request::Version`].
    Version(Version),
}

/// Sends a request to the node and waits for the answer.
pub(crate) async fn call(node: &mpsc::Sender<Call>, request: Request) -> Result<Reply, ApiError> {
    let (answer, answered) = oneshot::channel();
    let stopped = |()| {
        ApiError::failed("the node stopped before it answered: `overnode resume` starts it again")
    };
    node.send((request, answer)).await.map_err(|_| stopped(()))?;
    answered.await.map_err(|_| stopped(()))?
}

impl IntoResponse for Reply {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self) {
            Ok(body) => json(StatusCode::OK, body),
            Err(error) => {
                let message = format_args!("the answer could not be encoded as JSON: {error}");
                refusal(&ApiError::failed(message))
            }
        }
    }
}

/// Returns the HTTP response of an error.
pub(crate) fn refusal(error: &ApiError) -> Response {
    let status = match error.kind {
        ErrorKind::Usage => StatusCode::BAD_REQUEST,
        ErrorKind::Refused => StatusCode::CONFLICT,
        ErrorKind::Missing => StatusCode::NOT_FOUND,
        ErrorKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
    };
    refuse(status, error)
}

/// Returns the HTTP response of an error, with another status than that of its kind.
pub(crate) fn refuse(status: StatusCode, error: &ApiError) -> Response {
    let body = ErrorBody { error: error.message.clone() };
    json(status, serde_json::to_vec(&body).unwrap_or_default())
}

/// Returns a response with a JSON document.
fn json(status: StatusCode, body: Vec<u8>) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}
