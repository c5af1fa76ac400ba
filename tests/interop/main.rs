//! Tests with stock WireGuard programs as peers of a real node: Cloudflare's boringtun and
//! Mullvad's gotatun.
//!
//! The first test connects the two to each other, without overnode. It proves that the harness
//! measures what it claims.

mod meeting;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use lab::flow::{self, Amount};
use lab::ping::Pinging;
use lab::wireguard::{Configuration, Device, Peer, Stock, key_pair};
use lab::{Entry, Lab, gateway};

use meeting::{Begins, Meeting};

/// MTU that overnode leaves to containers on an underlay of 1500 bytes.
const MTU: u32 = 1420;

#[test]
fn two_stock_programs_talk_to_each_other() -> Result<()> {
    const INSIDE: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 38, 1, 1), Ipv4Addr::new(10, 38, 2, 1)];
    const GATEWAY: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 38, 1, 254), Ipv4Addr::new(10, 38, 2, 254)];
    const PORT: u16 = 51820;
    let lab = Lab::new("stock").entry(Entry::Setns).build()?;
    let containers = [lab.host(1).container("c")?, lab.host(2).container("c")?];
    let keys = [key_pair()?, key_pair()?];
    let (preshared, _) = key_pair()?;
    let mut devices = Vec::new();
    for (own, other, stock) in [(0, 1, Stock::Boringtun), (1, 0, Stock::Gotatun)] {
        let host = &lab.hosts()[own];
        gateway::plug(host, &containers[own], INSIDE[own], GATEWAY[own], MTU)?;
        let device = Device::start(stock, host.netns())?;
        device.configure(&Configuration {
            private_key: &keys[own].0,
            listen_port: PORT,
            peer: Peer {
                public_key: keys[other].1,
                preshared_key: Some(&preshared),
                // Only the first one can initiate. The second has to learn the first one's
                // endpoint.
                endpoint: (own == 0).then_some(SocketAddr::new(lab.hosts()[other].address(), PORT)),
                allowed_ips: &[IpAddr::V4(INSIDE[other]).into()],
                keepalive: None,
            },
        })?;
        device.up(host.netns(), MTU, &[IpAddr::V4(INSIDE[other]).into()])?;
        devices.push(device);
    }
    let first = containers[0].ping(INSIDE[1].into(), 1, Duration::from_millis(10))?;
    ensure!(first.lost() == 0, "the first ping, which starts the handshake, was lost");
    let pings = containers[1].ping(INSIDE[0].into(), 500, Duration::from_millis(2))?;
    ensure!(pings.lost() == 0 && pings.duplicates == 0, "pings were lost: {pings:?}");
    let sent = 20_000_000;
    for (from, to) in [(0, 1), (1, 0)] {
        let received =
            flow::tcp(&containers[from], &containers[to], Amount::Bytes(sent)).context("TCP")?;
        ensure!(received.bytes == sent, "{received:?}");
    }
    for device in &mut devices {
        device.check()?;
        let peer = device.peer()?;
        ensure!(peer.handshake_age.is_some_and(|age| age < Duration::from_secs(60)), "{peer:?}");
        ensure!(peer.received > sent && peer.sent > sent, "{peer:?}");
    }
    Ok(())
}

#[test]
fn boringtun_initiates() -> Result<()> {
    Meeting::new(Stock::Boringtun, Begins::Stock).preshared().hold()?.exchanges_everything()
}

#[test]
fn boringtun_responds() -> Result<()> {
    Meeting::new(Stock::Boringtun, Begins::Node).hold()?.exchanges_everything()
}

#[test]
fn gotatun_initiates() -> Result<()> {
    Meeting::new(Stock::Gotatun, Begins::Stock).hold()?.exchanges_everything()
}

#[test]
fn gotatun_responds() -> Result<()> {
    Meeting::new(Stock::Gotatun, Begins::Node).preshared().hold()?.exchanges_everything()
}

#[test]
fn peers_talk_over_an_ipv6_underlay() -> Result<()> {
    for begins in [Begins::Stock, Begins::Node] {
        Meeting::new(Stock::Gotatun, begins).ipv6().hold()?.exchanges_everything()?;
    }
    Ok(())
}

