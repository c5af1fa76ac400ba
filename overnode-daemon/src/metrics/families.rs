//! Defines the metrics and derives each from [`Status`].

use std::collections::BTreeMap;
use std::fmt::Error;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, EncodeLabelSet, MetricEncoder,
    NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

use overnode_ebpf::reason::Reason;

use overnode_api::{
    BulkStatus, ConnectionState, DataStatus, EndpointState, Kind, Level, NodeState, Path,
    PeerStatus, SessionState, Status, TargetState,
};

/// The metrics of a node at one moment.
#[derive(Debug)]
pub(super) struct Families(pub(super) Status);

type Labels<'a> = Vec<(&'a str, String)>;

/// A metric family: its name without prefix, unit and `_total`, its help text and its unit.
struct Family<'a> {
    name: &'a str,
    help: &'a str,
    unit: Option<Unit>,
}

const fn family<'a>(name: &'a str, help: &'a str) -> Family<'a> {
    Family { name, help, unit: None }
}

impl<'a> Family<'a> {
    fn in_unit(self, unit: Unit) -> Self {
        Self { unit: Some(unit), ..self }
    }

    fn begin<'e>(
        &'e self,
        encoder: &'e mut DescriptorEncoder<'_>,
        kind: MetricType,
    ) -> Result<MetricEncoder<'e>, Error> {
        encoder.encode_descriptor(self.name, self.help, self.unit.as_ref(), kind)
    }

    fn gauges<V: EncodeGaugeValue>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        values: impl IntoIterator<Item = (Labels<'a>, V)>,
    ) -> Result<(), Error> {
        let mut metric = self.begin(encoder, MetricType::Gauge)?;
        for (labels, value) in values {
            if labels.is_empty() {
                metric.encode_gauge(&value)?;
            } else {
                metric.encode_family(&Set(&labels))?.encode_gauge(&value)?;
            }
        }
        Ok(())
    }

    fn counters<V: EncodeCounterValue>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        values: impl IntoIterator<Item = (Labels<'a>, V)>,
    ) -> Result<(), Error> {
        let mut metric = self.begin(encoder, MetricType::Counter)?;
        for (labels, value) in values {
            if labels.is_empty() {
                metric.encode_counter::<NoLabelSet, V, u64>(&value, None)?;
            } else {
                metric
                    .encode_family(&Set(&labels))?
                    .encode_counter::<NoLabelSet, V, u64>(&value, None)?;
            }
        }
        Ok(())
    }
}

/// Encodes [`Labels`] as a label set.
#[derive(Debug)]
struct Set<'a>(&'a Labels<'a>);

impl EncodeLabelSet for Set<'_> {
    fn encode(
        &self,
        encoder: &mut prometheus_client::encoding::LabelSetEncoder<'_>,
    ) -> Result<(), Error> {
        for (name, value) in self.0 {
            let mut label = encoder.encode_label();
            let mut key = label.encode_label_key()?;
            std::fmt::Write::write_str(&mut key, name)?;
            let mut text = key.encode_label_value()?;
            std::fmt::Write::write_str(&mut text, value)?;
            text.finish()?;
        }
        Ok(())
    }
}

impl Collector for Families {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let encoder = &mut encoder;
        self.node(encoder)?;
        self.packets(encoder)?;
        self.peers(encoder)?;
        self.connections(encoder)?;
        self.addresses(encoder)?;
        self.names(encoder)
    }
}

impl Families {
    fn node(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let node = &self.0.node;
        let labels = vec![
            ("node", node.id.to_string()),
            ("nickname", node.nickname.clone()),
            ("version", node.version.clone()),
            ("programs", node.attachment.clone().unwrap_or_default()),
        ];
        family("node", "Always 1; the labels describe this node.")
            .gauges(encoder, [(labels, 1_i64)])?;
        family("uptime", "Time since the daemon started.")
            .in_unit(Unit::Seconds)
            .gauges(encoder, [(vec![], count(node.uptime_seconds))])?;
        let impaired = i64::from(node.state == NodeState::Impaired);
        family("impaired", "1 while the node has a problem that needs an operator.")
            .gauges(encoder, [(vec![], impaired)])?;
        let findings = [Level::Warning, Level::Critical].map(|level| {
            let found =
                self.0.health.findings.iter().filter(|finding| finding.level == level).count();
            (vec![("level", name_of(&level))], found as i64)
        });
        family("findings", "Findings of `overnode status`, by level.").gauges(encoder, findings)?;
        let mtu = node.mtu.map(|mtu| (vec![], i64::from(mtu)));
        family("container_mtu", "MTU of containers that are attached from now on.")
            .in_unit(Unit::Bytes)
            .gauges(encoder, mtu)?;
        let mut endpoints = BTreeMap::<_, i64>::new();
        for kind in [Kind::Netns, Kind::Docker, Kind::Cni, Kind::Host] {
            endpoints.insert((name_of(&kind), name_of(&EndpointState::Attached)), 0);
        }
        for endpoint in &self.0.endpoints {
            *endpoints.entry((name_of(&endpoint.kind), name_of(&endpoint.state))).or_default() += 1;
        }
        let endpoints = endpoints
            .into_iter()
            .map(|((kind, state), found)| (vec![("kind", kind), ("state", state)], found));
        family("endpoints", "Endpoints of this host, by what attached them and by state.")
            .gauges(encoder, endpoints)
    }

