//! Formats the sections of `overnode status`.

use std::time::SystemTime;

use overnode_api::bulk::Mode;
use overnode_api::{
    BulkStatus, ConnectionState, ConnectionStatus, CounterStatus, DataStatus, Direction, DnsStatus,
    EndpointState, EndpointStatus, ExternalPeerStatus, IpamStatus, Kind, LastError, Level,
    NodeState, NodeStatus, Path, PeerStatus, RouteStatus, SessionState, Status, TargetState,
    TargetStatus, WorkersStatus,
};
use overnode_types::NodeId;

use super::grid::{Cell, Grid, Style, Tone, maybe, pairs_of};
use super::units::{bytes, duration, round_trip, share, since};

/// Formats the problems and what to do about them, one paragraph each, or states that there are
/// none.
pub(super) fn health(status: &Status, style: Style) -> String {
    let mut pairs: Vec<(&str, Cell)> = Vec::new();
    for finding in &status.health.findings {
        let (name, tone) = match finding.level {
            Level::Critical => ("critical", Tone::Bad),
            Level::Warning | Level::Ok => ("warning", Tone::Wait),
        };
        let gap = if finding.advice.is_empty() { "" } else { "; " };
        pairs.push((name, Cell::new(format!("{}{gap}{}", finding.what, finding.advice), tone)));
    }
    if pairs.is_empty() {
        let others = status.peers.iter().filter(|peer| !peer.myself && !peer.reclaimed).count();
        let nodes = match others {
            0 => "no other node is known yet".to_owned(),
            1 => "the other node is reachable".to_owned(),
            _ => format!("all {others} other nodes are reachable"),
        };
        pairs.push(("health", Cell::new(format!("all is well: {nodes}"), Tone::Good)));
    }
    pairs_of(pairs.iter().map(|(name, cell)| (*name, cell)), style)
}

/// Formats the facts about this node.
pub(super) fn node(node: &NodeStatus, style: Style) -> String {
    let state = match node.state {
        NodeState::Starting => Cell::new("starting", Tone::Wait),
        NodeState::Running => Cell::new("running", Tone::Good),
        NodeState::Impaired => Cell::new("impaired", Tone::Bad),
        NodeState::Leaving => Cell::new("leaving", Tone::Wait),
    };
    let mut pairs: Vec<(&str, Cell)> = vec![
        ("node", named(node.id, &node.nickname).into()),
        ("state", state),
        ("version", format!("{}, up {}", node.version, duration(node.uptime_seconds)).into()),
    ];
    let (subnet, range) = (node.network.subnet, node.network.range);
    pairs.extend(node.address.map(|address| ("address", Cell::from(address))));
    pairs.push(("subnet", format!("{subnet}, addresses are allocated from {range}").into()));
    let underlay: Vec<String> = node
        .interface
        .iter()
        .cloned()
        .chain(node.underlay.iter().map(ToString::to_string))
        .collect();
    if !underlay.is_empty() {
        pairs.push(("underlay", underlay.join(", ").into()));
    }
    pairs.extend(node.mtu.map(|mtu| ("mtu", Cell::from(mtu))));
    pairs.extend(node.attachment.as_ref().map(|how| ("programs", Cell::from(how))));
    pairs.extend(workers(&node.bulk).map(|text| ("bulk flows", Cell::from(text))));
    if !node.settings.is_empty() {
        pairs.push(("settings", node.settings.join(" ").into()));
    }
    pairs.push(("public key", node.public_key.into()));
    pairs_of(pairs.iter().map(|(name, cell)| (*name, cell)), style)
}

/// Describes how bulk flows are handled. Returns `None` while the workers start.
fn workers(bulk: &WorkersStatus) -> Option<String> {
    let how_many = match (bulk.mode, bulk.workers) {
        (Mode::Off, _) => return Some("in the kernel, like all other flows".to_owned()),
        (_, 0) => {
            return bulk
                .error
                .as_ref()
                .map(|_| "in the kernel, because there are no workers".to_owned());
        }
        (_, 1) => "1 worker".to_owned(),
        (_, workers) => format!("{workers} workers"),
    };
    let speeds: Vec<String> =
        bulk.speeds.iter().map(|(cipher, speed)| format!("{cipher} {speed} MiB/s")).collect();
    Some(format!("{how_many}, each {}", speeds.join(" or ")))
}

