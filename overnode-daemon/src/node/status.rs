//! Collects the data of `status` and `inspect` from all parts of the node.

use std::net::IpAddr;
use std::time::Instant;

use overnode_ebpf::reason::Reason;

use super::containers::target_of;
use super::control_plane::targets;
use super::data_plane::paths::path_of;
use super::settings;
use super::view::View;
use crate::api::{
    ApiError, ConnectionState, ConnectionStatus, CounterStatus, DataStatus, Direction,
    EndpointState, EndpointStatus, ExternalPeerStatus, Health, LastError, LinkStatus, NodeState,
    NodeStatus, Path, PeerStatus, RouteStatus, SessionState, Status, TargetState, TargetStatus,
};
use crate::datapath::{Hook, UnderlayStatus};
use crate::net::session::PATTERN;
use overnode_core::control::dial::{self, Phase};
use overnode_core::gossip::{self, Record};
use overnode_types::{NodeId, PeerIndex};

impl View<'_> {
    /// Returns the status. The caller reads the maps first.
    pub(super) fn status(&self, now: Instant) -> Result<Status, ApiError> {
        let mut status = Status {
            health: Health::default(),
            node: self.node_status(now)?,
            targets: self.target_status(now)?,
            peers: self.peer_status(now),
            connections: self.connection_status(now),
            endpoints: self.endpoint_status()?,
            ipam: self.ipam_status(now),
            dns: self.names.status(|id| self.nickname(id)),
            external_peers: self.external_peers(now),
            counters: self.counter_status()?,
        };
        status.health = Health::of(&status);
        Ok(status)
    }

    fn node_status(&self, now: Instant) -> Result<NodeStatus, ApiError> {
        let identity = &self.local.identity;
        let underlay = self.data.datapath.underlay();
        let problems: Vec<String> = self.node_problems(now).into_iter().collect();
        let underlay_problems: Vec<String> = self.underlay_problems().into_iter().collect();
        let is_impaired = !problems.is_empty()
            || !underlay_problems.is_empty()
            || !self.address_problems(now).is_empty();
        Ok(NodeStatus {
            id: identity.id,
            nickname: identity.nickname.clone(),
            state: if is_impaired { NodeState::Impaired } else { NodeState::Running },
            problems,
            underlay_problems,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: now.duration_since(self.local.started).as_secs(),
            address: Some(self.addresses.ipam.layout().node_address(identity.id)),
            underlay: underlay.addresses.iter().copied().filter(is_of_use).collect(),
            interface: identity
                .interface
                .clone()
                .or_else(|| underlay.interfaces.first().map(|it| it.name.clone())),
            mtu: Some(underlay.container_mtu),
            network: identity.network,
            public_key: self.local.public_key,
            discovery: Some(identity.discovery),
            settings: settings::list(identity)
                .into_iter()
                .filter(|it| !it.is_default && it.key != "nickname")
                .map(|it| format!("{}={}", it.key, it.value))
                .collect(),
            attachment: Some(attachment(&underlay)),
            bulk: self.bulk.workers_status(),
        })
    }

    fn target_status(&self, now: Instant) -> Result<Vec<TargetStatus>, ApiError> {
        let known = self.control.dialer.target_status();
        Ok(targets(self.store)?
            .into_iter()
            .map(|host| {
                let view = known.iter().find(|view| view.name == host.as_str());
                let phase = view.map_or(&Phase::Connecting, |view| &view.phase);
                TargetStatus {
                    state: match phase {
                        Phase::Connecting => TargetState::Connecting,
                        Phase::Established => TargetState::Established,
                        Phase::Retrying { .. } => TargetState::Retrying,
                        Phase::Myself => TargetState::Myself,
                        Phase::Refused => TargetState::Failed,
                    },
                    peer: view.and_then(|view| view.peer),
                    next_try_in_seconds: next_try(phase, now),
                    last_error: view
                        .and_then(|view| view.last_error.as_ref())
                        .map(|error| last_error(error, now)),
                    host,
                }
            })
            .collect())
    }

    fn peer_status(&self, now: Instant) -> Vec<PeerStatus> {
        let paths = self.control.gossip.paths();
        let mut peers: Vec<PeerStatus> = self
            .control
            .gossip
            .records()
            .filter(|record| !record.left)
            .map(|record| {
                let myself = record.id == self.local.identity.id;
                let reach = self.reach(record.id);
                let reachable = myself || reach.is_some_and(|(reachable, _)| reachable);
                PeerStatus {
                    id: record.id,
                    nickname: record.nickname.clone(),
                    myself,
                    reachable: Some(reachable),
                    since_seconds: reach
                        .map(|(_, since)| now.saturating_duration_since(since).as_secs()),
                    reclaimed: !reachable && self.addresses.ipam.is_gone_for_good(record.id),
                    path: paths.get(&record.id).filter(|_| reachable && !myself).map(path),
                    address: Some(self.addresses.ipam.layout().node_address(record.id)),
                    underlay: record.addresses.clone(),
                    public_key: Some(record.public_key),
                    version: myself.then(|| env!("CARGO_PKG_VERSION").to_owned()),
                    links: if myself { self.own_links() } else { self.links_of(record) },
                    data: (!myself)
                        .then(|| self.data_status(record.id.peer_index(), now))
                        .flatten(),
                }
            })
            .collect();
        peers.sort_by_key(|peer| (!peer.myself, peer.id));
        peers
    }

    fn own_links(&self) -> Vec<LinkStatus> {
        let established = self
            .control
            .dialer
            .connection_status()
            .into_iter()
            .filter(|it| it.phase == Phase::Established);
        established
            .filter_map(|connection| {
                let peer = connection.peer?;
                Some(LinkStatus {
                    direction: Some(direction(connection.direction)),
                    remote: connection.address.parse().ok(),
                    peer,
                    nickname: connection.nickname,
                    state: self.link_state(self.local.identity.id, peer),
                })
            })
            .collect()
    }

    fn links_of(&self, record: &Record) -> Vec<LinkStatus> {
        record
            .links
            .iter()
            .map(|&peer| LinkStatus {
                direction: None,
                remote: None,
                peer,
                nickname: self.control.gossip.record(peer).map(|record| record.nickname.clone()),
                state: self.link_state(record.id, peer),
            })
            .collect()
    }

    fn link_state(&self, one: NodeId, other: NodeId) -> ConnectionState {
        let says = |a, b| {
            self.control
                .gossip
                .record(a)
                .is_some_and(|record| record.links.binary_search(&b).is_ok())
        };
        if says(one, other) && says(other, one) {
            ConnectionState::Established
        } else {
            ConnectionState::Pending
        }
    }

    fn connection_status(&self, now: Instant) -> Vec<ConnectionStatus> {
        self.control
            .dialer
            .connection_status()
            .into_iter()
            .map(|view| {
                let established = view.phase == Phase::Established;
                let state = match (&view.phase, view.peer) {
                    (Phase::Connecting, _) => ConnectionState::Connecting,
                    (Phase::Established, Some(peer)) => {
                        self.link_state(self.local.identity.id, peer)
                    }
                    (Phase::Established, None) => ConnectionState::Pending,
                    (Phase::Retrying { .. }, _) => ConnectionState::Retrying,
                    (Phase::Myself | Phase::Refused, _) => ConnectionState::Failed,
                };
                let rtt = view.peer.filter(|_| established).and_then(|peer| self.control.rtt(peer));
                let data = view.peer.filter(|_| established);
                let data = data.and_then(|peer| self.data_status(peer.peer_index(), now));
                let myself = || LastError {
                    message: "this target is this node itself; it is not tried again".to_owned(),
                    seconds_ago: None,
                };
                ConnectionStatus {
                    direction: direction(view.direction),
                    remote: view.address,
                    state,
                    since_seconds: view
                        .since
                        .map(|since| now.saturating_duration_since(since).as_secs()),
                    encryption: established.then(|| PATTERN.to_owned()),
                    peer: view.peer,
                    nickname: view
                        .nickname
                        .or_else(|| Some(self.control.gossip.record(view.peer?)?.nickname.clone())),
                    rtt_microseconds: rtt.and_then(|rtt| u64::try_from(rtt.as_micros()).ok()),
                    mtu: data.as_ref().and_then(|data| data.mtu),
                    bulk: data.as_ref().and_then(|data| data.bulk.clone()),
                    route: data.and_then(|data| data.route),
                    next_try_in_seconds: next_try(&view.phase, now),
                    last_error: if view.phase == Phase::Myself {
                        Some(myself())
                    } else {
                        view.last_error.as_ref().map(|error| last_error(error, now))
                    },
                }
            })
            .collect()
    }

    fn endpoint_status(&self) -> Result<Vec<EndpointStatus>, ApiError> {
        let attachments = self.store.attachments().map_err(ApiError::failed)?;
        Ok(attachments
            .iter()
            .map(|it| EndpointStatus {
                kind: it.kind(),
                image: it.image().cloned(),
                cni: it.cni().cloned(),
                name: it.name.clone(),
                target: target_of(it),
                address: self.local.with_prefix(it.address),
                fixed: it.is_static,
                interface: it.host_interface.clone(),
                attached_unix_seconds: Some(it.since),
                state: if !it.has_interface() {
                    EndpointState::Reserved
                } else if self.data.datapath.is_attached(&it.host_interface) {
                    EndpointState::Attached
                } else {
                    EndpointState::Gone
                },
            })
            .collect())
    }

    fn counter_status(&self) -> Result<Vec<CounterStatus>, ApiError> {
        let counters = self.data.datapath.counters()?;
        Ok(Reason::ALL
            .iter()
            .filter_map(|reason| {
                let count = *counters.get(reason.as_str())?;
                (count > 0).then(|| CounterStatus {
                    reason: reason.as_str().to_owned(),
                    description: reason.describe().trim().to_owned(),
                    dropped: reason.is_drop(),
                    count,
                })
            })
            .collect())
    }

    pub(super) fn data_status(&self, index: PeerIndex, now: Instant) -> Option<DataStatus> {
        let peer = self.data.peers().get(&index)?;
        let state = peer.state.as_ref()?;
        let sealing = state.sessions.iter().find(|session| session.sealing);
        let bulk = self.bulk.status(index, now);
        Some(DataStatus {
            session: match sealing {
                Some(session) if session.expires > now => SessionState::Established,
                Some(_) => SessionState::Expired,
                None if self.data.handshakes.peer(index).is_some_and(|view| view.waiting) => {
                    SessionState::Handshake
                }
                None => SessionState::None,
            },
            session_age_seconds: sealing
                .map(|session| now.saturating_duration_since(session.created).as_secs()),
            endpoint: state.endpoint,
            mtu: Some(state.mtu),
            route: index.node().and_then(|id| self.route_status(id, now)),
            rx_bytes: state.rx_bytes + bulk.as_ref().map_or(0, |bulk| bulk.rx_bytes),
            tx_bytes: state.tx_bytes + bulk.as_ref().map_or(0, |bulk| bulk.tx_bytes),
            rx_packets: Some(state.rx_packets + bulk.as_ref().map_or(0, |bulk| bulk.rx_packets)),
            tx_packets: Some(state.tx_packets + bulk.as_ref().map_or(0, |bulk| bulk.tx_packets)),
            received_seconds_ago: state
                .last_received
                .map(|at| now.saturating_duration_since(at).as_secs()),
            last_error: peer.last_error.as_ref().map(|error| last_error(error, now)),
            bulk,
        })
    }
}

