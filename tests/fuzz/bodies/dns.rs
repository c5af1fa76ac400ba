//! Fuzzes DNS: queries from containers, replies from the host's resolvers, and names that users
//! type.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use hickory_proto::op::{Edns, Message, MessageType, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType, rdata};
use overnode_core::names::zone::MAX_ANSWERS;
use overnode_core::names::{Directory, Zone};
use overnode_daemon::dns::Upstream;
use overnode_daemon::dns::service::{Entrance, Pending, Service, Step, Transport};
use overnode_types::name::Named;
use overnode_types::name::{Domain, is_relative, relative};
use overnode_types::{Network, NodeId};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::input::Input;

const FROM: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 40, 0, 9));
const HEADER: usize = 12;

/// Runs one input. The first byte selects the type of the rest.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input(data);
    match input.byte() {
        0 => query(input.0, Transport::Udp),
        1 => query(input.0, Transport::Tcp),
        2 => answer(&mut input),
        3 => name(input.0),
        _ => {}
    }
}

/// Checks that whatever is sent back is a reply to this query, fits, and is not answered in turn.
fn query(bytes: &[u8], transport: Transport) {
    let service = service();
    let before = service.counts();
    let step = service.begin(bytes, FROM, transport, Entrance::Node);
    let after = service.counts();
    let counted = after.queries + after.refused - before.queries - before.refused;
    let sent = match step {
        Step::Ignore => {
            assert!(bytes.len() < HEADER || bytes[2] & 0x80 != 0, "a query was ignored");
            return assert_eq!(counted, 0);
        }
        // There are no upstream resolvers.
        Step::Ask(pending) => service.conclude(pending, Err(ResponseCode::ServFail)),
        Step::Send(sent) => sent,
    };
    assert!((1..=2).contains(&counted));
    check_reply(&service, &sent, bytes, transport);
}

fn check_reply(service: &Service, sent: &[u8], query: &[u8], transport: Transport) {
    let asked = Message::from_vec(query).ok();
    let most = match (transport, asked.as_ref().and_then(|asked| asked.edns.as_ref())) {
        (Transport::Tcp, _) => usize::from(u16::MAX),
        (Transport::Udp, Some(edns)) => usize::from(edns.max_payload().clamp(512, 1232)),
        (Transport::Udp, None) => 512,
    };
    assert!((HEADER..=most).contains(&sent.len()), "{} bytes, {most} fit", sent.len());
    assert_eq!(sent[..2], query[..2], "the reply has a different ID");
    assert!(
        matches!(service.begin(sent, FROM, transport, Entrance::Node), Step::Ignore),
        "the reply could be answered in turn"
    );
    let reply = Message::from_vec(sent).expect("a reply can be parsed");
    assert_eq!(reply.metadata.message_type, MessageType::Response);
    assert!(reply.answers.len() <= MAX_ANSWERS);
    if let (Some(asked), [question]) = (&asked, &reply.queries[..]) {
        assert_eq!(Some(question), asked.queries.first());
    }
}

/// Checks that replies from upstream resolvers reach the container without records of our own
/// zones.
fn answer(input: &mut Input<'_>) {
    let service = service();
    let kind = input.byte();
    let transport = if kind & 1 == 0 { Transport::Udp } else { Transport::Tcp };
    let query = question("www.example.org.", kind & 2 != 0);
    let query = query.to_vec().expect("a query can be written");
    let Some(pending) = pending(&service, &query, transport) else {
        panic!("the service answered a name that it does not know")
    };
    let Ok(found) = Message::from_vec(input.0) else { return };
    let sent = service.conclude(pending, Ok(found));
    check_reply(&service, &sent, &query, transport);
    let reply = Message::from_vec(&sent).expect("a reply can be parsed");
    let sections = [&reply.answers, &reply.authorities, &reply.additionals];
    for record in sections.into_iter().flatten() {
        assert!(!service.directory().owns(&record.name), "{} is in one of our zones", record.name);
    }
}

fn pending(service: &Service, query: &[u8], transport: Transport) -> Option<Box<Pending>> {
    match service.begin(query, FROM, transport, Entrance::Node) {
        Step::Ask(pending) => Some(pending),
        Step::Ignore | Step::Send(_) => None,
    }
}

/// Checks that an accepted name is in canonical form and is accepted again as the same name.
fn name(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let domains = [Domain::new("overnode.local").expect("a domain")];
    if let Ok(name) = relative(text, &domains) {
        assert!(is_relative(&name) && name.len() <= 128, "{name:?}");
        assert!(name.bytes().all(|byte| byte.is_ascii_graphic()), "{name:?}");
    }
    if let Ok(domain) = Domain::new(text) {
        assert!(is_relative(domain.as_str()), "{domain:?}");
        assert_eq!(Domain::new(domain.as_str()).as_ref(), Ok(&domain));
    }
}

/// Returns a service with a hundred addresses for one name, and without upstream resolvers.
fn service() -> Service {
    let node = NodeId::new(1).expect("in range");
    let mut zone = Zone::new(node, StdRng::seed_from_u64(1));
    let many = (0..100).map(|n| ("many", IpAddr::from([10, 40, 1, n])));
    let others =
        [("web", FROM), ("a.deep", FROM), ("both", IpAddr::from([0x20, 1, 0xd, 0xb8, 0, 0, 0, 4]))];
    let mut names: Vec<Named> =
        many.chain(others).map(|(name, address)| Named { name: name.into(), address }).collect();
    names.sort();
    zone.set_names(node, &names);
    zone.set_served(BTreeSet::from([node]));
    let subnet = Network::default().subnet;
    let domains =
        ["overnode.local", "weave.local"].map(|it| Domain::new(it).expect("a domain")).to_vec();
    let directory = Directory::new(domains, subnet, zone);
    Service::new(directory, Upstream::new(Path::new("/nonexistent"), FROM, subnet))
}

fn question(name: &str, edns: bool) -> Message {
    let mut message = Message::query();
    message.metadata.id = 7;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).expect("a name"), RecordType::A));
    if edns {
        let mut edns = Edns::new();
        edns.set_max_payload(1232);
        message.set_edns(edns);
    }
    message
}

pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let query = |kind: u8, name: &str, edns| {
        let bytes = question(name, edns).to_vec().expect("a query can be written");
        [vec![kind], bytes].concat()
    };
    let mut reply = question("www.example.org.", false);
    reply.metadata.message_type = MessageType::Response;
    let record = |name: &str, last| {
        let address = Ipv4Addr::new(192, 0, 2, last);
        Record::from_rdata(Name::from_ascii(name).expect("a name"), 60, RData::A(rdata::A(address)))
    };
    reply.answers = vec![record("www.example.org.", 1), record("web.overnode.local.", 2)];
    reply.additionals = vec![record("ns.weave.local.", 3)];
    let reply = reply.to_vec().expect("a reply can be written");
    vec![
        ("ours", query(0, "web.overnode.local.", false)),
        ("many", query(0, "many.overnode.local.", true)),
        ("many-by-tcp", query(1, "many.weave.local.", false)),
        ("below", query(0, "deep.overnode.local.", true)),
        ("reverse", query(0, "9.0.40.10.in-addr.arpa.", false)),
        ("elsewhere", query(0, "www.example.org.", true)),
        ("root", query(0, ".", false)),
        ("answer", [vec![2, 0], reply.clone()].concat()),
        ("answer-by-tcp", [vec![2, 3], reply].concat()),
        ("name", b"\x03WEB.overnode.local.".to_vec()),
    ]
}
