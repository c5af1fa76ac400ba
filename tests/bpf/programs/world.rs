//! One node's programs and maps, loaded for a single test. Nothing is pinned and nothing is
//! attached.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, PerCpuArray};
use aya::programs::{Program, SchedClassifier, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use overnode_core::handshake::mac1_state;
use overnode_daemon::datapath::to_map;
use overnode_ebpf::map::{
    Address, Config, Endpoint, Peer, ROUTE_LOCAL, ROUTE_NONE, ROUTE_PEER, Route, SESSION_LIVE,
    SESSION_SLOT_BITS, Session,
};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::replay::Window;
use overnode_ebpf::wire::DAEMON_MAC;
use overnode_types::PublicKey;

/// Interface that test runs arrive on: loopback, which every namespace has.
pub(crate) const IFINDEX: u32 = 1;
pub(crate) const CONTAINER: Ipv4Addr = Ipv4Addr::new(10, 40, 0, 2);
pub(crate) const CONTAINER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x02];
pub(crate) const GATEWAY_MAC: [u8; 6] = [0x02, 0xee, 0, 0, 0, 0x02];
/// Address of another container on this host.
pub(crate) const NEIGHBOUR: Ipv4Addr = Ipv4Addr::new(10, 40, 0, 3);
pub(crate) const NEIGHBOUR_IFINDEX: u32 = 77;
pub(crate) const NEIGHBOUR_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x03];
pub(crate) const NEIGHBOUR_GATEWAY_MAC: [u8; 6] = [0x02, 0xee, 0, 0, 0, 0x03];
/// Address of a container of the peer.
pub(crate) const REMOTE: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 9);
pub(crate) const NODE: Ipv4Addr = Ipv4Addr::new(10, 39, 240, 1);
pub(crate) const NODE_ID: u16 = 1;
pub(crate) const PUBLIC_KEY: PublicKey = PublicKey([0x77; 32]);
/// The nodes' own addresses: the peer's, then the second peer's.
pub(crate) const PEER_NODE: Ipv4Addr = Ipv4Addr::new(10, 39, 240, 2);
pub(crate) const OTHER_PEER_NODE: Ipv4Addr = Ipv4Addr::new(10, 39, 240, 3);
pub(crate) const PEER: u32 = 2;
/// A second peer, without a session.
pub(crate) const OTHER_PEER: u32 = 3;
/// Address of a container of the second peer.
pub(crate) const OTHER_REMOTE: Ipv4Addr = Ipv4Addr::new(10, 44, 0, 1);
/// An address of this node that no container has.
pub(crate) const UNATTACHED: Ipv4Addr = Ipv4Addr::new(10, 40, 77, 77);
pub(crate) const MTU: u32 = 1420;
pub(crate) const SLOT: u32 = 5;
pub(crate) const LOCAL_INDEX: u32 = 0xabcde << SESSION_SLOT_BITS | SLOT;
pub(crate) const REMOTE_INDEX: u32 = 0x1234_5678;
pub(crate) const TX_KEY: [u8; 32] = [0x42; 32];
pub(crate) const RX_KEY: [u8; 32] = [0x17; 32];

pub(crate) const TC_ACT_UNSPEC: u32 = u32::MAX;
pub(crate) const TC_ACT_SHOT: u32 = 2;
pub(crate) const TC_ACT_REDIRECT: u32 = 7;
pub(crate) const XDP_DROP: u32 = 1;
pub(crate) const XDP_PASS: u32 = 2;
pub(crate) const XDP_REDIRECT: u32 = 4;

/// IP version of the underlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Underlay {
    V4,
    V6,
}

pub(crate) const UNDERLAYS: [Underlay; 2] = [Underlay::V4, Underlay::V6];

impl Underlay {
    /// Returns this host's address.
    pub(crate) fn local(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(192, 0, 2, 1).into(),
            Self::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
        }
    }

    /// Returns the peer's address.
    pub(crate) fn remote(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(198, 51, 100, 2).into(),
            Self::V6 => Ipv6Addr::new(0x2001, 0xdb8, 1, 2, 3, 4, 5, 6).into(),
        }
    }
}

/// Result of running a program over a packet.
#[derive(Debug)]
pub(crate) struct Output {
    pub verdict: u32,
    pub frame: Vec<u8>,
}

/// The hook at which messages are received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hook {
    Tc,
    Xdp,
}

