//! Exports the node's status as metrics for Prometheus.
//!
//! [`render`] writes the text. [`serve`] answers on a TCP port, if one is configured, and
//! `GET /v1/metrics` on the unix socket returns the same text. `docs/reference/metrics.md` lists
//! every metric; a test compares it with the code.
//!
//! Names have the prefix `overnode_` and base units (seconds, bytes, ratios of 1). Names of
//! counters end in `_total`. The number of label values is bounded: labels hold node IDs, reasons
//! and states, but never container addresses or names.

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

use overnode_api::Status;

use crate::dispatch::{Call, call, refusal, response};
use overnode_api::routes::{Reply, Request};

/// The content type of the OpenMetrics text format.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Retry interval for a port that cannot be bound.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// Renders a node's status in the OpenMetrics text format.
pub fn render(status: Status) -> String {
    let mut registry = Registry::with_prefix("overnode");
    registry.register_collector(Box::new(families::Families(status)));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = encode(&mut text, &registry);
    text
}

/// Answers a request for metrics.
pub async fn answer(node: mpsc::Sender<Call>) -> Response {
    match call(&node, Request::Status(())).await {
        Ok(Reply::Status(status)) => {
            ([(header::CONTENT_TYPE, CONTENT_TYPE)], render(status)).into_response()
        }
        Ok(other) => response(&other),
        Err(error) => refusal(&error),
    }
}

/// Serves metrics on this address until the process ends. If the address does not exist yet or is
/// in use, retries forever: the network must work without monitoring. The port is read-only and
/// serves nothing but metrics.
pub async fn serve(address: SocketAddr, node: mpsc::Sender<Call>) {
    let mut reported = String::new();
    loop {
        let why = match TcpListener::bind(address).await {
            Ok(listener) => {
                tracing::info!("serving metrics at http://{address}/metrics");
                port::serve(listener, node.clone()).await.to_string()
            }
            Err(error) => error.to_string(),
        };
        if why != reported {
            tracing::warn!(
                "metrics cannot be served at {address}: {why}; retrying every {} s",
                RETRY_INTERVAL.as_secs()
            );
            reported = why;
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}
