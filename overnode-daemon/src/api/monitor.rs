//! What `GET /v1/monitor` streams: one JSON object a line, each with `unix_milliseconds`, `event`,
//! and what belongs to that event.
//!
//! Of a dropped packet its headers are told, never what it carries.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::status::Path;
use crate::types::{NodeId, PublicKey};

/// Something that happened on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MonitorEvent {
    /// When, in milliseconds since 1970.
    pub unix_milliseconds: u64,
    /// What.
    #[serde(flatten)]
    pub what: Happening,
}

/// What happened; in JSON the field `event` has the variant's name in kebab-case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Happening {
    /// The first line: what happens from here on is told.
    Watching(Watching),
    /// A packet was dropped.
    Drop(Box<DroppedPacket>),
    /// More packets were dropped than are shown.
    DropsNotShown {
        /// Why they were dropped.
        reason: String,
        /// How many.
        count: u64,
    },
    /// This reader was too slow: these events are lost to it.
    Missed {
        /// How many.
        count: u64,
    },
    /// A control connection is up.
    Connected {
        /// With whom.
        peer: Who,
        /// Where it is.
        remote: SocketAddr,
    },
    /// A control connection ended.
    Disconnected {
        /// With whom.
        peer: Who,
        /// Where it was.
        remote: SocketAddr,
        /// In words.
        why: String,
    },
    /// Containers' packets can be sealed for a peer, which they could not before. Told once a
    /// second.
    SessionEstablished {
        /// With whom.
        peer: Who,
    },
    /// There is no session with a peer any more. Told once a second.
    SessionLost {
        /// With whom.
        peer: Who,
        /// What the last handshake failed for, if one did.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        why: Option<String>,
    },
    /// Packets for a node take another way from now on.
    PathChanged {
        /// For whom.
        peer: Who,
        /// Which; absent if no way is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<Path>,
    },
    /// Probes come back on the straight path to a node, or do no more.
    StraightPath {
        /// To whom.
        peer: Who,
        /// Whether they come back.
        works: bool,
        /// Largest inner packet that it takes, bytes.
        mtu: u32,
    },
    /// A node is known that was not before.
    NodeAppeared {
        /// Which.
        peer: Who,
    },
    /// A node can be reached again, directly or through others.
    NodeReachable {
        /// Which.
        peer: Who,
    },
    /// No chain of connections leads to a node any more.
    NodeUnreachable {
        /// Which.
        peer: Who,
    },
    /// A node has left the cluster for good.
    NodeLeft {
        /// Which.
        peer: Who,
    },
    /// A container was plugged in.
    Attached(Container),
    /// An engine has told which container it was that was plugged in, or that it is called
    /// otherwise from now on.
    Named(Container),
    /// A container was plugged out.
    Detached(Container),
    /// A container went away by itself.
    Gone(Container),
    /// Something that needs a person.
    Problem {
        /// In words, with what to do.
        problem: String,
    },
    /// What a [`Self::Problem`] told of is over.
    ProblemOver {
        /// The same words.
        problem: String,
    },
    /// Of a later version. Never sent.
    #[serde(other)]
    Unknown,
}

/// Who is watched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watching {
    /// The node's ID.
    pub id: NodeId,
    /// Its name for people.
    pub nickname: String,
    /// Packets that are shown a second, at most, for each reason.
    pub drops_per_second: u32,
}

/// A node, or a WireGuard peer that is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Who {
    /// The node's ID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<NodeId>,
    /// The key of one that is no node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_key: Option<PublicKey>,
    /// Its name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A container of this host, or the host itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Its address.
    pub address: IpAddr,
    /// As it was attached.
    pub target: String,
    /// Its name, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A packet that a program dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DroppedPacket {
    /// Why: the name of a counter of `status --counters`.
    pub reason: String,
    /// By which program.
    pub program: Program,
    /// The interface that it came in by; absent if that is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// Its length from the Ethernet header on, in bytes.
    pub bytes: u32,
    /// The container of this host that sent it, or that it was for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<Container>,
    /// Whose it is: to whom its destination belongs if it came from a container; else with whom the
    /// session is that it names, or else who is where it came from. Unless the reason says that it
    /// was opened, an attacker may have written it so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<Who>,
    /// What containers of this host are called that have an address in `inner` or `arp`: their
    /// names, or else how they were attached. The packet says that it is from there or for there;
    /// nobody else does.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub names: BTreeMap<IpAddr, String>,
    /// What its headers say.
    #[serde(flatten)]
    pub headers: Headers,
}

/// Which program dropped a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Program {
    /// Takes what containers send.
    FromContainer,
    /// Seals what must be segmented first, and what the daemon sends.
    Seal,
    /// Opens what peers send.
    FromUnderlay,
    /// The same in XDP.
    FromUnderlayXdp,
    /// What a worker of the bulk path opened, to a container.
    FromBulk,
}

/// The headers of a dropped packet, as far as they can be read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Headers {
    /// Who sent the frame and what it is; of containers' packets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ethernet: Option<Ethernet>,
    /// The VLAN that it is tagged with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// An ARP message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arp: Option<Arp>,
    /// On the underlay, between hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outer: Option<Flow>,
    /// Through whom a message between two nodes goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay: Option<Relayed>,
    /// The data message that it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<Message>,
    /// Between containers; of a message from a peer only if it was opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inner: Option<Flow>,
}

/// An Ethernet header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ethernet {
    /// The sender's hardware address, as in `02:00:00:00:00:01`.
    pub source: String,
    /// What the frame carries; 2048 is IPv4.
    pub ether_type: u16,
}

/// An ARP message for IPv4.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arp {
    /// Who asks, or answers.
    pub sender: IpAddr,
    /// About whom.
    pub target: IpAddr,
}

/// An IP header and what lies behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// From.
    pub source: IpAddr,
    /// To.
    pub destination: IpAddr,
    /// `tcp`, `udp`, `icmp` and the like; others by their numbers.
    pub protocol: String,
    /// Where the protocol has ports and the packet shows them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_port: Option<u16>,
    /// Likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_port: Option<u16>,
}

/// A relay header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relayed {
    /// The ID of the node that sent it first.
    pub source: u16,
    /// The ID of the node that it is for.
    pub destination: u16,
    /// The ID of the node that passed it on last.
    pub previous: u16,
    /// Hops that it may still take.
    pub hops: u8,
}

/// The header of a data message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The receiver index.
    pub receiver: u32,
    /// The message's number.
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
            peer: Some(Who { id: NodeId::new(2).ok(), ..Who::default() }),
            names: [("10.40.0.2".parse().unwrap(), "web".to_owned())].into(),
            headers,
        };
        let event = MonitorEvent { unix_milliseconds: 7, what: Happening::Drop(Box::new(dropped)) };
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
        assert_eq!(event.what, Happening::Unknown);
    }
}