/// Formats `--targets`.
pub(super) fn targets(targets: &[TargetStatus], style: Style) -> String {
    let mut grid = Grid::new(&["host", "state", "node", "note"]);
    for target in targets {
        let state = match target.state {
            TargetState::Connecting => Cell::new("connecting", Tone::Wait),
            TargetState::Established => Cell::new("established", Tone::Good),
            TargetState::Retrying => Cell::new("retrying", Tone::Wait),
            TargetState::Failed => Cell::new("failed", Tone::Bad),
            TargetState::Myself => Cell::new("this node", Tone::Good),
        };
        let note = match target.state {
            // Earlier errors no longer matter.
            TargetState::Established | TargetState::Myself => String::new(),
            TargetState::Connecting | TargetState::Retrying | TargetState::Failed => {
                trouble(target.last_error.as_ref(), target.next_try_in_seconds)
            }
        };
        grid.row([Cell::from(&target.host), state, maybe(target.peer), note.into()]);
    }
    grid.render(style)
}

/// Formats `--peers`, with the connections of all nodes if `detailed`.
pub(super) fn peers(status: &Status, detailed: bool, style: Style) -> String {
    let mut grid = Grid::new(&[
        "node", "address", "state", "since", "session", "path", "rtt", "loss", "endpoint", "mtu",
        "received", "sent", "note",
    ])
    .spare(&["endpoint", "since", "address", "loss", "mtu", "rtt"]);
    for peer in &status.peers {
        let [session, endpoint, mtu, received, sent, note] = data(peer.data.as_ref());
        let [path, rtt, loss] = route(peer.data.as_ref().and_then(|data| data.route.as_ref()));
        let state = reachability(peer);
        let since = maybe(peer.since_seconds.map(duration));
        let name = named(peer.id, &peer.nickname);
        grid.row([
            name.into(),
            maybe(peer.address),
            state,
            since,
            session,
            path,
            rtt,
            loss,
            endpoint,
            mtu,
            received,
            sent,
            note,
        ]);
    }
    let mut text = grid.render(style);
    if detailed && status.peers.iter().any(|peer| !peer.links.is_empty()) {
        text = format!("{text}\nConnections between nodes\n{}", links(&status.peers, style));
    }
    if !status.external_peers.is_empty() {
        text =
            format!("{text}\nWireGuard peers\n{}", external_peers(&status.external_peers, style));
    }
    text
}

/// Formats `--connections`.
pub(super) fn connections(connections: &[ConnectionStatus], style: Style) -> String {
    let mut grid = Grid::new(&[
        "",
        "remote",
        "state",
        "node",
        "rtt",
        "path",
        "loss",
        "mtu",
        "since",
        "bulk flows",
        "encryption",
        "note",
    ])
    .spare(&["encryption", "bulk flows", "loss", "since", "rtt", "path", "mtu"]);
    for connection in connections {
        let note = match connection.state {
            ConnectionState::Established => String::new(),
            ConnectionState::Connecting
            | ConnectionState::Pending
            | ConnectionState::Retrying
            | ConnectionState::Failed => {
                trouble(connection.last_error.as_ref(), connection.next_try_in_seconds)
            }
        };
        let [path, _, loss] = route(connection.route.as_ref());
        grid.row([
            arrow(connection.direction).into(),
            Cell::from(&connection.remote),
            connection_state(connection.state),
            maybe(
                connection
                    .peer
                    .map(|id| named(id, connection.nickname.as_deref().unwrap_or_default())),
            ),
            maybe(connection.rtt_microseconds.map(round_trip)),
            path,
            loss,
            maybe(connection.mtu),
            maybe(connection.since_seconds.map(duration)),
            maybe(connection.bulk.as_ref().map(bulk)),
            maybe(connection.encryption.as_ref()),
            note.into(),
        ]);
    }
    grid.render(style)
}