pub(crate) const HOOKS: [Hook; 2] = [Hook::Tc, Hook::Xdp];

impl Hook {
    pub(crate) fn passed(self) -> u32 {
        match self {
            Self::Tc => TC_ACT_UNSPEC,
            Self::Xdp => XDP_PASS,
        }
    }

    pub(crate) fn dropped(self) -> u32 {
        match self {
            Self::Tc => TC_ACT_SHOT,
            Self::Xdp => XDP_DROP,
        }
    }

    pub(crate) fn redirected(self) -> u32 {
        match self {
            Self::Tc => TC_ACT_REDIRECT,
            Self::Xdp => XDP_REDIRECT,
        }
    }
}

pub(crate) struct World {
    pub ebpf: Ebpf,
}

/// Runs a test with each hook over each underlay, each time in a new world.
pub(crate) fn each(test: impl Fn(Hook, Underlay, World)) {
    for hook in HOOKS {
        for underlay in UNDERLAYS {
            eprintln!("{hook:?}, {underlay:?}");
            test(hook, underlay, World::new(underlay));
        }
    }
}

/// All programs, for [`load`].
pub(crate) const ALL: &[&str] = &[
    "from_container",
    "seal",
    "from_underlay",
    "from_underlay_xdp",
    "from_bulk",
    "to_container",
    "resolver_connect",
    "resolver_sendmsg",
    "resolver_recvmsg",
    "resolver_getpeername",
    "aead_check",
];
/// The programs that packets run through.
const PATHS: &[&str] =
    &["from_container", "seal", "from_underlay", "from_underlay_xdp", "from_bulk", "to_container"];

/// Loads these programs.
pub(crate) fn load(debug: u8, names: &[&str]) -> Ebpf {
    let mut ebpf = EbpfLoader::new()
        .verifier_log_level(VerifierLogLevel::STATS)
        .override_global("DEBUG", &debug, true)
        .load(overnode_daemon::PROGRAMS)
        .expect("cannot parse the object");
    for (name, program) in ebpf.programs_mut().filter(|(name, _)| names.contains(name)) {
        let loaded = match program {
            Program::SchedClassifier(program) => program.load(),
            Program::Xdp(program) => program.load(),
            Program::CgroupSockAddr(program) => program.load(),
            _ => panic!("{name} has an unexpected program type"),
        };
        loaded.unwrap_or_else(|error| panic!("the kernel rejects {name}: {error:?}"));
    }
    ebpf
}

impl World {
    /// Returns a node with two containers, two peers, and a live session with the first peer.
    pub(crate) fn new(underlay: Underlay) -> Self {
        Self::with_debug(underlay, 0)
    }

    /// Like [`Self::new`]. The programs log if `debug` is not 0.
    pub(crate) fn with_debug(underlay: Underlay, debug: u8) -> Self {
        let mut world = Self { ebpf: load(debug, PATHS) };
        world
            .array("CONFIG")
            .set(
                0,
                Config {
                    subnet: to_map(Ipv4Addr::new(10, 32, 0, 0).into()),
                    subnet_bits: Address::V4_BITS + 12,
                    offload_veth: IFINDEX,
                    node: to_map(NODE.into()),
                    node_id: NODE_ID.into(),
                    mac1: mac1_state(&PUBLIC_KEY),
                },
                0,
            )
            .expect("CONFIG");
        world.set_endpoint(IFINDEX, CONTAINER, CONTAINER_MAC, GATEWAY_MAC);
        world.set_endpoint(NEIGHBOUR_IFINDEX, NEIGHBOUR, NEIGHBOUR_MAC, NEIGHBOUR_GATEWAY_MAC);
        world.set_route(Ipv4Addr::new(10, 40, 0, 0), 15, ROUTE_NONE, 0);
        world.set_route(Ipv4Addr::new(10, 42, 0, 0), 15, ROUTE_PEER, PEER);
        world.set_route(Ipv4Addr::new(10, 44, 0, 0), 15, ROUTE_PEER, OTHER_PEER);
        world.set_route(CONTAINER, 32, ROUTE_LOCAL, IFINDEX);
        world.set_route(NEIGHBOUR, 32, ROUTE_LOCAL, NEIGHBOUR_IFINDEX);
        for peer in [PEER, OTHER_PEER] {
            let tx_slot = if peer == PEER { SLOT } else { 0 };
            world.set_peer(
                peer,
                Peer {
                    remote: to_map(underlay.remote()),
                    local: to_map(underlay.local()),
                    remote_port_be: 6784_u16.to_be(),
                    present: 1,
                    ifindex: IFINDEX,
                    tx_slot,
                    mtu: MTU,
                    ..Peer::default()
                },
            );
        }
        world.set_session(SLOT, session());
        let local = to_map(underlay.local());
        HashMap::<_, Address, u32>::try_from(
            world.ebpf.map_mut("LOCAL_ADDRESSES").expect("LOCAL_ADDRESSES"),
        )
        .and_then(|mut map| map.insert(local, 1, 0))
        .expect("LOCAL_ADDRESSES");
        world
    }

