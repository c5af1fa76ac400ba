//! Tests of what a lying member can announce and send, with real daemons. One of them reads false
//! facts from its store.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use lab::raw::Injector;
use lab::{Capture, Container, Host, Lab, eventually};
use overnode_core::control::hello::{Hello, LocalIdentity, NEWEST_VERSION, OLDEST_VERSION};
use overnode_core::control::key;
use overnode_core::control::packet::Packet;
use overnode_core::control::renewal::Role;
use overnode_core::gossip::{Message, Record, Signer};
use overnode_core::ipam::{Change, Fact};
use overnode_daemon::net::session::{self, ConnectOptions, Link};
use overnode_daemon::store::Store;
use overnode_types::{Network, NodeId, Secret};
use tokio::runtime::{Builder, Runtime};

use crate::spoofing::{datagram, own_mac};
use crate::support::{
    MILLISECOND, TIMEOUT, TOKEN, attached, counter, in_lab, launch, launch_as, list, peer,
};

const INTERFACE: &str = "overnode0";

/// Makes a host's node claim `address` and give it to its next container.
fn lie(host: &Host, address: IpAddr) -> Result<()> {
    host.kill_daemon()?;
    let store = eventually(TIMEOUT, || Ok(Store::open_existing(&host.state_directory())?))?;
    store.change_addresses(&[Change::Put(Fact::Held { block: address.into(), lost: false })])?;
    drop(store);
    host.overnode(&["resume"])?.success()?;
    Ok(())
}

/// Returns the MAC address that the container's packets for `to` go to. The ping resolves it by ARP
/// and needs no reply.
fn gateway(container: &Container, to: IpAddr) -> Result<[u8; 6]> {
    let _ = container.ping(to, 1, MILLISECOND)?;
    let text = container.netns().ip(&["neigh", "show", &to.to_string()])?;
    let mac = text
        .split_whitespace()
        .skip_while(|word| *word != "lladdr")
        .nth(1)
        .context("no neighbor entry")?;
    let bytes =
        mac.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<Vec<_>, _>>()?;
    bytes.try_into().ok().context("not six bytes")
}

fn problems(host: &Host) -> Result<Vec<String>> {
    let status = host.status()?;
    let problems = status["ipam"]["problems"].as_array().context("no problems")?;
    Ok(problems.iter().filter_map(|problem| problem.as_str().map(str::to_owned)).collect())
}

/// Returns the prefixes that a host's data plane routes to the node with this ID and accepts from
/// it.
fn routes(host: &Host, id: usize) -> Result<Vec<String>> {
    let document = host.inspect()?;
    let routes = list(&document, "routes")?.iter().find(|it| it["peer"] == id);
    let prefixes = routes.and_then(|it| it["prefixes"].as_array()).into_iter().flatten();
    Ok(prefixes.filter_map(|prefix| prefix.as_str().map(str::to_owned)).collect())
}

#[test]
fn a_member_cannot_take_over_a_live_container_by_announcing_its_address() -> Result<()> {
    const PINGS: u32 = 200;
    const LIAR: usize = 9;
    in_lab(Lab::new("takeover").hosts(3), |lab| {
        let [a, b, c] = lab.hosts() else { unreachable!() };
        launch(lab, a)?;
        launch(lab, b)?;
        // The liar has no address space of its own.
        launch_as(lab, c, LIAR)?;
        let (victim, far) = (&attached(a, "victim")?, &attached(b, "far")?);
        far.reach(victim.address(), TIMEOUT)?;
        let address = victim.address();
        let prefix = IpNet::from(address).to_string();
        lie(c, address)?;
        let thief = &attached(c, "thief")?;
        ensure!(thief.address() == address, "the liar's container got {}", thief.address());
        for host in [a, b] {
            eventually(TIMEOUT, || {
                let document = host.inspect()?;
                let mut records = list(&document, "records")?.iter();
                let liar = records.find(|it| it["id"] == LIAR).context("no record of the liar")?;
                ensure!(
                    liar["ranges"].to_string().contains(&prefix),
                    "the false announcement has not arrived: {liar}"
                );
                let peer = peer(host, LIAR)?.context("the liar is not known")?;
                ensure!(peer["data"]["session"] == "established", "no session with the liar");
                Ok(())
            })?;
        }
        // Traffic still goes to the real owner.
        let listening = Capture::start(thief.netns(), lab.folder(), &["-i", INTERFACE])?;
        let stats = far.ping(address, PINGS, 5 * MILLISECOND)?;
        let stolen = listening
            .stop()?
            .count(|packet| packet.ip.is_some_and(|ip| ip.from == far.address()))?;
        ensure!(stolen == 0, "{stolen} of {PINGS} packets for {address} went to the liar");
        ensure!(stats.lost() == 0, "{} of {PINGS} pings were lost", stats.lost());
        // Packets that the liar sends from that address are dropped.
        let (mac, gateway) = (own_mac(thief)?, gateway(thief, far.address())?);
        let listening = Capture::start(far.netns(), lab.folder(), &["-i", INTERFACE])?;
        let before = counter(b, "foreign-source")?;
        let forged = datagram(mac, gateway, address, far.address());
        Injector::open(thief.netns(), INTERFACE)?.send_all(&vec![forged; PINGS as usize])?;
        eventually(TIMEOUT, || {
            let refused = counter(b, "foreign-source")? - before;
            ensure!(refused >= PINGS.into(), "only {refused} of {PINGS} were refused");
            Ok(())
        })?;
        let arrived = listening.stop()?.count(|packet| {
            packet.ip.is_some_and(|ip| ip.from == address && ip.protocol == lab::pcap::UDP)
        })?;
        ensure!(arrived == 0, "{arrived} forged packets arrived");
        // All honest nodes report which nodes claim the address.
        for host in [a, b] {
            eventually(TIMEOUT, || {
                let problems = problems(host)?;
                let told = problems.iter().any(|it| {
                    it.contains(&prefix) && it.contains("node 1 ") && it.contains("node 9 ")
                });
                ensure!(told, "{} does not report the clash: {problems:?}", host.name);
                Ok(())
            })?;
        }
        // After the liar has left, nothing of it remains.
        c.overnode(&["reset", "--force"])?.success()?;
        for host in [a, b] {
            eventually(TIMEOUT, || {
                let left = routes(host, LIAR)?;
                ensure!(left.is_empty(), "{} still sends {left:?} to the liar", host.name);
                let problems = problems(host)?;
                ensure!(problems.is_empty(), "{} still reports {problems:?}", host.name);
                Ok(())
            })?;
        }
        Ok(())
    })
}

