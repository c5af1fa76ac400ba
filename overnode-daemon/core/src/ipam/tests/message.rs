//! Tests of decoding hostile messages.

use proptest::prelude::*;

use super::*;

#[test]
fn hostile_messages_are_refused_as_a_whole() {
    let layout = *node(1).layout();
    let title = Title { serial: 1, holder: id(1) };
    let request = |quarter, holds| Message::Request {
        quarter,
        serial: 1,
        epoch: 1,
        round: Round::default(),
        need: 1,
        want: 1,
        holds,
    };
    let block = |text: &str| text.parse::<IpNet>().unwrap();
    let loan = |text: &str| Loan { epoch: 1, blocks: vec![block(text)] };
    let part = |part, parts, loans| Message::Transfer {
        quarter: id(1),
        serial: 1,
        epoch: 1,
        part,
        parts,
        loans,
    };
    let refused = [
        request(id(5), Vec::new()),
        request(id(1), vec![block("10.40.0.0/24")]),
        request(id(1), vec![block("10.43.0.0/24")]),
        request(id(1), vec![block("10.41.1.0/24"), block("10.41.0.0/24")]),
        request(id(1), vec![block("10.41.0.0/24"), block("10.41.0.0/25")]),
        request(id(1), vec![block("10.41.0.1/24")]),
        request(id(1), block("10.41.0.0/16").subnets(25).unwrap().take(257).collect()),
        Message::Title { quarter: id(1), title: Title { serial: u64::MAX, ..title } },
        Message::Query { quarter: id(9), serial: 1 },
        part(1, 1, Vec::new()),
        part(0, u16::MAX, Vec::new()),
        part(0, 1, vec![(id(6), loan("10.41.0.0/24")), (id(5), loan("10.41.1.0/24"))]),
        part(0, 1, vec![(id(5), loan("10.43.0.0/24"))]),
    ];
    for message in refused {
        let decoded = Message::decode(&message.encode(), &layout);
        assert!(
            matches!(decoded, Err(BadMessage::Bounds(_))),
            "{message:?} decoded to {decoded:?}"
        );
    }
    let good = request(id(1), vec![block("10.41.0.0/24"), block("10.41.1.0/24")]);
    assert_eq!(Message::decode(&good.encode(), &layout), Ok(good.clone()));
    let mut longer = good.encode();
    longer.push(0);
    assert_eq!(Message::decode(&longer, &layout), Err(BadMessage::Unreadable));
    assert_eq!(Message::decode(&[], &layout), Err(BadMessage::Empty));
    assert_eq!(Message::decode(&[9, 0], &layout), Err(BadMessage::Format(9)));
    assert!(matches!(
        Message::decode(&vec![1; MAX_MESSAGE + 1], &layout),
        Err(BadMessage::Bounds(_))
    ));
}

proptest! {
    #[test]
    fn no_message_causes_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut ipam = node(1);
        let mut framed = vec![crate::ipam::message::ALLOCATION_FORMAT];
        framed.extend(&bytes);
        let _ = ipam.handle_message(id(2), &framed, Instant::now());
        let _ = ipam.handle_message(id(2), &bytes, Instant::now());
    }
}
