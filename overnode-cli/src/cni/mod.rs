//! Implements `overnode-cni`: this program under another name, which container runtimes run as a
//! CNI plugin (specification 1.1).
//!
//! [`config`] parses the request and decides nothing else. This module carries out the request with
//! the daemon. [`result`] formats the answers.

pub mod config;
pub mod error;
mod inside;
pub mod result;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{self, Read as _, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use overnode_api::{
    self as api, Attached, EndpointState, EndpointStatus, ErrorKind, Primed, routes,
};
use overnode_api::{DEFAULT_RUN_DIR, DEFAULT_STATE_DIR};
use serde_json::{Value, json};

use crate::client::{Client, RequestError};
use crate::options::Context;
use crate::start;
use config::{Attachment, Command, Config, INPUT_LIMIT, NEWEST, Task, VERSIONS};
use error::{CniError, Code};

/// Returns whether the program was run under the plugin's name.
pub fn is_meant(program: Option<&OsStr>) -> bool {
    program.and_then(|path| Path::new(path).file_name()).is_some_and(|name| name == "overnode-cni")
}

/// Reads the request from the environment and standard input, carries it out, and writes the result
/// to standard output.
pub fn main() -> ExitCode {
    let env = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    let mut input = Vec::new();
    let read = match config::command(&env) {
        Ok(_) => io::stdin().lock().take(INPUT_LIMIT as u64 + 1).read_to_end(&mut input),
        Err(_) => Ok(0),
    };
    let (output, code) = match read {
        Ok(_) => run(&input, &env),
        Err(why) => {
            let error = CniError::new(
                Code::Io,
                "standard input cannot be read",
                format_args!("{why}; the runtime must send the network configuration there"),
            );
            (Some(error.document(NEWEST)), ExitCode::FAILURE)
        }
    };
    let written = output.map_or(Ok(()), |output| writeln!(io::stdout().lock(), "{output}"));
    if written.is_err() { ExitCode::FAILURE } else { code }
}

fn run(input: &[u8], env: &dyn Fn(&str) -> Option<String>) -> (Option<Value>, ExitCode) {
    // Errors carry the requested version once it is known.
    let mut version = NEWEST.to_owned();
    match answer(input, env, &mut version) {
        Ok(output) => (output, ExitCode::SUCCESS),
        Err(error) => (Some(error.document(&version)), ExitCode::FAILURE),
    }
}

fn answer(
    input: &[u8],
    env: &dyn Fn(&str) -> Option<String>,
    spoken: &mut String,
) -> Result<Option<Value>, CniError> {
    let command = config::command(env)?;
    if command == Command::Version {
        return versions(input).map(Some);
    }
    let config = config::config(input)?;
    let version = config::version(&config, command)?;
    version.clone_into(spoken);
    let task = config::task(command, &config, env)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|why| {
            CniError::new(
                Code::Io,
                "the asynchronous runtime did not start",
                format_args!("{why}; try again"),
            )
        })?;
    let directory =
        |name: &str, default: &str| env(name).map_or_else(|| PathBuf::from(default), PathBuf::from);
    let context = Context {
        state_dir: directory("OVERNODE_STATE_DIR", DEFAULT_STATE_DIR),
        run_dir: config
            .run_dir
            .clone()
            .unwrap_or_else(|| directory("OVERNODE_RUN_DIR", DEFAULT_RUN_DIR)),
        debug: false,
        color: false,
        width: None,
    };
    let node = Node { client: Client::new(&context), context };
    runtime.block_on(async {
        match task {
            Task::Add(wanted) => node.add(version, &config, &wanted).await.map(Some),
            Task::Del(wanted) => node.del(&config, &wanted).await.map(|()| None),
            Task::Check(wanted) => node.check(&config, &wanted).await.map(|()| None),
            Task::Gc(valid) => node.gc(&config.name, &valid).await.map(|()| None),
            Task::Status => node.status().await.map(|()| None),
        }
    })
}

/// Answers `VERSION`. Older runtimes send no configuration.
fn versions(input: &[u8]) -> Result<Value, CniError> {
    let asked = match input {
        [] => None,
        _ => config::config(input)?.cni_version,
    };
    Ok(json!({"cniVersion": asked.as_deref().unwrap_or(NEWEST), "supportedVersions": VERSIONS}))
}