/// Describes what seals the bulk flows, and their total rate in both directions.
fn bulk(bulk: &BulkStatus) -> String {
    let rate = bulk.rx_bits_per_second + bulk.tx_bits_per_second;
    match (bulk.in_use, rate) {
        (false, _) => "in the kernel".to_owned(),
        (true, 0) => bulk.cipher.name().to_owned(),
        (true, rate) => format!("{} {}", bulk.cipher.name(), bit_rate(rate)),
    }
}

fn bit_rate(bits: u64) -> String {
    let bits = bits as f64;
    match () {
        () if bits >= 1e9 => format!("{:.1} Gbit/s", bits / 1e9),
        () if bits >= 1e6 => format!("{:.0} Mbit/s", bits / 1e6),
        () => format!("{:.0} kbit/s", bits / 1e3),
    }
}

/// Formats `--endpoints`.
pub(super) fn endpoints(endpoints: &[EndpointStatus], style: Style) -> String {
    let now = SystemTime::now();
    let mut grid =
        Grid::new(&["address", "name", "interface", "state", "since", "kind", "image", "target"])
            .spare(&["interface", "kind"]);
    for endpoint in endpoints {
        let kind = match endpoint.kind {
            Kind::Netns => "netns",
            Kind::Docker => "docker",
            Kind::Cni => "cni",
            Kind::Host => "host",
        };
        let state = match endpoint.state {
            EndpointState::Attached => Cell::new("attached", Tone::Good),
            EndpointState::Reserved => Cell::new("reserved", Tone::Wait),
            EndpointState::Gone => Cell::new("gone", Tone::Bad),
        };
        grid.row([
            endpoint.address.into(),
            maybe(endpoint.name.as_ref()),
            Cell::from(&endpoint.interface),
            state,
            maybe(endpoint.attached_unix_seconds.map(|then| since(then, now))),
            kind.into(),
            maybe(endpoint.image.as_ref()),
            Cell::from(&endpoint.target),
        ]);
    }
    grid.render(style)
}

/// Formats `--ipam`. Includes problems if `detailed`. Otherwise [`health`] has shown them.
pub(super) fn ipam(ipam: &IpamStatus, detailed: bool, style: Style) -> String {
    let mut grid = Grid::new(&["node", "addresses", "share", "active", "state"]);
    for owner in &ipam.owners {
        grid.row([
            named(owner.id, &owner.nickname).into(),
            owner.addresses.into(),
            share(owner.percent).into(),
            maybe(owner.active),
            reachable(owner.reachable),
        ]);
    }
    let waiting = ipam.waiting_for.as_deref().unwrap_or("no address space yet");
    let lead = match ipam.ready {
        true => "this node can give out addresses".to_owned(),
        false => format!("this node cannot give out addresses: {waiting}"),
    };
    let mut facts = vec![("ready", Cell::from(lead))];
    for reclaim in &ipam.reclaims {
        let missing =
            reclaim.missing.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        facts.push((
            "reclaim",
            format!("of node {}: waiting for nodes {missing}", reclaim.id).into(),
        ));
    }
    if detailed {
        facts
            .extend(ipam.problems.iter().map(|problem| ("problem", Cell::new(problem, Tone::Bad))));
        facts.extend(ipam.notices.iter().map(|notice| ("notice", Cell::new(notice, Tone::Wait))));
    }
    let facts = pairs_of(facts.iter().map(|(name, cell)| (*name, cell)), style);
    let mut text = format!("{facts}{}", grid.render(style));
    if !ipam.loans.is_empty() {
        text = format!("{text}\nLoans\n{}", loans(ipam, style));
    }
    text
}

