//! Parses the runtime's request: environment variables, and the network configuration on standard
//! input.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use overnode_api::CONTAINER_INTERFACE;
use overnode_api::{self as api, CniEndpoint, Target};
use overnode_types::MacAddr;
use overnode_types::text::{harmless, quoted, reason};
use serde::Deserialize;
use serde_json::Value;

use super::error::{CniError, Code};

/// Supported versions of the specification, oldest first.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Newest supported version.
pub const NEWEST: &str = VERSIONS[VERSIONS.len() - 1];

/// Size limit of the input, in bytes.
pub const INPUT_LIMIT: usize = 1 << 20;

/// Value of `CNI_COMMAND`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Attaches a container.
    Add,
    /// Detaches a container.
    Del,
    /// Checks whether an attachment is still as it was made.
    Check,
    /// Removes attachments that are not listed.
    Gc,
    /// Checks whether containers can be added.
    Status,
    /// Reports the supported versions.
    Version,
}

/// The plugin's configuration, as passed by the runtime. Unknown keys are for other programs and
/// are ignored.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    /// Selected version of the specification.
    #[serde(default)]
    pub cni_version: Option<String>,
    /// Name of the network.
    #[serde(default)]
    pub name: String,
    /// Name of the interface inside the container, where an earlier plugin of the chain makes
    /// `CNI_IFNAME`.
    #[serde(default)]
    pub interface: Option<String>,
    /// The node's `--run-dir`.
    #[serde(default)]
    pub run_dir: Option<PathBuf>,
    /// DNS settings that replace the node's.
    #[serde(default)]
    pub dns: Option<Value>,
    /// Result of the earlier plugins, or of an earlier `ADD`.
    #[serde(default)]
    pub prev_result: Option<Value>,
    #[serde(default)]
    runtime_config: Option<Runtime>,
    #[serde(default)]
    ipam: Option<Value>,
    #[serde(default)]
    ip_masq: Option<bool>,
    #[serde(default, rename = "cni.dev/valid-attachments", deserialize_with = "present")]
    valid: Option<Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Runtime {
    #[serde(default)]
    ips: Option<Vec<String>>,
    #[serde(default)]
    mac: Option<String>,
}

/// A container and what it should get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Container given by `CNI_CONTAINERID`.
    pub container: Target,
    /// The node's identifiers of the attachment.
    pub endpoint: CniEndpoint,
    /// Value of `CNI_NETNS`. `None` only for `DEL`, where the container may be gone.
    pub netns: Option<String>,
    /// Static address. One without a prefix gets a prefix of 32 bits.
    pub address: Option<IpNet>,
    /// Hardware address.
    pub mac: Option<MacAddr>,
    /// Name of the container.
    pub name: Option<String>,
}

/// A task to carry out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// Carries out [`Command::Add`].
    Add(Attachment),
    /// Carries out [`Command::Del`].
    Del(Attachment),
    /// Carries out [`Command::Check`].
    Check(Attachment),
    /// Carries out [`Command::Gc`], with the container ID and `CNI_IFNAME` of each attachment to
    /// keep.
    Gc(Vec<(String, String)>),
    /// Carries out [`Command::Status`].
    Status,
}

/// Deserializes a key that is present, even if its value is null.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Reads `CNI_COMMAND`.
///
/// # Errors
/// Fails if its value is not a command.
pub fn command(env: Env<'_>) -> Result<Command, CniError> {
    let given = env("CNI_COMMAND").unwrap_or_default();
    Ok(match given.as_str() {
        "ADD" => Command::Add,
        "DEL" => Command::Del,
        "CHECK" => Command::Check,
        "GC" => Command::Gc,
        "STATUS" => Command::Status,
        "VERSION" => Command::Version,
        _ => {
            return Err(CniError::new(
                Code::Environment,
                format_args!("CNI_COMMAND is {:?}", quoted(&given)),
                "it must be ADD, DEL, CHECK, GC, STATUS or VERSION: container runtimes run this \
                 program, see docs/guide/cni.md",
            ));
        }
    })
}

