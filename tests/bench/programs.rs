//! The programs alone: the time of one run over one packet (`BPF_PROG_TEST_RUN`), and the number of
//! instructions that the verifier processed.
//!
//! Each message is sealed and opened once, because sealing changes the packet and a second opening
//! would be a replay. So every run is one system call, and the result is the median of the times
//! that the kernel measured.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, MapData, PerCpuArray};
use aya::programs::{Program, ProgramError, SchedClassifier, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use lab::raw::checksum;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::time::{ClockId, clock_gettime};
use overnode_ebpf::map::{
    Address, Config, Endpoint, Peer, ROUTE_LOCAL, ROUTE_PEER, Route, SESSION_LIVE,
    SESSION_SLOT_BITS, Session,
};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::replay::{WORDS, Window};
use overnode_ebpf::wire::{DATA_PORT, ETHERNET_LEN, IPV4_LEN, UDP_LEN};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

/// Lengths of the inner packets in bytes, including the IP header.
pub(crate) const SIZES: [usize; 3] = [64, 512, 1400];
const PROGRAMS: [&str; 5] =
    ["from_container", "seal", "from_underlay", "from_underlay_xdp", "from_bulk"];

const INNER: [[u8; 4]; 2] = [[10, 40, 0, 1], [10, 48, 0, 1]];
const OUTER: [[u8; 4]; 2] = [[192, 168, 77, 1], [192, 168, 77, 2]];
const SLOT: u32 = 1;
const INDEX: u32 = 0x5a5a5 << SESSION_SLOT_BITS | SLOT;
const PEER: u32 = 2;
const LOOPBACK: u32 = 1;
const TC_ACT_REDIRECT: u32 = 7;
const XDP_REDIRECT: u32 = 4;

/// Results of the measurement.
#[derive(Debug)]
pub(crate) struct Programs {
    /// Number of instructions that the verifier processed, by program.
    pub verified: BTreeMap<&'static str, u32>,
    /// Bytes of stack that a program and its deepest callback use together, by program.
    pub stack: BTreeMap<&'static str, u32>,
    /// One entry for each of [`SIZES`].
    pub costs: Vec<Cost>,
}

/// Time per packet of one length.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// Length of the inner packet in bytes.
    pub size: usize,
    /// Time of `seal`.
    pub seal: Duration,
    /// Time of `from_underlay`.
    pub open: Duration,
    /// Time of `from_underlay_xdp`.
    pub open_xdp: Duration,
    /// Time that ring's vectorized cipher takes in user space for as many bytes. Shows how fast the
    /// machine is at the moment.
    pub ring: Duration,
}

/// Loads the programs that the daemon embeds and runs each of them `runs` times for each length.
///
/// # Errors
/// When the kernel does not load a program, or when a program drops a valid packet.
pub(crate) fn measure(runs: usize) -> Result<Programs> {
    let stack = stack_depths()?;
    let mut bench = Bench::load()?;
    let costs = SIZES.iter().map(|&size| bench.cost(size, runs)).collect::<Result<_>>()?;
    Ok(Programs { verified: bench.verified, stack, costs })
}

struct Bench {
    programs: Ebpf,
    verified: BTreeMap<&'static str, u32>,
    routes: LpmTrie<MapData, Address, Route>,
    counters: PerCpuArray<MapData, u64>,
}

impl Bench {
    fn load() -> Result<Self> {
        let mut programs = parse()?;
        let mut verified = BTreeMap::new();
        for name in PROGRAMS {
            let program = programs
                .program_mut(name)
                .with_context(|| format!("no program {name} in the object"))?;
            load(program).with_context(|| format!("the kernel rejects {name}"))?;
            let info = program.info()?;
            verified.insert(
                name,
                info.verified_instruction_count()
                    .context("this kernel does not report the number of verified instructions")?,
            );
        }
        fill(&mut programs)?;
        let routes = take(&mut programs, "ROUTES")?;
        let counters = take(&mut programs, "COUNTERS")?;
        Ok(Self { programs, verified, routes, counters })
    }

    fn cost(&mut self, size: usize, runs: usize) -> Result<Cost> {
        let (seal, messages) = self.seal(size, runs)?;
        let open = self.open("from_underlay", TC_ACT_REDIRECT, &messages)?;
        let (_, messages) = self.seal(size, runs)?;
        let open_xdp = self.open("from_underlay_xdp", XDP_REDIRECT, &messages)?;
        Ok(Cost { size, seal, open, open_xdp, ring: ring(size, runs)? })
    }

