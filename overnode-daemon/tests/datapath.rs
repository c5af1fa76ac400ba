//! Tests the data plane against real kernel objects. Hosts and containers are network namespaces.
//! Needs root.

mod datapath_support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use aya::maps::Array;
use datapath_support::{Host, Namespace, Pair, addr, ip, ip_output, reexec, run};
use overnode_daemon::datapath::{Attachment, Datapath, Hook, KnownEndpoint, LinkEvent, NetnsRef};
use overnode_types::{MacAddr, PeerIndex, PublicKey, SessionIndex};

#[test]
fn containers_reach_each_other_over_ipv4() {
    let pair = Pair::new(false);
    pair.connect();
    pair.ping_across(20, "0.01");
    let counters = pair.a.run(async |datapath| datapath.counters().unwrap());
    assert!(counters["sealed"] >= 20 && counters["opened"] >= 20, "{counters:?}");
}

#[test]
fn containers_reach_each_other_over_ipv6() {
    let pair = Pair::new(true);
    pair.connect();
    pair.ping_across(20, "0.01");
}

#[test]
fn a_restarted_daemon_adopts_everything_without_a_gap() {
    let pair = Pair::new(false);
    pair.connect();
    let ping = pair.background_ping(3000, "0.001");
    for _ in 0..4 {
        for host in [&pair.a, &pair.b] {
            let sessions = host.run(async |datapath| datapath.peers().unwrap().remove(0).sessions);
            assert_eq!(sessions.len(), 1);
            assert!(sessions[0].confirmed && sessions[0].sealing, "{sessions:?}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    ping.lost_nothing();
}

#[test]
fn adoption_restores_peers_routes_and_session_ages() {
    let pair = Pair::new(false);
    let before = Instant::now();
    pair.connect();
    pair.ping_across(3, "0.01");
    let (peer, routes) = pair
        .b
        .run(async |datapath| (datapath.peers().unwrap().remove(0), datapath.routes(PeerIndex(1))));
    assert_eq!((peer.index, peer.public_key), (PeerIndex(1), PublicKey([1; 32])));
    assert_eq!(peer.endpoint, Some((addr("192.0.2.1"), 6784).into()));
    assert_eq!(peer.mtu, 1420, "never above the containers' MTU");
    let session = peer.sessions[0];
    assert!(
        session.created >= before - Duration::from_secs(1) && session.created <= Instant::now()
    );
    assert_eq!(session.expires - session.created, Duration::from_secs(180));
    assert!(!session.initiator && session.confirmed && session.sealing);
    assert!(peer.last_data_received.is_some_and(|at| at >= before && at <= Instant::now()));
    assert!(peer.rx_packets >= 3 && peer.tx_packets >= 3);
    assert_eq!(routes, ["10.40.0.0/15".parse().unwrap()]);
}

#[test]
fn tear_down_leaves_nothing_and_disturbs_nobody() {
    let pair = Pair::new(false);
    pair.connect();
    pair.ping_across(3, "0.01");
    pair.a.tear_down();
    pair.a.is_clean();
    assert!(!ip_output(&pair.container_a, &["link"]).contains("overnode0"));
    let state = pair.b.run(async |datapath| datapath.peers().unwrap().len());
    assert_eq!(state, 1, "the other node still has its peer");
    assert!(ip_output(&pair.container_b, &["link"]).contains("overnode0"));
    pair.b.tear_down();
    pair.b.is_clean();
    // A second run finds nothing to remove and succeeds.
    pair.b.tear_down();
}

#[test]
fn tear_down_works_when_the_state_directory_is_gone() {
    let mut pair = Pair::new(false);
    pair.connect();
    let state_dir = pair.a.state_dir().to_owned();
    pair.a.remove_state_dir();
    assert!(!state_dir.exists());
    pair.a.tear_down();
    pair.a.is_clean();
}

#[test]
fn clsact_carries_the_same_traffic() {
    if !reexec("clsact_carries_the_same_traffic", &[("OVERNODE_NO_TCX", "1")], None) {
        return;
    }
    let pair = Pair::new(false);
    // A qdisc of another owner stays, and ours is removed.
    run("tc", &["-n", &pair.b.namespace.name, "qdisc", "add", "dev", "eth0", "clsact"]);
    pair.connect();
    let filters = |host: &Host| {
        run("tc", &["-n", &host.namespace.name, "filter", "show", "dev", "eth0", "ingress"])
    };
    assert!(filters(&pair.a).contains("from_underlay"), "{}", filters(&pair.a));
    let ping = pair.background_ping(2000, "0.001");
    for _ in 0..4 {
        for host in [&pair.a, &pair.b] {
            assert_eq!(host.run(async |datapath| datapath.underlay().hook), Hook::Clsact);
        }
    }
    ping.lost_nothing();
    let count = filters(&pair.a).matches("direct-action").count();
    assert_eq!(count, 1, "replaced, not added: {}", filters(&pair.a));
    let known = KnownEndpoint {
        host_interface: "ov00000001".into(),
        address: addr("10.40.0.1"),
        netns: Some(netns(&pair.container_a)),
    };
    pair.a.run(async |datapath| {
        // The qdisc is removed, and the filter with it. Reconcile restores both.
        run("tc", &["qdisc", "del", "dev", "eth0", "clsact"]);
        assert!(!filters(&pair.a).contains("from_underlay"));
        assert_eq!(datapath.reconcile(&[known]).await.unwrap(), []);
    });
    pair.ping_across(5, "0.01");
    pair.a.tear_down();
    pair.a.is_clean();
    pair.b.tear_down();
    let qdiscs = run("tc", &["-n", &pair.b.namespace.name, "qdisc", "show", "dev", "eth0"]);
    assert!(qdiscs.contains("clsact"), "{qdiscs}");
    assert_eq!(filters(&pair.b).trim(), "");
}

#[test]
fn from_clsact_to_tcx_and_back_without_a_gap() {
    let name = "from_clsact_to_tcx_and_back_without_a_gap";
    if std::env::var_os("DATAPATH_STATE").is_some() {
        let host = Host::from_environment();
        assert_eq!(host.run(async |datapath| datapath.underlay().hook), Hook::Clsact);
        return;
    }
    let pair = Pair::new(false);
    pair.connect();
    let environment = pair.a.environment();
    let variables = [
        ("OVERNODE_NO_TCX", "1"),
        ("DATAPATH_STATE", environment.0.as_str()),
        ("DATAPATH_NETNS", environment.1.as_str()),
    ];
    // The kernel stops an interface for a moment when it gets its clsact qdisc, so the qdisc is
    // added before the pings start.
    assert!(!reexec(name, &variables, Some("nsenter")), "the child process must return early");
    let ping = pair.background_ping(3000, "0.001");
    for _ in 0..2 {
        assert_eq!(pair.a.run(async |datapath| datapath.underlay().hook), Hook::Tcx);
        assert!(!reexec(name, &variables, Some("nsenter")), "the child process must return early");
    }
    assert_eq!(pair.a.run(async |datapath| datapath.underlay().hook), Hook::Tcx);
    ping.lost_nothing();
    let filters =
        run("tc", &["-n", &pair.a.namespace.name, "filter", "show", "dev", "eth0", "ingress"]);
    assert_eq!(filters.trim(), "");
}

#[test]
fn nsenter_and_ip_netns_exec_find_the_same_objects() {
    let name = "nsenter_and_ip_netns_exec_find_the_same_objects";
    if std::env::var_os("DATAPATH_STATE").is_some() {
        let host = Host::from_environment();
        let peers = host.run_here(async |datapath| datapath.peers().unwrap().len());
        assert_eq!(peers, 1, "what `nsenter --net` pinned is found under `ip netns exec`");
        return;
    }
    let pair = Pair::new(false);
    pair.connect();
    let environment = pair.a.environment();
    let variables =
        [("DATAPATH_STATE", environment.0.as_str()), ("DATAPATH_NETNS", environment.1.as_str())];
    assert!(
        !reexec(name, &variables, Some("ip netns exec")),
        "the child process must return early"
    );
    pair.ping_across(5, "0.01");
    let underlay = pair.a.run(async |datapath| datapath.underlay());
    assert_eq!(underlay.interfaces.len(), 1);
    assert_eq!((underlay.interfaces[0].name.as_str(), underlay.container_mtu), ("eth0", 1420));
}

#[test]
fn native_xdp_carries_the_same_traffic() {
    let mut pair = Pair::new(false);
    pair.a.xdp = true;
    pair.b.xdp = true;
    pair.connect();
    assert!(ip_output(&pair.a.namespace, &["-d", "link", "show", "eth0"]).contains("xdp"));
    let ping = pair.background_ping(1000, "0.001");
    for _ in 0..3 {
        assert!(pair.a.run(async |datapath| datapath.underlay()).interfaces[0].xdp);
    }
    ping.lost_nothing();
    // A launch without XDP returns to TC.
    pair.a.xdp = false;
    assert!(!pair.a.run(async |datapath| datapath.underlay()).interfaces[0].xdp);
    assert!(!ip_output(&pair.a.namespace, &["-d", "link", "show", "eth0"]).contains("prog/xdp"));
    pair.ping_across(5, "0.01");
    pair.a.tear_down();
    pair.a.is_clean();
}

#[test]
fn containers_of_one_host_reach_each_other() {
    let pair = Pair::new(false);
    let second = Namespace::new("c");
    pair.a.run(async |datapath| {
        datapath.attach(&attachment(&pair.container_a, "10.40.0.1", "ov00000001")).await.unwrap();
        datapath.attach(&attachment(&second, "10.40.0.2", "ov00000002")).await.unwrap();
    });
    let output =
        pair.container_a.exec("ping", &["-q", "-c", "5", "-i", "0.01", "-W", "1", "10.40.0.2"]);
    assert!(output.contains(" 0% packet loss"), "{output}");
    let link = ip_output(&second, &["-d", "addr", "show", "overnode0"]);
    assert!(link.contains("10.40.0.2/12") && link.contains("mtu 1420"), "{link}");
    assert!(second.exec("ethtool", &["-k", "overnode0"]).contains("generic-receive-offload: on"));
    let host = ip_output(&pair.a.namespace, &["addr", "show", "ov00000002"]);
    assert!(!host.contains("inet"), "the host's end has no addresses: {host}");
}

#[test]
fn the_offload_veth_completes_packets_and_has_no_addresses() {
    let pair = Pair::new(false);
    pair.a.run(async |_| ());
    let features = pair.a.namespace.exec("ethtool", &["-k", "ovn0"]);
    for feature in [
        "tx-checksumming",
        "scatter-gather",
        "tcp-segmentation-offload",
        "generic-segmentation-offload",
    ] {
        assert!(features.contains(&format!("{feature}: off")), "{feature}: {features}");
    }
    assert!(features.contains("tx-udp-segmentation: off"), "{features}");
    for end in ["ovn0", "ovn1"] {
        let link = ip_output(&pair.a.namespace, &["addr", "show", end]);
        assert!(
            link.contains("UP") && !link.contains("inet") && link.contains("mtu 65535"),
            "{link}"
        );
        let link = ip_output(&pair.a.namespace, &["link", "show", end]);
        assert!(link.contains(&format!("alias overnode:{}", pair.a.node())), "{link}");
    }
    // Turn the offloads on from outside. Reconcile turns them off again.
    run(
        "ip",
        &[
            "netns",
            "exec",
            &pair.a.namespace.name,
            "ethtool",
            "-K",
            "ovn0",
            "tso",
            "on",
            "sg",
            "on",
            "tx",
            "on",
        ],
    );
    pair.a.run(async |datapath| datapath.reconcile(&[]).await.unwrap());
    let features = pair.a.namespace.exec("ethtool", &["-k", "ovn0"]);
    assert!(features.contains("tcp-segmentation-offload: off"), "{features}");
}

#[test]
fn a_failed_attach_leaves_nothing() {
    let pair = Pair::new(false);
    let taken = Namespace::new("c");
    ip(&["-n", &taken.name, "link", "add", "overnode0", "type", "veth", "peer", "name", "other"]);
    pair.a.run(async |datapath| {
        let refused = async |datapath: &mut Datapath, attachment: &Attachment, why: &str| {
            let error = format!("{:#}", datapath.attach(attachment).await.unwrap_err());
            assert!(error.contains(why), "{error}");
        };
        refused(
            datapath,
            &attachment(&taken, "10.40.0.1", "ov00000001"),
            "overnode0 already exists",
        )
        .await;
        refused(datapath, &attachment(&pair.container_a, "10.60.0.1", "ov00000001"), "outside")
            .await;
        refused(datapath, &attachment(&pair.container_a, "10.40.0.1", "eth0"), "not a valid name")
            .await;
        let at = |netns| Attachment::inside(netns, addr("10.40.0.1"));
        refused(datapath, &at(NetnsRef::Path("/proc/thread-self/ns/net".into())), "host's own")
            .await;
        let gone = at(NetnsRef::Pid(u32::MAX));
        refused(datapath, &gone, "check that the process still runs").await;
        let group = Attachment {
            mac: Some(MacAddr::new([1, 0, 0, 0, 0, 1])),
            ..attachment(&pair.container_a, "10.40.0.1", "ov00000001")
        };
        refused(datapath, &group, "MAC address").await;
        datapath.attach(&attachment(&pair.container_a, "10.40.0.1", "ov00000001")).await.unwrap();
        let other = Namespace::new("c");
        refused(datapath, &attachment(&other, "10.40.0.1", "ov00000002"), "already attached").await;
        refused(
            datapath,
            &attachment(&pair.container_a, "10.40.0.2", "ov00000002"),
            "overnode0 already exists",
        )
        .await;
        refused(
            datapath,
            &attachment(&other, "10.40.0.2", "ov00000001"),
            "ov00000001 already exists",
        )
        .await;
        datapath.detach("ov00000001").await.unwrap();
        datapath.detach("ov00000001").await.unwrap();
        datapath.attach(&attachment(&pair.container_a, "10.40.0.1", "ov00000002")).await.unwrap();
        datapath.detach("ov00000002").await.unwrap();
    });
    let links = ip_output(&pair.a.namespace, &["link"]);
    assert!(!links.contains("ov00000001") && !links.contains("ov00000002"), "{links}");
    assert!(!ip_output(&pair.container_a, &["link"]).contains("overnode0"));
}

#[test]
fn reconcile_removes_only_orphaned_interfaces() {
    let pair = Pair::new(false);
    let second = Namespace::new("c");
    let host = &pair.a.namespace.name;
    // Interfaces of other owners: the same kind of name, but another alias, or no alias and another
    // MAC address.
    for (name, alias) in [("ovaaaaaaaa", Some("overnode:0123456789ab")), ("ovbbbbbbbb", None)] {
        ip(&["-n", host, "link", "add", name, "type", "veth", "peer", "name", &format!("p{name}")]);
        if let Some(alias) = alias {
            ip(&["-n", host, "link", "set", name, "alias", alias]);
        }
    }
    // Our own interface, identified only by its MAC address: a daemon was killed before it could
    // set the alias.
    let node = pair.a.node();
    let mac = format!("02:{}:{}:{}:12:34", &node[..2], &node[2..4], &node[4..6]);
    ip(&[
        "-n",
        host,
        "link",
        "add",
        "ovcccccccc",
        "address",
        &mac,
        "type",
        "veth",
        "peer",
        "name",
        "unmarked",
    ]);
    let known = KnownEndpoint {
        host_interface: "ov00000001".into(),
        address: addr("10.40.0.1"),
        netns: Some(netns(&pair.container_a)),
    };
    let gone = KnownEndpoint {
        host_interface: "ov00000003".into(),
        address: addr("10.40.0.3"),
        netns: Some(netns(&second)),
    };
    pair.a.run(async |datapath| {
        datapath.attach(&attachment(&pair.container_a, "10.40.0.1", "ov00000001")).await.unwrap();
        datapath.attach(&attachment(&second, "10.40.0.2", "ov00000002")).await.unwrap();
    });
    pair.a.run(async |datapath| {
        let lost = datapath.reconcile(&[known.clone(), gone.clone()]).await.unwrap();
        assert!(lost[0].netns_exists && lost[0].address == addr("10.40.0.3"));
        assert_eq!(
            lost.iter().map(|lost| lost.host_interface.as_str()).collect::<Vec<_>>(),
            ["ov00000003"]
        );
        assert_eq!(datapath.reconcile(std::slice::from_ref(&known)).await.unwrap(), []);
    });
    let links = ip_output(&pair.a.namespace, &["link"]);
    for (name, stays) in [
        ("ov00000001", true),
        ("ov00000002", false),
        ("ovaaaaaaaa", true),
        ("ovbbbbbbbb", true),
        ("ovcccccccc", false),
    ] {
        assert_eq!(links.contains(name), stays, "{name}: {links}");
    }
    assert!(!ip_output(&second, &["link"]).contains("overnode0"));
}

#[test]
fn a_container_that_disappears_is_reported_and_forgotten() {
    let pair = Pair::new(false);
    let short_lived = Namespace::new("c");
    pair.a.run(async |datapath| {
        let mut events = datapath.watch().unwrap();
        datapath.attach(&attachment(&short_lived, "10.40.0.7", "ov00000007")).await.unwrap();
        let netns = netns(&short_lived);
        assert!(datapath.is_attached("ov00000007"));
        drop(short_lived);
        expect(&mut events, &LinkEvent::Vanished("ov00000007".into())).await;
        let known = KnownEndpoint {
            host_interface: "ov00000007".into(),
            address: addr("10.40.0.7"),
            netns: Some(netns),
        };
        let lost = datapath.reconcile(&[known]).await.unwrap();
        assert!(lost.len() == 1 && !lost[0].netns_exists, "{lost:?}");
        assert!(!datapath.is_attached("ov00000007"));
        // The address can be reused.
        datapath.attach(&attachment(&pair.container_a, "10.40.0.7", "ov00000008")).await.unwrap();
        ip(&["addr", "add", "192.0.2.77/24", "dev", "eth0"]);
        expect(&mut events, &LinkEvent::AddressesChanged).await;
        datapath.refresh().await.unwrap();
        assert!(datapath.underlay().addresses.contains(&addr("192.0.2.77")));
        ip(&["route", "add", "198.51.100.0/24", "dev", "eth0"]);
        expect(&mut events, &LinkEvent::RoutesChanged).await;
    });
}

#[test]
fn paths_follow_routes_addresses_and_mtus() {
    let pair = Pair::new(false);
    let endpoint = |text: &str| Some(text.parse().unwrap());
    pair.a.run(async |datapath| {
        let key = PublicKey([9; 32]);
        datapath.set_peer(PeerIndex(9), &key, endpoint("203.0.113.9:6784")).await.unwrap();
        let path = |datapath: &Datapath| {
            let peer = datapath.peers().unwrap().remove(0);
            (peer.ifindex.is_some(), peer.mtu, peer.endpoint)
        };
        assert!(!path(datapath).0, "no route yet");
        ip(&["route", "add", "203.0.113.0/24", "via", "192.0.2.2", "mtu", "1400"]);
        datapath.refresh().await.unwrap();
        assert_eq!(path(datapath), (true, 1400 - 60, endpoint("203.0.113.9:6784")));
        // Without an endpoint, the current one is kept.
        datapath.set_peer(PeerIndex(9), &key, None).await.unwrap();
        assert_eq!(path(datapath).2, endpoint("203.0.113.9:6784"));
        datapath.set_peer(PeerIndex(9), &key, endpoint("[2001:db8::2]:7000")).await.unwrap();
        assert_eq!(path(datapath), (true, 1420, endpoint("[2001:db8::2]:7000")));
        ip(&["link", "set", "eth0", "mtu", "1380"]);
        datapath.refresh().await.unwrap();
        assert_eq!(path(datapath).1, 1300);
        assert_eq!(datapath.container_mtu(), 1300);
        // A new key under the same index is a new peer.
        datapath.set_peer(PeerIndex(9), &PublicKey([8; 32]), None).await.unwrap();
        assert_eq!(path(datapath).2, None);
        datapath.remove_peer(PeerIndex(9)).unwrap();
        assert_eq!(datapath.peers().unwrap().len(), 0);
        assert!(datapath.set_peer(PeerIndex(0), &key, None).await.is_err());
        assert!(datapath.set_peer(PeerIndex(5120), &key, None).await.is_err());
    });
}

#[test]
fn an_underlay_without_ethernet_is_reported_and_harms_no_other_peer() {
    let pair = Pair::new(false);
    pair.connect();
    pair.a.run(async |datapath| {
        ip(&["tuntap", "add", "tun0", "mode", "tun"]);
        ip(&["link", "set", "tun0", "up"]);
        ip(&["route", "add", "203.0.113.0/24", "dev", "tun0"]);
        let endpoint = Some("203.0.113.3:6784".parse().unwrap());
        datapath.set_peer(PeerIndex(3), &PublicKey([3; 32]), endpoint).await.unwrap();
        let problems = datapath.underlay().problems;
        assert!(problems.len() == 1 && problems[0].contains("tun0"), "{problems:?}");
        datapath.refresh().await.unwrap();
    });
    pair.ping_across(3, "0.01");
}

#[test]
fn maps_of_another_version_are_refused_if_in_use_else_replaced() {
    let pair = Pair::new(false);
    pair.a.run(async |datapath| {
        datapath.attach(&attachment(&pair.container_a, "10.40.0.1", "ov00000001")).await.unwrap();
    });
    let pin = format!("/sys/fs/bpf/overnode/{}/maps/CONFIG", pair.a.node());
    std::fs::remove_file(&pin).unwrap();
    Array::<_, u64>::create(1, 0).unwrap().pin(&pin).unwrap();
    let error = pair.a.try_open().unwrap_err().to_string();
    assert!(
        error.contains("another version") && error.contains("CONFIG") && error.contains("reset"),
        "{error}"
    );
    ip(&["-n", &pair.a.namespace.name, "link", "del", "ov00000001"]);
    pair.a.run(async |datapath| {
        assert_eq!(datapath.reconcile(&[]).await.unwrap(), []);
        datapath.attach(&attachment(&pair.container_a, "10.40.0.1", "ov00000001")).await.unwrap();
    });
}

#[test]
fn only_the_chosen_interface_is_used() {
    let mut pair = Pair::new(false);
    pair.a.interface = Some("lo".into());
    pair.a.run(async |datapath| {
        let error = datapath
            .set_peer(PeerIndex(2), &PublicKey([2; 32]), Some("192.0.2.2:6784".parse().unwrap()))
            .await
            .err()
            .map(|error| error.to_string());
        // `lo` leads nowhere. Either there is no route, or the error names the right interface.
        assert!(error.is_none_or(|error| error.contains("--interface")));
        let eth0 = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        assert!(eth0.contains("eth0"));
        assert_eq!(
            datapath
                .underlay()
                .interfaces
                .iter()
                .filter(|interface| interface.name == "eth0")
                .count(),
            0
        );
    });
    pair.a.interface = Some("nosuch0".into());
    let error = pair.a.try_open().unwrap_err().to_string();
    assert!(error.contains("nosuch0") && error.contains("--interface"), "{error}");
}

#[test]
fn a_session_slot_is_quarantined_and_wiped() {
    let pair = Pair::new(false);
    pair.connect();
    pair.ping_across(2, "0.01");
    pair.a.run(async |datapath| {
        let keys = pair.keys(true, 1);
        let peer = PeerIndex(2);
        assert!(datapath.install_session(peer, &keys).unwrap_err().to_string().contains("in use"));
        datapath.withdraw_session(peer, SessionIndex::new(0xffff_f001)).unwrap();
        assert_eq!(
            datapath.peers().unwrap()[0].sessions.len(),
            1,
            "another index in the same slot"
        );
        datapath.withdraw_session(peer, keys.local_index).unwrap();
        assert_eq!(datapath.peers().unwrap()[0].sessions, []);
        assert!(datapath.install_session(peer, &keys).is_err(), "withdrawn a moment ago");
        let before = datapath.counters().unwrap();
        pair.container_a
            .exec_status("ping", &["-q", "-c", "2", "-i", "0.01", "-W", "0.1", "10.42.0.1"]);
        let grown = growth(&before, &datapath.counters().unwrap());
        assert_eq!(grown, [("no-session", 2)], "dropped and counted, never sent");
        tokio::time::sleep(Duration::from_millis(900)).await;
        datapath.install_session(peer, &pair.keys(true, 1)).unwrap();
        assert!(
            datapath.install_session(PeerIndex(77), &pair.keys(true, 5)).is_err(),
            "no such peer"
        );
    });
    pair.b.run(async |datapath| {
        datapath.withdraw_session(PeerIndex(1), pair.keys(false, 1).local_index).unwrap();
        tokio::time::sleep(Duration::from_millis(900)).await;
        datapath.install_session(PeerIndex(1), &pair.keys(false, 1)).unwrap();
    });
    pair.ping_across(5, "0.01");
}

#[test]
fn a_new_session_takes_over_without_a_loss() {
    let pair = Pair::new(false);
    pair.connect();
    let ping = pair.background_ping(4000, "0.001");
    for slot in 2..6 {
        // Follow the order of a handshake: the responder first, then the initiator, which seals at
        // once.
        pair.b.run(async |datapath| {
            datapath.install_session(PeerIndex(1), &pair.keys(false, slot)).unwrap()
        });
        pair.a.run(async |datapath| {
            datapath.install_session(PeerIndex(2), &pair.keys(true, slot)).unwrap()
        });
        let both = [(&pair.a, PeerIndex(2)), (&pair.b, PeerIndex(1))];
        for (host, _) in both {
            wait_until_sealing(&pair, host, slot);
        }
        // Messages that were sealed earlier arrive within this time.
        std::thread::sleep(Duration::from_millis(20));
        for (host, peer) in both {
            host.run(async |datapath| {
                for old in datapath.peers().unwrap().remove(0).sessions {
                    if old.local_index.get() & 0xfff < slot {
                        datapath.withdraw_session(peer, old.local_index).unwrap();
                    }
                }
            });
        }
    }
    ping.lost_nothing();
}

#[test]
fn probes_of_every_size_that_the_underlay_carries_arrive() {
    for is_ipv6 in [false, true] {
        let pair = Pair::new(is_ipv6);
        pair.connect();
        pair.ping_across(2, "0.01");
        let largest = if is_ipv6 { 1420 } else { 1440 };
        pair.a.run(async |datapath| {
            for (n, inner_len) in (0..).zip([56, 500, largest, largest + 16]) {
                let payload = vec![n; inner_len as usize - 28];
                datapath.send_probe(PeerIndex(2), addr("10.39.240.2"), &payload).unwrap();
            }
            assert!(datapath.send_probe(PeerIndex(2), addr("10.39.240.2"), &[0; 65536]).is_err());
        });
        pair.b.run(async |datapath| {
            let mut probes = datapath.probes().unwrap();
            for (n, inner_len) in (0..).zip([56, 500, largest]) {
                let probe = tokio::time::timeout(Duration::from_secs(5), probes.recv())
                    .await
                    .unwrap()
                    .unwrap();
                assert_eq!(
                    (probe.peer, probe.inner_len, probe.payload),
                    (PeerIndex(1), inner_len, [n; 28])
                );
            }
            assert!(
                tokio::time::timeout(Duration::from_millis(50), probes.recv()).await.is_err(),
                "a probe that is too large arrived"
            );
            assert!(datapath.probes().is_err(), "the receiver was already taken");
        });
    }
}

#[test]
fn a_keepalive_confirms_the_session_at_the_other_end() {
    let pair = Pair::new(false);
    pair.connect();
    let state = pair.b.run(async |datapath| datapath.peers().unwrap().remove(0).sessions.remove(0));
    assert!(!state.confirmed && !state.sealing);
    pair.a.run(async |datapath| {
        // The neighbor is not resolved yet, so the first message may have to wait for it.
        datapath.keepalive(PeerIndex(2)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(datapath.counters().unwrap()["keepalive-sent"], 1);
    });
    pair.b.run(async |datapath| {
        assert_eq!(datapath.counters().unwrap()["keepalive-received"], 1);
        let state = datapath.peers().unwrap().remove(0).sessions.remove(0);
        assert!(state.confirmed && state.sealing);
    });
}

#[test]
fn a_foreign_offload_veth_is_an_error_and_is_not_removed() {
    let pair = Pair::new(false);
    ip(&[
        "-n",
        &pair.a.namespace.name,
        "link",
        "add",
        "ovn0",
        "type",
        "veth",
        "peer",
        "name",
        "ovn1",
    ]);
    let error = pair.a.try_open().unwrap_err().to_string();
    assert!(error.contains("ovn0") && error.contains("did not create"), "{error}");
    pair.a.tear_down();
    assert!(ip_output(&pair.a.namespace, &["link"]).contains("ovn0"));
}

/// Waits until the session of a host's only peer that seals is the one in `slot`. Sends packets
/// meanwhile: the first message under a session confirms it.
fn wait_until_sealing(pair: &Pair, host: &Host, slot: u32) {
    let start = Instant::now();
    loop {
        let sealing: Vec<u32> = host.run(async |datapath| {
            let sessions = datapath.peers().unwrap().remove(0).sessions;
            let sealing = sessions.iter().filter(|session| session.sealing);
            sealing.map(|session| session.local_index.get() & 0xfff).collect()
        });
        if sealing == [slot] {
            return;
        }
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "slot {slot} does not seal, but {sealing:?} does"
        );
        pair.ping_across(1, "0.01");
    }
}

fn netns(container: &Namespace) -> NetnsRef {
    NetnsRef::Path(container.path())
}

fn attachment(container: &Namespace, address: &str, host_interface: &str) -> Attachment {
    let ordinary = Attachment::inside(netns(container), addr(address));
    Attachment { host_interface: host_interface.into(), ..ordinary }
}

fn growth<'a>(
    before: &BTreeMap<&'a str, u64>,
    after: &BTreeMap<&'a str, u64>,
) -> Vec<(&'a str, u64)> {
    after
        .iter()
        .map(|(reason, count)| (*reason, count - before[reason]))
        // Exclude the traffic that a container's kernel sends on its own at any time: ARP and IPv6
        // neighbor discovery.
        .filter(|(reason, grown)| *grown != 0 && !["arp", "unsupported"].contains(reason))
        .collect()
}

async fn expect(events: &mut tokio::sync::mpsc::Receiver<LinkEvent>, wanted: &LinkEvent) {
    let found = tokio::time::timeout(Duration::from_secs(5), async {
        while let Some(event) = events.recv().await {
            if event == *wanted {
                return true;
            }
        }
        false
    });
    assert_eq!(found.await, Ok(true), "{wanted:?} was not reported");
}
