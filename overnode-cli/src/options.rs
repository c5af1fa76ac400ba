//! Defines the command line.

use std::ffi::OsStr;
use std::io::{self, IsTerminal, Write};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};
use ipnet::IpNet;
use overnode_api::bulk::Mode;
use overnode_api::{DEFAULT_RUN_DIR, DEFAULT_STATE_DIR};
use overnode_api::{Host, Target};
use overnode_ebpf::reason::Reason;
use overnode_types::name::Domain;
use overnode_types::{NodeId, PublicKey};

use crate::duration;
use crate::failure::Failure;

/// Joins the containers of many Linux hosts into one private, encrypted network
///
/// Every host runs one node, and all nodes are equal. Nodes find each other, and each of them keeps
/// working when the network splits.
#[derive(Debug, Parser)]
#[command(name = "overnode", version, after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,

    /// The command to run.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  host1 > overnode token --out token             # then copy the file to host2
  host1 > sudo overnode launch --id 1 --token-file token host1 host2
  host2 > sudo overnode launch --id 2 --token-file token host1 host2
  host1 > sudo overnode attach my-container
  host1 > sudo overnode status

Exit status: 0 success, 1 failure (one line on stderr says why and what to do), 2 wrong usage.";

/// Options of every command.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// Print debug messages, and make a daemon that this command starts log more
    #[arg(long, global = true, help_heading = "Global options")]
    pub debug: bool,

    /// Print without colors; setting NO_COLOR in the environment has the same effect
    #[arg(long, global = true, help_heading = "Global options")]
    pub no_color: bool,

    /// Directory for the node's identity, keys and addresses
    #[arg(
        long,
        global = true,
        help_heading = "Global options",
        env = "OVERNODE_STATE_DIR",
        hide_env_values = true,
        value_name = "DIR",
        default_value = DEFAULT_STATE_DIR
    )]
    pub state_dir: PathBuf,

    /// Directory of the daemon's socket
    #[arg(
        long,
        global = true,
        help_heading = "Global options",
        env = "OVERNODE_RUN_DIR",
        hide_env_values = true,
        value_name = "DIR",
        default_value = DEFAULT_RUN_DIR
    )]
    pub run_dir: PathBuf,
}

#[allow(missing_docs, reason = "documentation here would replace the help texts")]
/// The command to run.
#[derive(Debug, Subcommand)]
pub enum Command {
    Launch(Launch),
    Set(Set),
    Get(Get),
    Connect(Connect),
    Forget(Forget),
    Attach(Attach),
    Detach(Detach),
    Expose(Expose),
    Hide(Hide),
    Status(Status),
    /// Print everything the node knows as JSON, without secrets
    #[command(after_help = "\
Example:
  sudo overnode inspect | jq .records")]
    Inspect,
    Monitor(Monitor),
    DnsAdd(DnsAdd),
    DnsRemove(DnsRemove),
    DnsLookup(DnsLookup),
    Prime(Prime),
    Reclaim(Reclaim),
    Reset(Reset),
    /// Start a node that was launched and is not running
    #[command(after_help = "\
Example:
  sudo overnode resume")]
    Resume,
    #[command(subcommand)]
    Peer(Peer),
    Token(Token),
    Completions(Completions),
    /// Print the versions of this command and of the daemon
    #[command(after_help = "\
Example:
  overnode version")]
    Version,
}

/// Print a new random token that cannot be guessed, or write it to a file
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  overnode token --out token                     # readable by its owner only
  overnode token | ssh host1 sudo overnode launch --id 1 --token-file - host1")]
