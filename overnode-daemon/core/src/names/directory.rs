//! Answers single questions from the zone. No I/O, no clock.

use std::net::IpAddr;

use hickory_proto::op::{Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use ipnet::IpNet;

use overnode_types::name::{Domain, is_relative};

use super::domain::{absolute, name_of, part_before};
use super::zone::{Existence, Zone};

/// Time to live of answers, in seconds. It is short because names come and go with containers.
pub const TTL: u32 = 1;

/// A name that no node may have (RFC 6761).
const LOCALHOST: &str = "localhost";

/// How to answer a question.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Send this answer without asking any other server.
    Answer(Answer),
    /// Ask the upstream resolvers: the name is not ours.
    Upstream,
}

/// An answer from the zone.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The response code, which also tells whether the name exists.
    pub code: ResponseCode,
    /// The requested records.
    pub records: Vec<Record>,
    /// In a negative answer, the SOA record with the time for which the answer may be cached.
    pub soa: Option<Box<Record>>,
}

/// The names of the container network as one node serves them.
#[derive(Debug)]
pub struct Directory {
    domains: Vec<Domain>,
    subnet: IpNet,
    zone: Zone,
}

impl Directory {
    /// Creates a directory. Reverse lookups use the first of the `domains`. No other server knows
    /// the addresses in `subnet`.
    pub fn new(domains: Vec<Domain>, subnet: IpNet, zone: Zone) -> Self {
        Self { domains, subnet, zone }
    }

    /// Returns the zone.
    pub fn zone(&self) -> &Zone {
        &self.zone
    }

    /// Returns the zone for changes.
    pub fn zone_mut(&mut self) -> &mut Zone {
        &mut self.zone
    }

    /// Returns the domains in their order.
    pub fn domains(&self) -> &[Domain] {
        &self.domains
    }

    /// Returns true if the name is in one of our domains, for which no other server is
    /// authoritative.
    pub fn owns(&self, name: &Name) -> bool {
        self.domains.iter().any(|domain| name_of(domain).zone_of(name))
    }

    /// Returns the relative name that a question without a domain asks for: one label, such as
    /// `web`. Names with dots belong to others. Otherwise a node that names a container
    /// `example.org` would receive what containers send there.
    pub fn bare_name(query: &Query) -> Option<String> {
        let mut labels = query.name.iter();
        let (Some(label), None) = (labels.next(), labels.next()) else { return None };
        let label = std::str::from_utf8(label).ok()?.to_ascii_lowercase();
        (is_relative(&label) && !label.contains('.') && label != LOCALHOST).then_some(label)
    }

    /// Returns true if it is not known yet whether this name of one label exists.
    pub fn is_in_doubt(&self, name: &str) -> bool {
        self.zone.existence(name) == Existence::Unknown
    }

    /// Decides how to answer a question.
    pub fn ask(&mut self, query: &Query) -> Verdict {
        let is_plain = query.query_class == DNSClass::IN && !is_transfer(query.query_type);
        let domain =
            self.domains.iter().find(|domain| name_of(domain).zone_of(&query.name)).cloned();
        match (domain, network_of(&query.name)) {
            _ if !is_plain => Verdict::Answer(Answer::refused()),
            (Some(domain), _) => Verdict::Answer(self.forward(&domain, query)),
            (None, Some(network)) => self.reverse(network, query),
            (None, None) => self.bare(query).map_or(Verdict::Upstream, Verdict::Answer),
        }
    }

    /// Answers a question for a name of one label, if there is such a name.
    fn bare(&mut self, query: &Query) -> Option<Answer> {
        let name = Self::bare_name(query)?;
        let addresses = self.zone.addresses(&name);
        // A name below it does not make it ours.
        (!addresses.is_empty()).then(|| Answer::of(records(addresses, query)))
    }

