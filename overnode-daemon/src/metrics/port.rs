//! The TCP port for Prometheus. It bounds everything that a remote client can consume: the number
//! and lifetime of connections, the size of requests, and how often the node is asked.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{CONTENT_TYPE, answer};
use crate::dispatch::Call;
use crate::net::admission::{Admission, Limits, Slot};

/// Limits on concurrent connections and on the rate of connections per source.
const LIMITS: Limits =
    Limits { connections: 32, of_source: 8, interval: Duration::from_millis(20), burst: 100 };
/// Lifetime of a connection. It carries one request, whose head must arrive and whose answer must
/// be read within this time.
const LIFETIME: Duration = Duration::from_secs(10);
/// Largest request head, in bytes. hyper accepts no lower limit.
const MAX_HEAD: usize = 8192;
/// Age up to which a cached answer is reused. The node is asked at most once in this interval.
const CACHE_TTL: Duration = Duration::from_secs(1);
/// A page for browsers that open the port.
const PAGE: &str = "overnode: the metrics are at /metrics\n";

/// Serves connections until the listener fails.
pub(super) async fn serve(listener: TcpListener, node: mpsc::Sender<Call>) -> io::Error {
    let mut admission = Admission::new(LIMITS, StdRng::from_os_rng());
    let metrics = Arc::new(Metrics { node, latest: Mutex::default() });
    let mut tasks = JoinSet::new();
    loop {
        while tasks.try_join_next().is_some() {}
        let (stream, remote) = match listener.accept().await {
            Ok(accepted) => accepted,
            // The client has already gone away.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return error,
        };
        match admission.admit(remote.ip(), Instant::now()) {
            Some(slot) => drop(tasks.spawn(serve_connection(stream, slot, Arc::clone(&metrics)))),
            None => {
                let _ = stream.set_zero_linger();
            }
        }
    }
}

async fn serve_connection(stream: TcpStream, mut slot: Slot, metrics: Arc<Metrics>) {
    let service = service_fn(move |request| {
        let metrics = Arc::clone(&metrics);
        async move { Ok::<_, Infallible>(respond(&request, &metrics).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(LIFETIME)
        .max_buf_size(MAX_HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // The result is irrelevant: the client sees how the connection ends.
        _ = timeout(LIFETIME, connection) => {}
        () = slot.is_lost() => {}
    }
}

async fn respond(request: &Request<Incoming>, metrics: &Metrics) -> Response {
    if request.method() != Method::GET {
        return StatusCode::METHOD_NOT_ALLOWED.into_response();
    }
    match request.uri().path() {
        "/" => PAGE.into_response(),
        "/metrics" => metrics.get().await,
        _ => StatusCode::NOT_FOUND.into_response(),
    }
}

struct Metrics {
    node: mpsc::Sender<Call>,
    /// The latest answer, and when the node gave it.
    latest: Mutex<Option<(Instant, Bytes)>>,
}

impl Metrics {
    /// Returns the metrics. Requests that arrive while the node is being asked wait for the same
    /// answer.
    async fn get(&self) -> Response {
        let mut latest = self.latest.lock().await;
        if let Some((_, text)) = latest.as_ref().filter(|(at, _)| at.elapsed() < CACHE_TTL) {
            return page(text.clone());
        }
        let response = answer(self.node.clone()).await;
        if response.status() != StatusCode::OK {
            return response;
        }
        match axum::body::to_bytes(response.into_body(), usize::MAX).await {
            Ok(text) => {
                *latest = Some((Instant::now(), text.clone()));
                page(text)
            }
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        }
    }
}

fn page(text: Bytes) -> Response {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], Body::from(text)).into_response()
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpSocket;

    use super::*;
    use overnode_api::ApiError;

    /// Starts a server and returns its address and a count of requests to the node. The node
    /// refuses all of them.
    async fn port() -> (SocketAddr, Arc<AtomicU32>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (node, mut calls) = mpsc::channel::<Call>(1);
        let asked = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&asked);
        tokio::spawn(async move {
            while let Some((_, answer)) = calls.recv().await {
                count.fetch_add(1, Ordering::Relaxed);
                let _ = answer.send(Err(ApiError::refused("no node was launched")));
            }
        });
        tokio::spawn(serve(listener, node));
        (address, asked)
    }

    async fn call_from(last: u8, to: SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 3, last], 0).into()).unwrap();
        socket.connect(to).await.unwrap()
    }

    async fn request(mut stream: TcpStream, what: &str) -> String {
        stream.write_all(format!("{what} HTTP/1.1\r\nHost: it\r\n\r\n").as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn the_port_serves_nothing_but_metrics() {
        let (address, asked) = port().await;
        let status = |text: String| text.split(' ').nth(1).unwrap().to_owned();
        assert!(request(call_from(1, address).await, "GET /").await.ends_with(PAGE));
        assert_eq!(status(request(call_from(1, address).await, "GET /v1/status").await), "404");
        assert_eq!(status(request(call_from(1, address).await, "POST /metrics").await), "405");
        assert_eq!(asked.load(Ordering::Relaxed), 0);
        assert_eq!(status(request(call_from(1, address).await, "GET /metrics").await), "409");
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn idle_connections_cannot_keep_prometheus_out() {
        let (address, _asked) = port().await;
        let mut idle = Vec::new();
        for number in 0..4 * LIMITS.connections as u8 {
            idle.push(call_from(number % 5, address).await);
        }
        assert!(request(call_from(77, address).await, "GET /").await.ends_with(PAGE));
        let closed = async |stream: &mut TcpStream| {
            timeout(Duration::from_millis(20), stream.read(&mut [0; 1])).await.is_ok()
        };
        let mut open = 0;
        for stream in &mut idle {
            open += usize::from(!closed(stream).await);
        }
        assert!(open <= LIMITS.connections, "{open} connections are open");
    }

    #[tokio::test]
    async fn an_endless_request_is_refused() {
        let (address, _asked) = port().await;
        let mut stream = call_from(1, address).await;
        stream.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        let mut sent = 0;
        while stream.write_all(b"X-Header: endless endless endless\r\n").await.is_ok() {
            sent += 1;
            assert!(sent < 1_000_000, "the request is never refused");
        }
    }

    #[tokio::test]
    async fn many_requests_at_once_cost_the_node_one_answer() {
        let metrics = {
            let (node, _calls) = mpsc::channel(1);
            Metrics {
                node,
                latest: Mutex::new(Some((Instant::now(), Bytes::from_static(b"cached")))),
            }
        };
        for _ in 0..1000 {
            // The receiver is dropped, so asking the node would fail.
            assert_eq!(metrics.get().await.status(), StatusCode::OK);
        }
        *metrics.latest.lock().await =
            Some((Instant::now().checked_sub(CACHE_TTL).unwrap(), Bytes::new()));
        assert_ne!(metrics.get().await.status(), StatusCode::OK);
    }
}