pub struct Token {
    /// Create this file with the token; only its owner can read it
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Print a script that completes commands and options in a shell
///
/// The Debian package installs the scripts for bash, zsh and fish.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  overnode completions bash > /etc/bash_completion.d/overnode
  source <(overnode completions zsh)")]
pub struct Completions {
    /// The shell
    #[arg(value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}

/// Start this host's node and join the cluster
///
/// The given hosts become the node's targets: the node dials them and keeps trying. They need not
/// be reachable or even exist. A node that is its own target skips itself. Launching a running node
/// again adds the hosts to its targets. Launching a stopped node again starts it with these hosts
/// as targets, or with its previous targets if no host is given. In both cases, the given options
/// change the node's settings, as `overnode set` does, and the others stay as they are.
///
/// All nodes of a cluster have the same token, and each node has its own ID. Nodes 1 to 4 can give
/// addresses to containers by themselves.
///
/// Anyone who knows or guesses the token can join the cluster. Create it with `overnode token`. A
/// token that is easy to guess is accepted with a warning.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  overnode token --out token                     # then copy the file to the other hosts
  sudo overnode launch --id 1 --token-file token host1 host2 host3
  ssh host1 cat token | sudo overnode launch --id 2 --token-file - host1")]
pub struct Launch {
    /// This node's ID in the cluster, 1 to 4095
    #[arg(long, value_name = "ID", allow_hyphen_values = true)]
    pub id: NodeId,

    /// The cluster's token. Every user of this host can see it in the process list, unlike with
    /// --token-file or OVERNODE_TOKEN
    #[arg(long, value_name = "TOKEN", conflicts_with = "token_file", allow_hyphen_values = true)]
    pub token: Option<String>,

    /// Read the token from the first line of this file; - is standard input
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,

    /// The node's human-readable name [default: the host's name]
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub nickname: Option<String>,

    /// The interface to the other hosts [default: the one that routes to them]
    #[arg(long, value_name = "NAME", value_parser = interface)]
    pub interface: Option<String>,

    /// MTU of the containers' interfaces, in bytes, 576 to 65455 [default: what fits the interface
    /// to the other hosts]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(576..=65455))]
    pub mtu: Option<u32>,

    /// Dial targets only, not the nodes that other nodes report
    #[arg(long)]
    pub no_discovery: bool,

    /// Leave this host's Docker engine alone: no network plugin and no default network
    #[arg(long)]
    pub no_docker: bool,

    /// Decrypt messages in native XDP on the underlay interface instead of in TC. This turns off
    /// the interface's segmentation offloads for everything else on the host
    #[arg(long, requires = "interface")]
    pub xdp: bool,

    /// Userspace workers for bulk flows: off, or the cipher that they seal with [default: auto]
    #[arg(long, value_name = "CIPHER", value_enum)]
    pub bulk: Option<Mode>,

    /// Number of userspace workers, 1 to 16, one core each [default: half of the cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub bulk_workers: Option<u8>,

    /// Addresses that nodes give out, inside the subnet; the same on every node [default:
    /// 10.40.0.0/13]
    #[arg(long, value_name = "NETWORK")]
    pub range: Option<IpNet>,

    /// All addresses of the container network; the same on every node [default: 10.32.0.0/12]
    #[arg(long, value_name = "NETWORK")]
    pub subnet: Option<IpNet>,

    /// Domain of the containers' names, in addition to weave.local [default: overnode.local]
    #[arg(long, value_name = "DOMAIN", value_parser = domain, conflicts_with = "no_dns")]
    pub dns_domain: Option<String>,

    /// Do not serve names to the containers of this host
    #[arg(long)]
    pub no_dns: bool,

    /// Targets: host names or IP addresses
    #[arg(value_name = "HOST")]
    pub hosts: Vec<Host>,
}

/// Change settings of the node, all of the given ones or none
///
/// The node restarts with the new settings; containers keep communicating. `default` stands for the
/// default of any setting. `overnode get` lists the settings and their values. ID, token, subnet
/// and range are fixed at the launch.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo overnode set mtu=1300
  sudo overnode set bulk=off discovery=default
  sudo overnode set interface=eth1 xdp=on")]
pub struct Set {
    /// Settings with their new values
    #[arg(value_name = "KEY=VALUE", required = true, value_parser = setting)]
    pub changes: Vec<(String, String)>,
}

/// Print the settings of the node
///
/// Prints all settings as KEY=VALUE, one per line, or the value of one.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo overnode get
  sudo overnode get mtu")]
pub struct Get {
    /// The setting to print [default: all]
    #[arg(value_name = "KEY")]
    pub key: Option<String>,
}

/// Add targets: hosts that this node dials
///
/// Targets need not be reachable or even exist. The node keeps them and retries.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo overnode connect host2 host3
  sudo overnode connect --replace 192.0.2.7    # the only target from now on")]
pub struct Connect {
    /// Replace the existing targets
    #[arg(long)]
    pub replace: bool,

