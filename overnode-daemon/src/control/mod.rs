//! Control connections: who may join, and the encrypted channel that gossip travels on.
//!
//! [`key`] turns the token into keys. [`session`] is the Noise handshake and the two halves of the channel, over any
//! byte stream; [`frame`] is its framing and [`hello`] what nodes tell each other first, with the reasons to
//! refuse. [`dial`] decides whom to call and when, and which of two connections stays; it has no I/O
//! and reads no clock.
//!
//! Not here: sockets, name resolution and tasks (the node's runtime), and what the messages mean
//! ([`crate::gossip`]).

pub mod dial;
pub mod frame;
pub mod hello;
pub mod key;
pub mod session;

use std::net::Ipv6Addr;

/// The TCP port of control connections.
pub const CONTROL_PORT: u16 = 6783;

/// Longest name of a host, in bytes (RFC 1035 section 2.3.4).
const MAX_HOST: usize = 253;

/// What a HOST on the command line means: a name or address, and a port.
///
/// `host`, `host:port`, an IPv4 or IPv6 address, `[IPv6]:port`; the port is [`CONTROL_PORT`] if none is named. None if it can be
/// none of these; whether it resolves or exists does not matter.
pub fn split_target(target: &str) -> Option<(&str, u16)> {
    let (host, port) = if let Some(rest) = target.strip_prefix('[') {
        let (host, port) = rest.split_once(']')?;
        host.parse::<Ipv6Addr>().ok()?;
        (host, if port.is_empty() { None } else { Some(port.strip_prefix(':')?) })
    } else if target.parse::<Ipv6Addr>().is_ok() {
        (target, None)
    } else {
        target.rsplit_once(':').map_or((target, None), |(host, port)| (host, Some(port)))
    };
    let port = port.map_or(Some(CONTROL_PORT), |port| port.parse().ok().filter(|port| *port != 0))?;
    (is_name(host) || host.parse::<Ipv6Addr>().is_ok()).then_some((host, port))
}

fn is_name(host: &str) -> bool {
    let is_plain = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_');
    !host.is_empty() && host.len() <= MAX_HOST && host.chars().all(is_plain) && !host.starts_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_split() {
        for (target, expected) in [
            ("host1", Some(("host1", 6783))),
            ("host1.example:7000", Some(("host1.example", 7000))),
            ("192.0.2.1", Some(("192.0.2.1", 6783))),
            ("192.0.2.1:1", Some(("192.0.2.1", 1))),
            ("2001:db8::1", Some(("2001:db8::1", 6783))),
            ("[2001:db8::1]", Some(("2001:db8::1", 6783))),
            ("[2001:db8::1]:7000", Some(("2001:db8::1", 7000))),
            ("höst", Some(("höst", 6783))),
            ("", None),
            (":6783", None),
            ("host:", None),
            ("host:0", None),
            ("host:65536", None),
            ("host:http", None),
            ("host:1:2", None),
            ("[host]:1", None),
            ("[2001:db8::1]x", None),
            ("[2001:db8::1", None),
            ("a b", None),
            ("-host", None),
            ("host/16", None),
        ] {
            assert_eq!(split_target(target), expected, "{target:?}");
        }
    }
}
