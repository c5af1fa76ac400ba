//! Stock WireGuard programs as peers.
//!
//! The first test joins two of them to each other, without overnode: it proves that the harness measures what it claims.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::rig::probe;
use lab::rig::space::{Space, sweep};
use lab::rig::wireguard::{Configuration, Device, Peer, Stock, key_pair};

const UNDERLAY: [&str; 2] = ["192.168.77.1", "192.168.77.2"];
const OVERLAY: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 38, 0, 1), Ipv4Addr::new(10, 38, 0, 2)];
const PORT: u16 = 51820;

#[test]
fn two_stock_programs_talk_to_each_other() -> Result<()> {
    sweep();
    let spaces = [Space::new("stock-a")?, Space::new("stock-b")?];
    spaces[0].join("under", &spaces[1], "under", 1500)?;
    let keys = [key_pair()?, key_pair()?];
    let (preshared, _) = key_pair()?;
    let mut devices = Vec::new();
    for (own, other, stock) in [(0, 1, Stock::Boringtun), (1, 0, Stock::Gotatun)] {
        let space = &spaces[own];
        space.run(&format!("ip address add {}/24 dev under", UNDERLAY[own]))?;
        let interface = format!("ovi{}{own}", std::process::id());
        let device = Device::start(stock, space, &interface)?;
        device.configure(&Configuration {
            private_key: &keys[own].0,
            listen_port: PORT,
            peer: Peer {
                public_key: keys[other].1,
                preshared_key: Some(&preshared),
                // Only the first can begin: the second has to learn where the first is.
                endpoint: (own == 0).then_some(SocketAddr::new(UNDERLAY[other].parse()?, PORT)),
                allowed_ips: &[IpAddr::V4(OVERLAY[other]).into()],
                keepalive: None,
            },
        })?;
        space.run(&format!("ip address add {}/24 dev {interface}", OVERLAY[own]))?;
        space.run(&format!("ip link set {interface} mtu 1420 up"))?;
        devices.push(device);
    }
    let first = probe::ping(&spaces[0], OVERLAY[1], 1, Duration::from_millis(100))?;
    ensure!(first.lost() == 0, "the first ping, which starts the handshake, was lost");
    let pings = probe::ping(&spaces[1], OVERLAY[0], 1000, Duration::from_millis(1))?;
    ensure!(pings.lost() == 0 && pings.duplicates == 0, "{} of {} pings were lost", pings.lost(), pings.sent);
    ensure!(pings.average() > Duration::ZERO && pings.percentile(50) <= pings.percentile(99));
    let flood = probe::flood(&spaces[0], &spaces[1], OVERLAY[1], 64, Duration::from_millis(500))?;
    ensure!(
        flood.received_per_second <= flood.sent_per_second * 1.2,
        "more arrived than was sent: {flood:?}"
    );
    for (from, to) in [(0, 1), (1, 0)] {
        probe::transfer(&spaces[from], &spaces[to], OVERLAY[to], 20_000_000).context("TCP")?;
    }
    for device in &mut devices {
        device.check()?;
        let peer = device.peer()?;
        ensure!(peer.handshake_age.is_some_and(|age| age < Duration::from_secs(60)), "{peer:?}");
        ensure!(peer.received > 20_000_000 && peer.sent > 20_000_000, "{peer:?}");
    }
    Ok(())
}