    /// Host names or IP addresses
    #[arg(value_name = "HOST", required = true)]
    pub hosts: Vec<Host>,
}

/// Remove targets
///
/// The node never dials them as targets again. A connection to a live node stays open, because the
/// other nodes report that node.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  sudo overnode forget host3")]
pub struct Forget {
    /// Targets as given to `launch` or `connect`
    #[arg(value_name = "HOST", required = true)]
    pub hosts: Vec<Host>,
}

/// Attach a container, or any network namespace, to the network and print its address
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo overnode attach my-container            # a Docker or podman container, by name or ID
  sudo overnode attach netns:blue --ip 10.32.0.7
  sudo overnode attach pid:4711")]
pub struct Attach {
    /// netns:NAME, netns:/path, pid:NUMBER, or a container's name or ID
    pub target: Target,

    /// A static address, 10.32.0.1 to 10.39.239.255 unless the subnet was changed [default: the
    /// next free one]
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub ip: Option<IpNet>,

    /// A human-readable name, also for other containers in DNS [default: the container's name]
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub name: Option<String>,
}

/// Detach a container from the network, whether or not it still exists
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo overnode detach my-container
  sudo overnode detach netns:blue")]
pub struct Detach {
    /// The target as given to `attach`, or the name that it got there
    pub target: Target,
}

/// Give this host itself an address in the container network and print it
///
/// The host can then reach the containers of all hosts, and they can reach the host. Exposed hosts
/// can also reach each other. The interface is called overnode0. After a reboot it comes back with
/// the node, until `overnode hide`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo overnode expose
  sudo overnode expose --name storage           # containers resolve storage.overnode.local")]
pub struct Expose {
    /// A static address, 10.32.0.1 to 10.39.239.255 unless the subnet was changed [default: the
    /// next free one]
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub ip: Option<IpNet>,

    /// A human-readable name, also for containers in DNS [default: none]
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub name: Option<String>,
}

/// Remove this host's address in the container network
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  sudo overnode hide")]
pub struct Hide {}

/// Show the node, its targets, peers, connections, containers, addresses, names and packet counters
///
/// Shows all sections unless some are selected.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo overnode status
  sudo overnode status --connections --targets
  sudo overnode status --peers --json")]
pub struct Status {
    /// Show the configured targets
    #[arg(long)]
    pub targets: bool,

    /// Show the nodes of the cluster and the connections between them
    #[arg(long)]
    pub peers: bool,

    /// Show this node's control connections
    #[arg(long)]
    pub connections: bool,

    /// Show which node owns which addresses
    #[arg(long)]
    pub ipam: bool,

    /// Show the containers attached on this host
    #[arg(long)]
    pub endpoints: bool,

    /// Show the names that containers can look up, with their addresses
    #[arg(long)]
    pub dns: bool,

    /// Show packet counters by reason
    #[arg(long)]
    pub counters: bool,

    /// Print machine-readable JSON
    #[arg(long)]
    pub json: bool,
}

/// Show dropped packets and changes of peers, paths and containers as they happen
///
/// Prints one line per event until Ctrl-C. Of a dropped packet it shows the headers, never the
/// payload. If many packets are dropped for one reason, it shows some of them each second and
/// counts the rest.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo overnode monitor
  sudo overnode monitor --reason spoofed --reason no-route
  sudo overnode monitor --events
  sudo overnode monitor --json --for 1m > what-happened.jsonl")]
pub struct Monitor {
    /// Show dropped packets only
    #[arg(long)]
    pub drops: bool,

    /// Show changes of peers, paths and containers only
    #[arg(long)]
    pub events: bool,

