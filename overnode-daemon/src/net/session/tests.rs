use proptest::prelude::*;
use tokio::io::{DuplexStream, duplex};

use super::*;
use overnode_types::{Network, NodeId, Secret};

fn node(id: u16, seed: u8) -> LocalIdentity {
    let seed = Secret([seed; 32]);
    let static_secret = key::exchange_secret(&seed);
    let hello = Hello {
        versions: (2, 2),
        id: NodeId::new(id).unwrap(),
        incarnation: 1,
        nickname: format!("host{id}"),
        network: Network::default(),
        verifying_key: key::verifying_key(&seed),
        process: id.into(),
        public_key: key::public_key(&static_secret),
    };
    LocalIdentity { static_secret, cluster_key: Secret([9; 32]), hello }
}

type Outcome = Result<Link<DuplexStream>, Refusal>;

async fn meet(initiator: &LocalIdentity, responder: &LocalIdentity) -> (Outcome, Outcome) {
    let (a, b) = duplex(1 << 16);
    tokio::join!(
        connect(a, Role::Initiator, initiator, ConnectOptions::default(), |_| Ok(())),
        connect(b, Role::Responder, responder, ConnectOptions::default(), |_| Ok(())),
    )
}

fn words(outcome: Outcome) -> String {
    outcome.expect_err("the connection must be refused").to_string()
}

#[tokio::test]
async fn two_nodes_with_the_same_token_connect_and_exchange_messages() {
    let (one, two) = (node(1, 1), node(2, 2));
    let (a, b) = meet(&one, &two).await;
    let (mut a, mut b) = (a.unwrap(), b.unwrap());
    assert_eq!((a.version, b.version), (2, 2));
    assert_eq!(a.peer, two.hello);
    assert_eq!(b.peer, one.hello);
    let long: Vec<u8> = (0..frame::MAX_MESSAGE).map(|i| (i % 251) as u8).collect();
    let sending = async {
        a.writer.send(b"first").await.unwrap();
        a.writer.heartbeat().await.unwrap();
        a.writer.send(&long).await.unwrap();
        assert!(matches!(
            a.writer.send(&vec![0; frame::MAX_MESSAGE + 1]).await,
            Err(Refusal::Frame(frame::BadFrame::MessageTooLong))
        ));
        a.writer.close().await;
        a.reader
    };
    let receiving = async {
        assert_eq!(b.reader.receive().await.unwrap(), b"first");
        assert_eq!(b.reader.receive().await.unwrap(), long);
        assert!(matches!(b.reader.receive().await, Err(Refusal::Closed)));
    };
    tokio::join!(sending, receiving);
}

#[tokio::test]
async fn a_different_token_is_reported_on_both_sides_and_nothing_is_exchanged() {
    let (one, mut two) = (node(1, 1), node(2, 2));
    two.cluster_key = Secret([10; 32]);
    let (a, spy_a) = duplex(1 << 16);
    let (b, spy_b) = duplex(1 << 16);
    let admitted = |_: &Hello| -> Result<(), Refusal> {
        panic!("a node with another token reached admission")
    };
    let wire = tokio::spawn(relay(spy_a, spy_b));
    let (initiator, responder) = tokio::join!(
        connect(a, Role::Initiator, &one, ConnectOptions::default(), admitted),
        connect(b, Role::Responder, &two, ConnectOptions::default(), admitted)
    );
    assert!(matches!(initiator, Err(Refusal::Token)));
    assert!(matches!(responder, Err(Refusal::Token)));
    assert!(words(initiator).contains("the token differs"));
    assert!(words(responder).contains("overnode reset"));
    let (sent, answered) = wire.await.unwrap();
    // The responder sends e (32) + tag, s (32 + tag), then the fixed refusal. It sends no greeting.
    assert_eq!(answered.len(), (2 + 32 + 48 + 16) + (2 + 1));
    assert_eq!(answered[answered.len() - 3..], [0, 1, 1]);
    for bytes in [&sent, &answered] {
        assert!(!bytes.windows(5).any(|window| window == b"host1" || window == b"host2"));
    }
}

