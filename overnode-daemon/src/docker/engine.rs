//! A client of the engine's API: lists the containers that have our endpoints and manages the
//! default network. Every exchange has a time limit and a size limit. An engine that is absent or
//! does not answer is not an error; the request is repeated later.
//!
//! The paths of the API (docs.docker.com/reference/api/engine) contain no version, so the engine
//! uses its newest one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, StatusCode, header};
use hyper_util::rt::TokioIo;
use ipnet::IpNet;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::NAME;
use overnode_core::docker::report::{
    Details, ListedContainer, ListedNetwork, Report, Version, is_default, our_networks, too_old,
    with_details,
};
use overnode_types::text::reason;

/// Time limit of one request. While it creates a network, the engine in turn calls the plugin.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest accepted answer, in bytes.
const ANSWER_LIMIT: usize = 32 << 20;
/// Interval of reports when nothing happens.
const REPORT_INTERVAL: Duration = Duration::from_secs(30);
/// Retry interval for failed operations, and the longest delay of a report that was ordered.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// Delay of the first report after a container has joined: the engine lists it a moment later.
const REPORT_DELAY: Duration = Duration::from_millis(100);
/// Least time between two reports, whatever happens in the containers.
const REPORT_SPACING: Duration = Duration::from_millis(250);
/// The engine's stream of events, without those of health checks that change nothing.
const EVENTS: &str = "/events?filters=%7B%22type%22%3A%5B%22container%22%2C%22network%22%5D%2C\
                      %22event%22%3A%5B%22start%22%2C%22die%22%2C%22rename%22%2C%22health_status\
                      %22%2C%22connect%22%2C%22disconnect%22%5D%7D";

/// An order to the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Report the containers soon. Set `again` if the last report was not sufficient.
    Look {
        /// Wait longer than before.
        again: bool,
    },
    /// Create the default network with this subnet, as soon as an engine is available.
    CreateDefault(IpNet),
    /// Remove the default network.
    RemoveDefault {
        /// Disconnect the containers that use the network. Without it, the engine refuses to remove
        /// a network that is in use.
        force: bool,
    },
}

/// A result from the client, or from the plugin server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineEvent {
    /// The engine's containers and networks.
    Report(Report),
    /// The result of creating the default network. A failed attempt is repeated.
    Default(Result<(), EngineError>),
    /// The result of removing the default network.
    Removed(Result<(), EngineError>),
    /// Why the plugin socket cannot be served, or `None` if it is served again.
    Trouble(Option<String>),
}

/// Why an operation failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// There is no engine, or it does not answer properly.
    #[error("no Docker engine answers at {}: {why}", socket.display())]
    Absent {
        /// The engine's socket.
        socket: PathBuf,
        /// The reason.
        why: String,
    },
    /// The engine refused.
    #[error("{0}")]
    Refused(String),
}

#[derive(Deserialize)]
struct ErrorBody {
    message: String,
}

/// Carries out orders and reports periodically, until the receiver of `events` or the sender of
/// `orders` is dropped.
pub(super) async fn watch(
    socket: PathBuf,
    mut orders: mpsc::UnboundedReceiver<Order>,
    events: mpsc::Sender<EngineEvent>,
) {
    let mut engine = Engine { socket, details: BTreeMap::new() };
    let mut wanted_subnet: Option<IpNet> = None;
    let mut retry_at = Instant::now();
    let mut report_at = Instant::now();
    let mut reported_at = report_at;
    let mut delay = REPORT_DELAY;
    loop {
        let next = if wanted_subnet.is_some() { report_at.min(retry_at) } else { report_at };
        let event = tokio::select! {
            order = orders.recv() => match order {
                None => return,
                Some(Order::Look { again }) => {
                    delay = if again { (delay * 2).min(RETRY_INTERVAL) } else { REPORT_DELAY };
                    let soon = (Instant::now() + delay).max(reported_at + REPORT_SPACING);
                    report_at = report_at.min(soon);
                    continue;
                }
                Some(Order::CreateDefault(subnet)) => {
                    wanted_subnet = Some(subnet);
                    retry_at = Instant::now();
                    continue;
                }
                Some(Order::RemoveDefault { force }) => {
                    wanted_subnet = None;
                    EngineEvent::Removed(engine.remove_default(force).await)
                }
            },
            () = sleep_until(next) => match wanted_subnet {
                Some(subnet) if retry_at <= Instant::now() => {
                    let created = engine.create_default(subnet).await;
                    match &created {
                        Ok(()) => {
                            wanted_subnet = None;
                            report_at = report_at.min(Instant::now() + RETRY_INTERVAL);
                        }
                        Err(_) => retry_at = Instant::now() + RETRY_INTERVAL,
                    }
                    EngineEvent::Default(created)
                }
                Some(_) | None => {
                    reported_at = Instant::now();
                    report_at = reported_at + REPORT_INTERVAL;
                    match engine.report().await {
                        Ok(report) => EngineEvent::Report(report),
                        Err(why) => {
                            tracing::debug!("{why}");
                            continue;
                        }
                    }
                }
            },
        };
        if events.send(event).await.is_err() {
            return;
        }
    }
}