    /// Of the dropped packets, show only those with this reason; may be given several times.
    /// `status --counters` explains the reasons
    #[arg(long, value_name = "REASON", value_parser = reason)]
    pub reason: Vec<String>,

    /// Stop after this time [default: at Ctrl-C]
    #[arg(long = "for", value_name = "TIME", value_parser = duration::parse_positive)]
    pub limit: Option<Duration>,

    /// Print machine-readable output: one JSON object per line
    #[arg(long)]
    pub json: bool,
}

/// Add addresses to a name, for the containers of all hosts
///
/// A name may have several addresses, added on one node or on several. Containers get them in
/// random order. The name is served while the node on which it was added is reachable. It survives
/// a restart of that node. The names of containers need not be added.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo overnode dns-add db 10.40.0.7             # db.overnode.local
  sudo overnode dns-add www 192.0.2.10 192.0.2.11")]
pub struct DnsAdd {
    /// The name, with or without the domain
    #[arg(value_name = "NAME")]
    pub name: String,

    /// IP addresses of containers or of anything else
    #[arg(value_name = "ADDRESS", required = true)]
    pub addresses: Vec<IpAddr>,
}

/// Undo dns-add, on the node on which the name was added
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo overnode dns-remove db                    # all addresses that were added on this node
  sudo overnode dns-remove www 192.0.2.11")]
pub struct DnsRemove {
    /// The name, with or without the domain
    #[arg(value_name = "NAME")]
    pub name: String,

    /// Addresses to remove [default: all]
    #[arg(value_name = "ADDRESS")]
    pub addresses: Vec<IpAddr>,
}

/// Print the addresses of a name, one per line
///
/// Prints what the containers of this host get as an answer. Covers only names of the container
/// network, which `overnode status --dns` lists.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  sudo overnode dns-lookup db")]
pub struct DnsLookup {
    /// The name, with or without the domain
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// Wait until this node can give an address to a container
///
/// Nodes 1 to 4 can do so at once, other nodes as soon as they hold addresses.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  sudo overnode prime --timeout 1m && sudo overnode attach my-container")]
pub struct Prime {
    /// Give up after this time [default: never]
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    pub timeout: Option<Duration>,
}

/// Reclaim the address space of a node that is gone for good
///
/// All other nodes must agree, including those that are currently unreachable. Otherwise two halves
/// of a split cluster could take the same space. Run this on one of the nodes 1 to 4, because only
/// they lend addresses. Never reclaim a node that is merely unreachable. The command is refused
/// while the node is reachable and for 20 seconds afterwards.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  sudo overnode reclaim 3    # the disk of host3 is lost")]
pub struct Reclaim {
    /// The ID of the node that is gone
    pub id: NodeId,
    /// Stop waiting after this time; the node continues in the background
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration::parse)]
    pub timeout: Duration,
}

/// Stop and destroy the node
///
/// The node leaves the cluster, and everything that it created on this host is removed. This also
/// works on a node that is not running.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo overnode reset
  sudo overnode reset --force    # even while containers are attached

Then, on each node that has this host as a target:
  sudo overnode forget HOST")]
pub struct Reset {
    /// Reset even while containers are attached
    #[arg(long)]
    pub force: bool,
}

#[allow(missing_docs, reason = "documentation here would replace the help texts")]
/// Manage WireGuard peers that are not nodes of the cluster
#[derive(Debug, Subcommand)]
pub enum Peer {
    Add(AddPeer),
    /// Remove a WireGuard peer
    #[command(after_help = "\
Example:
  sudo overnode peer remove xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=")]
    Remove {
        /// The peer's public key
        public_key: PublicKey,
    },
    /// List the WireGuard peers
    #[command(after_help = "\
Example:
  sudo overnode peer list --json")]
    List {
        /// Print machine-readable JSON
        #[arg(long)]
        json: bool,
    },
}

/// Add or change a WireGuard peer and print what to put into its configuration
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  sudo overnode peer add xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg= \\
      --allowed-ips 10.32.100.1/32 --endpoint laptop.example.org:51820 --keepalive 25")]
pub struct AddPeer {
    /// The peer's public key, 44 characters of base64
    pub public_key: PublicKey,

