//! Formats events of `overnode monitor`.

use std::net::{IpAddr, SocketAddr};

use overnode_api::{
    Container, DroppedPacket, EventKind, Flow, MonitorEvent, Path, PeerRef, Program,
};

use super::grid::Tone;

/// Formats an event as a line, with its line break: time, kind and description.
pub(crate) fn event(event: &MonitorEvent, color: bool) -> String {
    let (tone, kind, text) = words(&event.what);
    // Text from other hosts and containers must not control the terminal.
    let text: String = text.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    let kind = format!("{kind:<18}");
    let kind = match tone.filter(|_| color) {
        None | Some(Tone::Plain) => kind,
        Some(Tone::Good) => format!("\u{1b}[32m{kind}\u{1b}[0m"),
        Some(Tone::Wait) => format!("\u{1b}[33m{kind}\u{1b}[0m"),
        Some(Tone::Bad) => format!("\u{1b}[31m{kind}\u{1b}[0m"),
    };
    format!("{}  {kind}  {text}\n", clock(event.unix_milliseconds))
}

fn words(what: &EventKind) -> (Option<Tone>, &'static str, String) {
    let (tone, kind, text) = match what {
        EventKind::Watching(it) => (
            Tone::Plain,
            "watching",
            format!(
                "node {} ({}), at most {} dropped packets per second and reason",
                it.id, it.nickname, it.drops_per_second
            ),
        ),
        EventKind::Drop(it) => (Tone::Bad, "drop", dropped(it)),
        EventKind::DropsNotShown { reason, count } => {
            (Tone::Bad, "drops not shown", format!("{reason:<14}  {count} more packets"))
        }
        EventKind::Missed { count } => (
            Tone::Wait,
            "missed",
            format!("{count} events, which arrived faster than they were read"),
        ),
        EventKind::Connected { peer, remote } => {
            (Tone::Good, "connected", format!("{} at {remote}", who(peer)))
        }
        EventKind::Disconnected { peer, remote, why } => {
            (Tone::Bad, "disconnected", format!("{} at {remote}: {why}", who(peer)))
        }
        EventKind::SessionEstablished { peer } => {
            (Tone::Good, "session", format!("{} established", who(peer)))
        }
        EventKind::SessionLost { peer, why } => {
            let why = why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
            (Tone::Bad, "session lost", format!("{}{why}", who(peer)))
        }
        EventKind::PathChanged { peer, path } => match path {
            Some(Path::Direct) => (Tone::Good, "path", format!("{} direct", who(peer))),
            Some(Path::Via(relay)) => {
                (Tone::Wait, "path", format!("{} through node {relay}", who(peer)))
            }
            None => (Tone::Bad, "path", format!("{} has no known path", who(peer))),
        },
        EventKind::DirectPath { peer, works: true, mtu } => {
            (Tone::Good, "direct path", format!("{} up, MTU {mtu} bytes", who(peer)))
        }
        EventKind::DirectPath { peer, works: false, .. } => {
            (Tone::Bad, "direct path", format!("{} down: no answer to probes", who(peer)))
        }
        EventKind::NodeAppeared { peer } => (Tone::Good, "node appeared", who(peer)),
        EventKind::NodeReachable { peer } => (Tone::Good, "node reachable", who(peer)),
        EventKind::NodeUnreachable { peer } => (Tone::Bad, "node unreachable", who(peer)),
        EventKind::NodeLeft { peer } => (Tone::Wait, "node left", who(peer)),
        EventKind::Attached(it) => (Tone::Good, "attached", container(it)),
        EventKind::Named(it) => (Tone::Plain, "named", container(it)),
        EventKind::Detached(it) => (Tone::Wait, "detached", container(it)),
        EventKind::Gone(it) => (Tone::Wait, "gone", container(it)),
        EventKind::Problem { problem } => (Tone::Bad, "problem", problem.clone()),
        EventKind::ProblemResolved { problem } => (Tone::Good, "problem resolved", problem.clone()),
        EventKind::Unknown => {
            (Tone::Plain, "unknown", "an event of a newer version: use --json to see it".to_owned())
        }
    };
    (Some(tone), kind, text)
}

