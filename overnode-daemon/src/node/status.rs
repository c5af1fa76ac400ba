//! What `status` and `inspect` tell, gathered from all parts.

use std::time::Instant;

use overnode_ebpf::reason::Reason;

use super::endpoints::target_of;
use super::running::Node;
use super::{launch, links};
use crate::api::{
    ApiError, ConnectionState, ConnectionStatus, CounterStatus, DataStatus, Direction, EndpointState, EndpointStatus,
    IpamStatus, LastError, LinkStatus, NodeState, NodeStatus, Path, PeerStatus, RangeOwner, SessionState, Status,
    TargetState, TargetStatus,
};
use crate::control::dial;
use crate::control::session::PATTERN;
use crate::gossip::{self, Record};
use crate::net::mesh;
use crate::types::{NodeId, PeerIndex};

impl Node {
    pub(super) fn status(&mut self) -> Result<Status, ApiError> {
        let now = Instant::now();
        self.read_maps(now);
        Ok(Status {
            node: self.node_status(now)?,
            targets: self.target_status(now)?,
            peers: self.peer_status(now),
            connections: self.connection_status(now),
            endpoints: self.endpoint_status()?,
            ipam: self.ipam_status(),
            external_peers: self.externals()?,
            counters: self.counter_status()?,
        })
    }

    /// Everything. What a type keeps secret has no JSON form, so that no field can slip through.
    pub(super) fn inspect(&mut self) -> Result<serde_json::Value, ApiError> {
        let now = Instant::now();
        let status = self.status()?;
        let sessions: Vec<_> = self
            .peers
            .values()
            .filter_map(|peer| peer.state.as_ref())
            .map(|state| {
                let sessions: Vec<_> = state
                    .sessions
                    .iter()
                    .map(|session| {
                        serde_json::json!({
                            "local_index": session.local_index,
                            "remote_index": session.remote_index,
                            "initiator": session.initiator,
                            "confirmed": session.confirmed,
                            "sealing": session.sealing,
                            "age_seconds": now.saturating_duration_since(session.created).as_secs(),
                            "expires_in_seconds": session.expires.saturating_duration_since(now).as_secs(),
                        })
                    })
                    .collect();
                serde_json::json!({ "peer": state.index, "public_key": state.public_key, "sessions": sessions })
            })
            .collect();
        let handshakes: serde_json::Map<_, _> =
            self.handshakes.counters().named().map(|(name, count)| (name.to_owned(), count.into())).collect();
        let records: Vec<&Record> = self.gossip.records().collect();
        let routes: Vec<_> = self
            .peers
            .iter()
            .map(|(index, peer)| serde_json::json!({ "peer": index, "prefixes": peer.routes }))
            .collect();
        Ok(serde_json::json!({
            "status": status,
            "incarnation": self.incarnation,
            "records": records,
            "routes": routes,
            "data": { "peers": sessions, "underlay": self.datapath.underlay() },
            "handshakes": handshakes,
        }))
    }

    fn node_status(&self, now: Instant) -> Result<NodeStatus, ApiError> {
        let identity = &self.identity;
        let underlay = self.datapath.underlay();
        Ok(NodeStatus {
            id: identity.id,
            nickname: identity.nickname.clone(),
            state: if self.problems.is_empty() { NodeState::Running } else { NodeState::Impaired },
            problems: self.problems.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: now.duration_since(self.started).as_secs(),
            address: launch::node_address(identity.network, identity.id).ok(),
            underlay: underlay.addresses.clone(),
            interface: identity.interface.clone().or_else(|| underlay.interfaces.first().cloned()),
            mtu: Some(underlay.mtu),
            network: identity.network,
            public_key: self.public_key,
            discovery: Some(identity.discovery),
            attachment: Some(underlay.attachment.to_owned()),
        })
    }