struct Node {
    client: Client,
    context: Context,
}

impl Node {
    async fn add(
        &self,
        version: &str,
        config: &Config,
        wanted: &Attachment,
    ) -> Result<Value, CniError> {
        // Check the result that this one is added to before anything is created.
        result::previous(config)?;
        let netns = wanted.netns.as_ref().map(|path| api::Netns::Path(path.into()));
        let request = api::Attach {
            target: wanted.container.clone(),
            netns,
            address: wanted.address,
            name: wanted.name.clone(),
            cni: Some(api::CniAttach { endpoint: wanted.endpoint.clone(), mac: wanted.mac }),
        };
        let attached: Attached = match self.client.try_post::<routes::Attach>(&request).await {
            Ok(attached) => attached,
            Err(why) => return Err(self.not_added(why).await),
        };
        let dns = match &config.dns {
            Some(_) => None,
            None => self.client.try_get::<routes::Status>().await.ok().map(|status| status.dns),
        };
        let result = result::added(version, config, wanted, &attached, dns.as_ref());
        if result.is_err() {
            self.del(config, wanted).await?;
        }
        result
    }

    async fn not_added(&self, why: RequestError) -> CniError {
        let message = "the container was not attached";
        let code = match &why {
            RequestError::NotRunning => Code::TryAgain,
            RequestError::Refused(refusal) => match refusal.kind {
                ErrorKind::Usage => Code::Config,
                ErrorKind::Missing => Code::UnknownContainer,
                ErrorKind::Refused => match self.client.try_get::<routes::Prime>().await {
                    Ok(Primed { ready: false, .. }) => Code::TryAgain,
                    Ok(_) | Err(_) => Code::Node,
                },
                ErrorKind::Failed => Code::Node,
            },
            RequestError::Denied | RequestError::Stranger(_) | RequestError::Broken(_) => Code::Io,
        };
        CniError::new(code, message, self.client.explain(why))
    }

    async fn del(&self, config: &Config, wanted: &Attachment) -> Result<(), CniError> {
        match self.detach(wanted.container.clone(), wanted.endpoint.clone()).await {
            Ok(()) => Ok(()),
            Err(RequestError::NotRunning) => cut(&self.context, config, wanted).await,
            Err(why) => {
                let details = self.client.explain(why);
                Err(CniError::new(Code::TryAgain, "the container was not detached", details))
            }
        }
    }