/// Formats the address ranges lent between nodes.
fn loans(ipam: &IpamStatus, style: Style) -> String {
    let name = |id: NodeId| {
        let owner = ipam.owners.iter().find(|owner| owner.id == id);
        named(id, owner.map_or("", |owner| &owner.nickname))
    };
    let mut grid = Grid::new(&["lender", "borrower", "addresses", "state", "networks"]);
    for loan in &ipam.loans {
        let state = match (loan.lender_reachable, loan.borrower_reachable) {
            (true, true) => reachable(Some(true)),
            (false, true) => Cell::new("lender unreachable", Tone::Bad),
            (true, false) => Cell::new("borrower unreachable", Tone::Bad),
            (false, false) => Cell::new("both unreachable", Tone::Bad),
        };
        let networks = loan.networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        grid.row([
            name(loan.lender).into(),
            name(loan.borrower).into(),
            loan.addresses.into(),
            state,
            networks.into(),
        ]);
    }
    grid.render(style)
}

/// Formats `--dns`.
pub(super) fn dns(dns: &DnsStatus, style: Style) -> String {
    let lead = match (&dns.address, &dns.domain) {
        (Some(address), Some(domain)) if dns.serving => {
            let domains: Vec<&str> = std::iter::once(domain.as_str())
                .chain(dns.aliases.iter().map(String::as_str))
                .collect();
            Cell::from(format!("at {address}, under {}", domains.join(" and ")))
        }
        _ => Cell::new("not served to containers", Tone::Wait),
    };
    let upstream: Vec<String> = dns.upstream.iter().map(ToString::to_string).collect();
    let upstream = match upstream.is_empty() {
        true => Cell::new("no resolver in /etc/resolv.conf", Tone::Wait),
        false => upstream.join(", ").into(),
    };
    let queries = format!(
        "{}, of which {} were forwarded ({} without an answer); {} refused",
        dns.queries, dns.forwarded, dns.failed, dns.refused
    );
    let facts = [("names", lead), ("upstream", upstream), ("queries", queries.into())];
    let mut grid = Grid::new(&["name", "address", "node", "state"]);
    for entry in &dns.entries {
        grid.row([
            Cell::from(&entry.name),
            entry.address.into(),
            named(entry.node, &entry.nickname).into(),
            reachable(Some(entry.reachable)),
        ]);
    }
    format!(
        "{}{}",
        pairs_of(facts.iter().map(|(name, cell)| (*name, cell)), style),
        grid.render(style)
    )
}

/// Formats `--counters`.
pub(super) fn counters(counters: &[CounterStatus], style: Style) -> String {
    let mut grid = Grid::new(&["reason", "packets", "verdict", "meaning"]);
    for counter in counters.iter().filter(|counter| counter.count > 0) {
        let fate = if counter.dropped { Cell::new("dropped", Tone::Wait) } else { "passed".into() };
        grid.row([
            Cell::from(&counter.reason),
            counter.count.into(),
            fate,
            Cell::from(counter.description.trim()),
        ]);
    }
    grid.render(style)
}

/// Formats WireGuard peers that are not nodes.
pub(super) fn external_peers(peers: &[ExternalPeerStatus], style: Style) -> String {
    let mut grid = Grid::new(&[
        "allowed",
        "name",
        "session",
        "endpoint",
        "mtu",
        "received",
        "sent",
        "public key",
        "note",
    ])
    .spare(&["endpoint", "mtu"]);
    for peer in peers {
        let allowed =
            peer.allowed_ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let [session, endpoint, mtu, received, sent, note] = data(peer.data.as_ref());
        let name = maybe(peer.name.as_ref());
        grid.row([
            allowed.into(),
            name,
            session,
            endpoint,
            mtu,
            received,
            sent,
            peer.public_key.into(),
            note,
        ]);
    }
    grid.render(style)
}

/// Formats the connections between nodes, as reported by each node.
fn links(peers: &[PeerStatus], style: Style) -> String {
    let mut grid = Grid::new(&["node", "", "remote", "to", "state"]);
    for peer in peers {
        for link in &peer.links {
            grid.row([
                named(peer.id, &peer.nickname).into(),
                maybe(link.direction.map(arrow)),
                maybe(link.remote),
                named(link.peer, link.nickname.as_deref().unwrap_or_default()).into(),
                connection_state(link.state),
            ]);
        }
    }
    grid.render(style)
}