    fn target_status(&self, now: Instant) -> Result<Vec<TargetStatus>, ApiError> {
        let states = self.dialer.states();
        Ok(self
            .targets()?
            .into_iter()
            .map(|host| {
                let view = states.iter().find(|view| view.target == host.as_str());
                let state = view.map(|view| &view.state);
                TargetStatus {
                    state: match state {
                        Some(dial::State::Connecting) | None => TargetState::Connecting,
                        Some(dial::State::Established { .. }) => TargetState::Established,
                        Some(dial::State::Waiting { .. }) => TargetState::Retrying,
                        Some(dial::State::Myself) => TargetState::Myself,
                    },
                    peer: match state {
                        Some(dial::State::Established { peer }) => Some(*peer),
                        Some(dial::State::Myself) => Some(self.identity.id),
                        Some(dial::State::Connecting | dial::State::Waiting { .. }) | None => None,
                    },
                    next_try_in_seconds: next_try(state, now),
                    last_error: view.and_then(|view| view.last_error.as_ref()).map(|(why, at)| last_error(why, *at, now)),
                    host,
                }
            })
            .collect())
    }

    fn peer_status(&self, now: Instant) -> Vec<PeerStatus> {
        let paths = self.gossip.paths();
        let mut peers: Vec<PeerStatus> = self
            .gossip
            .records()
            .filter(|record| !record.left)
            .map(|record| {
                let myself = record.id == self.identity.id;
                let reachable = self.reachable.get(&record.id);
                PeerStatus {
                    id: record.id,
                    nickname: record.nickname.clone(),
                    myself,
                    reachable: Some(myself || paths.contains_key(&record.id)),
                    since_seconds: reachable.map(|(_, since)| now.saturating_duration_since(*since).as_secs()),
                    path: (!myself).then(|| paths.get(&record.id).map(path)).flatten(),
                    address: launch::node_address(self.identity.network, record.id).ok(),
                    underlay: record.addresses.clone(),
                    public_key: Some(record.public_key),
                    version: None,
                    links: if myself { self.own_links() } else { self.links_of(record) },
                    data: (!myself).then(|| self.data_status(record.id.peer_index(), now)).flatten(),
                }
            })
            .collect();
        peers.sort_by_key(|peer| (!peer.myself, peer.id));
        peers
    }

    fn own_links(&self) -> Vec<LinkStatus> {
        self.connections
            .values()
            .map(|connection| LinkStatus {
                direction: Some(direction(connection.direction)),
                remote: Some(connection.remote),
                peer: connection.peer,
                nickname: Some(connection.nickname.clone()),
                state: self.link_state(self.identity.id, connection.peer),
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
                nickname: self.gossip.record(peer).map(|record| record.nickname.clone()),
                state: self.link_state(record.id, peer),
            })
            .collect()
    }

    fn link_state(&self, one: NodeId, other: NodeId) -> ConnectionState {
        let says = |a, b| self.gossip.record(a).is_some_and(|record| record.links.contains(&b));
        if says(one, other) && says(other, one) { ConnectionState::Established } else { ConnectionState::Pending }
    }

    fn connection_status(&self, now: Instant) -> Vec<ConnectionStatus> {
        let mut connections: Vec<ConnectionStatus> = self
            .connections
            .values()
            .map(|connection| ConnectionStatus {
                direction: direction(connection.direction),
                remote: connection.remote.to_string(),
                state: self.link_state(self.identity.id, connection.peer),
                since_seconds: Some(now.saturating_duration_since(connection.since).as_secs()),
                encryption: Some(PATTERN.to_owned()),
                peer: Some(connection.peer),
                nickname: Some(connection.nickname.clone()),
                rtt_microseconds: connection.rtt.and_then(|rtt| u64::try_from(rtt.as_micros()).ok()),
                next_try_in_seconds: None,
                last_error: None,
            })
            .collect();
        for view in self.dialer.states() {
            let (state, error) = match view.state {
                dial::State::Established { .. } => continue,
                dial::State::Connecting => (ConnectionState::Connecting, None),
                dial::State::Waiting { .. } => (ConnectionState::Retrying, None),
                dial::State::Myself => (ConnectionState::Failed, Some("it is this node itself; never tried again".to_owned())),
            };
            connections.push(ConnectionStatus {
                direction: Direction::Outbound,
                remote: view.target.clone(),
                state,
                since_seconds: None,
                encryption: None,
                peer: matches!(view.state, dial::State::Myself).then_some(self.identity.id),
                nickname: None,
                rtt_microseconds: None,
                next_try_in_seconds: next_try(Some(&view.state), now),
                last_error: match (error, &view.last_error) {
                    (Some(message), _) => Some(LastError { message, seconds_ago: None }),
                    (None, Some((why, at))) => Some(last_error(why, *at, now)),
                    (None, None) => None,
                },
            });
        }
        connections.extend(self.refused.iter().map(|refused: &links::Refused| ConnectionStatus {
            direction: Direction::Inbound,
            remote: refused.remote.to_string(),
            state: ConnectionState::Failed,
            since_seconds: Some(now.saturating_duration_since(refused.at).as_secs()),
            encryption: None,
            peer: self.node_at(refused.remote),
            nickname: None,
            rtt_microseconds: None,
            next_try_in_seconds: None,
            last_error: Some(last_error(&refused.why, refused.at, now)),
        }));
        connections
    }

