//! How requests reach the node, and how its answers become HTTP responses.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use overnode_api::error::ErrorBody;
use overnode_api::routes::{Reply, Request};
use overnode_api::{ApiError, ErrorKind};
use tokio::sync::{mpsc, oneshot};

/// A request and the channel for its answer.
pub type Call = (Request, oneshot::Sender<Result<Reply, ApiError>>);

/// The socket's file name in the run directory.
pub const SOCKET: &str = "overnode.sock";

/// The largest accepted request body, in bytes.
pub const BODY_LIMIT: usize = 256 * 1024;

/// Sends a request to the node and waits for the answer.
pub(crate) async fn call(node: &mpsc::Sender<Call>, request: Request) -> Result<Reply, ApiError> {
    let (answer, answered) = oneshot::channel();
    let stopped = |()| {
        ApiError::failed("the node stopped before it answered: `overnode resume` starts it again")
    };
    node.send((request, answer)).await.map_err(|_| stopped(()))?;
    answered.await.map_err(|_| stopped(()))?
}

/// Returns the HTTP response of an answer.
pub(crate) fn response(reply: &Reply) -> Response {
    match serde_json::to_vec(reply) {
        Ok(body) => json(StatusCode::OK, body),
        Err(error) => {
            let message = format_args!("the answer could not be encoded as JSON: {error}");
            refusal(&ApiError::failed(message))
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
