use std::collections::BTreeSet;
use std::path::Path;

use hickory_proto::op::{OpCode, Query};
use hickory_proto::rr::{Name, RecordType};
use proptest::prelude::{any, prop, prop_assert, prop_assert_eq, proptest};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;
use overnode_core::names::Zone;
use overnode_types::name::Domain;
use overnode_types::name::Named;
use overnode_types::{Network, NodeId};

const FROM: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 40, 0, 9));

/// Returns a service with 100 addresses for `many` and without upstream resolvers.
fn service() -> Service {
    let node = NodeId::new(1).unwrap();
    let mut zone = Zone::new(node, StdRng::seed_from_u64(1));
    let many = (0..100).map(|n| ("many", format!("10.40.1.{n}")));
    let names = many.chain([("web", "10.40.0.1".to_owned())]);
    let mut names: Vec<Named> =
        names.map(|(name, it)| Named { name: name.into(), address: it.parse().unwrap() }).collect();
    names.sort();
    zone.set_names(node, &names);
    zone.set_served(BTreeSet::from([node]));
    let subnet = Network::default().subnet;
    let directory = Directory::new(vec![Domain::new("overnode.local").unwrap()], subnet, zone);
    Service::new(
        directory,
        Upstream::new(Path::new("/nonexistent"), "10.39.240.1".parse().unwrap(), subnet),
    )
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn with_edns(mut message: Message, payload: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(payload);
    message.set_edns(edns);
    message
}

fn bytes(service: &Service, query: &Message, transport: Transport) -> Vec<u8> {
    match service.begin(&query.to_vec().unwrap(), FROM, transport, Entrance::Node) {
        Step::Send(bytes) => bytes,
        Step::Ignore => panic!("ignored"),
        Step::Ask(_) => panic!("forwarded upstream"),
    }
}

fn ask(service: &Service, query: &Message, transport: Transport) -> Message {
    let reply = Message::from_vec(&bytes(service, query, transport)).unwrap();
    assert_eq!(reply.metadata.id, query.metadata.id);
    assert_eq!(reply.metadata.message_type, MessageType::Response);
    assert!(reply.metadata.recursion_available);
    reply
}

#[test]
fn our_names_are_answered_authoritatively() {
    let service = service();
    let query = query("Web.overnode.local.", RecordType::A);
    let reply = ask(&service, &query, Transport::Udp);
    assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
    assert!(
        reply.metadata.authoritative
            && reply.metadata.recursion_desired
            && !reply.metadata.truncation
    );
    assert_eq!(reply.queries, query.queries);
    assert_eq!(reply.answers.len(), 1);
    assert!(reply.edns.is_none(), "the query has no EDNS");
    assert_eq!(service.counts(), Counts { queries: 1, ..Counts::default() });
}

#[test]
fn long_answers_are_truncated_on_udp_and_complete_on_tcp() {
    let service = service();
    let plain = query("many.overnode.local.", RecordType::A);
    for (query, most) in [
        (plain.clone(), 512),
        (with_edns(plain.clone(), 0), 512),
        (with_edns(plain.clone(), 800), 800),
        (with_edns(plain.clone(), 1232), 1232),
        (with_edns(plain.clone(), 65535), 1232),
    ] {
        let reply = bytes(&service, &query, Transport::Udp);
        assert!(reply.len() <= most, "{} of {most}", reply.len());
        let reply = Message::from_vec(&reply).unwrap();
        assert!(reply.metadata.truncation);
        assert!(reply.answers.len() > 25, "as much as fits");
    }
    let whole = ask(&service, &plain, Transport::Tcp);
    assert!(!whole.metadata.truncation);
    assert_eq!(whole.answers.len(), 100);
}

#[test]
fn edns_is_answered_and_later_versions_are_refused() {
    let service = service();
    let reply = ask(
        &service,
        &with_edns(query("web.overnode.local.", RecordType::A), 4096),
        Transport::Udp,
    );
    assert_eq!(reply.edns.unwrap().max_payload(), 1232);
    let mut later = with_edns(query("web.overnode.local.", RecordType::A), 4096);
    later.edns.as_mut().unwrap().set_version(1);
    let reply = ask(&service, &later, Transport::Udp);
    assert_eq!(u16::from(reply.metadata.response_code), 16, "BADVERS");
    assert!(reply.answers.is_empty());
}

#[test]
fn malformed_queries_are_ignored_or_refused_with_a_bare_header() {
    let service = service();
    let good = query("web.overnode.local.", RecordType::A).to_vec().unwrap();
    let begin = |bytes: &[u8]| match service.begin(bytes, FROM, Transport::Udp, Entrance::Node) {
        Step::Ignore => None,
        Step::Send(reply) => {
            assert_eq!(reply.len(), HEADER_LEN);
            assert_eq!(reply[..2], bytes[..2]);
            Some(Message::from_vec(&reply).unwrap().metadata.response_code)
        }
        Step::Ask(_) => panic!("forwarded upstream"),
    };
    let altered = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        begin(&bytes)
    };
    for short in 0..HEADER_LEN {
        assert_eq!(begin(&good[..short]), None);
    }
    assert_eq!(altered(2, 0x81), None, "a response");
    assert_eq!(altered(2, 0x29), Some(ResponseCode::NotImp), "an update");
    for cut in HEADER_LEN..good.len() {
        assert_eq!(begin(&good[..cut]), Some(ResponseCode::FormErr), "truncated at {cut}");
    }
    for (at, value) in
        [(4, 0xff), (5, 0), (5, 2), (6, 0xff), (7, 1), (9, 1), (10, 0xff), (11, 3), (11, 1)]
    {
        assert_eq!(altered(at, value), Some(ResponseCode::FormErr), "{value} at {at}");
    }
    // A compressed name that points to itself.
    let pointer = [&good[..HEADER_LEN], &[0xc0, 12, 0, 1, 0, 1]].concat();
    assert_eq!(begin(&pointer), Some(ResponseCode::FormErr));
    assert_eq!(service.counts().queries, 0);
    assert!(service.counts().refused > 20);
}

