//! The daemon's own command line.

use std::net::{AddrParseError, IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use clap::Parser;
use overnode_api::{DEFAULT_RUN_DIR, DEFAULT_STATE_DIR};

use crate::docker;

/// The environment variable with the directory in which a Docker engine looks for plugins.
pub const DOCKER_PLUGINS: &str = "OVERNODE_DOCKER_PLUGINS";

/// `None` for an empty environment variable, which counts as unset and must not keep a node from
/// starting.
type MaybeAddress = Option<SocketAddr>;

fn address_if_any(text: &str) -> Result<MaybeAddress, AddrParseError> {
    if text.is_empty() { Ok(None) } else { text.parse().map(Some) }
}

/// The daemon of an overnode node. `overnode launch` starts it, so there is rarely a reason to run
/// it by hand.
#[derive(Clone, Debug, PartialEq, Eq, Parser)]
#[command(name = "overnoded", version)]
pub struct Options {
    /// Directory for the node's identity, keys and addresses
    #[arg(long, env = "OVERNODE_STATE_DIR", value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    pub state_dir: PathBuf,

    /// Directory for the socket
    #[arg(long, env = "OVERNODE_RUN_DIR", value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    pub run_dir: PathBuf,

    /// Directory in which a Docker engine looks for plugins [default: /run/docker/plugins if both
    /// directories above have their defaults; otherwise no engine is served]
    #[arg(long, env = DOCKER_PLUGINS, value_name = "DIR")]
    pub docker_plugins: Option<PathBuf>,

    /// Socket of the Docker engine
    #[arg(
        long,
        env = "OVERNODE_DOCKER_SOCKET",
        value_name = "PATH",
        default_value = docker::ENGINE
    )]
    pub docker_socket: PathBuf,

    /// Serve metrics for Prometheus at this address, for example 127.0.0.1:6785 [default: no port;
    /// the socket serves them at /v1/metrics]
    #[arg(
        long,
        env = "OVERNODE_METRICS",
        value_name = "ADDRESS:PORT",
        default_value = "",
        hide_default_value = true,
        value_parser = address_if_any
    )]
    pub metrics: MaybeAddress,

    /// Log more, including messages of the eBPF programs
    #[arg(long, env = "OVERNODE_DEBUG", value_parser = clap::builder::FalseyValueParser::new())]
    pub debug: bool,

    /// Log without colors; NO_COLOR in the environment does the same
    #[arg(long)]
    pub no_color: bool,

    /// What to do instead of running a node.
    #[command(subcommand)]
    pub command: Option<Offline>,
}

/// Tasks for a node whose daemon does not run. `overnode` starts them.
#[derive(Clone, Debug, PartialEq, Eq, clap::Subcommand)]
pub enum Offline {
    /// Destroy the node
    Reset {
        /// Even if containers are attached
        #[arg(long)]
        force: bool,
    },
    /// Delete the interface of the container that has this address
    DeleteInterface {
        /// The container's address
        address: IpAddr,
    },
}

impl Options {
    /// Returns the locations of the Docker engine to serve, or `None` if no engine is served.
    pub fn docker(&self) -> Option<docker::SocketPaths> {
        let plugins =
            docker_plugins(&self.state_dir, &self.run_dir, self.docker_plugins.as_deref())?;
        Some(docker::SocketPaths { plugins, engine: self.docker_socket.clone() })
    }

    /// Returns true if the log may have colors.
    pub fn color(&self) -> bool {
        // https://no-color.org: any value except an empty one.
        !self.no_color && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
    }
}

/// Returns the plugin directory of the Docker engine that a node with these directories serves. A
/// machine can run several nodes, but an engine belongs to one of them. A node with non-default
/// directories therefore serves an engine only if `given` names its plugin directory.
pub fn docker_plugins(state_dir: &Path, run_dir: &Path, given: Option<&Path>) -> Option<PathBuf> {
    let is_usual =
        state_dir == Path::new(DEFAULT_STATE_DIR) && run_dir == Path::new(DEFAULT_RUN_DIR);
    let usual = is_usual.then_some(Path::new(docker::PLUGINS));
    given.filter(|given| !given.as_os_str().is_empty()).or(usual).map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_have_defaults() {
        let options = Options::parse_from(["overnoded"]);
        assert_eq!(options.state_dir, PathBuf::from(DEFAULT_STATE_DIR));
        assert_eq!(options.run_dir, PathBuf::from(DEFAULT_RUN_DIR));
    }

    #[test]
    fn metrics_are_served_where_an_address_is_given() {
        let metrics = |value: &str| {
            Options::try_parse_from(["overnoded", "--metrics", value]).map(|it| it.metrics)
        };
        assert_eq!(Options::parse_from(["overnoded"]).metrics, None);
        assert_eq!(metrics("").unwrap(), None);
        assert_eq!(metrics("[::1]:6785").unwrap(), Some("[::1]:6785".parse().unwrap()));
        assert!(metrics("6785").is_err());
    }

    #[test]
    fn only_a_node_with_default_directories_serves_the_default_engine() {
        let docker = |arguments: &[&str]| {
            let words = ["overnoded"].iter().chain(arguments);
            Options::parse_from(words).docker().map(|places| places.plugins)
        };
        assert_eq!(docker(&[]), Some(PathBuf::from(docker::PLUGINS)));
        assert_eq!(docker(&["--state-dir", "/tmp/other"]), None);
        assert_eq!(docker(&["--run-dir", "/tmp/other"]), None);
        assert_eq!(
            docker(&["--run-dir", "/tmp/other", "--docker-plugins", "/x"]),
            Some("/x".into())
        );
    }
}