/// A member that is not a daemon. It uses the real protocol, but the test chooses its messages.
struct Member {
    runtime: Runtime,
    link: Link<tokio::net::TcpStream>,
}

impl Member {
    /// Connects to a host's node from the host `from`.
    fn connect(from: &Host, to: &Host, id: u16) -> Result<Self> {
        let seed = seed(id);
        let static_secret = key::exchange_secret(&seed);
        let hello = Hello {
            versions: (OLDEST_VERSION, NEWEST_VERSION),
            id: NodeId::new(id)?,
            incarnation: 1,
            nickname: "liar".to_owned(),
            network: Network::default(),
            verifying_key: key::verifying_key(&seed),
            process: 7,
            public_key: key::public_key(&static_secret),
        };
        let me = LocalIdentity { static_secret, cluster_key: key::cluster_key(TOKEN)?, hello };
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let address = SocketAddr::new(to.address(), 6783);
        let stream = from.netns().enter(move || Ok(TcpStream::connect(address)?))?;
        stream.set_nonblocking(true)?;
        let link = runtime.block_on(async {
            let stream = tokio::net::TcpStream::from_std(stream)?;
            anyhow::Ok(
                session::connect(stream, Role::Initiator, &me, ConnectOptions::default(), |_| {
                    Ok(())
                })
                .await?,
            )
        })?;
        Ok(Self { runtime, link })
    }

    fn tell(&mut self, records: Vec<Record>) -> Result<()> {
        let packet = Packet::Gossip(Message::Delta(records).encode()).encode();
        Ok(self.runtime.block_on(self.link.writer.send(&packet))?)
    }
}

fn seed(id: u16) -> Secret {
    let mut seed = [9; 32];
    seed[..2].copy_from_slice(&id.to_be_bytes());
    Secret(seed)
}

/// Returns a record of a node that need not exist.
fn made_up(id: u16, links: impl IntoIterator<Item = u16>) -> Result<Record> {
    let public_key = key::public_key(&key::exchange_secret(&seed(id)));
    let mut record = Record {
        version: 1,
        links: links.into_iter().map(NodeId::new).collect::<Result<_, _>>()?,
        ..Record::blank(NodeId::new(id)?, 1, format!("liar{id}"), public_key)
    };
    Signer::new(&seed(id)).sign(&mut record);
    Ok(record)
}

#[test]
fn a_member_cannot_stop_a_daemon_with_thousands_of_made_up_nodes() -> Result<()> {
    const LIAR: u16 = 9;
    const MADE_UP: std::ops::Range<u16> = 100..2100;
    in_lab(Lab::new("made-up").hosts(2), |lab| {
        let [a, b] = lab.hosts() else { unreachable!() };
        launch(lab, a)?;
        let mut liar = Member::connect(b, a, LIAR)?;
        liar.tell(vec![made_up(LIAR, std::iter::once(1).chain(MADE_UP))?])?;
        let records: Vec<Record> = MADE_UP.map(|id| made_up(id, [LIAR])).collect::<Result<_>>()?;
        // As many records in one message as are allowed.
        for records in records.chunks(1000) {
            liar.tell(records.to_vec())?;
        }
        let began = Instant::now();
        let mut slowest = Duration::ZERO;
        let mut known = 0;
        while known < MADE_UP.len() && began.elapsed() < 2 * TIMEOUT {
            let asked = Instant::now();
            known = list(&a.status()?, "peers")?.len();
            slowest = slowest.max(asked.elapsed());
        }
        ensure!(known >= MADE_UP.len(), "only {known} nodes are known");
        // The same task feeds systemd's watchdog.
        ensure!(slowest < TIMEOUT / 2, "the daemon did not answer for {slowest:?}");
        attached(a, "honest")?;
        Ok(())
    })
}