/// Orders a report whenever a container or its membership in networks changes, as the engine's
/// stream of events tells.
pub(super) async fn follow_events(socket: PathBuf, orders: mpsc::UnboundedSender<Order>) {
    loop {
        if let Err(why) = stream_events(&socket, &orders).await {
            tracing::debug!("the engine's events cannot be read: {why:#}");
        }
        // Events may have been missed.
        if orders.send(Order::Look { again: false }).is_err() {
            return;
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

async fn stream_events(socket: &Path, orders: &mpsc::UnboundedSender<Order>) -> anyhow::Result<()> {
    let (mut sender, _connection) = connect(socket).await?;
    let request = request(Method::GET, EVENTS, Bytes::new())?;
    let response = timeout(REQUEST_TIMEOUT, sender.send_request(request)).await??;
    anyhow::ensure!(response.status().is_success(), "its answer is {}", response.status());
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        // Whatever has happened, the next report shows it.
        frame?;
        orders.send(Order::Look { again: false })?;
    }
    Ok(())
}

struct Engine {
    socket: PathBuf,
    /// Details of containers by ID, each with the endpoints and names that the container had at the
    /// time.
    details: BTreeMap<String, ([Vec<String>; 2], Details)>,
}

impl Engine {
    async fn report(&mut self) -> Result<Report, EngineError> {
        let containers: Vec<ListedContainer> = self.get("/containers/json").await?;
        let networks = self.remove_duplicates(self.get("/networks").await?).await?;
        let details = self.details_of(&containers, &our_networks(&networks)).await;
        Ok(Report::of(containers, networks, &details))
    }

    /// Asks for the details of new containers.
    async fn details_of(
        &mut self,
        containers: &[ListedContainer],
        ours: &BTreeSet<String>,
    ) -> BTreeMap<&str, &Details> {
        let wanted = with_details(containers, ours);
        self.details.retain(|id, _| wanted.contains(id));
        for listed in containers.iter().filter(|listed| wanted.contains(listed.id())) {
            let version = [listed.endpoint_ids(), listed.names()];
            if self.details.get(listed.id()).is_some_and(|(known, _)| *known == version) {
                continue;
            }
            match self.get(&format!("/containers/{}/json", listed.id())).await {
                Ok(details) => _ = self.details.insert(listed.id().to_owned(), (version, details)),
                // The container has ended in the meantime.
                Err(EngineError::Refused(why)) => tracing::debug!("{why}"),
                // One container that is stuck must not keep the others from being reported.
                Err(why @ EngineError::Absent { .. }) => {
                    tracing::debug!("{why}");
                    break;
                }
            }
        }
        self.details.iter().map(|(id, (_, details))| (id.as_str(), details)).collect()
    }

    /// Removes surplus default networks and returns the networks that remain. If creating the
    /// default network takes longer than the time limit of an answer, the repeated request makes
    /// the engine create a second network with the same name.
    async fn remove_duplicates(
        &self,
        networks: Vec<ListedNetwork>,
    ) -> Result<Vec<ListedNetwork>, EngineError> {
        let (mut kept, mut defaults): (Vec<_>, Vec<_>) =
            networks.into_iter().partition(|it| !is_default(it));
        defaults.sort_by(|one, two| two.created.cmp(&one.created));
        let mut left = defaults.len();
        for network in defaults {
            // The engine refuses to remove a network that is in use.
            if left > 1 && self.remove(&network).await.is_ok() {
                tracing::info!(
                    "the Docker engine created the default network twice: removed {}",
                    network.id
                );
                left -= 1;
            } else {
                kept.push(network);
            }
        }
        Ok(kept)
    }

    /// Checks that the engine's version is supported. An engine that does not report its version
    /// passes.
    async fn check_version(&self) -> Result<(), EngineError> {
        let found: Version = self.get("/version").await?;
        match too_old(&found) {
            Some(why) => Err(EngineError::Refused(why)),
            None => Ok(()),
        }
    }

    async fn create_default(&self, subnet: IpNet) -> Result<(), EngineError> {
        self.check_version().await?;
        // A name in the path would also match an ID with that prefix, so list all networks.
        let networks: Vec<ListedNetwork> = self.get("/networks").await?;
        let networks = self.remove_duplicates(networks).await?;
        if networks.iter().any(is_default) {
            return Ok(());
        }
        if let Some(found) = networks.iter().find(|network| network.name == NAME) {
            return Err(EngineError::Refused(format!(
                "Docker has a network named {NAME} with the driver {}: remove it, or create one \
                 under another name with `docker network create --driver {NAME} \
                 --ipam-driver {NAME} --subnet {subnet} NAME`",
                found.driver
            )));
        }
        let body = json!({
            "Name": NAME,
            "CheckDuplicate": true,
            "Driver": NAME,
            "Attachable": false,
            // The engine rejects `--ip` if the subnet was not configured explicitly.
            "IPAM": { "Driver": NAME, "Config": [{ "Subnet": subnet.to_string() }] },
        });
        match self.request(Method::POST, "/networks/create", Some(&body)).await? {
            (status, _) if status.is_success() => Ok(()),
            // The network was created in the meantime.
            (StatusCode::CONFLICT, _) => Ok(()),
            (status, answer) => {
                Err(refused("the default network was not created", status, &answer))
            }
        }
    }

    async fn remove_default(&self, force: bool) -> Result<(), EngineError> {
        let networks: Vec<ListedNetwork> = self.get("/networks").await?;
        for found in networks.iter().filter(|network| is_default(network)) {
            if force {
                let path = format!("/networks/{}", found.id);
                // The list of networks does not include their containers.
                let detailed: ListedNetwork = self.get(&path).await?;
                for container in detailed.containers.unwrap_or_default().into_keys() {
                    let body = json!({ "Container": container, "Force": true });
                    self.request(Method::POST, &format!("{path}/disconnect"), Some(&body)).await?;
                }
            }
            self.remove(found).await?;
        }
        Ok(())
    }

    async fn remove(&self, network: &ListedNetwork) -> Result<(), EngineError> {
        match self.request(Method::DELETE, &format!("/networks/{}", network.id), None).await? {
            (status, _) if status.is_success() || status == StatusCode::NOT_FOUND => Ok(()),
            (status, answer) => {
                Err(refused("the default network was not removed", status, &answer))
            }
        }
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, EngineError> {
        let (status, body) = self.request(Method::GET, path, None).await?;
        if !status.is_success() {
            return Err(refused(&format!("the request {path} failed"), status, &body));
        }
        serde_json::from_slice(&body).map_err(|why| {
            self.unavailable(format!("its answer to {path} is malformed: {}", reason(&why)))
        })
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<&serde_json::Value>,
    ) -> Result<(StatusCode, Bytes), EngineError> {
        match timeout(REQUEST_TIMEOUT, exchange(&self.socket, method, path, body)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(why)) => Err(self.unavailable(format!("{why:#}"))),
            Err(_) => Err(self.unavailable(format!(
                "no answer to {path} within {} s",
                REQUEST_TIMEOUT.as_secs()
            ))),
        }
    }

    fn unavailable(&self, why: String) -> EngineError {
        EngineError::Absent { socket: self.socket.clone(), why }
    }
}

async fn exchange(
    socket: &Path,
    method: Method,
    path: &str,
    body: Option<&serde_json::Value>,
) -> anyhow::Result<(StatusCode, Bytes)> {
    let (mut sender, _connection) = connect(socket).await?;
    let bytes = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
    let response = sender.send_request(request(method, path, bytes.into())?).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_LIMIT)
        .collect()
        .await
        .map_err(|why| anyhow::anyhow!("the answer could not be read: {why}"))?;
    Ok((status, body.to_bytes()))
}

/// Connects to the engine. Dropping the set ends the connection.
async fn connect(socket: &Path) -> anyhow::Result<(SendRequest<Full<Bytes>>, JoinSet<()>)> {
    let stream = UnixStream::connect(socket).await?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let mut driver = JoinSet::new();
    driver.spawn(async { _ = connection.await });
    Ok((sender, driver))
}

fn request(
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<hyper::Request<Full<Bytes>>, hyper::http::Error> {
    hyper::Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "docker")
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::CONNECTION, "close")
        .body(Full::new(body))
}

/// Creates the error for a refusal by the engine, with the engine's own message.
pub fn refused(what: &str, status: StatusCode, body: &[u8]) -> EngineError {
    let message = serde_json::from_slice::<ErrorBody>(body).map(|error| error.message);
    let message = message.unwrap_or_else(|_| status.to_string());
    EngineError::Refused(format!("{what}: Docker says: {}", reason(&message)))
}
