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
use axum::routing::{get, post};
use futures_util::stream;
use tokio::net::{UnixListener, UnixSocket};
use tokio::sync::mpsc;

use super::routes::{Reply, Request};
use super::{ApiError, EventKind, routes};
use crate::dispatch::{BODY_LIMIT, Call, call, refusal, refuse, response};
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
    let mut router = Router::new();
    for &(method, path, read) in routes::ALL.iter().filter(|(_, path, _)| *path != routes::MONITOR)
    {
        router = router.route(
            path,
            match method {
                overnode_api::Method::Get => get(move |node| ask(node, read(b"null"))),
                overnode_api::Method::Post => {
                    post(move |node, body| ask_with_body(node, read, body))
                }
            },
        );
    }
    router
        .route(routes::METRICS, get(|State(node)| metrics::answer(node)))
        .route(routes::MONITOR, get(|node| monitor(node, hub)))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(node)
}

type Node = State<mpsc::Sender<Call>>;

async fn ask_with_body(
    node: Node,
    read: routes::Reader,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    match body {
        Ok(bytes) => ask(node, read(&bytes)).await,
        Err(rejection) => {
            let message = format!("the request body could not be read: {}", rejection.body_text());
            refuse(rejection.status(), &ApiError::usage(message))
        }
    }
}

async fn ask(State(node): Node, request: serde_json::Result<Request>) -> Response {
    let request = match request {
        Ok(request) => request,
        Err(error) => {
            let message = format_args!("the request body is not the expected JSON: {error}");
            return refusal(&ApiError::usage(message));
        }
    };
    match call(&node, request).await {
        Ok(reply) => response(&reply),
        Err(error) => refusal(&error),
    }
}

/// Streams events until the reader disconnects or the daemon ends.
async fn monitor(State(node): Node, hub: Hub) -> Response {
    // Subscribe before asking the node: events are only emitted while there is a reader.
    let reader = match hub.read() {
        Ok(reader) => reader,
        Err(error) => return refusal(&ApiError::refused(error)),
    };
    let first = match call(&node, Request::Monitor(())).await {
        Ok(Reply::Monitor(watching)) => line_now(EventKind::Watching(watching)),
        Ok(other) => return response(&other),
        Err(error) => return refusal(&error),
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

async fn unknown_path(uri: Uri) -> Response {
    refusal(&ApiError::missing(format_args!(
        "{} is not a path of this API: every path starts with /v1/",
        uri.path()
    )))
}

async fn wrong_method(method: Method, uri: Uri) -> Response {
    let message =
        format!("{} does not accept {method}: use the other one of GET and POST", uri.path());
    refuse(StatusCode::METHOD_NOT_ALLOWED, &ApiError::usage(message))
}