/// The handshake proves the X25519 key, but the greeting names another node's identity.
#[tokio::test]
async fn a_member_greets_with_the_identity_of_another_node() {
    let (one, mut two) = (node(1, 1), node(2, 2));
    two.hello.verifying_key = node(3, 3).hello.verifying_key;
    for (initiator, responder) in [(&one, &two), (&two, &one)] {
        let (a, b) = duplex(1 << 16);
        let admit = |_: &Hello| Ok(());
        let (called, answered) = tokio::join!(
            connect(a, Role::Initiator, initiator, ConnectOptions::default(), admit),
            connect(b, Role::Responder, responder, ConnectOptions::default(), admit)
        );
        let honest = if initiator.hello.id == one.hello.id { called } else { answered };
        assert!(words(honest).contains("the identity of another node"));
    }
}

/// Carries bytes between two streams until both are closed. Returns the bytes of each direction.
async fn relay(a: DuplexStream, b: DuplexStream) -> (Vec<u8>, Vec<u8>) {
    let (mut a_read, mut a_write) = tokio::io::split(a);
    let (mut b_read, mut b_write) = tokio::io::split(b);
    tokio::join!(copy(&mut a_read, &mut b_write), copy(&mut b_read, &mut a_write))
}

async fn copy<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(from: &mut R, to: &mut W) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let mut buffer = [0; 4096];
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(length) => {
                all.extend_from_slice(&buffer[..length]);
                if to.write_all(&buffer[..length]).await.is_err() {
                    break;
                }
            }
        }
    }
    let _ = to.shutdown().await;
    all
}

