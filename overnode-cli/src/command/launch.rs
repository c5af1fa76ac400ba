//! Implements `overnode launch`.

use std::fs;
use std::os::unix::fs::MetadataExt;

use overnode_api::{self as api, LaunchOutcome, Launched, Token, routes};
use tokio::signal::unix::{SignalKind, signal};

use super::{listed, read_secret, require_root, warn};
use crate::client::Client;
use crate::failure::Failure;
use crate::options::{Context, Launch};
use crate::start::{self, Started};
use crate::strength::weakness;

/// Starts the daemon if none is running, and makes it launch the node. If the launch fails, a
/// daemon that this command started is stopped again.
///
/// # Errors
/// Fails if the node does not run as requested afterwards.
pub(super) async fn run(context: &Context, wanted: Launch) -> Result<String, Failure> {
    let token = token(&wanted)?;
    require_root("launch")?;
    let warnings: Vec<String> =
        weakness(token.expose()).into_iter().chain(readable(&wanted)).collect();
    let client = Client::new(context);
    let (started, _) = start::ensure_running(context, &client).await?;
    let request = api::Launch {
        id: wanted.id,
        token,
        hosts: wanted.hosts,
        nickname: wanted.nickname,
        interface: wanted.interface,
        mtu: wanted.mtu,
        discovery: wanted.no_discovery.then_some(false),
        xdp: wanted.xdp,
        bulk: wanted.bulk,
        bulk_workers: wanted.bulk_workers,
        dns: wanted.no_dns.then_some(false),
        dns_domain: wanted.dns_domain,
        docker: wanted.no_docker.then_some(false),
        subnet: wanted.subnet,
        range: wanted.range,
        restart: started.is_some(),
    };
    let launched = tokio::select! {
        launched = client.post::<routes::Launch>(&request) => launched,
        why = interrupted() => Err(why),
    };
    match (launched, started) {
        (Ok(launched), _) => {
            warnings.iter().for_each(warn);
            Ok(describe(&launched))
        }
        (Err(why), None) => Err(why),
        (Err(why), Some(started)) => Err(undo(started, why).await),
    }
}

async fn undo(started: Started, why: Failure) -> Failure {
    match started.stop().await {
        Ok(()) => why,
        Err(also) => why.and(also),
    }
}

/// Returns when SIGINT or SIGTERM asks this command to end.
async fn interrupted() -> Failure {
    let failure = |signal: &str| {
        Failure::failed(format_args!("interrupted by {signal}: launch again when ready"))
    };
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => failure("SIGINT"),
        _ = terminate.recv() => failure("SIGTERM"),
    }
}

/// Returns the token from the option, the file or the environment, in this order.
fn token(wanted: &Launch) -> Result<Token, Failure> {
    let text = match (&wanted.token, &wanted.token_file) {
        (Some(token), _) => token.clone(),
        (None, Some(file)) => read_secret("--token-file", file)?.to_string(),
        (None, None) => match std::env::var("OVERNODE_TOKEN") {
            Ok(token) => token,
            Err(std::env::VarError::NotPresent) => {
                return Err(Failure::usage(
                    "the cluster's token is missing: give --token, --token-file or OVERNODE_TOKEN; \
                     `overnode token` creates one",
                ));
            }
            Err(std::env::VarError::NotUnicode(_)) => {
                return Err(Failure::usage(
                    "OVERNODE_TOKEN is not valid UTF-8: set it to the cluster's token",
                ));
            }
        },
    };
    Token::new(text).map_err(Failure::usage)
}

/// Returns a warning if other users can read the token file.
fn readable(wanted: &Launch) -> Option<String> {
    let file = wanted.token_file.as_ref().filter(|_| wanted.token.is_none())?;
    let found = fs::metadata(file).ok().filter(fs::Metadata::is_file)?;
    (found.mode() & 0o044 != 0).then(|| {
        format!(
            "other users of this host can read the token in {0}: run `chmod go= {0}`",
            file.display()
        )
    })
}

fn describe(launched: &Launched) -> String {
    let Launched { outcome, id, nickname, targets, changed } = launched;
    let what = match outcome {
        LaunchOutcome::Started => "launched",
        LaunchOutcome::Restarted => "restarted",
        LaunchOutcome::AlreadyRunning => "already running",
    };
    let with =
        if changed.is_empty() { String::new() } else { format!(" with {}", changed.join(" ")) };
    format!("node {id} ({nickname}): {what}{with}; targets: {}\n", listed(targets))
}