/// Returns the cells for path, round-trip time and loss.
fn route(route: Option<&RouteStatus>) -> [Cell; 3] {
    let Some(route) = route else { return [(); 3].map(|()| "".into()) };
    let path = match route.path {
        Some(Path::Direct) => Cell::new("direct", Tone::Good),
        Some(Path::Via(relay)) => Cell::new(format!("via {relay}"), Tone::Wait),
        None => Cell::new("none", Tone::Bad),
    };
    let loss = route.loss_per_mille.map(|loss| format!("{}.{}%", loss / 10, loss % 10));
    [path, maybe(route.rtt_microseconds.map(round_trip)), maybe(loss)]
}

/// Returns the cells for session, endpoint, MTU, received, sent and note.
fn data(data: Option<&DataStatus>) -> [Cell; 6] {
    let Some(data) = data else { return [(); 6].map(|()| "".into()) };
    let age = data.session_age_seconds.map(|age| format!(" {}", duration(age))).unwrap_or_default();
    let session = match data.session {
        SessionState::None => Cell::new("none", Tone::Bad),
        SessionState::Handshake => Cell::new("handshake", Tone::Wait),
        SessionState::Established => Cell::new(format!("established{age}"), Tone::Good),
        SessionState::Expired => Cell::new(format!("expired{age}"), Tone::Bad),
    };
    let note = match data.session {
        SessionState::Established => {
            let astray = data.route.as_ref().filter(|route| !route.direct_works);
            astray.map_or_else(String::new, |route| trouble(route.last_error.as_ref(), None))
        }
        SessionState::None | SessionState::Handshake | SessionState::Expired => {
            trouble(data.last_error.as_ref(), None)
        }
    };
    [
        session,
        maybe(data.endpoint),
        maybe(data.mtu),
        bytes(data.rx_bytes).into(),
        bytes(data.tx_bytes).into(),
        note.into(),
    ]
}

fn reachability(peer: &PeerStatus) -> Cell {
    if peer.myself {
        return Cell::new("this node", Tone::Good);
    }
    match (peer.reachable, peer.path) {
        _ if peer.reclaimed => "gone, reclaimed".into(),
        (Some(true), Some(Path::Direct)) => Cell::new("direct", Tone::Good),
        (Some(true), Some(Path::Via(node))) => Cell::new(format!("via {node}"), Tone::Wait),
        (state, _) => reachable(state),
    }
}

fn reachable(state: Option<bool>) -> Cell {
    match state {
        Some(true) => Cell::new("reachable", Tone::Good),
        Some(false) => Cell::new("unreachable", Tone::Bad),
        None => "".into(),
    }
}

fn connection_state(state: ConnectionState) -> Cell {
    match state {
        ConnectionState::Connecting => Cell::new("connecting", Tone::Wait),
        ConnectionState::Pending => Cell::new("pending", Tone::Wait),
        ConnectionState::Established => Cell::new("established", Tone::Good),
        ConnectionState::Retrying => Cell::new("retrying", Tone::Wait),
        ConnectionState::Failed => Cell::new("failed", Tone::Bad),
    }
}

const fn arrow(direction: Direction) -> &'static str {
    match direction {
        Direction::Outbound => "->",
        Direction::Inbound => "<-",
    }
}

fn named(id: NodeId, nickname: &str) -> String {
    if nickname.is_empty() { id.to_string() } else { format!("{id}({nickname})") }
}

fn trouble(error: Option<&LastError>, next_try_in_seconds: Option<u64>) -> String {
    let what = error.map(|error| match error.seconds_ago {
        Some(age) => format!("{} ({} ago)", error.message, duration(age)),
        None => error.message.clone(),
    });
    let next = next_try_in_seconds.map(|seconds| format!("next try in {}", duration(seconds)));
    what.into_iter().chain(next).collect::<Vec<_>>().join("; ")
}
