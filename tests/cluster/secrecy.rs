//! Tests of invariant S1: no packet of a container leaves a host unencrypted, whatever is up, down,
//! restarting or misconfigured.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::flow::{self, Amount};
use lab::{Family, Lab, eventually};

use crate::support::{
    MILLISECOND, TIMEOUT, TOKEN, all_reach_all, attached, counter, ensure_nothing_plain,
    ensure_sealed, in_lab, launch, launch_containers, one_each, wait_for_sessions,
};

fn nothing_unencrypted_through_the_life_of_nodes(builder: lab::Builder) -> Result<()> {
    in_lab(builder.hosts(2), |lab| {
        let [a, b] = lab.hosts() else { unreachable!() };
        let capture = lab.capture()?;
        launch(lab, a)?;
        let one = attached(a, "one")?;
        // Address of a future container of node 2. No node has it yet.
        let future: IpAddr = "10.42.0.1".parse()?;
        let pings = one.start_pinging(future, MILLISECOND)?;
        std::thread::sleep(Duration::from_millis(300));
        launch(lab, b)?;
        let two = attached(b, "two")?;
        one.reach(two.address(), TIMEOUT)?;
        let back = two.start_pinging(one.address(), MILLISECOND)?;
        flow::tcp(&one, &two, Amount::Bytes(2_000_000))?;
        a.kill_daemon()?;
        flow::tcp(&two, &one, Amount::Bytes(2_000_000))?;
        b.kill_daemon()?;
        flow::tcp(&one, &two, Amount::Bytes(2_000_000))?;
        a.overnode(&["resume"])?.success()?;
        // The peer is reset and launched again with a new identity.
        b.overnode(&["reset", "--force"])?.success()?;
        std::thread::sleep(Duration::from_millis(300));
        launch(lab, b)?;
        b.attach(&two, &[])?;
        one.reach(two.address(), TIMEOUT)?;
        a.overnode(&["reset", "--force"])?.success()?;
        std::thread::sleep(Duration::from_millis(300));
        let _ = (pings.stop()?, back.stop()?);
        ensure_sealed(&capture.stop()?)
    })
}

#[test]
fn nothing_unencrypted_leaves_a_host_over_ipv4() -> Result<()> {
    nothing_unencrypted_through_the_life_of_nodes(Lab::new("plain4"))
}

#[test]
fn nothing_unencrypted_leaves_a_host_over_ipv6() -> Result<()> {
    nothing_unencrypted_through_the_life_of_nodes(Lab::new("plain6").family(Family::V6))
}

#[test]
fn without_a_peer_packets_are_dropped_and_counted() -> Result<()> {
    in_lab(Lab::new("no-peer").hosts(2), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        let one = attached(host, "one")?;
        let capture = lab.capture()?;
        let before = counter(host, "no-route")?;
        for to in ["10.42.0.1", "10.46.3.4", "10.33.0.9"] {
            assert_eq!(one.ping(to.parse()?, 50, MILLISECOND)?.received, 0);
        }
        ensure_nothing_plain(&capture.stop()?)?;
        assert_eq!(counter(host, "no-route")? - before, 150);
        Ok(())
    })
}

/// The control connection works and announces the peer, but no handshake message gets through.
#[test]
fn without_a_session_packets_are_dropped_and_counted() -> Result<()> {
    in_lab(Lab::new("no-session").hosts(2), |lab| {
        let rule = ["add", "rule", "bridge", "lab", "cuts", "udp", "dport", "6784", "drop"];
        lab.underlay().run("nft", &rule)?;
        for host in lab.hosts() {
            launch(lab, host)?;
        }
        let containers = one_each(lab)?;
        let host = lab.host(1);
        // Once the route is known, only the session is missing.
        eventually(TIMEOUT, || {
            let before = counter(host, "no-session")?;
            ensure!(containers[0].ping(containers[1].address(), 5, MILLISECOND)?.received == 0);
            ensure!(
                counter(host, "no-session")? > before,
                "packets to a known peer are not counted as no-session"
            );
            Ok(())
        })?;
        let capture = lab.capture()?;
        let before = counter(host, "no-session")?;
        assert_eq!(containers[0].ping(containers[1].address(), 100, MILLISECOND)?.received, 0);
        assert_eq!(counter(host, "no-session")? - before, 100);
        let captured = capture.stop()?;
        ensure_nothing_plain(&captured)?;
        assert_eq!(captured.count(|packet| packet.wireguard_type() == Some(4))?, 0);

        lab.underlay().run("nft", &["flush", "chain", "bridge", "lab", "cuts"])?;
        wait_for_sessions(lab)?;
        all_reach_all(&containers)
    })
}

#[test]
fn an_outage_between_hosts_heals_and_leaks_nothing() -> Result<()> {
    in_lab(Lab::new("cut").hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        let capture = lab.capture()?;
        lab.cut(lab.host(1), lab.host(2))?;
        assert_eq!(containers[0].ping(containers[1].address(), 200, MILLISECOND)?.received, 0);
        lab.heal(lab.host(1), lab.host(2))?;
        all_reach_all(&containers)?;
        ensure_sealed(&capture.stop()?)
    })
}