    fn packets(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let packets = self.0.counters.iter().map(|it| {
            (vec![("reason", it.reason.clone()), ("dropped", it.dropped.to_string())], it.count)
        });
        family("packets", "Packets by reason, since the node was launched or the host started.")
            .counters(encoder, packets)
    }

    fn peers(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let others = || self.0.peers.iter().filter(|peer| !peer.myself);
        let names = others().map(|it| {
            (vec![("peer", it.id.to_string()), ("nickname", it.nickname.clone())], 1_i64)
        });
        family("peer", "Always 1; one series for each other known node.").gauges(encoder, names)?;
        let of = |peer: &PeerStatus| vec![("peer", peer.id.to_string())];
        let reachable = others().map(|it| (of(it), i64::from(it.reachable == Some(true))));
        family("peer_reachable", "1 while the node is reachable, directly or through others.")
            .gauges(encoder, reachable)?;
        let data = || others().filter_map(|it| Some((of(it), it.data.as_ref()?)));
        let gauge = |value: fn(&DataStatus) -> Option<f64>| {
            data().filter_map(move |(labels, data)| Some((labels, value(data)?)))
        };
        let session = gauge(|it| Some(f64::from(it.session == SessionState::Established)));
        family("peer_session", "1 while there are session keys to seal packets for the node.")
            .gauges(encoder, session)?;
        family("peer_session_age", "Age of the session keys.")
            .in_unit(Unit::Seconds)
            .gauges(encoder, gauge(|it| Some(it.session_age_seconds? as f64)))?;
        let direct = gauge(|it| Some(f64::from(it.route.as_ref()?.path == Some(Path::Direct))));
        family("peer_path_direct", "1 while packets take the direct path to the node.")
            .gauges(encoder, direct)?;
        let relayed =
            gauge(|it| Some(f64::from(matches!(it.route.as_ref()?.path, Some(Path::Via(_))))));
        family("peer_path_relayed", "1 while packets to the node go through another node.")
            .gauges(encoder, relayed)?;
        family("peer_rtt", "Smoothed round-trip time of probes on the direct path.")
            .in_unit(Unit::Seconds)
            .gauges(encoder, gauge(|it| Some(it.route.as_ref()?.rtt_microseconds? as f64 / 1e6)))?;
        family("peer_loss", "Recent loss of probes on the direct path, from 0 to 1.")
            .in_unit(Unit::Other("ratio".to_owned()))
            .gauges(
                encoder,
                gauge(|it| Some(f64::from(it.route.as_ref()?.loss_per_mille?) / 1000.0)),
            )?;
        family("peer_mtu", "Largest container packet that fits the path to the node.")
            .in_unit(Unit::Bytes)
            .gauges(encoder, gauge(|it| it.mtu.map(f64::from)))?;
        let counter = |value: fn(&DataStatus) -> Option<u64>| {
            data().filter_map(move |(labels, data)| Some((labels, value(data)?)))
        };
        family("peer_received", "Container packets received from the node, after opening.")
            .in_unit(Unit::Bytes)
            .counters(encoder, counter(|it| Some(it.rx_bytes)))?;
        family("peer_sent", "Container packets sent to the node, before sealing.")
            .in_unit(Unit::Bytes)
            .counters(encoder, counter(|it| Some(it.tx_bytes)))?;
        family("peer_received_messages", "Messages received from the node, including keepalives.")
            .counters(encoder, counter(|it| it.rx_packets))?;
        family("peer_sent_messages", "Messages sent to the node, including keepalives.")
            .counters(encoder, counter(|it| it.tx_packets))?;
        self.bulk(encoder)
    }

