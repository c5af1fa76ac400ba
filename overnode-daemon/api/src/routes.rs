//! The routes. Each is declared once, as one line of `routes!`: the daemon serves it, and the
//! command requests it. [`Request`] and [`Reply`] have a variant for each.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::documents::*;
use super::status::{ExternalPeerStatus, Status as StatusDocument};

/// The HTTP method of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Has no body and changes nothing.
    Get,
    /// Has a JSON document as its body.
    Post,
}

/// A route of the API.
pub trait Route {
    /// The document in the body of a request; `()` for none.
    type Request: Serialize + DeserializeOwned + Send + 'static;
    /// The document in the answer.
    type Answer: Serialize + DeserializeOwned;
    /// The method.
    const METHOD: Method;
    /// The path.
    const PATH: &'static str;
}

/// Reads the body of a request.
pub type Reader = fn(&[u8]) -> serde_json::Result<Request>;

macro_rules! routes {
    ($(
        $(#[doc = $doc:literal])+
        $name:ident: $method:ident $path:literal, $request:ty => $answer:ty;
    )+) => {
        $(
            $(#[doc = $doc])+
            #[derive(Clone, Copy, Debug)]
            pub struct $name;

            impl Route for $name {
                type Request = $request;
                type Answer = $answer;
                const METHOD: Method = Method::$method;
                const PATH: &'static str = $path;
            }
        )+

        /// A request, by its route.
        #[derive(Debug)]
        pub enum Request {
            $($(#[doc = $doc])+ $name($request),)+
        }

        /// An answer, by its route. The JSON form is the document in the variant.
        #[derive(Debug, Serialize)]
        #[serde(untagged)]
        #[allow(clippy::large_enum_variant, reason = "there is one at a time")]
        pub enum Reply {
            $($(#[doc = $doc])+ $name($answer),)+
        }

        /// All routes: method, path, and the function that reads the body of a request. For a
        /// request without a body, it reads `null`.
        pub const ALL: &[(Method, &str, Reader)] = &[
            $((Method::$method, $path, |body| serde_json::from_slice(body).map(Request::$name)),)+
        ];
    };
}

routes! {
    /// Versions of the daemon and its protocols.
    Version: Get "/v1/version", () => super::Version;
    /// The node's status.
    Status: Get "/v1/status", () => StatusDocument;
    /// The stream of [`MonitorEvent`](super::MonitorEvent)s, one JSON object per line. The document
    /// is the first of them.
    Monitor: Get "/v1/monitor", () => super::Watching;
    /// Everything the node knows, without secrets.
    Inspect: Get "/v1/inspect", () => Value;
    /// Whether an address can be given to a container now.
    Prime: Get "/v1/prime", () => Primed;
    /// Starts the node, or adds targets.
    Launch: Post "/v1/launch", super::Launch => Launched;
    /// The settings of the node.
    Get: Get "/v1/settings", () => Settings;
    /// Changes settings of the node.
    Set: Post "/v1/settings", super::Set => Settings;
    /// Adds targets.
    Connect: Post "/v1/connect", super::Connect => Targets;
    /// Removes targets.
    Forget: Post "/v1/forget", super::Forget => Targets;
    /// Attaches a network namespace.
    Attach: Post "/v1/attach", super::Attach => Attached;
    /// Detaches a network namespace.
    Detach: Post "/v1/detach", super::Detach => Detached;
    /// Reclaims the address space of a node that is gone for good. Answers at once.
    Reclaim: Post "/v1/reclaim", super::Reclaim => Reclaimed;
    /// Adds addresses to a name.
    DnsAdd: Post "/v1/dns/add", super::DnsAdd => DnsAddresses;
    /// Removes addresses from a name.
    DnsRemove: Post "/v1/dns/remove", super::DnsRemove => DnsAddresses;
    /// Looks up a name.
    DnsLookup: Post "/v1/dns/lookup", super::DnsLookup => DnsAddresses;
    /// Leaves the cluster and removes everything. The daemon exits afterward.
    Reset: Post "/v1/reset", super::Reset => WasReset;
    /// The external WireGuard peers.
    ExternalPeers: Get "/v1/external-peers", () => Vec<ExternalPeerStatus>;
    /// Adds an external WireGuard peer.
    AddExternalPeer: Post "/v1/external-peers", super::AddExternalPeer => ExternalPeerAdded;
    /// Removes an external WireGuard peer.
    RemoveExternalPeer: Post "/v1/external-peers/remove",
        super::RemoveExternalPeer => ExternalPeerRemoved;
}

/// The path of [`Monitor`].
pub const MONITOR: &str = <Monitor as Route>::PATH;
/// The path of the status for Prometheus, as text.
pub const METRICS: &str = "/v1/metrics";