    /// Networks that the peer may send from and that are routed to it
    #[arg(long, value_name = "NETWORK,…", value_delimiter = ',', required = true)]
    pub allowed_ips: Vec<IpNet>,

    /// The peer's endpoint, resolved once when the command runs [default: the peer must send first]
    #[arg(long, value_name = "HOST:PORT", value_parser = endpoint)]
    pub endpoint: Option<SocketAddr>,

    /// A file with the preshared key, as printed by `wg genpsk`; - is standard input
    #[arg(long, value_name = "FILE")]
    pub preshared_key_file: Option<PathBuf>,

    /// Send something at least this often
    #[arg(long, value_name = "TIME", value_parser = duration::parse_seconds)]
    pub keepalive: Option<u16>,

    /// A human-readable name
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub name: Option<String>,
}

/// Settings that every command uses.
#[derive(Clone, Debug)]
pub struct Context {
    /// State directory, an absolute path.
    pub state_dir: PathBuf,
    /// Run directory, an absolute path.
    pub run_dir: PathBuf,
    /// Whether to print debug messages.
    pub debug: bool,
    /// Whether to print colors.
    pub color: bool,
    /// Width of tables in columns; `None` if standard output is not a terminal and COLUMNS is not
    /// set.
    pub width: Option<u16>,
}

impl Global {
    /// Combines the options with the environment and the terminal's properties.
    ///
    /// # Errors
    /// Fails if a directory cannot be made absolute, for example because the current directory is
    /// gone.
    pub fn context(self) -> Result<Context, Failure> {
        // The daemon does not keep this command's current directory.
        let absolute = |option: &str, dir: PathBuf| {
            std::path::absolute(&dir).map_err(|error| {
                Failure::usage(format_args!(
                    "{option} {}: {error}; give the absolute path of a directory",
                    dir.display()
                ))
            })
        };
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == OsStr::new("dumb"));
        Ok(Context {
            state_dir: absolute("--state-dir", self.state_dir)?,
            run_dir: absolute("--run-dir", self.run_dir)?,
            debug: self.debug,
            color: !self.no_color && !set("NO_COLOR") && !dumb && io::stdout().is_terminal(),
            width: width(),
        })
    }
}

/// Prints a message of clap: help as it is, an error as one line. Returns the exit status.
pub fn explain(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A reader that closes the pipe early is not a failure.
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let mut command = command_in(std::env::args());
            let _ = write!(io::stderr(), "{}", command.render_help());
            ExitCode::from(2)
        }
        _ => {
            let line = in_one_line(&error.render().to_string(), &command_in(std::env::args()));
            let _ = writeln!(io::stderr(), "overnode: {line}");
            ExitCode::from(2)
        }
    }
}

/// Joins the paragraphs of clap's message that describe the error, and refers to the help.
fn in_one_line(rendered: &str, command: &clap::Command) -> String {
    let mut said: Vec<String> = Vec::new();
    for paragraph in rendered.split("\n\n") {
        let line = paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
        if !(line.is_empty()
            || line.starts_with("Usage: ")
            || line.starts_with("For more information"))
        {
            said.push(line.trim_start_matches("error: ").trim_start_matches("tip: ").to_owned());
        }
    }
    let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
    format!("{}; see `{name} --help`", said.join("; "))
}

/// Returns the command whose help matches the arguments.
fn command_in(arguments: impl Iterator<Item = String>) -> clap::Command {
    let mut command = Cli::command();
    command.build();
    for argument in arguments.skip(1) {
        if let Some(sub) = command.find_subcommand(&argument).cloned() {
            command = sub;
        }
    }
    command
}

fn width() -> Option<u16> {
    // Shells do not export COLUMNS by themselves, so an exported value is intended.
    let told = std::env::var("COLUMNS")
        .ok()
        .and_then(|columns| columns.parse().ok())
        .filter(|&width| width > 0);
    told.or_else(|| terminal_size::terminal_size_of(io::stdout()).map(|(width, _)| width.0))
}