    fn seal(&mut self, size: usize, runs: usize) -> Result<(Duration, Vec<Vec<u8>>)> {
        self.route(0, ROUTE_LOCAL, LOOPBACK)?;
        self.route(1, ROUTE_PEER, PEER)?;
        let frame = frame(size)?;
        let mut times = Vec::with_capacity(runs);
        let mut messages = Vec::with_capacity(runs);
        for _ in 0..runs {
            let (time, message) = self.run("seal", TC_ACT_REDIRECT, &frame)?;
            times.push(time);
            messages.push(message);
        }
        ensure!(
            messages[0].len() > frame.len() + IPV4_LEN + UDP_LEN,
            "seal did not extend the packet"
        );
        ensure!(messages[0] != messages[runs - 1], "seal produced the same message twice");
        Ok((median(times), messages))
    }

    fn open(&mut self, program: &str, verdict: u32, messages: &[Vec<u8>]) -> Result<Duration> {
        self.route(0, ROUTE_PEER, PEER)?;
        self.route(1, ROUTE_LOCAL, LOOPBACK)?;
        let times = messages
            .iter()
            .map(|message| Ok(self.run(program, verdict, message)?.0))
            .collect::<Result<_>>()?;
        Ok(median(times))
    }

    fn route(&mut self, side: usize, kind: u32, target: u32) -> Result<()> {
        let key = Key::new(128, Address::from_v4(INNER[side]));
        Ok(self.routes.insert(&key, Route { kind, target }, 0)?)
    }

    fn run(&self, name: &str, verdict: u32, packet: &[u8]) -> Result<(Duration, Vec<u8>)> {
        let before = self.counts()?;
        let mut out = vec![0; 2048];
        // In `struct __sk_buff`, the mark is at offset 8. `seal` finds the verified source address
        // there.
        let mut context = [0; 192];
        context[8..12].copy_from_slice(&INNER[0]);
        let ctx_in = (name == "seal").then_some(&context[..]);
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in,
            ..TestRunOptions::new()
        };
        let result = match self
            .programs
            .program(name)
            .with_context(|| format!("no program {name} in the object"))?
        {
            Program::SchedClassifier(program) => SchedClassifier::test_run(program, options),
            Program::Xdp(program) => Xdp::test_run(program, options),
            _ => bail!("{name} has an unexpected program type"),
        }
        .with_context(|| format!("cannot run {name}"))?;
        if result.return_value != verdict {
            let after = self.counts()?;
            let reasons: Vec<_> = Reason::ALL
                .iter()
                .filter(|reason| before[**reason as usize] != after[**reason as usize])
                .map(|reason| reason.as_str())
                .collect();
            bail!(
                "{name} returned {} for a valid packet: {}",
                result.return_value,
                reasons.join(", ")
            );
        }
        out.truncate(result.data_size_out as usize);
        Ok((result.duration, out))
    }

    fn counts(&self) -> Result<Vec<u64>> {
        let slots = overnode_ebpf::reason::REASON_SLOTS;
        (0..slots).map(|slot| Ok(self.counters.get(&slot, 0)?.iter().sum())).collect()
    }
}

fn parse() -> Result<Ebpf> {
    EbpfLoader::new()
        .verifier_log_level(VerifierLogLevel::STATS)
        .override_global("DEBUG", &0u8, true)
        .load(overnode_daemon::PROGRAMS)
        .context("cannot load the programs' maps")
}