/// Parses the configuration, without checking its version.
///
/// # Errors
/// Fails if the input is too large or is not a configuration.
pub fn config(input: &[u8]) -> Result<Config, CniError> {
    if input.len() > INPUT_LIMIT {
        return Err(CniError::new(
            Code::Decode,
            "the network configuration is too large",
            format_args!("the limit is {INPUT_LIMIT} bytes: make it smaller"),
        ));
    }
    let object = serde_json::from_slice::<serde_json::Map<String, Value>>(input);
    object.and_then(|object| Config::deserialize(Value::Object(object))).map_err(|error| {
        CniError::new(
            Code::Decode,
            "the network configuration on standard input cannot be parsed",
            format_args!(
                "{}; correct the network's file, usually in /etc/cni/net.d",
                reason(&error)
            ),
        )
    })
}

/// Returns the version of the configuration, which the answer must have too.
///
/// # Errors
/// Fails if the version is not supported or does not have the command.
pub fn version(config: &Config, command: Command) -> Result<&'static str, CniError> {
    // The specification gives a configuration without a version the version 0.1.0.
    let given = config.cni_version.as_deref().unwrap_or("0.1.0");
    let Some(at) = VERSIONS.iter().position(|known| *known == given) else {
        return Err(CniError::new(
            Code::Incompatible,
            format_args!("CNI version {:?} is not supported", quoted(given)),
            format_args!(
                "supported versions are {}: set cniVersion to one of them",
                VERSIONS.join(", ")
            ),
        ));
    };
    let since = match command {
        Command::Gc | Command::Status => "1.1.0",
        Command::Check => "0.4.0",
        Command::Add | Command::Del | Command::Version => VERSIONS[0],
    };
    if VERSIONS.iter().position(|known| *known == since) > Some(at) {
        return Err(CniError::new(
            Code::Incompatible,
            format_args!("CNI version {given} does not have this command"),
            format_args!(
                "the command exists since {since}: set cniVersion to that version or a later one"
            ),
        ));
    }
    Ok(VERSIONS[at])
}

/// Returns the task for a command and its configuration.
///
/// # Errors
/// Fails if variables or values are invalid, or if a key asks for something unsupported.
pub fn task(command: Command, config: &Config, env: Env<'_>) -> Result<Task, CniError> {
    if !is_name(&config.name) {
        return Err(bad_config(
            format_args!("the network's name is {:?}", quoted(&config.name)),
            "set `name` to 1 to 128 letters, digits, dots, hyphens and underscores that begin with \
             a letter or a digit",
        ));
    }
    if let Some(interface) = &config.interface
        && !is_interface(interface)
    {
        return Err(bad_config(
            format_args!("`interface` is {:?}", quoted(interface)),
            "an interface name has 1 to 15 characters, without spaces, / and :",
        ));
    }
    unsupported(config, command)?;
    Ok(match command {
        Command::Add => {
            config.dns.as_ref().map_or(Ok(()), check_dns)?;
            Task::Add(attachment(command, config, env)?)
        }
        Command::Del => Task::Del(attachment(command, config, env)?),
        Command::Check => Task::Check(attachment(command, config, env)?),
        Command::Gc => Task::Gc(valid(config)?),
        Command::Status | Command::Version => Task::Status,
    })
}

/// Refuses keys whose effect this plugin cannot provide. Attachments that exist must still be
/// removable, so `DEL` and `GC` ignore the keys.
fn unsupported(config: &Config, command: Command) -> Result<(), CniError> {
    if matches!(command, Command::Del | Command::Gc) {
        return Ok(());
    }
    let refuse = |key: &str, value: &dyn std::fmt::Display, why: &str| {
        // The specification asks for the whole value.
        let value = harmless(&value.to_string());
        Err(CniError::new(
            Code::Unsupported,
            format_args!("the key {key} with the value {value} is not supported"),
            why,
        ))
    };
    let empty = |value: &&Value| {
        value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty)
    };
    if let Some(ipam) = config.ipam.as_ref().filter(|it| !empty(it)) {
        return refuse("ipam", ipam, "nodes allocate unique addresses themselves: remove this key");
    }
    if config.ip_masq == Some(true) {
        return refuse(
            "ipMasq",
            &true,
            "this network has no gateway: remove this key and chain the plugin after `bridge`, see \
             docs/guide/cni.md",
        );
    }
    Ok(())
}