    fn bulk(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let workers = &self.0.node.bulk;
        family("bulk_workers", "Running workers of the bulk path.")
            .gauges(encoder, [(vec![], workers.workers as i64)])?;
        let drops = Reason::ALL.iter().filter(|reason| reason.is_of_workers()).map(|reason| {
            let count = workers.drops.get(reason.as_str()).copied().unwrap_or_default();
            (vec![("reason", reason.as_str().to_owned())], count)
        });
        family(
            "bulk_drops",
            "Packets and messages that the workers dropped since they started, by reason.",
        )
        .counters(encoder, drops)?;
        let bulk = || {
            let others = self
                .0
                .peers
                .iter()
                .filter_map(|peer| Some((peer, peer.data.as_ref()?.bulk.as_ref()?)));
            others.map(|(peer, bulk)| (vec![("peer", peer.id.to_string())], bulk))
        };
        let used = bulk().map(|(mut labels, bulk)| {
            labels.push(("cipher", bulk.cipher.name().to_owned()));
            (labels, i64::from(bulk.in_use))
        });
        family("bulk_peer_in_use", "1 while bulk flows to the node go through workers.")
            .gauges(encoder, used)?;
        let counter =
            |value: fn(&BulkStatus) -> u64| bulk().map(move |(labels, bulk)| (labels, value(bulk)));
        family("bulk_peer_received", "Part of peer_received that came through workers.")
            .in_unit(Unit::Bytes)
            .counters(encoder, counter(|it| it.rx_bytes))?;
        family("bulk_peer_sent", "Part of peer_sent that went through workers.")
            .in_unit(Unit::Bytes)
            .counters(encoder, counter(|it| it.tx_bytes))?;
        family(
            "bulk_peer_silences",
            "How often the node's workers fell silent while packets were sent to them.",
        )
        .counters(encoder, counter(|it| it.silences))
    }

    fn connections(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        use ConnectionState as C;
        use TargetState as T;
        let connections =
            [C::Connecting, C::Pending, C::Established, C::Retrying, C::Failed].map(|state| {
                let found = self.0.connections.iter().filter(|it| it.state == state).count();
                (vec![("state", name_of(&state))], found as i64)
            });
        family("connections", "Control connections and attempts, by state.")
            .gauges(encoder, connections)?;
        let targets =
            [T::Connecting, T::Established, T::Retrying, T::Failed, T::Myself].map(|state| {
                let found = self.0.targets.iter().filter(|it| it.state == state).count();
                (vec![("state", name_of(&state))], found as i64)
            });
        family("targets", "Targets of this node, by state.").gauges(encoder, targets)
    }

    fn addresses(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let ipam = &self.0.ipam;
        family("ipam_ready", "1 while this node can allocate an address for a container.")
            .gauges(encoder, [(vec![], i64::from(ipam.ready))])?;
        family("ipam_problems", "Contradictions between nodes about the allocation of addresses.")
            .gauges(encoder, [(vec![], ipam.problems.len() as i64)])?;
        let own = ipam.owners.iter().find(|owner| owner.id == self.0.node.id);
        let held = own.map(|owner| (vec![], count(owner.addresses)));
        family("ipam_addresses", "Addresses that this node can allocate, including borrowed ones.")
            .gauges(encoder, held)?;
        let active = own.and_then(|owner| owner.active).map(|active| (vec![], count(active)));
        family("ipam_active_addresses", "Addresses of this node that are in use.")
            .gauges(encoder, active)?;
        let sum = |lent: bool| {
            let mine = |id| id == self.0.node.id;
            let loans =
                ipam.loans.iter().filter(|it| mine(if lent { it.lender } else { it.borrower }));
            [(vec![], count(loans.map(|it| it.addresses).sum()))]
        };
        family("ipam_lent_addresses", "Addresses that this node has lent to other nodes.")
            .gauges(encoder, sum(true))?;
        family("ipam_borrowed_addresses", "Addresses that other nodes have lent to this node.")
            .gauges(encoder, sum(false))?;
        family("ipam_reclaims", "Nodes whose addresses this node is reclaiming.")
            .gauges(encoder, [(vec![], ipam.reclaims.len() as i64)])
    }

    fn names(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let dns = &self.0.dns;
        family("dns_serving", "1 while this node serves DNS to its containers.")
            .gauges(encoder, [(vec![], i64::from(dns.serving))])?;
        family("dns_names", "Known pairs of a name and an address.")
            .gauges(encoder, [(vec![], dns.entries.len() as i64)])?;
        family("dns_queries", "DNS queries from containers.")
            .counters(encoder, [(vec![], dns.queries)])?;
        let outcomes =
            [("forwarded", dns.forwarded), ("failed", dns.failed), ("refused", dns.refused)]
                .map(|(outcome, queries)| (vec![("outcome", outcome.to_owned())], queries));
        family(
            "dns_outcomes",
            "DNS queries that were forwarded to the host's resolvers, that failed there, and that \
             were refused.",
        )
        .counters(encoder, outcomes)
    }
}

/// Returns the name of a value, as in `status --json`.
fn name_of(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value)
        .ok()
        .and_then(|it| it.as_str().map(str::to_owned))
        .unwrap_or_default()
}

fn count(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
