//! What `status` tells, for Prometheus: [`render`] makes the text, [`serve`] answers on a port, if
//! one was asked for. `GET /v1/metrics` on the unix socket gives the same. `docs/metrics.md` lists
//! every metric; a test holds the two against each other.
//!
//! Names have the prefix `overnode_`, base units (seconds, bytes, ratios of 1), and `_total` where
//! they only grow. Labels are bounded: IDs of nodes, reasons, states; never addresses or names of
//! containers.

mod families;
mod port;

use std::net::SocketAddr;
use std::time::Duration;

use axum::http::header;
use axum::response::{IntoResponse, Response};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::api::{Call, Reply, Request, Status, server};

/// The format, OpenMetrics' text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A port that could not be had is tried again after this time.
const AGAIN: Duration = Duration::from_secs(10);

/// The metrics of a node, as Prometheus reads them.
pub fn render(status: Status) -> String {
    let mut registry = Registry::with_prefix("overnode");
    registry.register_collector(Box::new(families::Families(status)));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = encode(&mut text, &registry);
    text
}

/// The answer to a request for metrics.
pub async fn answer(node: mpsc::Sender<Call>) -> Response {
    match server::call(&node, Request::Status).await {
        Ok(Reply::Status(status)) => {
            ([(header::CONTENT_TYPE, CONTENT_TYPE)], render(*status)).into_response()
        }
        Ok(other) => other.into_response(),
        Err(error) => error.into_response(),
    }
}

/// Answers on this address as long as the process lives. One that is not there yet, or taken, is
/// tried again: the network works without anybody watching. There is nothing to write here, and
/// nothing but metrics to read.
pub async fn serve(address: SocketAddr, node: mpsc::Sender<Call>) {
    let mut told = String::new();
    loop {
        let why = match TcpListener::bind(address).await {
            Ok(listener) => {
                tracing::info!("metrics are served at http://{address}/metrics");
                port::serve(listener, node.clone()).await.to_string()
            }
            Err(error) => error.to_string(),
        };
        if why != told {
            tracing::warn!(
                "metrics cannot be served at {address}: {why}; it is tried again every {} s",
                AGAIN.as_secs()
            );
            told = why;
        }
        tokio::time::sleep(AGAIN).await;
    }
}
