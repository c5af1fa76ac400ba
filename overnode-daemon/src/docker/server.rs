//! The server on the plugin socket: HTTP with JSON.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response as HttpResponse};
use serde::Serialize;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};

use super::Call;
use super::engine::EngineEvent;
use crate::api::server::bind;
use overnode_core::docker::NAME;
use overnode_core::docker::message::{BODY_LIMIT, Refusal, Request, Response};
use overnode_trust as trust;

/// Interval of checks that the socket is still in the plugin directory. Also the retry interval.
const CHECK_INTERVAL: Duration = Duration::from_secs(3);
const MEDIA_TYPE: &str = "application/vnd.docker.plugins.v1.2+json";

/// The error of both protocols: the network driver and the IPAM driver use different field names.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ErrorBody<'a> {
    err: &'a str,
    error: &'a str,
}

/// Serves `socket` until the receiver of `calls` is dropped. Recreates the socket if the file is
/// removed.
pub(super) async fn serve(
    socket: PathBuf,
    bound: Arc<AtomicU64>,
    calls: mpsc::Sender<Call>,
    events: mpsc::Sender<EngineEvent>,
) {
    let mut reported = None;
    while !calls.is_closed() {
        let trouble = match listen(&socket) {
            Ok((listener, inode)) => {
                bound.store(inode, Ordering::Relaxed);
                report_trouble(&events, &mut reported, None).await;
                tokio::select! {
                    served = axum::serve(listener, router(calls.clone())) => {
                        served.err().map(|why| why.to_string())
                    }
                    () = removed(&socket, inode) => None,
                }
            }
            Err(why) => Some(format!(
                "Docker networks cannot be served at {}: {why}; the node keeps trying",
                socket.display()
            )),
        };
        if trouble.is_some() {
            report_trouble(&events, &mut reported, trouble).await;
            tokio::time::sleep(CHECK_INTERVAL).await;
        }
    }
}

async fn report_trouble(
    events: &mpsc::Sender<EngineEvent>,
    reported: &mut Option<String>,
    trouble: Option<String>,
) {
    if *reported != trouble {
        reported.clone_from(&trouble);
        let _ = events.send(EngineEvent::Trouble(trouble)).await;
    }
}

fn listen(socket: &Path) -> io::Result<(UnixListener, u64)> {
    if let Some(folder) = socket.parent() {
        std::fs::create_dir_all(folder)?;
        trust::check_directory(folder).map_err(io::Error::other)?;
    }
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        return Err(io::Error::other(format!(
            "another process already serves the driver {NAME} there"
        )));
    }
    let listener = bind(socket)?;
    Ok((listener, std::fs::metadata(socket)?.ino()))
}

async fn removed(socket: &Path, inode: u64) {
    loop {
        tokio::time::sleep(CHECK_INTERVAL).await;
        if std::fs::metadata(socket).map(|found| found.ino()).ok() != Some(inode) {
            return;
        }
    }
}

fn router(calls: mpsc::Sender<Call>) -> Router {
    Router::new().fallback(answer).layer(DefaultBodyLimit::max(BODY_LIMIT)).with_state(calls)
}

async fn answer(
    State(calls): State<mpsc::Sender<Call>>,
    uri: Uri,
    body: Result<Bytes, BytesRejection>,
) -> HttpResponse {
    let bytes = match body {
        Ok(bytes) => bytes,
        Err(rejection) => {
            return refuse(
                rejection.status(),
                &format!("the request body could not be read: {}", rejection.body_text()),
            );
        }
    };
    match ask(&calls, uri.path(), &bytes).await {
        Ok(response) => json(StatusCode::OK, &response),
        Err(refusal) => {
            let status = match refusal {
                Refusal::Malformed(_) => StatusCode::BAD_REQUEST,
                Refusal::Unknown(_) => StatusCode::NOT_FOUND,
                // The protocols report a request that was understood but not carried out with
                // status 200.
                Refusal::Refused(_) => StatusCode::OK,
            };
            refuse(status, &refusal.to_string())
        }
    }
}

async fn ask(calls: &mpsc::Sender<Call>, path: &str, body: &[u8]) -> Result<Response, Refusal> {
    let request = Request::parse(path, body)?;
    let stopped =
        || Refusal::new("the overnode node is stopping: `overnode resume` starts it again");
    let (answer, answered) = oneshot::channel();
    calls.send((request, answer)).await.map_err(|_| stopped())?;
    answered.await.map_err(|_| stopped())?
}

fn refuse(status: StatusCode, why: &str) -> HttpResponse {
    json(status, &ErrorBody { err: why, error: why })
}

fn json(status: StatusCode, body: &impl Serialize) -> HttpResponse {
    match serde_json::to_vec(body) {
        Ok(body) => (status, [(header::CONTENT_TYPE, MEDIA_TYPE)], body).into_response(),
        Err(why) => (StatusCode::INTERNAL_SERVER_ERROR, why.to_string()).into_response(),
    }
}