fn name(text: &str) -> Result<String, String> {
    overnode_api::check_name(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

fn setting(text: &str) -> Result<(String, String), &'static str> {
    let (key, value) = text
        .split_once('=')
        .ok_or("give KEY=VALUE, such as mtu=1300; `overnode get` lists the keys")?;
    Ok((key.trim().to_owned(), value.trim().to_owned()))
}

fn reason(text: &str) -> Result<String, String> {
    let known: Vec<&str> = {
        let drops = Reason::ALL.iter().filter(|reason| reason.is_drop());
        drops.map(|reason| reason.as_str()).collect()
    };
    if known.contains(&text) {
        return Ok(text.to_owned());
    }
    Err(format!("valid reasons: {}", known.join(", ")))
}

fn domain(text: &str) -> Result<String, String> {
    Domain::new(text).map(|domain| domain.as_str().to_owned()).map_err(|error| error.to_string())
}

fn interface(text: &str) -> Result<String, &'static str> {
    // The kernel's rule (dev_valid_name in net/core/dev.c).
    let fits = (1..=15).contains(&text.len()) && text != "." && text != "..";
    if fits && !text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace()) {
        Ok(text.to_owned())
    } else {
        Err("an interface name has 1 to 15 characters, without spaces, / and :")
    }
}

/// Parses an address, with or without the subnet's prefix length. The node adds a missing one.
fn address(text: &str) -> Result<IpNet, String> {
    let with_prefix = text.parse();
    with_prefix.or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).map_err(|_| {
        "give an address, alone or with the subnet's prefix length, as in 10.32.0.7/12".to_owned()
    })
}

fn endpoint(text: &str) -> Result<SocketAddr, String> {
    let mut found = text.to_socket_addrs().map_err(|error| format!("{error}: give HOST:PORT"))?;
    found.next().ok_or_else(|| "the name resolves to no address".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(line: &str) -> String {
        let words = || line.split(' ').map(str::to_owned);
        let error = Cli::try_parse_from(words()).unwrap_err();
        in_one_line(&error.render().to_string(), &command_in(words()))
    }

    #[test]
    fn the_command_line_definition_is_valid() {
        Cli::command().debug_assert();
    }

    #[test]
    fn usage_errors_are_one_line_with_a_hint() {
        for id in ["0", "4096", "65536", "one", "-1", "1.5"] {
            assert_eq!(
                wrong(&format!("overnode launch --token t --id {id}")),
                format!(
                    "invalid value '{id}' for '--id <ID>': an ID is a whole number from 1 to 4095; \
                     see `overnode launch --help`"
                )
            );
        }
        assert_eq!(
            wrong("overnode launch --token t"),
            "the following required arguments were not provided: --id <ID>; \
             see `overnode launch --help`"
        );
        assert_eq!(
            wrong("overnode launhc"),
            "unrecognized subcommand 'launhc'; a similar subcommand exists: 'launch'; \
             see `overnode --help`"
        );
        assert!(
            wrong("overnode launch --id 1 --token a --token-file b")
                .contains("cannot be used with")
        );
    }

    #[test]
    fn values_are_checked() {
        assert!(wrong("overnode connect").contains("<HOST>"));
        assert!(wrong("overnode connect host:6783").contains("without a port"));
        assert!(wrong("overnode attach pid:x").contains("netns:NAME"));
        assert!(wrong("overnode attach netns:a --ip 10.32.0").contains("as in 10.32.0.7/12"));
        assert!(wrong("overnode monitor --for 0").contains("more than 0"));
        assert!(wrong("overnode prime --timeout soon").contains("such as 500ms, 10s, 2m"));
        assert!(wrong("overnode attach netns:a --ip x/12").contains("as in 10.32.0.7/12"));
        assert!(wrong("overnode launch --id 1 --mtu 100").contains("576"));
        assert!(
            wrong("overnode launch --id 1 --interface a-much-too-long-name")
                .contains("15 characters")
        );
        assert!(
            wrong("overnode peer add short --allowed-ips 10.0.0.0/8").contains("44 characters")
        );
        assert!(wrong("overnode prime --timeout soon").contains("soon"));
    }
}
