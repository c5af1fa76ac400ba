//! The names of hosts and network namespaces in requests.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::documents::check_name;

/// A host to connect to: a name or an IP address, without a port. The host need not exist.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Host(String);

/// The text is neither a host name nor an IP address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither a host name nor an IP address: give one of these, without a port")]
pub struct BadHost(String);

/// The target of an `attach` request.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Target {
    /// `netns:NAME`: a network namespace as `ip netns` names it.
    Name(String),
    /// `netns:/path`: a network namespace file.
    Path(PathBuf),
    /// `pid:N`: the network namespace that a process is in.
    Process(u32),
    /// A Docker or Podman container, by name or ID. The daemon does not ask a container engine, so
    /// the request must include the container's process.
    Container(String),
    /// `host:`: this host itself.
    Host,
}

/// The location of a network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Netns {
    /// A network namespace file.
    Path(PathBuf),
    /// A process in the namespace.
    Pid(u32),
}

/// The text names neither a network namespace, nor a process, nor a container.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} cannot be attached: give netns:NAME, netns:/path, pid:NUMBER, or a container's name or \
     ID"
)]
pub struct BadTarget(String);

impl Host {
    /// Returns the host as it was given, with IP addresses in canonical form.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Host {
    type Err = BadHost;

    fn from_str(text: &str) -> Result<Self, BadHost> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self(address.to_string()));
        }
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
                && !label.starts_with('-')
        };
        // A name whose last label is a number would pass for a malformed address (RFC 3696, section
        // 2).
        let name = text.strip_suffix('.').unwrap_or(text);
        let numeric = name
            .rsplit('.')
            .next()
            .is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
        if name.len() > 253 || numeric || !name.split('.').all(label) {
            return Err(BadHost(shortened(text)));
        }
        Ok(Self(text.to_owned()))
    }
}

impl Target {
    /// Returns the network namespace that the target implies. There is none for a container, whose
    /// process must be given, and none for the host.
    pub fn netns(&self) -> Option<Netns> {
        match self {
            Self::Name(name) => Some(Netns::Path(Path::new("/run/netns").join(name))),
            Self::Path(path) => Some(Netns::Path(path.clone())),
            Self::Process(pid) => Some(Netns::Pid(*pid)),
            Self::Container(_) | Self::Host => None,
        }
    }
}

impl FromStr for Target {
    type Err = BadTarget;

    fn from_str(text: &str) -> Result<Self, BadTarget> {
        let bad = || BadTarget(shortened(text));
        if text.len() > 4096 || text.chars().any(char::is_control) {
            return Err(bad());
        }
        if let Some(netns) = text.strip_prefix("netns:") {
            return match netns {
                "" | "." | ".." => Err(bad()),
                path if path.starts_with('/') => Ok(Self::Path(path.into())),
                name if name.contains('/') => Err(bad()),
                name => Ok(Self::Name(name.to_owned())),
            };
        }
        if let Some(pid) = text.strip_prefix("pid:") {
            return match pid.parse() {
                Ok(0) | Err(_) => Err(bad()),
                Ok(pid) => Ok(Self::Process(pid)),
            };
        }
        if text == "host:" {
            return Ok(Self::Host);
        }
        check_name(text).map_err(|_| bad())?;
        Ok(Self::Container(text.to_owned()))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(f, "netns:{name}"),
            Self::Path(path) => write!(f, "netns:{}", path.display()),
            Self::Process(pid) => write!(f, "pid:{pid}"),
            Self::Container(container) => f.write_str(container),
            Self::Host => f.write_str("host:"),
        }
    }
}

impl fmt::Display for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Pid(pid) => write!(f, "/proc/{pid}/ns/net"),
        }
    }
}

impl TryFrom<String> for Host {
    type Error = BadHost;

    fn try_from(text: String) -> Result<Self, BadHost> {
        text.parse()
    }
}

impl From<Host> for String {
    fn from(host: Host) -> Self {
        host.0
    }
}

impl TryFrom<String> for Target {
    type Error = BadTarget;

    fn try_from(text: String) -> Result<Self, BadTarget> {
        text.parse()
    }
}

impl From<Target> for String {
    fn from(target: Target) -> Self {
        target.to_string()
    }
}

/// Shortens a text for quoting in an error message. A user recognizes the input from its first 80
/// characters.
fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        for good in [
            "host2",
            "a.example.org",
            "a.example.org.",
            "10.0.0.1",
            "fd00::1",
            "under_score",
            "3com.example",
        ] {
            assert_eq!(good.parse::<Host>().unwrap().as_str(), good);
        }
        assert_eq!("FD00:0::1".parse::<Host>().unwrap().as_str(), "fd00::1");
        for bad in [
            "",
            ".",
            "a..b",
            "a b",
            "10.0.0.256",
            "10.0.1",
            "host:6783",
            "[::1]",
            "-x",
            "http://h",
            "é",
            "a/24",
        ] {
            assert!(bad.parse::<Host>().is_err(), "{bad}");
        }
        assert!("x".repeat(64).parse::<Host>().is_err());
        assert!("xy.".repeat(90).parse::<Host>().is_err());
    }

    #[test]
    fn targets() {
        assert_eq!("netns:a".parse(), Ok(Target::Name("a".into())));
        assert_eq!("netns:/proc/1/ns/net".parse(), Ok(Target::Path("/proc/1/ns/net".into())));
        assert_eq!("pid:12".parse(), Ok(Target::Process(12)));
        assert_eq!("web_1.x".parse(), Ok(Target::Container("web_1.x".into())));
        for bad in [
            "",
            "netns:",
            "netns:..",
            "netns:a/b",
            "pid:0",
            "pid:x",
            "pid:-1",
            "-x",
            "a b",
            "a:b",
            "x\n",
            "host:a",
            "../x",
        ] {
            assert!(bad.parse::<Target>().is_err(), "{bad}");
        }
        for text in ["netns:a", "netns:/a/b", "pid:7", "web", "host", "host:"] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
    }
}
