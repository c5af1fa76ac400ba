//! Stock WireGuard programs as peers.
//!
//! The first test joins two of them to each other, without overnode: it proves that the harness measures what it claims.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::flow::{self, Amount};
use lab::wireguard::{Configuration, Device, Peer, Stock, key_pair};
use lab::{Entry, Lab, gateway};

const INSIDE: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 38, 1, 1), Ipv4Addr::new(10, 38, 2, 1)];
const GATEWAY: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 38, 1, 254), Ipv4Addr::new(10, 38, 2, 254)];
const PORT: u16 = 51820;
/// What overnode leaves to containers on an underlay of 1500 bytes.
const MTU: u32 = 1420;

#[test]
fn two_stock_programs_talk_to_each_other() -> Result<()> {
    let lab = Lab::new("stock").entry(Entry::Setns).build()?;
    let containers = [lab.host(1).container("c")?, lab.host(2).container("c")?];
    let keys = [key_pair()?, key_pair()?];
    let (preshared, _) = key_pair()?;
    let mut devices = Vec::new();
    for (own, other, stock) in [(0, 1, Stock::Boringtun), (1, 0, Stock::Gotatun)] {
        let host = &lab.hosts()[own];
        gateway::plug(host, &containers[own], INSIDE[own], GATEWAY[own], MTU)?;
        let interface = format!("ovi{}{own}", std::process::id());
        let device = Device::start(stock, host.netns(), &interface)?;
        device.configure(&Configuration {
            private_key: &keys[own].0,
            listen_port: PORT,
            peer: Peer {
                public_key: keys[other].1,
                preshared_key: Some(&preshared),
                // Only the first can begin: the second has to learn where the first is.
                endpoint: (own == 0).then_some(SocketAddr::new(lab.hosts()[other].address(), PORT)),
                allowed_ips: &[IpAddr::V4(INSIDE[other]).into()],
                keepalive: None,
            },
        })?;
        host.netns().ip(&["link", "set", &interface, "mtu", &MTU.to_string(), "up"])?;
        host.netns().ip(&["route", "add", &INSIDE[other].to_string(), "dev", &interface])?;
        devices.push(device);
    }
    let first = containers[0].ping(INSIDE[1].into(), 1, Duration::from_millis(10))?;
    ensure!(first.lost() == 0, "the first ping, which starts the handshake, was lost");
    let pings = containers[1].ping(INSIDE[0].into(), 500, Duration::from_millis(2))?;
    ensure!(pings.lost() == 0 && pings.duplicates == 0, "pings were lost: {pings:?}");
    let sent = 20_000_000;
    for (from, to) in [(0, 1), (1, 0)] {
        let received = flow::tcp(&containers[from], &containers[to], Amount::Bytes(sent)).context("TCP")?;
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