fn attachment(command: Command, config: &Config, env: Env<'_>) -> Result<Attachment, CniError> {
    let may_be_gone = command == Command::Del;
    let get = |name: &str| env(name).unwrap_or_default();
    let (id, ifname, netns) = (get("CNI_CONTAINERID"), get("CNI_IFNAME"), get("CNI_NETNS"));
    let container = id.parse::<Target>().ok().filter(|it| matches!(it, Target::Container(_)));
    let mut bad = Vec::new();
    if container.is_none() {
        bad.push(format!("CNI_CONTAINERID={:?}", quoted(&id)));
    }
    if !is_interface(&ifname) {
        bad.push(format!("CNI_IFNAME={:?}", quoted(&ifname)));
    }
    if !may_be_gone && !netns.starts_with('/') || netns.len() > 4096 {
        bad.push(format!("CNI_NETNS={:?}", quoted(&netns)));
    }
    let mut details = "a container ID has 1 to 128 letters, digits, dots, hyphens and underscores; \
                       an interface name has 1 to 15 characters; the network namespace is a path \
                       that begins with /";
    let args =
        if command == Command::Add { Args::parse(&get("CNI_ARGS")) } else { Ok(Args::default()) };
    if let Err((what, why)) = &args {
        if bad.is_empty() {
            details = why;
        }
        bad.push(format!("CNI_ARGS: {what}"));
    }
    let (Some(container), Ok(args), true) = (container, args, bad.is_empty()) else {
        let message = format_args!("invalid environment variables: {}", bad.join(", "));
        return Err(CniError::new(Code::Environment, message, details));
    };
    let is_chained = config.prev_result.is_some();
    let interface = match &config.interface {
        Some(interface) => interface.clone(),
        None if is_chained && command == Command::Add => CONTAINER_INTERFACE.to_owned(),
        None => ifname.clone(),
    };
    if is_chained && command == Command::Add && interface == ifname {
        return Err(bad_config(
            format_args!(
                "`interface` is {interface:?}, which an earlier plugin of the chain creates"
            ),
            "set `interface` to another name, or remove it",
        ));
    }
    let netns = Some(netns).filter(|path| !path.is_empty());
    let endpoint = CniEndpoint { network: config.name.clone(), ifname, interface };
    // Settings that reach every plugin of a chain are meant for its first one.
    let (address, mac) = if is_chained { (None, None) } else { (args.address, args.mac) };
    let mut wanted = Attachment { container, endpoint, netns, address, mac, name: args.name };
    if command == Command::Add {
        capabilities(&mut wanted, config)?;
    }
    Ok(wanted)
}

/// Content of `CNI_ARGS`.
#[derive(Debug, Default)]
struct Args {
    address: Option<IpNet>,
    mac: Option<MacAddr>,
    name: Option<String>,
}

impl Args {
    /// Parses the variable. The error says what is wrong and what to do.
    fn parse(text: &str) -> Result<Self, (String, &'static str)> {
        let mut ignore_unknown = false;
        let mut unknown = None;
        let mut args = Self::default();
        let (mut pod, mut namespace) = (None, None);
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let Some((key, value)) = pair.split_once('=') else {
                return Err((format!("{:?} has no =", quoted(pair)), "give KEY=VALUE;KEY=VALUE"));
            };
            match key {
                "IgnoreUnknown" => {
                    ignore_unknown = matches!(value, "1" | "true" | "TRUE" | "True" | "t" | "T")
                }
                // Runtimes send these keys without a value if the user gave none.
                "IP" | "MAC" if value.is_empty() => {}
                "IP" => match parse_address(value) {
                    Some(address) => args.address = Some(address),
                    None => {
                        return Err((format!("IP={:?}", quoted(value)), "give one IPv4 address"));
                    }
                },
                "MAC" => match parse_mac(value) {
                    Some(mac) => args.mac = Some(mac),
                    None => {
                        return Err((
                            format!("MAC={:?}", quoted(value)),
                            "give a unicast MAC address",
                        ));
                    }
                },
                "K8S_POD_NAME" => pod = Some(value),
                "K8S_POD_NAMESPACE" => namespace = Some(value),
                _ => unknown = unknown.or(Some(key)),
            }
        }
        if let (Some(key), false) = (unknown, ignore_unknown) {
            return Err((
                format!("unknown key {:?}", quoted(key)),
                "known keys are IP, MAC, K8S_POD_NAME and K8S_POD_NAMESPACE: set IgnoreUnknown=1 \
                 to ignore others",
            ));
        }
        let full = match (pod, namespace) {
            (Some(pod), Some(namespace)) if !namespace.is_empty() => {
                Some(format!("{pod}.{namespace}"))
            }
            (pod, _) => pod.map(str::to_owned),
        };
        // An unusable name is no reason to refuse the container.
        args.name = full.filter(|name| api::check_name(name).is_ok());
        Ok(args)
    }
}