#[test]
fn a_different_preshared_key_lets_nothing_through() -> Result<()> {
    let meeting = Meeting::new(Stock::Boringtun, Begins::Stock).preshared().mistaken().hold()?;
    let pings = meeting.outside.ping(meeting.inside.address(), 20, Duration::from_millis(100))?;
    ensure!(pings.received == 0, "{pings:?}");
    ensure!(
        meeting.device.peer()?.handshake_age.is_none(),
        "a handshake succeeded with different preshared keys"
    );
    ensure!(
        meeting.count("opened")? == 0 && meeting.count("sealed")? == 0,
        "{}",
        meeting.counters()?
    );
    Ok(())
}

#[test]
fn a_peer_cannot_send_from_addresses_that_are_not_its_own() -> Result<()> {
    let meeting = Meeting::new(Stock::Gotatun, Begins::Stock).hold()?;
    meeting.is_up()?;
    let (inside, foreign) = (meeting.inside.address().to_string(), "10.38.9.9");
    meeting.outside.netns().ip(&["address", "add", foreign, "dev", "eth0"])?;
    let mut ping = meeting.outside.command("ping");
    let output =
        ping.args(["-n", "-c", "5", "-i", "0.1", "-W", "1", "-I", foreign, &inside]).output()?;
    ensure!(
        output.status.code() == Some(1),
        "pings from {foreign} were answered: {}",
        String::from_utf8_lossy(&output.stdout)
    );
    ensure!(meeting.count("foreign-source")? == 5, "{}", meeting.counters()?);
    meeting.passes_pings()
}

#[test]
fn a_peer_that_moves_is_followed() -> Result<()> {
    let meeting = Meeting::new(Stock::Gotatun, Begins::Stock).hold()?;
    meeting.is_up()?;
    meeting.lab.renumber(meeting.lab.host(2), 99)?;
    // The peer sends first, because only an authenticated message shows the node the peer's new
    // endpoint.
    meeting.outside.reach(meeting.inside.address(), Duration::from_secs(10))?;
    meeting.passes_pings()
}

#[test]
fn a_removed_peer_is_a_stranger() -> Result<()> {
    let meeting = Meeting::new(Stock::Boringtun, Begins::Stock).hold()?;
    meeting.is_up()?;
    let capture = meeting.lab.capture()?;
    meeting.remove()?;
    let sealed = meeting.count("sealed")?;
    for (from, to) in [(&meeting.inside, &meeting.outside), (&meeting.outside, &meeting.inside)] {
        let pings = from.ping(to.address(), 20, Duration::from_millis(20))?;
        ensure!(pings.received == 0, "{pings:?}");
    }
    ensure!(meeting.count("sealed")? == sealed, "{}", meeting.counters()?);
    ensure!(
        capture.stop()?.containing(&flow::MARKER)?.is_empty(),
        "an unencrypted ping left the host"
    );
    Ok(())
}

/// WireGuard rekeys after 120 seconds, or at most 15 seconds later. This test waits for that, with
/// four meetings in parallel.
#[test]
fn rekeying_loses_no_packet() -> Result<()> {
    const INTERVAL: Duration = Duration::from_millis(10);
    const PINGS: u32 = 14_000;
    let watch = |stock: Stock, begins: Begins| -> Result<()> {
        let meeting = Meeting::new(stock, begins).preshared().hold()?;
        meeting.is_up()?;
        let started = Instant::now();
        let (inside, outside) = (&meeting.inside, &meeting.outside);
        let out = Pinging::start(inside.netns(), outside.address(), Some(PINGS), INTERVAL)?;
        let back = Pinging::start(outside.netns(), inside.address(), Some(PINGS), INTERVAL)?;
        for pings in [out.finish()?, back.finish()?] {
            ensure!(pings.sent == PINGS && pings.lost() == 0 && pings.duplicates == 0, "{pings:?}");
        }
        let age = meeting.device.peer()?.handshake_age.context("no handshake")?;
        let took = started.elapsed();
        ensure!(age < took, "no rekey within {took:?}: the last handshake is {age:?} old");
        Ok(())
    };
    thread::scope(|scope| {
        let mut watches = Vec::new();
        for stock in Stock::ALL {
            for begins in [Begins::Stock, Begins::Node] {
                let name = format!("{stock}, {begins:?} initiates");
                watches.push((name, scope.spawn(move || watch(stock, begins))));
            }
        }
        let mut failures = Vec::new();
        for (name, watch) in watches {
            match watch.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => failures.push(format!("{name}: {error:#}")),
                Err(_) => failures.push(format!("{name}: the thread panicked")),
            }
        }
        if failures.is_empty() { Ok(()) } else { Err(anyhow!("{}", failures.join("; "))) }
    })
}