/// Packets must never follow the underlay's own route to the container network.
#[test]
fn a_default_route_does_not_leak_packets() -> Result<()> {
    in_lab(Lab::new("lure").hosts(2).routed(), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        let one = attached(host, "one")?;
        host.netns().enter(|| Ok(std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?))?;
        let capture = lab.capture()?;
        for to in ["10.42.0.1", "10.47.255.254", "192.168.50.10", "8.8.8.8"] {
            let _ = lab::ping::Pinging::start(one.netns(), to.parse()?, Some(20), MILLISECOND)?
                .finish();
        }
        let captured = capture.stop()?;
        ensure_nothing_plain(&captured)
    })
}

/// Returns the number of packets that arrived on one of the node's interfaces and reached the
/// host's own stack, to be delivered or forwarded.
fn taken_by_the_host(host: &lab::Host) -> Result<u64> {
    let rules = host.netns().run("nft", &["list", "table", "inet", "taken"])?;
    let counts = rules.split("packets ").skip(1).filter_map(|rest| rest.split(' ').next());
    counts.map(|count| Ok(count.parse::<u64>()?)).sum()
}

#[test]
fn without_their_programs_containers_reach_nothing() -> Result<()> {
    in_lab(Lab::new("naked").hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        let ([a, b], [one, two]) = (lab.hosts(), &containers[..]) else { unreachable!() };
        // The host forwards packets, as the hosts of other container engines do.
        let conf = |name: &str, value: &str| {
            a.netns()
                .enter(|| Ok(std::fs::write(format!("/proc/sys/net/ipv4/conf/{name}"), value)?))
        };
        for hook in ["input", "forward"] {
            let hooked = format!("{{ type filter hook {hook} priority 0; }}");
            a.netns().run("nft", &["add", "table", "inet", "taken"])?;
            a.netns().run("nft", &["add", "chain", "inet", "taken", hook, &hooked])?;
            a.netns()
                .run("nft", &["add", "rule", "inet", "taken", hook, "iifname", "ov*", "counter"])?;
        }
        let host_end =
            a.status()?["endpoints"][0]["interface"].as_str().expect("an interface").to_owned();
        // All packets of the container go to the host end, whose MAC address is known from ARP.
        one.run("ip", &["route", "add", "default", "via", &two.address().to_string()])?;
        let far = two.address().to_string();
        let neighbors: serde_json::Value =
            serde_json::from_str(&one.netns().ip(&["-j", "neigh", "show", &far])?)?;
        let gateway = neighbors[0]["lladdr"].as_str().expect("the MAC address of the gateway");
        one.run(
            "ip",
            &["neigh", "replace", &far, "lladdr", gateway, "dev", "overnode0", "nud", "permanent"],
        )?;
        for pin in a
            .pins()?
            .iter()
            .filter(|pin| pin.starts_with("links/") && !pin.ends_with("from_underlay"))
        {
            for node in std::fs::read_dir("/sys/fs/bpf/overnode")? {
                let path = node?.path().join(pin);
                if path.is_file() {
                    std::fs::remove_file(path)?;
                }
            }
        }
        let send = || -> Result<()> {
            for to in [a.address(), b.address(), two.address()] {
                one.ping(to, 5, MILLISECOND)?;
            }
            Ok(())
        };
        send()?;
        assert_eq!(taken_by_the_host(a)?, 0);
        // Without the settings of the host end, the counters see packets.
        conf(&format!("{host_end}/rp_filter"), "0")?;
        conf("all/rp_filter", "0")?;
        conf(&format!("{host_end}/forwarding"), "1")?;
        send()?;
        assert!(taken_by_the_host(a)? > 0, "the counter of the test does not work");
        Ok(())
    })
}

#[test]
fn strangers_cannot_make_programs_attach() -> Result<()> {
    in_lab(Lab::new("stranger").hosts(2), |lab| {
        let [a, b] = lab.hosts() else { unreachable!() };
        a.overnode(&["launch", "--id", "1", "--token", TOKEN])?.success()?;
        let to = std::net::SocketAddr::new(a.address(), 6784);
        b.netns().enter(move || {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
            for kind in 0..=4_u8 {
                let mut message = [0x55; 148];
                message[..4].copy_from_slice(&[kind, 0, 0, 0]);
                socket.send_to(&message, to)?;
            }
            Ok(())
        })?;
        std::thread::sleep(Duration::from_millis(500));
        let interfaces = a.inspect()?["data"]["underlay"]["interfaces"].clone();
        assert_eq!(interfaces, serde_json::json!([]));
        launch(lab, b)?;
        a.overnode(&["connect", b.target()])?.success()?;
        wait_for_sessions(lab)
    })
}