/// Applies `runtimeConfig`: values that the runtime passes for the plugin's capabilities.
fn capabilities(wanted: &mut Attachment, config: &Config) -> Result<(), CniError> {
    if let Some(ips) = config.runtime_config.as_ref().and_then(|it| it.ips.as_deref())
        && !ips.is_empty()
    {
        match ips {
            [one] if parse_address(one).is_some() => wanted.address = parse_address(one),
            _ => {
                return Err(bad_config(
                    format_args!("runtimeConfig.ips is {:?}", quoted(&ips.join(" "))),
                    "a container has one IPv4 address in this network: give exactly one",
                ));
            }
        }
    }
    if let Some(text) = config.runtime_config.as_ref().and_then(|it| it.mac.as_deref())
        && !text.is_empty()
    {
        let Some(mac) = parse_mac(text) else {
            return Err(bad_config(
                format_args!("runtimeConfig.mac is {:?}", quoted(text)),
                "give a unicast MAC address such as 02:00:00:00:00:01",
            ));
        };
        wanted.mac = Some(mac);
    }
    Ok(())
}

/// Checks the form of `dns`, because it is copied into the result.
fn check_dns(dns: &Value) -> Result<(), CniError> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Dns {
        #[serde(rename = "nameservers")]
        _nameservers: Vec<IpAddr>,
        #[serde(rename = "domain")]
        _domain: String,
        #[serde(rename = "search")]
        _search: Vec<String>,
        #[serde(rename = "options")]
        _options: Vec<String>,
    }
    // Serde would read a list as the fields in their order.
    let told = if dns.is_object() {
        Dns::deserialize(dns).map_err(|why| why.to_string())
    } else {
        Err("it is not an object".into())
    };
    told.map(drop).map_err(|why| {
        bad_config(
            format_args!("dns is {}: {}", quoted(&dns.to_string()), reason(&why)),
            "give nameservers (addresses), domain, search and options, or remove dns",
        )
    })
}

fn valid(config: &Config) -> Result<Vec<(String, String)>, CniError> {
    #[derive(Deserialize)]
    struct Attached {
        #[serde(rename = "containerID")]
        container: String,
        ifname: String,
    }
    // A misspelled key must not make `GC` remove everything.
    let Some(list) = &config.valid else {
        return Err(bad_config(
            "the key cni.dev/valid-attachments is missing",
            "GC removes all attachments that are not listed there: the runtime must pass it, even \
             if it is empty",
        ));
    };
    let list: Option<Vec<Attached>> =
        Deserialize::deserialize(list).map_err(|error: serde_json::Error| {
            CniError::new(
                Code::Decode,
                "cni.dev/valid-attachments cannot be parsed",
                reason(&error),
            )
        })?;
    Ok(list.into_iter().flatten().map(|it| (it.container, it.ifname)).collect())
}

fn bad_config(message: impl std::fmt::Display, details: &str) -> CniError {
    CniError::new(Code::Config, message, details)
}

fn parse_address(text: &str) -> Option<IpNet> {
    let address: IpNet = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).ok()?;
    address.addr().is_ipv4().then_some(address)
}

fn parse_mac(text: &str) -> Option<MacAddr> {
    text.parse().ok().filter(|mac: &MacAddr| mac.is_assignable())
}

fn is_name(name: &str) -> bool {
    api::check_name(name).is_ok()
}

/// Applies the kernel's rule for interface names.
fn is_interface(name: &str) -> bool {
    let is_bad = |byte: u8| {
        byte == b'/' || byte == b':' || byte.is_ascii_whitespace() || byte.is_ascii_control()
    };
    (1..=15).contains(&name.len()) && name != "." && name != ".." && !name.bytes().any(is_bad)
}