    fn array<V: aya::Pod>(&mut self, name: &str) -> Array<&mut aya::maps::MapData, V> {
        Array::try_from(self.ebpf.map_mut(name).expect(name)).expect(name)
    }

    pub(crate) fn set_endpoint(
        &mut self,
        ifindex: u32,
        address: Ipv4Addr,
        mac: [u8; 6],
        gateway_mac: [u8; 6],
    ) {
        HashMap::<_, u32, Endpoint>::try_from(self.ebpf.map_mut("ENDPOINTS").expect("ENDPOINTS"))
            .and_then(|mut map| {
                map.insert(
                    ifindex,
                    Endpoint { address: to_map(address.into()), mac, gateway_mac },
                    0,
                )
            })
            .expect("ENDPOINTS");
    }

    pub(crate) fn remove_endpoint(&mut self, ifindex: u32) {
        HashMap::<_, u32, Endpoint>::try_from(self.ebpf.map_mut("ENDPOINTS").expect("ENDPOINTS"))
            .and_then(|mut map| map.remove(&ifindex))
            .expect("ENDPOINTS");
    }

    pub(crate) fn set_route(&mut self, prefix: Ipv4Addr, bits: u32, kind: u32, target: u32) {
        LpmTrie::<_, Address, Route>::try_from(self.ebpf.map_mut("ROUTES").expect("ROUTES"))
            .and_then(|mut map| {
                let key = Key::new(Address::V4_BITS + bits, to_map(prefix.into()));
                map.insert(&key, Route { kind, target }, 0)
            })
            .expect("ROUTES");
    }

    pub(crate) fn peer(&mut self, index: u32) -> Peer {
        self.array("PEERS").get(&index, 0).expect("PEERS")
    }

    pub(crate) fn set_peer(&mut self, index: u32, peer: Peer) {
        self.array("PEERS").set(index, peer, 0).expect("PEERS");
    }

    pub(crate) fn change_peer(&mut self, index: u32, change: impl FnOnce(&mut Peer)) {
        let mut peer = self.peer(index);
        change(&mut peer);
        self.set_peer(index, peer);
    }

    pub(crate) fn session(&mut self, slot: u32) -> Session {
        self.array("SESSIONS").get(&slot, 0).expect("SESSIONS")
    }

    pub(crate) fn set_session(&mut self, slot: u32, session: Session) {
        self.array("SESSIONS").set(slot, session, 0).expect("SESSIONS");
    }

    pub(crate) fn change_session(&mut self, slot: u32, change: impl FnOnce(&mut Session)) {
        let mut session = self.session(slot);
        change(&mut session);
        self.set_session(slot, session);
    }

    /// Returns the number of packets counted under a reason, on all CPUs.
    pub(crate) fn count(&self, reason: Reason) -> u64 {
        PerCpuArray::<_, u64>::try_from(self.ebpf.map("COUNTERS").expect("COUNTERS"))
            .and_then(|map| map.get(&(reason as u32), 0))
            .expect("COUNTERS")
            .iter()
            .sum()
    }

