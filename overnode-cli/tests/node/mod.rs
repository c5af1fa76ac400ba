//! A node with canned answers, behind the real server.
#![allow(dead_code, reason = "each test program uses its part")]

use std::fs;
use std::thread;

use overnode_api::bulk::Cipher;
use overnode_api::bulk::Mode;
use overnode_daemon::api::*;
use overnode_daemon::monitor::Hub;
use overnode_types::{Network, PublicKey};
use tokio::sync::mpsc;

use crate::common::Host;

/// A node with canned answers. Its socket exists once the constructor returns. Its threads end with
/// the process.
pub(crate) struct Canned {
    pub host: Host,
}

impl Canned {
    /// Answers each request with this function.
    pub(crate) fn start(
        mut answer: impl FnMut(Request) -> Result<Reply, ApiError> + Send + 'static,
    ) -> Self {
        Self::start_with(move |mut calls| {
            while let Some((request, reply)) = calls.blocking_recv() {
                let _ = reply.send(answer(request));
            }
        })
    }

    /// Passes all requests to this function.
    pub(crate) fn start_with(node: impl FnOnce(mpsc::Receiver<Call>) + Send + 'static) -> Self {
        Self::at(Host::new(), node)
    }

    /// Like [`Self::start_with`], on an existing host.
    pub(crate) fn at(host: Host, node: impl FnOnce(mpsc::Receiver<Call>) + Send + 'static) -> Self {
        fs::create_dir_all(host.run_dir()).unwrap();
        let (calls, requests) = mpsc::channel(16);
        let socket = host.socket();
        let (bound, ready) = std::sync::mpsc::channel();
        thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = server::bind(&socket).unwrap();
                bound.send(()).unwrap();
                serve(listener, calls, Hub::default()).await.unwrap();
            });
        });
        ready.recv().unwrap();
        thread::spawn(move || node(requests));
        Self { host }
    }
}

/// Returns the version that a daemon of node 1 would report.
pub(crate) fn version(pid: u32) -> Version {
    let id = Some(1.try_into().unwrap());
    Version { version: "9.9.9".into(), protocols: None, kernel: None, pid, id, state_dir: None }
}