fn dropped(it: &DroppedPacket) -> String {
    let headers = &it.headers;
    let mut parts = vec![format!("{:<14}", it.reason)];
    // The container that sends or receives the packet is named separately.
    let named = |address: IpAddr| match it.names.get(&address) {
        Some(name) if it.container.as_ref().is_none_or(|it| it.address != address) => {
            format!(" ({name})")
        }
        Some(_) | None => String::new(),
    };
    let from_container = matches!(it.program, Program::FromContainer | Program::Seal);
    if let Some(inner) = &headers.inner {
        parts.push(flow(inner, named));
    } else if let Some(arp) = &headers.arp {
        parts.push(format!(
            "ARP from {}{} for {}{}",
            arp.sender,
            named(arp.sender),
            arp.target,
            named(arp.target)
        ));
    } else if let Some(ethernet) = &headers.ethernet {
        parts.push(format!("EtherType {:#06x}", ethernet.ether_type));
    }
    if let Some(vlan) = headers.vlan {
        parts.push(format!("VLAN {vlan}"));
    }
    if let Some(outer) = &headers.outer {
        let inside = if headers.inner.is_some() { "inside " } else { "" };
        parts.push(format!("{inside}{}", flow(outer, |_| String::new())));
    }
    if let Some(relay) = &headers.relay {
        parts.push(format!("relayed from node {} to node {}", relay.source, relay.destination));
    }
    let there = if from_container { "from" } else { "for" };
    parts.extend(it.container.as_ref().map(|it| format!("{there} {}", name(it))));
    let peer = if from_container { "for" } else { "of" };
    parts.extend(it.peer.as_ref().map(|it| format!("{peer} {}", who(it))));
    if it.reason == "spoofed"
        && let Some(ethernet) = &headers.ethernet
    {
        parts.push(format!("hardware address {}", ethernet.source));
    }
    parts.push(format!("{} bytes", it.bytes));
    parts.extend(it.interface.as_ref().map(|it| format!("on {it}")));
    parts.join("  ")
}

fn flow(flow: &Flow, named: impl Fn(IpAddr) -> String) -> String {
    let place = |address: IpAddr, port: Option<u16>| match port {
        Some(port) => SocketAddr::new(address, port).to_string() + &named(address),
        None => address.to_string() + &named(address),
    };
    let Flow { source, destination, protocol, source_port, destination_port } = flow;
    format!(
        "{protocol} {} > {}",
        place(*source, *source_port),
        place(*destination, *destination_port)
    )
}

fn who(peer: &PeerRef) -> String {
    let name = peer.name.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
    match (peer.id, peer.public_key) {
        (Some(id), _) => format!("node {id}{name}"),
        (None, Some(key)) => format!("WireGuard peer {key}{name}"),
        (None, None) => format!("a peer{name}"),
    }
}

fn name(container: &Container) -> &str {
    container.name.as_deref().unwrap_or(&container.target)
}

fn container(it: &Container) -> String {
    let name = it.name.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
    format!("{} {}{name}", it.address, it.target)
}