    /// Returns all nonzero counters.
    pub(crate) fn counts(&self) -> Vec<(Reason, u64)> {
        Reason::ALL
            .iter()
            .map(|reason| (*reason, self.count(*reason)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    pub(crate) fn classifier(&self, name: &str) -> &SchedClassifier {
        self.ebpf.program(name).expect(name).try_into().expect(name)
    }

    pub(crate) fn xdp(&self) -> &Xdp {
        self.ebpf
            .program("from_underlay_xdp")
            .expect("from_underlay_xdp")
            .try_into()
            .expect("from_underlay_xdp")
    }

    /// Runs a packet through a TC program.
    pub(crate) fn run(&self, program: &str, frame: &[u8]) -> Output {
        self.run_gso(program, frame, 0)
    }

    /// Like [`Self::run`], for a packet that stands for several segments of this size.
    pub(crate) fn run_gso(&self, program: &str, frame: &[u8], gso_size: u32) -> Output {
        // `from_container` marks packets for `seal` with the container's address. The daemon's
        // frames have no mark.
        let is_of_container = program == "seal" && !frame.starts_with(&DAEMON_MAC);
        self.run_marked(
            program,
            frame,
            gso_size,
            if is_of_container { CONTAINER.octets() } else { [0; 4] },
        )
    }

    /// Like [`Self::run_gso`], with a mark.
    pub(crate) fn run_marked(
        &self,
        program: &str,
        frame: &[u8],
        gso_size: u32,
        mark: [u8; 4],
    ) -> Output {
        // In `struct __sk_buff`, the mark is at offset 8 and the segment size at offset 176.
        let mut context = [0; 192];
        context[8..12].copy_from_slice(&mark);
        context[176..180].copy_from_slice(&gso_size.to_ne_bytes());
        run(self.classifier(program), frame, &context)
    }

    /// Runs a packet from the underlay.
    pub(crate) fn receive(&self, hook: Hook, frame: &[u8]) -> Output {
        match hook {
            Hook::Tc => self.run("from_underlay", frame),
            Hook::Xdp => run(self.xdp(), frame, &[]),
        }
    }

    /// Checks that a program drops a packet and counts it once, under this reason only.
    #[track_caller]
    pub(crate) fn expect_drop(&self, program: &str, frame: &[u8], reason: Reason) {
        let before = self.counts();
        let output = self.run(program, frame);
        self.check_drop(before, output.verdict, TC_ACT_SHOT, reason);
    }

    /// Like [`Self::expect_drop`], for a packet from the underlay.
    #[track_caller]
    pub(crate) fn expect_refused(&self, hook: Hook, frame: &[u8], reason: Reason) {
        let before = self.counts();
        let output = self.receive(hook, frame);
        self.check_drop(before, output.verdict, hook.dropped(), reason);
    }

    #[track_caller]
    fn check_drop(&self, before: Vec<(Reason, u64)>, verdict: u32, dropped: u32, reason: Reason) {
        let mut expected: std::collections::BTreeMap<_, _> = before.into_iter().collect();
        *expected.entry(reason).or_default() += 1;
        assert_eq!(
            self.counts(),
            expected.into_iter().collect::<Vec<_>>(),
            "counted under another reason"
        );
        assert_eq!(verdict, dropped, "not dropped, although counted as {}", reason.as_str());
    }

    /// Makes `seal` send a keepalive.
    pub(crate) fn keepalive(&self, peer: u32) -> Output {
        self.run("seal", &overnode_ebpf::wire::keepalive_frame(peer))
    }
}

fn run<P>(program: &P, frame: &[u8], context: &[u8]) -> Output
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = aya::programs::TestRunResult>,
{
    let mut out = vec![0; 16384];
    let result = program
        .test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: (!context.is_empty()).then_some(context),
            ..TestRunOptions::default()
        })
        .expect("the test run");
    out.truncate(result.data_size_out as usize);
    Output { verdict: result.return_value, frame: out }
}

/// Returns the session of [`SLOT`], live for another hour.
pub(crate) fn session() -> Session {
    let now = boot_ns();
    Session {
        state: SESSION_LIVE,
        peer: PEER,
        local_index: LOCAL_INDEX,
        remote_index: REMOTE_INDEX,
        tx_key: words(&TX_KEY),
        rx_key: words(&RX_KEY),
        created_ns: now,
        expires_ns: now + 3_600_000_000_000,
        initiator: 1,
        tx_counter: 0,
        window: Window::new(),
    }
}

/// Returns the time in nanoseconds since boot.
pub(crate) fn boot_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid.
    assert_eq!(
        unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) },
        0,
        "CLOCK_BOOTTIME"
    );
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn words(key: &[u8; 32]) -> [u32; 8] {
    std::array::from_fn(|word| u32::from_le_bytes(std::array::from_fn(|byte| key[word * 4 + byte])))
}