#[tokio::test]
async fn other_names_fail_without_upstream_resolvers() {
    let service = service();
    let query = with_edns(query("example.org.", RecordType::A), 1232);
    let Step::Ask(pending) =
        service.begin(&query.to_vec().unwrap(), FROM, Transport::Udp, Entrance::Node)
    else {
        panic!("not forwarded upstream")
    };
    let reply = Message::from_vec(&service.finish(pending).await).unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    assert!(!reply.metadata.authoritative && reply.edns.is_some());
    assert_eq!(service.counts(), Counts { queries: 1, forwarded: 1, failed: 1, refused: 0 });
}

#[test]
fn forwarding_is_limited_and_only_on_request() {
    let service = service();
    let mut query = query("example.org.", RecordType::A);
    query.metadata.recursion_desired = false;
    let refused = bytes(&service, &query, Transport::Udp);
    assert_eq!(Message::from_vec(&refused).unwrap().metadata.response_code, ResponseCode::Refused);
    query.metadata.recursion_desired = true;
    let query = query.to_vec().unwrap();
    let mut waiting = Vec::new();
    for container in 0..20_u8 {
        let from = IpAddr::from([10, 40, 0, container]);
        for _ in 0..2 * MAX_PENDING_OF_ONE {
            if let Step::Ask(pending) = service.begin(&query, from, Transport::Udp, Entrance::Node)
            {
                waiting.push(pending);
            }
        }
        assert_eq!(waiting.len(), (usize::from(container) + 1) * MAX_PENDING_OF_ONE);
        if waiting.len() == MAX_PENDING {
            break;
        }
    }
    assert_eq!(waiting.len(), MAX_PENDING);
    assert!(matches!(
        service.begin(&query, "10.40.9.9".parse().unwrap(), Transport::Udp, Entrance::Node),
        Step::Send(_)
    ));
    waiting.clear();
    assert!(matches!(service.begin(&query, FROM, Transport::Udp, Entrance::Node), Step::Ask(_)));
    assert!(service.pending.lock().is_empty(), "all shares are returned");
}

proptest! {
    #[test]
    fn arbitrary_bytes_cause_no_panic_and_no_oversized_answer(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let service = service();
        for transport in [Transport::Udp, Transport::Tcp] {
            if let Step::Send(reply) = service.begin(&bytes, FROM, transport, Entrance::Node) {
                let fits = reply.len() <= usize::from(MAX_UDP_BYTES);
                prop_assert!(transport == Transport::Tcp || fits);
                prop_assert!(Message::from_vec(&reply).is_ok());
            }
        }
    }

    #[test]
    fn altered_queries_are_answered_or_refused(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let service = service();
        let query = with_edns(query("many.overnode.local.", RecordType::ANY), 1232);
        let mut bytes = query.to_vec().unwrap();
        for (index, value) in &flips {
            let at = index.index(bytes.len());
            bytes[at] ^= value;
        }
        if let Step::Send(reply) = service.begin(&bytes, FROM, Transport::Udp, Entrance::Node) {
            prop_assert_eq!(&reply[..2], &bytes[..2]);
            prop_assert!(reply.len() <= usize::from(MAX_UDP_BYTES));
            let reply = Message::from_vec(&reply).unwrap();
            let is_unsupported = reply.metadata.response_code == ResponseCode::NotImp;
            prop_assert!(reply.metadata.op_code == OpCode::Query || is_unsupported);
        }
    }
}