    fn endpoint_status(&self) -> Result<Vec<EndpointStatus>, ApiError> {
        let attachments = self.store.attachments().map_err(ApiError::failed)?;
        Ok(attachments
            .iter()
            .map(|it| EndpointStatus {
                name: it.name.clone(),
                target: target_of(it),
                address: self.with_prefix(it.address),
                fixed: it.fixed,
                interface: it.host_interface.clone(),
                attached_unix_seconds: Some(it.since_unix),
                state: if self.datapath.is_attached(&it.host_interface) {
                    EndpointState::Attached
                } else {
                    EndpointState::Gone
                },
            })
            .collect())
    }

    fn ipam_status(&self) -> IpamStatus {
        let primed = self.primed();
        let owners = crate::ipam::quarters(self.identity.network)
            .into_iter()
            .map(|(id, ranges, addresses, percent)| {
                let record = self.gossip.record(id).filter(|record| !record.left);
                let myself = id == self.identity.id;
                RangeOwner {
                    id,
                    nickname: record.map(|record| record.nickname.clone()).unwrap_or_default(),
                    addresses,
                    percent,
                    active: myself.then(|| self.ipam.active()),
                    reachable: Some(self.reachable.get(&id).is_some_and(|(reachable, _)| *reachable)),
                    ranges,
                }
            })
            .collect();
        IpamStatus { ready: primed.ready, waiting_for: primed.waiting_for, owners }
    }

    fn counter_status(&self) -> Result<Vec<CounterStatus>, ApiError> {
        let counters = self.datapath.counters()?;
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
        let peer = self.peers.get(&index)?;
        let state = peer.state.as_ref()?;
        let sealing = state.sessions.iter().find(|session| session.sealing);
        Some(DataStatus {
            session: match sealing {
                Some(session) if session.expires > now => SessionState::Established,
                Some(_) => SessionState::Expired,
                None if self.handshakes.view(index).is_some_and(|view| view.waiting) => SessionState::Handshake,
                None => SessionState::None,
            },
            session_age_seconds: sealing.map(|session| now.saturating_duration_since(session.created).as_secs()),
            endpoint: state.endpoint,
            mtu: Some(state.mtu),
            rx_bytes: state.rx_bytes,
            tx_bytes: state.tx_bytes,
            rx_packets: Some(state.rx_packets),
            tx_packets: Some(state.tx_packets),
            received_seconds_ago: state.last_rx.map(|at| now.saturating_duration_since(at).as_secs()),
            last_error: peer.last_error.as_ref().map(|(why, at)| last_error(why, *at, now)),
        })
    }
}

fn direction(direction: mesh::Direction) -> Direction {
    match direction {
        mesh::Direction::Outbound => Direction::Outbound,
        mesh::Direction::Inbound => Direction::Inbound,
    }
}

fn path(path: &gossip::Path) -> Path {
    if path.hops == 1 { Path::Direct } else { Path::Via(path.next) }
}

fn next_try(state: Option<&dial::State>, now: Instant) -> Option<u64> {
    match state {
        Some(dial::State::Waiting { until }) => Some(until.saturating_duration_since(now).as_secs()),
        Some(dial::State::Connecting | dial::State::Established { .. } | dial::State::Myself) | None => None,
    }
}

fn last_error(why: &str, at: Instant, now: Instant) -> LastError {
    LastError { message: why.to_owned(), seconds_ago: Some(now.saturating_duration_since(at).as_secs()) }
}