impl View<'_> {
    /// Returns the external WireGuard peers.
    pub(super) fn external_peers(&self, now: Instant) -> Vec<ExternalPeerStatus> {
        self.data
            .externals()
            .map(|peer| ExternalPeerStatus {
                public_key: peer.public_key,
                name: peer.name.clone(),
                preshared_key: peer.preshared_key.is_some(),
                allowed_ips: peer.allowed.clone(),
                persistent_keepalive_seconds: peer.keepalive,
                data: self.data_status(peer.index, now),
            })
            .collect()
    }

    fn route_status(&self, id: NodeId, now: Instant) -> Option<RouteStatus> {
        let (route, since) = self.data.relay_routes.route(id)?;
        let direct_works = self.data.paths.state(id);
        let micros = |rtt: std::time::Duration| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX);
        Some(RouteStatus {
            path: path_of(route),
            since_seconds: now.saturating_duration_since(since).as_secs(),
            direct_works: direct_works.is_some_and(|state| state.alive),
            rtt_microseconds: direct_works.and_then(|state| state.rtt).map(micros),
            loss_per_mille: direct_works
                .filter(|state| state.rtt.is_some())
                .map(|state| (state.loss * 1000.0) as u16),
            last_error: direct_works
                .and_then(|state| state.last_error)
                .map(|(error, at)| last_error(&(error.to_string(), at), now)),
        })
    }
}

fn attachment(underlay: &UnderlayStatus) -> String {
    let hook = match underlay.hook {
        Hook::Tcx => "tcx",
        Hook::Clsact => "clsact",
    };
    let xdp = if underlay.interfaces.iter().any(|interface| interface.xdp) { "+xdp" } else { "" };
    format!("{hook}{xdp}")
}

/// Whether other hosts may know this host by the address.
fn is_of_use(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    }
}

fn direction(direction: dial::Direction) -> Direction {
    match direction {
        dial::Direction::Out => Direction::Outbound,
        dial::Direction::In => Direction::Inbound,
    }
}

fn path(path: &gossip::Path) -> Path {
    if path.hops == 1 { Path::Direct } else { Path::Via(path.via) }
}

fn next_try(phase: &Phase, now: Instant) -> Option<u64> {
    match phase {
        Phase::Retrying { next } => Some(next.saturating_duration_since(now).as_secs()),
        Phase::Connecting | Phase::Established | Phase::Myself | Phase::Refused => None,
    }
}

fn last_error((why, at): &(String, Instant), now: Instant) -> LastError {
    LastError {
        message: why.clone(),
        seconds_ago: Some(now.saturating_duration_since(*at).as_secs()),
    }
}