/// Formats a time as the local time of day, with milliseconds.
fn clock(unix_milliseconds: u64) -> String {
    let seconds = i64::try_from(unix_milliseconds / 1000).unwrap_or(0);
    // SAFETY: an all-zero `tm` is valid.
    let mut parts: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid.
    unsafe { libc::localtime_r(&raw const seconds, &raw mut parts) };
    format!(
        "{:02}:{:02}:{:02}.{:03}",
        parts.tm_hour,
        parts.tm_min,
        parts.tm_sec,
        unix_milliseconds % 1000
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(json: &str) -> String {
        let parsed: MonitorEvent =
            serde_json::from_str(&json.replacen('{', r#"{"unix_milliseconds":90061007,"#, 1))
                .unwrap();
        let line = event(&parsed, false);
        let (clock, rest) = line.split_at(12);
        assert!(clock.ends_with(":01.007"), "{clock}");
        rest.to_owned()
    }

    #[test]
    fn drops() {
        assert_eq!(
            line(
                r#"{"event":"drop","reason":"spoofed","program":"from-container","interface":"ov0a280002","bytes":98,"container":{"address":"10.40.0.2","target":"netns:blue","name":"blue"},"peer":{"id":2,"name":"host2"},"ethernet":{"source":"02:00:00:00:00:01","ether_type":2048},"inner":{"source":"10.40.0.3","destination":"10.42.0.9","protocol":"udp","source_port":5000,"destination_port":53}}"#
            ),
            "  drop                spoofed         udp 10.40.0.3:5000 > 10.42.0.9:53  from blue  \
             for node 2 (host2)  hardware address 02:00:00:00:00:01  98 bytes  on ov0a280002\n"
        );
        assert_eq!(
            line(
                r#"{"event":"drop","reason":"spoofed","program":"from-container","interface":"ov0a280002","bytes":98,"container":{"address":"10.40.0.2","target":"netns:blue","name":"blue"},"names":{"10.40.0.2":"blue","10.40.0.3":"shop","10.40.0.4":"web\u001b"},"inner":{"source":"10.40.0.3","destination":"10.40.0.4","protocol":"udp","source_port":5000,"destination_port":53}}"#
            ),
            "  drop                spoofed         udp 10.40.0.3:5000 (shop) > 10.40.0.4:53 \
             (web?)  from blue  98 bytes  on ov0a280002\n"
        );
        assert_eq!(
            line(
                r#"{"event":"drop","reason":"spoofed","program":"from-container","bytes":42,"container":{"address":"10.40.0.2","target":"netns:blue"},"names":{"10.40.0.2":"netns:blue","10.40.0.3":"shop"},"arp":{"sender":"10.40.0.3","target":"10.40.0.2"}}"#
            ),
            "  drop                spoofed         ARP from 10.40.0.3 (shop) for 10.40.0.2  from \
             netns:blue  42 bytes\n"
        );
        assert_eq!(
            line(
                r#"{"event":"drop","reason":"forged","program":"from-underlay","interface":"eth0","bytes":142,"peer":{"id":2},"outer":{"source":"fd00::1","destination":"fd00::2","protocol":"udp","source_port":6784,"destination_port":6784},"message":{"receiver":7,"counter":8}}"#
            ),
            "  drop                forged          udp [fd00::1]:6784 > [fd00::2]:6784  of node 2  \
             142 bytes  on eth0\n"
        );
        assert_eq!(
            line(r#"{"event":"drops-not-shown","reason":"spoofed","count":99968}"#),
            "  drops not shown     spoofed         99968 more packets\n"
        );
    }

    #[test]
    fn others() {
        assert_eq!(
            line(r#"{"event":"path-changed","peer":{"id":3,"name":"host3"},"path":{"via":2}}"#),
            "  path                node 3 (host3) through node 2\n"
        );
        assert_eq!(
            line(
                r#"{"event":"disconnected","peer":{"id":3},"remote":"192.0.2.3:6783","why":"it\u001b[2J ended"}"#
            ),
            "  disconnected        node 3 at 192.0.2.3:6783: it?[2J ended\n"
        );
        assert_eq!(
            line(r#"{"event":"named","address":"10.40.0.2","target":"0123456789ab","name":"web"}"#),
            "  named               10.40.0.2 0123456789ab (web)\n"
        );
        assert_eq!(
            line(r#"{"event":"eclipse"}"#),
            "  unknown             an event of a newer version: use --json to see it\n"
        );
    }

    #[test]
    fn only_terminals_get_colors() {
        let problem = MonitorEvent {
            unix_milliseconds: 0,
            what: EventKind::Problem { problem: "x".to_owned() },
        };
        assert!(event(&problem, true).contains("\u{1b}[31m"));
        assert!(!event(&problem, false).contains('\u{1b}'));
    }
}
