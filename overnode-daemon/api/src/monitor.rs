//! The events that `GET /v1/monitor` streams: one JSON object per line, each with
//! `unix_milliseconds`, `event` and the fields of that event.
//!
//! For a dropped packet, an event shows the headers, never the payload.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::status::Path;
use overnode_types::{MacAddr, NodeId, PublicKey, SessionIndex};

/// An event on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MonitorEvent {
    /// When it happened, in milliseconds since 1970.
    pub unix_milliseconds: u64,
    /// What happened.
    #[serde(flatten)]
    pub what: EventKind,
}

/// The kinds of events. The JSON field `event` holds the variant's name in kebab-case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum EventKind {
    /// The first line of the stream. Events follow from here on.
    Watching(Watching),
    /// A packet was dropped.
    Drop(Box<DroppedPacket>),
    /// Packets were dropped, but not shown, because there were too many of them.
    DropsNotShown {
        /// Why they were dropped.
        reason: String,
        /// Number of packets.
        count: u64,
    },
    /// This reader was too slow and missed events.
    Missed {
        /// Number of missed events.
        count: u64,
    },
    /// A control connection was established.
    Connected {
        /// The node at the other end.
        peer: PeerRef,
        /// Its socket address.
        remote: SocketAddr,
    },
    /// A control connection ended.
    Disconnected {
        /// The node at the other end.
        peer: PeerRef,
        /// Its socket address.
        remote: SocketAddr,
        /// The reason, in words.
        why: String,
    },
    /// Container packets can be sealed for a peer from now on. Checked once a second.
    SessionEstablished {
        /// The peer.
        peer: PeerRef,
    },
    /// There is no longer a session with a peer. Checked once a second.
    SessionLost {
        /// The peer.
        peer: PeerRef,
        /// Why the last handshake failed, if one did.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        why: Option<String>,
    },
    /// Packets for a node take another path from now on.
    PathChanged {
        /// The node.
        peer: PeerRef,
        /// The new path; absent if none is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<Path>,
    },
    /// The direct path to a node started or stopped working.
    DirectPath {
        /// The node.
        peer: PeerRef,
        /// Whether probes come back.
        works: bool,
        /// The largest inner packet that fits the path, in bytes.
        mtu: u32,
    },
    /// A node became known.
    NodeAppeared {
        /// The node.
        peer: PeerRef,
    },
    /// A node became reachable, directly or through others.
    NodeReachable {
        /// The node.
        peer: PeerRef,
    },
    /// A node became unreachable: no chain of connections leads to it.
    NodeUnreachable {
        /// The node.
        peer: PeerRef,
    },
    /// A node left the cluster for good.
    NodeLeft {
        /// The node.
        peer: PeerRef,
    },
    /// A container was attached.
    Attached(Container),
    /// A container engine reported which container was attached, or renamed it.
    Named(Container),
    /// A container was detached.
    Detached(Container),
    /// A container's interface vanished without a detach.
    Gone(Container),
    /// The node has a problem that needs an operator.
    Problem {
        /// What is wrong and what to do, in words.
        problem: String,
    },
    /// A [`Self::Problem`] is over.
    ProblemResolved {
        /// The text of the problem.
        problem: String,
    },
    /// An event of a later version. Never sent.
    #[serde(other)]
    Unknown,
}

/// The node that is being watched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watching {
    /// The node's ID.
    pub id: NodeId,
    /// Its nickname.
    pub nickname: String,
    /// Maximum number of dropped packets shown per second and drop reason.
    pub drops_per_second: u32,
}

/// A node or an external WireGuard peer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRef {
    /// The node's ID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<NodeId>,
    /// The public key, for an external peer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_key: Option<PublicKey>,
    /// The nickname of a node, or the name of an external peer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A container of this host, or the host itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Its address.
    pub address: IpAddr,
    /// The target that was attached.
    pub target: String,
    /// Its name, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A packet that an eBPF program dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DroppedPacket {
    /// The drop reason: the name of a counter in `status --counters`.
    pub reason: String,
    /// The program that dropped it.
    pub program: Program,
    /// The ingress interface; absent if the interface no longer exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// The frame's length in bytes, Ethernet header included.
    pub bytes: u32,
    /// The container of this host that sent the packet, or that the packet was for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<Container>,
    /// The peer that the packet belongs to. For a packet from a container, this is the owner of the
    /// destination address. For a message from the underlay, it is the peer of the session that the
    /// message names, or else the peer at the source address. An attacker can forge both, unless
    /// the drop reason implies that the message was authenticated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<PeerRef>,
    /// Names of this host's containers whose addresses are in `inner` or `arp`. A container without
    /// a name is listed by its target. The match relies on the packet's own addresses and proves
    /// nothing about its origin.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub names: BTreeMap<IpAddr, String>,
    /// The packet's headers.
    #[serde(flatten)]
    pub headers: Headers,
}