    /// Detaches a container. Succeeds if the container is not attached any more.
    async fn detach(
        &self,
        target: api::Target,
        endpoint: api::CniEndpoint,
    ) -> Result<(), RequestError> {
        let request = api::Detach { target, cni: Some(endpoint) };
        match self.client.try_post::<routes::Detach>(&request).await {
            Err(RequestError::Refused(refusal)) if refusal.kind == ErrorKind::Missing => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    async fn check(&self, config: &Config, wanted: &Attachment) -> Result<(), CniError> {
        let Some(expected) = result::previous(config)? else {
            return Err(CniError::new(
                Code::Config,
                "prevResult is missing",
                "CHECK compares with the result of ADD: the runtime must pass it",
            ));
        };
        let wrong = |what: String| {
            let details = "delete the attachment and add it again, or restart the container";
            Err(CniError::new(Code::Node, what, details))
        };
        let known = self.endpoints().await.map_err(|why| {
            CniError::new(Code::TryAgain, "the node cannot be queried", self.client.explain(why))
        })?;
        let is_it = |it: &&EndpointStatus| {
            it.target == wanted.container && is_attachment(it, &wanted.endpoint)
        };
        let Some(found) = known.iter().find(is_it) else {
            return Err(CniError::new(
                Code::UnknownContainer,
                format_args!("{} is not attached to {}", wanted.container, wanted.endpoint.network),
                "add it again, or restart the container",
            ));
        };
        let interface = found
            .cni
            .as_ref()
            .map_or(wanted.endpoint.interface.as_str(), |it| it.interface.as_str());
        if found.state != EndpointState::Attached {
            return wrong(format!("the interface of {} is gone", found.address));
        }
        if !result::has(expected, interface, &found.address.to_string()) {
            return wrong(format!("prevResult does not list {} on {interface}", found.address));
        }
        let netns = wanted.netns.as_deref().unwrap_or_default();
        let is_it = |it: &inside::Interface| {
            it.name == interface && it.address == Some(found.address.addr())
        };
        match inside::interfaces(netns) {
            Ok(Some(interfaces)) => match interfaces.into_iter().find(is_it) {
                Some(found) if found.is_up => Ok(()),
                Some(_) => wrong(format!("{interface} in {netns} is down")),
                None => wrong(format!("{interface} in {netns} does not have {}", found.address)),
            },
            Ok(None) => wrong(format!("{netns} is not a network namespace")),
            Err(why) => wrong(format!("{netns}: {why}")),
        }
    }

    async fn gc(&self, network: &str, valid: &[(String, String)]) -> Result<(), CniError> {
        let known = match self.endpoints().await {
            Ok(known) => known,
            Err(why) => {
                let details = self.client.explain(why);
                return Err(CniError::new(Code::TryAgain, "the node cannot be queried", details));
            }
        };
        let valid: BTreeSet<(&str, &str)> =
            valid.iter().map(|(id, name)| (id.as_str(), name.as_str())).collect();
        let mut errors = Vec::new();
        for found in known {
            let Some(endpoint) = found.cni else { continue };
            let container = found.target.to_string();
            if endpoint.network != network
                || valid.contains(&(container.as_str(), endpoint.ifname.as_str()))
            {
                continue;
            }
            if let Err(why) = self.detach(found.target, endpoint).await {
                errors.push(format!("{container}: {}", self.client.explain(why)));
            }
        }
        if errors.is_empty() {
            return Ok(());
        }
        Err(CniError::new(Code::Node, "some stale attachments were not removed", errors.join("; ")))
    }

    async fn status(&self) -> Result<(), CniError> {
        let message = "containers cannot be added";
        match self.client.try_get::<routes::Prime>().await {
            Ok(Primed { ready: true, .. }) => Ok(()),
            Ok(Primed { waiting_for, .. }) => {
                let why =
                    waiting_for.unwrap_or_else(|| "this node has no addresses to allocate".into());
                Err(CniError::new(
                    Code::NotAvailable,
                    message,
                    format_args!("{why}; `overnode prime` waits until this changes"),
                ))
            }
            Err(why) => {
                // Without a daemon, keys are not renewed. After three minutes, containers reach
                // only other containers of this host.
                let code = match &why {
                    RequestError::NotRunning => Code::Limited,
                    _ => Code::NotAvailable,
                };
                Err(CniError::new(code, message, self.client.explain(why)))
            }
        }
    }

    async fn endpoints(&self) -> Result<Vec<EndpointStatus>, RequestError> {
        self.client.try_get::<routes::Status>().await.map(|status| status.endpoints)
    }
}

fn is_attachment(found: &EndpointStatus, wanted: &api::CniEndpoint) -> bool {
    found.cni.as_ref().is_some_and(|it| it.network == wanted.network && it.ifname == wanted.ifname)
}

/// Deletes the interface while no daemon is running. The daemon releases the address once it runs
/// again and misses the interface.
async fn cut(context: &Context, config: &Config, wanted: &Attachment) -> Result<(), CniError> {
    let Some(netns) = &wanted.netns else { return Ok(()) };
    let failed = |why: String| {
        CniError::new(
            Code::TryAgain,
            "the container was not detached",
            format_args!(
                "the daemon is not running, and {why}; start the daemon with `overnode resume`, \
                 then try again"
            ),
        )
    };
    let Some(found) = inside::interfaces(netns).map_err(&failed)? else { return Ok(()) };
    let ours = [wanted.endpoint.interface.as_str(), overnode_api::CONTAINER_INTERFACE];
    // The path of a deleted namespace may belong to another container by now.
    let listed = config.prev_result.as_ref().and_then(result::addresses);
    let is_meant = |address: &IpAddr| listed.as_ref().is_none_or(|listed| listed.contains(address));
    let found = found.into_iter().filter(|it| ours.contains(&it.name.as_str()));
    let addresses: BTreeSet<IpAddr> = found.filter_map(|it| it.address).filter(is_meant).collect();
    for address in addresses {
        start::offline(context, &["delete-interface", &address.to_string()]).map_err(&failed)?;
    }
    Ok(())
}