#[tokio::test]
async fn refusals_arrive_over_tcp() {
    let one = node(1, 1);
    let mut wrong_token = node(2, 2);
    wrong_token.cluster_key = Secret([10; 32]);
    let mut elsewhere = node(2, 2);
    elsewhere.hello.network.range = "10.36.0.0/14".parse().unwrap();
    for (other, expected) in [
        (&wrong_token, "the token differs"),
        (&elsewhere, "--range"),
        (&node(1, 5), "used twice"),
        (&one, "own"),
    ] {
        for _ in 0..20 {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (initiator, responder) = tokio::join!(
                async {
                    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
                    connect(stream, Role::Initiator, &one, ConnectOptions::default(), |_| Ok(()))
                        .await
                        .map(drop)
                },
                async {
                    let (stream, _) = listener.accept().await.unwrap();
                    connect(stream, Role::Responder, other, ConnectOptions::default(), |_| Ok(()))
                        .await
                        .map(drop)
                }
            );
            for outcome in [initiator, responder] {
                let text = outcome.unwrap_err().to_string();
                assert!(text.contains(expected), "{text}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn other_protocols_are_reported_as_not_an_overnode_node() {
    for (banner, role) in [
        ("SSH-2.0-OpenSSH_9.2p1", Role::Initiator),
        ("HTTP/1.1 400 Bad Request\r\n\r\n", Role::Initiator),
        ("GET / HTTP/1.1\r\n\r\n", Role::Responder),
        ("\u{16}\u{3}\u{1}\u{2}\u{0}\u{1}", Role::Responder),
        ("\u{0}\u{2}xx", Role::Responder),
    ] {
        let (a, mut b) = duplex(1 << 16);
        b.write_all(banner.as_bytes()).await.unwrap();
        let text =
            words(connect(a, role, &node(1, 1), ConnectOptions::default(), |_| Ok(())).await);
        assert!(text.starts_with("the other end is not an overnode node ("), "{banner:?}: {text}");
    }
}

#[tokio::test]
async fn an_incompatibility_is_reported_on_both_sides() {
    let one = node(1, 1);
    let mut elsewhere = node(2, 2);
    elsewhere.hello.network.subnet = "10.0.0.0/8".parse().unwrap();
    let (a, b) = meet(&one, &elsewhere).await;
    for (text, peer) in [(words(a), "node 2 (host2)"), (words(b), "node 1 (host1)")] {
        assert!(
            text.contains("10.0.0.0/8") && text.contains("10.32.0.0/12") && text.contains(peer),
            "{text}"
        );
        assert!(text.contains("--subnet"), "{text}");
    }

    let mut modern = node(2, 2);
    modern.hello.versions = (7, 9);
    let (a, b) = meet(&one, &modern).await;
    assert_eq!(
        words(a),
        "no common protocol version: this node supports 2 to 2, the other node 7 to 9; upgrade \
         overnode on this host"
    );
    assert_eq!(
        words(b),
        "no common protocol version: this node supports 7 to 9, the other node 2 to 2; upgrade \
         overnode on the other host"
    );

    let (a, b) = meet(&one, &node(1, 3)).await;
    assert!(matches!((&a, &b), (Err(Refusal::IdClash { .. }), Err(Refusal::IdClash { .. }))));
    assert!(words(a).contains("ID 1 is used twice"));

    let (a, b) = meet(&one, &one).await;
    assert!(matches!((&a, &b), (Err(Refusal::Myself), Err(Refusal::Myself))));
}

#[tokio::test]
async fn the_newest_common_version_is_used() {
    for (ours, theirs, expected) in [
        ((1, 3), (2, 5), Some(3)),
        ((2, 2), (1, 9), Some(2)),
        ((4, 6), (1, 4), Some(4)),
        ((1, 2), (3, 4), None),
    ] {
        let (mut one, mut two) = (node(1, 1), node(2, 2));
        (one.hello.versions, two.hello.versions) = (ours, theirs);
        let (a, b) = meet(&one, &two).await;
        match expected {
            Some(version) => {
                assert_eq!((a.unwrap().version, b.unwrap().version), (version, version))
            }
            None => {
                for (text, old) in [(words(a), "this host"), (words(b), "the other host")] {
                    assert!(text.contains("1 to 2") && text.contains("3 to 4"), "{text}");
                    assert!(text.ends_with(&format!("upgrade overnode on {old}")), "{text}");
                }
            }
        }
    }
}

#[tokio::test]
async fn a_host_with_a_copy_of_the_disk_is_not_taken_for_the_node_itself() {
    for id in [1, 2] {
        let one = node(1, 1);
        let mut copy = node(id, 1);
        copy.hello.process = 99;
        let (a, b) = meet(&one, &copy).await;
        for outcome in [a, b] {
            let text = words(outcome);
            assert!(
                text.contains("a copy of this node's disk") && text.contains("overnode reset"),
                "{text}"
            );
        }
    }
}

/// Nodes of other versions read these bytes, so new reasons go to the end.
#[test]
fn the_wire_format_of_verdicts_is_stable() {
    let clash = || Refusal::IdClash {
        id: NodeId::new(300).unwrap(),
        holder: "one".into(),
        newcomer: "two".into(),
    };
    let network = Network::default();
    let versions = Refusal::Version { ours: (1, 1), theirs: (2, 2) };
    let elsewhere = Refusal::Network { ours: network, theirs: network, peer: String::new() };
    for (outcome, golden) in [
        (Ok(()), "00"),
        (Err(versions), "01"),
        (Err(elsewhere), "02"),
        (Err(clash()), "03ac02036f6e650374776f"),
        (Err(Refusal::Myself), "04"),
        (Err(Refusal::Closed), "05"),
        (Err(Refusal::Copy(NodeId::new(1).unwrap())), "06"),
    ] {
        let verdict = Verdict::of(&outcome);
        assert_eq!(data_encoding::HEXLOWER.encode(&verdict.encode()), golden);
        assert_eq!(Verdict::decode(&verdict.encode()).unwrap(), verdict);
    }
    assert!(matches!(Verdict::decode(&[7]), Err(Refusal::Unknown)), "a verdict of a later version");
}

#[tokio::test]
async fn a_refused_admission_is_reported_to_the_other_side() {
    for refusing in [Role::Initiator, Role::Responder] {
        let clash = move |role| {
            move |peer: &Hello| {
                if role != refusing {
                    return Ok(());
                }
                let (holder, newcomer) = ("old-host7".into(), peer.nickname.clone());
                Err(Refusal::IdClash { id: peer.id, holder, newcomer })
            }
        };
        let (a, b) = duplex(1 << 16);
        let (one, seven) = (node(1, 1), node(7, 7));
        let (a, b) = tokio::join!(
            connect(a, Role::Initiator, &one, ConnectOptions::default(), clash(Role::Initiator)),
            connect(b, Role::Responder, &seven, ConnectOptions::default(), clash(Role::Responder))
        );
        for text in [words(a), words(b)] {
            assert!(text.contains("is used twice: by old-host7 and by host"), "{text}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn silence_ends_the_handshake_and_the_connection() {
    let (a, _silent) = duplex(1 << 16);
    let began = Instant::now();
    let outcome =
        connect(a, Role::Responder, &node(1, 1), ConnectOptions::default(), |_| Ok(())).await;
    assert!(matches!(outcome, Err(Refusal::TimedOut(10))));
    assert_eq!(began.elapsed(), HANDSHAKE_LIMIT);

    let (a, b) = meet(&node(1, 1), &node(2, 2)).await;
    let (mut a, mut b) = (a.unwrap(), b.unwrap());
    let began = Instant::now();
    tokio::time::sleep(READ_LIMIT / 2).await;
    b.writer.heartbeat().await.unwrap();
    assert!(matches!(a.reader.receive().await, Err(Refusal::TimedOut(15))));
    assert_eq!(began.elapsed(), READ_LIMIT / 2 + READ_LIMIT);

    let endless = vec![0; frame::MAX_MESSAGE];
    assert!(
        matches!(a.writer.send(&endless).await, Err(Refusal::TimedOut(15))),
        "the peer does not read"
    );
}

#[tokio::test(start_paused = true)]
async fn a_canceled_receive_loses_nothing() {
    let (a, b) = meet(&node(1, 1), &node(2, 2)).await;
    let (mut a, mut b) = (a.unwrap(), b.unwrap());
    let message = vec![5; 300_000];
    let expected = message.clone();
    let sender = tokio::spawn(async move {
        a.writer.send(&message).await.unwrap();
        a
    });
    let mut dropped = 0;
    let received = loop {
        tokio::select! {
            biased;
            () = tokio::task::yield_now(), if dropped < 40 => dropped += 1,
            received = b.reader.receive() => break received.unwrap(),
        }
    };
    assert_eq!(received, expected);
    assert!(dropped > 0);
    sender.await.unwrap();
}

#[tokio::test]
async fn altered_repeated_and_reordered_messages_end_the_connection() {
    for tamper in 0..3 {
        let (a, spy_a) = duplex(1 << 16);
        let (b, mut spy_b) = duplex(1 << 16);
        let (one, two) = (node(1, 1), node(2, 2));
        let (mut from_a, mut to_a) = tokio::io::split(spy_a);
        let meeting = async {
            tokio::join!(
                connect(a, Role::Initiator, &one, ConnectOptions::default(), |_| Ok(())),
                connect(b, Role::Responder, &two, ConnectOptions::default(), |_| Ok(())),
            )
        };
        let honest = async {
            let mut frames = Vec::new();
            for turn in ["a", "b", "a", "b", "b", "a"] {
                let mut frame = Vec::new();
                if turn == "a" {
                    read_one(&mut from_a, &mut frame).await;
                    spy_b.write_all(&frame).await.unwrap();
                } else {
                    read_one(&mut spy_b, &mut frame).await;
                    to_a.write_all(&frame).await.unwrap();
                }
                frames.push(frame);
            }
        };
        let ((a, b), ()) = tokio::join!(meeting, honest);
        let (mut a, mut b) = (a.unwrap(), b.unwrap());
        a.writer.send(b"one").await.unwrap();
        a.writer.send(b"two").await.unwrap();
        let (mut first, mut second) = (Vec::new(), Vec::new());
        read_one(&mut from_a, &mut first).await;
        read_one(&mut from_a, &mut second).await;
        match tamper {
            0 => {
                first[5] ^= 1;
                spy_b.write_all(&first).await.unwrap();
            }
            1 => {
                spy_b.write_all(&first).await.unwrap();
                assert_eq!(b.reader.receive().await.unwrap(), b"one");
                spy_b.write_all(&first).await.unwrap();
            }
            _ => spy_b.write_all(&second).await.unwrap(),
        }
        assert!(matches!(b.reader.receive().await, Err(Refusal::Garbage(_))), "case {tamper}");
    }
}

async fn read_one<R: AsyncRead + Unpin>(from: &mut R, frame: &mut Vec<u8>) {
    let length = from.read_u16().await.unwrap();
    frame.extend(length.to_be_bytes());
    frame.resize(2 + usize::from(length), 0);
    from.read_exact(&mut frame[2..]).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_altered_byte_anywhere_in_the_handshake_ends_it() {
    let (one, two) = (node(1, 1), node(2, 2));
    let verdict = 1 + 1;
    let sent_by_initiator =
        (2 + 48) + (2 + 48 + 16 + one.hello.encode().len()) + (2 + verdict + 16);
    for position in 0..sent_by_initiator + 3 {
        let (a, spy_a) = duplex(1 << 16);
        let (b, spy_b) = duplex(1 << 16);
        let (mut a_read, mut a_write) = tokio::io::split(spy_a);
        let (mut b_read, mut b_write) = tokio::io::split(spy_b);
        let spy = tokio::spawn(async move {
            tokio::join!(flip(&mut a_read, &mut b_write, position), copy(&mut b_read, &mut a_write))
        });
        let (_, responder) = tokio::join!(
            connect(a, Role::Initiator, &one, ConnectOptions::default(), |_| Ok(())),
            connect(b, Role::Responder, &two, ConnectOptions::default(), |_| Ok(()))
        );
        let is_altered = position < sent_by_initiator;
        assert_eq!(responder.is_err(), is_altered, "byte {position} of {sent_by_initiator}");
        spy.abort();
    }
}

async fn flip<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    from: &mut R,
    to: &mut W,
    position: usize,
) {
    let mut seen = 0;
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if (seen..seen + length).contains(&position) {
            buffer[position - seen] ^= 0x40;
        }
        seen += length;
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn hostile_bytes_never_panic_and_never_connect(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
        initiator in any::<bool>(),
    ) {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().start_paused(true).build().unwrap();
        let role = if initiator { Role::Initiator } else { Role::Responder };
        let outcome = runtime.block_on(async {
            let (a, mut b) = duplex(1 << 16);
            b.write_all(&bytes).await.unwrap();
            connect(a, role, &node(1, 1), ConnectOptions::default(), |_| Ok(())).await
        });
        prop_assert!(outcome.is_err());
    }

    #[test]
    fn any_bytes_are_decoded_as_greeting_or_verdict_or_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let with_version = [&[2, 0, 2, 0], bytes.as_slice()].concat();
        for bytes in [&bytes, &with_version] {
            if let Ok(hello) = Hello::decode(bytes, PublicKey([1; 32]), (2, 2)) {
                prop_assert!(hello.nickname.len() <= overnode_core::control::hello::MAX_NICKNAME);
                prop_assert!(!hello.nickname.contains(char::is_control));
            }
            let _ = Verdict::decode(bytes);
        }
    }
}

// The Ed25519 public key whose seed is 32 bytes of 2, computed with Python's cryptography module.
const IDENTITY: &str = "8139770ea87d175f56a35466c34c7ecccb8d8a91b4ee37a25df60f5b8fc9b394";

#[test]
fn the_wire_format_of_the_greeting_is_stable() {
    let golden = [
        vec![2, 0, 2, 0],                      // versions
        vec![2],                               // ID
        vec![0xac, 0x02],                      // incarnation 300
        vec![5, b'h', b'o', b's', b't', b'2'], // nickname
        vec![0, 10, 32, 0, 0, 12],             // subnet
        vec![0, 10, 40, 0, 0, 13],             // range
        data_encoding::HEXLOWER.decode(IDENTITY.as_bytes()).unwrap(),
        vec![0x81, 0x02], // process 257
    ]
    .concat();
    let mut hello = node(2, 2).hello;
    (hello.incarnation, hello.process) = (300, 257);
    assert_eq!(hello.encode(), golden);
    let longer = [golden, vec![1, 2, 3]].concat();
    assert_eq!(
        Hello::decode(&longer, hello.public_key, (1, 4)).unwrap(),
        hello,
        "later versions may append fields"
    );
}