    fn forward(&mut self, domain: &Domain, query: &Query) -> Answer {
        let none = |existence| Answer::none(existence, &name_of(domain));
        let Some(name) = part_before(domain, &query.name) else { return none(Existence::Absent) };
        if name.is_empty() {
            let asked = matches!(query.query_type, RecordType::SOA | RecordType::ANY);
            return if asked {
                Answer::of(vec![soa(&name_of(domain))])
            } else {
                none(Existence::Exists)
            };
        }
        let existence = self.zone.existence(&name);
        let records = records(self.zone.addresses(&name), query);
        if records.is_empty() { none(existence) } else { Answer::of(records) }
    }

    fn reverse(&mut self, network: IpNet, query: &Query) -> Verdict {
        let address = (network.prefix_len() == network.max_prefix_len()).then(|| network.addr());
        let names = address.map(|address| self.zone.names(address)).unwrap_or_default();
        let is_ours = self.subnet.contains(&network);
        if names.is_empty() && !is_ours {
            return Verdict::Upstream;
        }
        let pointers: Vec<Record> = names
            .iter()
            .filter_map(|name| absolute(self.domains.first()?, name))
            .map(|name| record(query.name.clone(), RData::PTR(PTR(name))))
            .collect();
        let asked = matches!(query.query_type, RecordType::PTR | RecordType::ANY);
        if asked && !pointers.is_empty() {
            return Verdict::Answer(Answer::of(pointers));
        }
        let exists = !pointers.is_empty() || address.is_none();
        let existence = if exists { Existence::Exists } else { Existence::Absent };
        Verdict::Answer(Answer::none(existence, &self.zone_above(&query.name)))
    }

    /// Returns the ancestor of a reverse name whose network is the largest one that lies entirely
    /// in the subnet.
    fn zone_above(&self, name: &Name) -> Name {
        let bits = if self.subnet.addr().is_ipv4() { 8 } else { 4 };
        let labels = usize::from(self.subnet.prefix_len().div_ceil(bits)) + 2;
        name.trim_to(labels)
    }
}

impl Answer {
    fn of(records: Vec<Record>) -> Self {
        Self { code: ResponseCode::NoError, records, soa: None }
    }

    fn none(existence: Existence, zone: &Name) -> Self {
        let code = match existence {
            Existence::Exists => ResponseCode::NoError,
            Existence::Absent => ResponseCode::NXDomain,
            Existence::Unknown => {
                return Self { code: ResponseCode::ServFail, records: Vec::new(), soa: None };
            }
        };
        Self { code, records: Vec::new(), soa: Some(Box::new(soa(zone))) }
    }

    fn refused() -> Self {
        Self { code: ResponseCode::Refused, records: Vec::new(), soa: None }
    }
}

/// Returns the records of these addresses that a question asks for.
fn records(addresses: Vec<IpAddr>, query: &Query) -> Vec<Record> {
    let wanted = |address: &IpAddr| match query.query_type {
        RecordType::A => address.is_ipv4(),
        RecordType::AAAA => address.is_ipv6(),
        kind => kind == RecordType::ANY,
    };
    let wanted = addresses.into_iter().filter(wanted);
    wanted.map(|it| record(query.name.clone(), data_of(it))).collect()
}

fn is_transfer(kind: RecordType) -> bool {
    matches!(kind, RecordType::AXFR | RecordType::IXFR)
}

/// Returns the network of a reverse name.
fn network_of(name: &Name) -> Option<IpNet> {
    name.parse_arpa_name().ok()
}

fn data_of(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(v4) => RData::A(A(v4)),
        IpAddr::V6(v6) => RData::AAAA(AAAA(v6)),
    }
}

fn record(name: Name, data: RData) -> Record {
    Record::from_rdata(name, TTL, data)
}