/// Returns a status that has an example of every kind of entry.
pub(crate) fn sample() -> Status {
    let error = |message: &str, seconds_ago| LastError {
        message: message.into(),
        seconds_ago: Some(seconds_ago),
    };
    let data = DataStatus {
        session: SessionState::Established,
        session_age_seconds: Some(90),
        endpoint: Some("192.0.2.12:6784".parse().unwrap()),
        mtu: Some(1420),
        route: Some(RouteStatus {
            path: Some(Path::Via(3.try_into().unwrap())),
            since_seconds: 77,
            direct_works: false,
            rtt_microseconds: Some(345),
            loss_per_mille: Some(15),
            last_error: Some(error("probes are not answered", 70)),
        }),
        rx_bytes: 123_456_789,
        tx_bytes: 4096,
        rx_packets: Some(100_000),
        tx_packets: Some(7),
        received_seconds_ago: Some(1),
        last_error: None,
        bulk: Some(BulkStatus {
            in_use: true,
            cipher: Cipher::Aes,
            session_age_seconds: Some(70),
            rx_bytes: 1_000_000,
            tx_bytes: 2000,
            rx_packets: 800,
            tx_packets: 4,
            rx_bits_per_second: 5_310_000_000,
            tx_bits_per_second: 1_000_000,
            silences: 0,
        }),
    };
    let peer = PeerStatus {
        id: 1.try_into().unwrap(),
        nickname: "host1".into(),
        myself: true,
        reachable: Some(true),
        since_seconds: Some(12_345),
        reclaimed: false,
        path: None,
        address: Some("10.39.240.1".parse().unwrap()),
        underlay: vec!["192.0.2.11:6783".parse().unwrap()],
        public_key: Some(PublicKey([1; 32])),
        version: Some("0.1.0".into()),
        links: vec![LinkStatus {
            direction: Some(Direction::Outbound),
            remote: Some("192.0.2.12:6783".parse().unwrap()),
            peer: 2.try_into().unwrap(),
            nickname: Some("host2".into()),
            state: ConnectionState::Established,
        }],
        data: None,
    };
    let connection = ConnectionStatus {
        direction: Direction::Outbound,
        remote: "192.0.2.12:6783".into(),
        state: ConnectionState::Established,
        since_seconds: Some(12_300),
        encryption: Some("Noise_XXpsk3_25519_ChaChaPoly_BLAKE2s".into()),
        peer: Some(2.try_into().unwrap()),
        nickname: Some("host2".into()),
        rtt_microseconds: Some(340),
        mtu: Some(1420),
        route: data.route.clone(),
        next_try_in_seconds: None,
        last_error: None,
        bulk: data.bulk.clone(),
    };
    let target = TargetStatus {
        host: "host1".parse().unwrap(),
        state: TargetState::Myself,
        peer: Some(1.try_into().unwrap()),
        next_try_in_seconds: None,
        last_error: None,
    };
    let owner = RangeOwner {
        id: 1.try_into().unwrap(),
        nickname: "host1".into(),
        addresses: 131_072,
        percent: 25.0,
        active: Some(2),
        reachable: Some(true),
        ranges: vec!["10.40.0.0/15".parse().unwrap()],
    };
    let mut status = Status {
        health: Health::default(),
        node: NodeStatus {
            id: 1.try_into().unwrap(),
            nickname: "host1".into(),
            state: NodeState::Impaired,
            underlay_problems: Vec::new(),
            problems: vec![
                "UDP port 6783 is in use: stop whatever uses it (`ss -lnup` shows it)".into(),
            ],
            version: "0.1.0".into(),
            uptime_seconds: 12_345,
            address: Some("10.39.240.1".parse().unwrap()),
            underlay: vec!["192.0.2.11".parse().unwrap()],
            interface: Some("eth0".into()),
            mtu: Some(1420),
            network: Network::default(),
            public_key: PublicKey([1; 32]),
            discovery: Some(true),
            settings: vec!["mtu=1300".into()],
            attachment: Some("tcx".into()),
            bulk: WorkersStatus {
                mode: Mode::Auto,
                workers: 1,
                pid: Some(4711),
                speeds: [("AES-256-GCM".to_owned(), 3980), ("ChaCha20-Poly1305".to_owned(), 1880)]
                    .into(),
                ..WorkersStatus::default()
            },
        },
        targets: vec![
            target.clone(),
            TargetStatus {
                host: "host2".parse().unwrap(),
                state: TargetState::Established,
                peer: Some(2.try_into().unwrap()),
                ..target.clone()
            },
            TargetStatus {
                host: "host9".parse().unwrap(),
                state: TargetState::Retrying,
                peer: None,
                next_try_in_seconds: Some(12),
                last_error: Some(error("the name does not resolve", 3)),
            },
        ],
        peers: vec![
            peer.clone(),
            PeerStatus {
                id: 2.try_into().unwrap(),
                nickname: "host2".into(),
                myself: false,
                path: Some(Path::Direct),
                address: Some("10.39.240.2".parse().unwrap()),
                data: Some(data.clone()),
                ..peer.clone()
            },
            PeerStatus {
                id: 3.try_into().unwrap(),
                nickname: String::new(),
                myself: false,
                reachable: Some(false),
                since_seconds: None,
                address: Some("10.39.240.3".parse().unwrap()),
                links: Vec::new(),
                data: Some(DataStatus {
                    session: SessionState::None,
                    session_age_seconds: None,
                    endpoint: None,
                    last_error: Some(error("no answer to the handshake", 5)),
                    ..data.clone()
                }),
                ..peer
            },
        ],
        connections: vec![
            connection.clone(),
            ConnectionStatus {
                remote: "192.0.2.14:6783".into(),
                state: ConnectionState::Failed,
                since_seconds: None,
                encryption: None,
                peer: Some(4.try_into().unwrap()),
                nickname: Some("host4".into()),
                rtt_microseconds: None,
                mtu: None,
                route: None,
                bulk: None,
                last_error: Some(error("the token differs", 60)),
                ..connection
            },
        ],
        endpoints: vec![EndpointStatus {
            kind: Kind::Netns,
            image: None,
            cni: None,
            name: Some("web".into()),
            target: "netns:blue".parse().unwrap(),
            address: "10.40.0.1/12".parse().unwrap(),
            fixed: false,
            interface: "ov1a2b3c4d".into(),
            attached_unix_seconds: Some(1_700_000_000),
            state: EndpointState::Attached,
        }],
        ipam: IpamStatus {
            ready: true,
            waiting_for: None,
            loans: vec![
                LoanStatus {
                    lender: 1.try_into().unwrap(),
                    borrower: 5.try_into().unwrap(),
                    addresses: 80,
                    networks: vec![
                        "10.41.0.0/26".parse().unwrap(),
                        "10.41.0.64/28".parse().unwrap(),
                    ],
                    lender_reachable: true,
                    borrower_reachable: true,
                },
                LoanStatus {
                    lender: 2.try_into().unwrap(),
                    borrower: 5.try_into().unwrap(),
                    addresses: 16,
                    networks: vec!["10.43.0.0/28".parse().unwrap()],
                    lender_reachable: false,
                    borrower_reachable: true,
                },
            ],
            problems: vec![
                "the address 10.40.0.9 is in use here and on node 7: detach one of the two".into(),
            ],
            notices: vec!["node 3 now lends the quarter of node 4".into()],
            reclaims: vec![ReclaimStatus {
                id: 4.try_into().unwrap(),
                missing: vec![3.try_into().unwrap()],
            }],
            owners: vec![
                owner.clone(),
                RangeOwner {
                    id: 2.try_into().unwrap(),
                    nickname: "host2".into(),
                    active: None,
                    reachable: Some(false),
                    ..owner.clone()
                },
                RangeOwner {
                    id: 5.try_into().unwrap(),
                    nickname: "host5".into(),
                    addresses: 96,
                    percent: 0.018,
                    active: None,
                    ranges: vec!["10.41.0.0/26".parse().unwrap(), "10.41.0.64/28".parse().unwrap()],
                    ..owner
                },
            ],
        },
        dns: DnsStatus {
            serving: true,
            address: Some("10.39.240.1".parse().unwrap()),
            domain: Some("overnode.local".into()),
            aliases: vec!["weave.local".into()],
            upstream: vec!["192.0.2.53".parse().unwrap()],
            queries: 1234,
            forwarded: 5,
            failed: 2,
            refused: 3,
            entries: vec![
                DnsEntry {
                    name: "db".into(),
                    address: "10.42.0.9".parse().unwrap(),
                    node: 2.try_into().unwrap(),
                    nickname: "host2".into(),
                    reachable: false,
                },
                DnsEntry {
                    name: "web".into(),
                    address: "10.40.0.1".parse().unwrap(),
                    node: 1.try_into().unwrap(),
                    nickname: "host1".into(),
                    reachable: true,
                },
            ],
        },
        external_peers: vec![ExternalPeerStatus {
            public_key: "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=".parse().unwrap(),
            name: Some("laptop".into()),
            preshared_key: true,
            allowed_ips: vec!["10.39.250.1/32".parse().unwrap()],
            persistent_keepalive_seconds: Some(25),
            data: Some(data),
        }],
        counters: vec![
            CounterStatus {
                reason: "sealed".into(),
                description: "Sealed and sent to a peer.".into(),
                dropped: false,
                count: 4_294_967_296,
            },
            CounterStatus {
                reason: "spoofed".into(),
                description:
                    "A container sent from an address, or a hardware address, that is not its own."
                        .into(),
                dropped: true,
                count: 7,
            },
        ],
    };
    status.health = Health::of(&status);
    status
}