fn load(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::SchedClassifier(program) => program.load(),
        Program::Xdp(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// Returns the stack depth of each program. The verifier reports it only in its log, and aya
/// returns the log only when a load fails. So each program is loaded once with no file descriptor
/// left for the result, which the kernel notices last.
fn stack_depths() -> Result<BTreeMap<&'static str, u32>> {
    let mut programs = parse()?;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let mut depths = BTreeMap::new();
    for name in PROGRAMS {
        let program = programs
            .program_mut(name)
            .with_context(|| format!("no program {name} in the object"))?;
        // The lowest free number, which the next file descriptor would get.
        let next = File::open("/dev/null")?.as_raw_fd();
        setrlimit(Resource::RLIMIT_NOFILE, next.try_into()?, hard)?;
        let outcome = load(program);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
        let Err(ProgramError::LoadError { io_error, verifier_log }) = outcome else {
            bail!("{name} was loaded without a file descriptor");
        };
        let log = verifier_log.to_string();
        let line = log.lines().find_map(|line| line.strip_prefix("stack depth "));
        let line = line.with_context(|| format!("the kernel rejects {name}: {io_error}: {log}"))?;
        let mut frames = line.split('+').map(str::parse::<u32>);
        let own = frames.next().context("the stack depth in the log is empty")??;
        let mut deepest = 0;
        for frame in frames {
            deepest = deepest.max(frame?);
        }
        depths.insert(name, own + deepest);
    }
    Ok(depths)
}

/// Adds one peer whose session seals and opens with the same key, so that sealed packets can be
/// opened here.
fn fill(programs: &mut Ebpf) -> Result<()> {
    let mut config: Array<_, Config> = take(programs, "CONFIG")?;
    let subnet = Address::from_v4([10, 32, 0, 0]);
    let node = Address::from_v4([10, 39, 240, 1]);
    config.set(
        0,
        Config {
            subnet,
            subnet_bits: Address::V4_BITS + 12,
            offload_veth: LOOPBACK,
            node,
            node_id: 1,
            ..Config::default()
        },
        0,
    )?;

    let mut endpoints: HashMap<_, u32, Endpoint> = take(programs, "ENDPOINTS")?;
    let endpoint = Endpoint {
        address: Address::from_v4(INNER[1]),
        mac: [2, 0, 0, 0, 0, 1],
        gateway_mac: [2, 0, 0, 0, 0, 2],
    };
    endpoints.insert(LOOPBACK, endpoint, 0)?;

    let mut addresses: HashMap<_, Address, u32> = take(programs, "LOCAL_ADDRESSES")?;
    // Both addresses are local, because a peer's endpoint follows its messages, and they come from
    // here.
    for address in OUTER {
        addresses.insert(Address::from_v4(address), 0, 0)?;
    }

    let mut peers: Array<_, Peer> = take(programs, "PEERS")?;
    let peer = Peer {
        remote: Address::from_v4(OUTER[1]),
        local: Address::from_v4(OUTER[0]),
        remote_port_be: DATA_PORT.to_be(),
        present: 1,
        ifindex: LOOPBACK,
        tx_slot: SLOT,
        mtu: 1420,
        ..Peer::default()
    };
    peers.set(PEER, peer, 0)?;

    let mut sessions: Array<_, Session> = take(programs, "SESSIONS")?;
    let created_ns =
        u64::try_from(Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME)?).as_nanos())?;
    let session = Session {
        state: SESSION_LIVE,
        peer: PEER,
        local_index: INDEX,
        remote_index: INDEX,
        tx_key: [0x0bad_cafe; 8],
        rx_key: [0x0bad_cafe; 8],
        created_ns,
        expires_ns: created_ns + 3600 * 1_000_000_000,
        initiator: 1,
        tx_counter: 0,
        window: Window { next: 0, words: [0; WORDS] },
    };
    sessions.set(SLOT, session, 0)?;
    Ok(())
}

fn take<M: TryFrom<aya::maps::Map, Error = aya::maps::MapError>>(
    programs: &mut Ebpf,
    name: &str,
) -> Result<M> {
    let map = programs.take_map(name).with_context(|| format!("no map {name} in the object"))?;
    M::try_from(map).with_context(|| format!("map {name} has an unexpected layout"))
}

/// Returns an Ethernet frame with a UDP datagram from one container to the other. `size` is the
/// length in bytes from the IP header on.
fn frame(size: usize) -> Result<Vec<u8>> {
    let mut ip = vec![0x45, 0];
    ip.extend(u16::try_from(size)?.to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(INNER.concat());
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());

    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    frame.extend(ip);
    for field in [4000, 4001, u16::try_from(size - IPV4_LEN)?, 0] {
        frame.extend(u16::to_be_bytes(field));
    }
    frame.resize(ETHERNET_LEN + size, 0x5a);
    Ok(frame)
}

fn ring(size: usize, runs: usize) -> Result<Duration> {
    let key = UnboundKey::new(&CHACHA20_POLY1305, &[7; 32])
        .map_err(|_| anyhow!("ring rejects the key"))?;
    let key = LessSafeKey::new(key);
    let mut text = vec![0x5a; size];
    let mut times = Vec::with_capacity(runs);
    for run in 0..runs {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&(run as u64).to_le_bytes());
        let start = Instant::now();
        let tag = key
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::empty(),
                &mut text,
            )
            .map_err(|_| anyhow!("ring cannot seal"))?;
        times.push(start.elapsed());
        let _ = std::hint::black_box(tag);
    }
    Ok(median(times))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}
