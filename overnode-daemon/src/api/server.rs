//! The HTTP server of the API and its routes.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use futures_util::stream;
use serde::de::DeserializeOwned;
use tokio::net::{UnixListener, UnixSocket};
use tokio::sync::{mpsc, oneshot};

use super::{ApiError, BODY_LIMIT, Call, ErrorKind, EventKind, Reply, Request, error::ErrorBody};
use crate::metrics;
use crate::monitor::hub::{Hub, line_now};

/// How long answers in flight may take to be read after the node has ended.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// Maximum number of connections waiting to be accepted.
const BACKLOG: u32 = 128;

/// Creates the socket. Only its owner may use it, from the moment the file exists. An existing
/// socket is replaced, so the caller must know that no other daemon listens on it.
///
/// # Errors
/// Returns the system's error, or `InvalidInput` if the path is longer than the 107 bytes that a
/// socket allows.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    let fresh = path.with_extension("new");
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let socket = UnixSocket::new_stream()?;
    // Linux gives the file the mode that the socket has when it is bound (net/unix/af_unix.c,
    // unix_bind_bsd).
    //
    // SAFETY: fchmod takes no pointers, and the descriptor is open.
    if unsafe { libc::fchmod(socket.as_raw_fd(), 0o600) } != 0 {
        return Err(io::Error::last_os_error());
    }
    socket.bind(&fresh)?;
    let listener = socket.listen(BACKLOG)?;
    fs::set_permissions(&fresh, Permissions::from_mode(0o600))?;
    fs::rename(&fresh, path)?;
    Ok(listener)
}

/// Answers requests until the node ends, which drops the other end of `node`.
///
/// # Errors
/// Returns an error if the listener fails.
pub async fn serve(listener: UnixListener, node: mpsc::Sender<Call>, hub: Hub) -> io::Result<()> {
    let (gone, last) = (node.clone(), node.clone());
    let serving = axum::serve(listener, router(node, hub))
        .with_graceful_shutdown(async move { gone.closed().await });
    tokio::select! {
        ended = serving => ended,
        () = async { last.closed().await; tokio::time::sleep(LAST_ANSWERS).await } => Ok(()),
    }
}

fn router(node: mpsc::Sender<Call>, hub: Hub) -> Router {
    Router::new()
        .route("/v1/version", get(|node| ask(node, Request::Version)))
        .route("/v1/status", get(|node| ask(node, Request::Status)))
        .route("/v1/inspect", get(|node| ask(node, Request::Inspect)))
        .route("/v1/metrics", get(|State(node)| metrics::answer(node)))
        .route("/v1/prime", get(|node| ask(node, Request::Prime)))
        .route("/v1/monitor", get(|node| monitor(node, hub)))
        .route("/v1/launch", with_body(Request::Launch))
        .route("/v1/connect", with_body(Request::Connect))
        .route("/v1/forget", with_body(Request::Forget))
        .route("/v1/attach", with_body(Request::Attach))
        .route("/v1/detach", with_body(Request::Detach))
        .route("/v1/reclaim", with_body(Request::Reclaim))
        .route("/v1/dns/add", with_body(Request::DnsAdd))
        .route("/v1/dns/remove", with_body(Request::DnsRemove))
        .route("/v1/dns/lookup", with_body(Request::DnsLookup))
        .route("/v1/reset", with_body(Request::Reset))
        .route(
            "/v1/external-peers",
            with_body(Request::AddExternalPeer).get(|node| ask(node, Request::ListExternalPeers)),
        )
        .route("/v1/external-peers/remove", with_body(Request::RemoveExternalPeer))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(node)
}

type Node = State<mpsc::Sender<Call>>;

fn with_body<T: DeserializeOwned + Send + 'static>(
    request: fn(T) -> Request,
) -> MethodRouter<mpsc::Sender<Call>> {
    post(move |node: Node, body: Result<Bytes, BytesRejection>| async move {
        let bytes = match body {
            Ok(bytes) => bytes,
            Err(rejection) => {
                let message =
                    format!("the request body could not be read: {}", rejection.body_text());
                return refuse(rejection.status(), &ApiError::usage(message));
            }
        };
        match serde_json::from_slice(&bytes) {
            Ok(body) => ask(node, request(body)).await,
            Err(error) => {
                ApiError::usage(format_args!("the request body is not the expected JSON: {error}"))
                    .into_response()
            }
        }
    })
}

async fn ask(State(node): Node, request: Request) -> Response {
    match call(&node, request).await {
        Ok(reply) => reply.into_response(),
        Err(error) => error.into_response(),
    }
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

/// Streams events until the reader disconnects or the daemon ends.
async fn monitor(State(node): Node, hub: Hub) -> Response {
    // Subscribe before asking the node: events are only emitted while there is a reader.
    let reader = match hub.read() {
        Ok(reader) => reader,
        Err(error) => return ApiError::refused(error).into_response(),
    };
    let first = match call(&node, Request::Monitor).await {
        Ok(Reply::Watching(watching)) => line_now(EventKind::Watching(watching)),
        Ok(other) => return other.into_response(),
        Err(error) => return error.into_response(),
    };
    let lines = stream::unfold((Some(first), reader), |(first, mut reader)| async move {
        let line = match first {
            Some(first) => first,
            None => reader.next().await?,
        };
        Some((Ok::<_, io::Error>(line), (None, reader)))
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

async fn unknown_path(uri: Uri) -> ApiError {
    ApiError::missing(format_args!(
        "{} is not a path of this API: every path starts with /v1/",
        uri.path()
    ))
}

async fn wrong_method(method: Method, uri: Uri) -> Response {
    let message =
        format!("{} does not accept {method}: use the other one of GET and POST", uri.path());
    refuse(StatusCode::METHOD_NOT_ALLOWED, &ApiError::usage(message))
}

impl IntoResponse for Reply {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self) {
            Ok(body) => json(StatusCode::OK, body),
            Err(error) => {
                ApiError::failed(format_args!("the answer could not be encoded as JSON: {error}"))
                    .into_response()
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = match self.kind {
            ErrorKind::Usage => StatusCode::BAD_REQUEST,
            ErrorKind::Refused => StatusCode::CONFLICT,
            ErrorKind::Missing => StatusCode::NOT_FOUND,
            ErrorKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        };
        refuse(status, &self)
    }
}

fn refuse(status: StatusCode, error: &ApiError) -> Response {
    let body = ErrorBody { error: error.message.clone() };
    json(status, serde_json::to_vec(&body).unwrap_or_default())
}

fn json(status: StatusCode, body: Vec<u8>) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}