fn soa(zone: &Name) -> Record {
    let contact = zone.prepend_label("hostmaster").unwrap_or_else(|_| zone.clone());
    let (serial, refresh, retry, expire) = (1, 3600, 600, 86400);
    let soa = SOA::new(zone.clone(), contact, serial, refresh, retry, expire, TTL);
    record(zone.clone(), RData::SOA(soa))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;
    use overnode_types::name::Named;
    use overnode_types::{Network, NodeId};

    fn directory() -> Directory {
        let node = NodeId::new(1).unwrap();
        let mut zone = Zone::new(node, StdRng::seed_from_u64(1));
        let names = [
            ("web", "10.40.0.1"),
            ("web", "10.40.0.2"),
            ("a.deep", "10.40.0.3"),
            ("outside", "192.0.2.7"),
            ("both", "10.40.0.4"),
            ("both", "2001:db8::4"),
        ];
        let names: Vec<_> = names
            .iter()
            .map(|(name, it)| Named { name: (*name).into(), address: it.parse().unwrap() })
            .collect();
        zone.set_names(node, &names);
        zone.set_served(BTreeSet::from([node]));
        let domains = ["overnode.local", "weave.local"].map(|it| Domain::new(it).unwrap()).to_vec();
        Directory::new(domains, Network::default().subnet, zone)
    }

    fn ask(name: &str, kind: RecordType) -> Verdict {
        directory().ask(&Query::query(Name::from_ascii(name).unwrap(), kind))
    }

    fn answer(name: &str, kind: RecordType) -> Answer {
        match ask(name, kind) {
            Verdict::Answer(answer) => answer,
            Verdict::Upstream => panic!("{name} {kind} is forwarded upstream"),
        }
    }

    fn data(name: &str, kind: RecordType) -> Vec<String> {
        let answer = answer(name, kind);
        assert_eq!(answer.code, ResponseCode::NoError);
        assert!(answer.soa.is_none() && answer.records.iter().all(|record| record.ttl == TTL));
        let mut data: Vec<String> =
            answer.records.iter().map(|record| record.data.to_string()).collect();
        data.sort();
        data
    }

    /// Asserts a negative answer and returns the name of its SOA record.
    fn none(name: &str, kind: RecordType, code: ResponseCode) -> String {
        let answer = answer(name, kind);
        assert_eq!((answer.code, answer.records.len()), (code, 0), "{name} {kind}");
        let soa = answer.soa.unwrap();
        assert_eq!((soa.record_type(), soa.ttl), (RecordType::SOA, TTL));
        assert!(soa.name.zone_of(&Name::from_ascii(name).unwrap()), "{} of {name}", soa.name);
        soa.name.to_string()
    }

    #[test]
    fn names_are_found_under_both_domains_in_any_case() {
        for name in ["web.overnode.local.", "web.weave.local.", "WEB.OverNode.local."] {
            assert_eq!(data(name, RecordType::A), ["10.40.0.1", "10.40.0.2"]);
        }
        let answer = answer("wEb.weave.local.", RecordType::A);
        assert_eq!(
            answer.records[0].name.to_string(),
            "wEb.weave.local.",
            "in the case of the query"
        );
        assert_eq!(data("a.deep.overnode.local.", RecordType::ANY), ["10.40.0.3"]);
        assert_eq!(data("both.overnode.local.", RecordType::AAAA), ["2001:db8::4"]);
        assert_eq!(data("both.overnode.local.", RecordType::A), ["10.40.0.4"]);
        assert_eq!(data("both.overnode.local.", RecordType::ANY).len(), 2);
    }

    #[test]
    fn a_name_without_records_of_the_type_is_no_error() {
        for kind in
            [RecordType::AAAA, RecordType::TXT, RecordType::HTTPS, RecordType::MX, RecordType::PTR]
        {
            assert_eq!(none("web.overnode.local.", kind, ResponseCode::NoError), "overnode.local.");
        }
        assert_eq!(none("deep.weave.local.", RecordType::A, ResponseCode::NoError), "weave.local.");
        none("overnode.local.", RecordType::A, ResponseCode::NoError);
        assert_eq!(data("overnode.local.", RecordType::SOA).len(), 1);
    }

    #[test]
    fn unknown_names_in_our_domains_are_denied_and_not_forwarded() {
        for name in [
            "other.overnode.local.",
            "x.web.overnode.local.",
            "b\\.c.overnode.local.",
            "*.weave.local.",
        ] {
            for kind in [RecordType::A, RecordType::AAAA] {
                none(name, kind, ResponseCode::NXDomain);
            }
        }
    }

    #[test]
    fn names_outside_our_domains_are_forwarded() {
        for name in [
            "example.org.",
            "local.",
            ".",
            "xovernode.local.",
            "other.",
            "a.deep.",
            "deep.",
            "8.8.8.8.in-addr.arpa.",
            "arpa.",
        ] {
            assert_eq!(ask(name, RecordType::A), Verdict::Upstream, "{name}");
        }
        for name in ["10.in-addr.arpa.", "2.0.192.in-addr.arpa.", "48.10.in-addr.arpa."] {
            assert_eq!(ask(name, RecordType::PTR), Verdict::Upstream, "{name}");
        }
    }

    #[test]
    fn names_of_one_label_are_found_without_a_domain() {
        for name in ["web.", "WEB."] {
            assert_eq!(data(name, RecordType::A), ["10.40.0.1", "10.40.0.2"]);
        }
        let answer = answer("web.", RecordType::AAAA);
        assert_eq!((answer.code, answer.records), (ResponseCode::NoError, vec![]));
    }

    #[test]
    fn names_of_a_node_that_cannot_be_reached_are_in_doubt() {
        let mut directory = directory();
        directory.zone_mut().set_served(BTreeSet::new());
        let mut ask = |name: &str| {
            directory.ask(&Query::query(Name::from_ascii(name).unwrap(), RecordType::A))
        };
        let Verdict::Answer(answer) = ask("web.overnode.local.") else { panic!() };
        assert_eq!(answer.code, ResponseCode::ServFail);
        let Verdict::Answer(answer) = ask("other.overnode.local.") else { panic!() };
        assert_eq!(answer.code, ResponseCode::NXDomain);
        assert_eq!(ask("web."), Verdict::Upstream, "others may know this name");
        assert!(directory.is_in_doubt("web") && !directory.is_in_doubt("other"));
    }

    #[test]
    fn reverse_lookups_return_names() {
        assert_eq!(data("1.0.40.10.in-addr.arpa.", RecordType::PTR), ["web.overnode.local."]);
        assert_eq!(data("3.0.40.10.IN-ADDR.ARPA.", RecordType::PTR), ["a.deep.overnode.local."]);
        assert_eq!(data("7.2.0.192.in-addr.arpa.", RecordType::PTR), ["outside.overnode.local."]);
        let v6 = Name::from(IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 4])).to_string();
        assert_eq!(data(&v6, RecordType::PTR), ["both.overnode.local."]);
        let zone = none("1.0.40.10.in-addr.arpa.", RecordType::TXT, ResponseCode::NoError);
        assert_eq!(zone, "40.10.in-addr.arpa.");
        none("40.10.in-addr.arpa.", RecordType::PTR, ResponseCode::NoError);
        none("0.40.10.in-addr.arpa.", RecordType::PTR, ResponseCode::NoError);
        none("9.0.40.10.in-addr.arpa.", RecordType::PTR, ResponseCode::NXDomain);
    }

    #[test]
    fn transfers_and_other_classes_are_refused() {
        for name in ["overnode.local.", "example.org."] {
            assert_eq!(answer(name, RecordType::AXFR), Answer::refused());
            let mut query = Query::query(Name::from_ascii(name).unwrap(), RecordType::TXT);
            query.set_query_class(DNSClass::CH);
            assert_eq!(directory().ask(&query), Verdict::Answer(Answer::refused()));
        }
    }
}