/// The eBPF program that dropped a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Program {
    /// Takes the packets that containers send.
    FromContainer,
    /// Seals packets that must be segmented first, and packets that the daemon sends.
    Seal,
    /// Opens the messages that peers send.
    FromUnderlay,
    /// Does the same as [`Self::FromUnderlay`], in XDP.
    FromUnderlayXdp,
    /// Delivers packets that a bulk worker opened to a container.
    FromBulk,
    /// Lets only packets that the other programs delivered into a container.
    ToContainer,
}

/// The headers of a dropped packet, as far as they could be parsed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Headers {
    /// The Ethernet header; for container packets only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ethernet: Option<Ethernet>,
    /// The VLAN ID that the frame is tagged with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// The ARP message, if the packet is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arp: Option<Arp>,
    /// The outer headers: the flow between two hosts on the underlay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outer: Option<Flow>,
    /// The relay header of a message that is relayed between two nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay: Option<Relayed>,
    /// The header of the data message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<Message>,
    /// The flow between two containers. For a message from a peer, present only if the message was
    /// opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inner: Option<Flow>,
}

/// An Ethernet header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ethernet {
    /// The sender's MAC address.
    pub source: MacAddr,
    /// The EtherType of the payload; 2048 is IPv4.
    pub ether_type: u16,
}

/// An ARP message for IPv4.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arp {
    /// The sender's protocol address.
    pub sender: IpAddr,
    /// The target's protocol address.
    pub target: IpAddr,
}

/// An IP header and the ports behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// The source address.
    pub source: IpAddr,
    /// The destination address.
    pub destination: IpAddr,
    /// The protocol: `tcp`, `udp`, `icmp` and so on, or its number.
    pub protocol: String,
    /// The source port, if the protocol has ports and the packet includes them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_port: Option<u16>,
    /// The destination port, under the same conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_port: Option<u16>,
}

/// A relay header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relayed {
    /// ID of the node that sent the message.
    pub source: u16,
    /// ID of the node that the message is for.
    pub destination: u16,
    /// ID of the node that relayed the message last.
    pub previous: u16,
    /// Remaining hops.
    pub hops: u8,
}

/// The header of a data message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The receiver index.
    pub receiver: SessionIndex,
    /// The message counter.
    pub counter: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_flat_object() {
        let headers = Headers {
            inner: Some(Flow {
                source: "10.40.0.2".parse().unwrap(),
                destination: "10.42.0.9".parse().unwrap(),
                protocol: "udp".to_owned(),
                source_port: Some(5000),
                destination_port: Some(53),
            }),
            ..Headers::default()
        };
        let dropped = DroppedPacket {
            reason: "no-session".to_owned(),
            program: Program::FromContainer,
            interface: None,
            bytes: 98,
            container: None,
            peer: Some(PeerRef { id: NodeId::new(2).ok(), ..PeerRef::default() }),
            names: [("10.40.0.2".parse().unwrap(), "web".to_owned())].into(),
            headers,
        };
        let event = MonitorEvent { unix_milliseconds: 7, what: EventKind::Drop(Box::new(dropped)) };
        let text = serde_json::to_string(&event).unwrap();
        assert_eq!(
            text,
            r#"{"unix_milliseconds":7,"event":"drop","reason":"no-session","program":"from-container","bytes":98,"peer":{"id":2},"names":{"10.40.0.2":"web"},"inner":{"source":"10.40.0.2","destination":"10.42.0.9","protocol":"udp","source_port":5000,"destination_port":53}}"#
        );
        assert_eq!(serde_json::from_str::<MonitorEvent>(&text).unwrap(), event);
    }

    #[test]
    fn events_of_later_versions_can_be_read() {
        let event: MonitorEvent =
            serde_json::from_str(r#"{"unix_milliseconds":7,"event":"eclipse","of":{"the":"sun"}}"#)
                .unwrap();
        assert_eq!(event.what, EventKind::Unknown);
    }
}
