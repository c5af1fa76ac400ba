//! Tests of invariant S2: a host without the token gets nothing, and both sides report the reason.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{Host, Lab, eventually};

use crate::support::{
    MILLISECOND, TIMEOUT, TOKEN, attached, in_lab, launch, launch_all, list, one_each, peer,
    wait_for_sessions,
};

#[test]
fn a_wrong_token_is_named_on_both_sides_and_nothing_is_exchanged() -> Result<()> {
    in_lab(Lab::new("token").hosts(2), |lab| {
        let [a, b] = lab.hosts() else { unreachable!() };
        launch(lab, a)?;
        b.overnode(&["launch", "--id", "2", "--token", "another-password", "host1"])?.success()?;
        let (one, two) = (attached(a, "one")?, attached(b, "two")?);
        for (host, other) in [(a, 2), (b, 1)] {
            eventually(TIMEOUT, || {
                let status = host.status()?;
                let named = list(&status, "connections")?.iter().any(|it| {
                    it["last_error"]["message"].as_str().is_some_and(|text| text.contains("token"))
                });
                ensure!(named, "{} does not name the token: {}", host.name, status["connections"]);
                Ok(())
            })?;
            let table = host.overnode(&["status", "--connections"])?.success()?;
            assert!(table.contains("token"), "{table}");
            assert!(peer(host, other)?.is_none(), "{} knows node {other}", host.name);
        }
        let capture = lab.capture()?;
        assert_eq!(one.ping(two.address(), 200, MILLISECOND)?.received, 0);
        assert_eq!(two.ping(one.address(), 200, MILLISECOND)?.received, 0);
        assert_eq!(capture.stop()?.count(|packet| packet.wireguard_type() == Some(4))?, 0);
        Ok(())
    })
}

/// A host without the token does not disturb the members.
#[test]
fn an_outsider_among_members_stays_outside() -> Result<()> {
    in_lab(Lab::new("outsider").hosts(3), |lab| {
        let [a, b, c] = lab.hosts() else { unreachable!() };
        launch(lab, a)?;
        launch(lab, b)?;
        // It also uses the ID of a member.
        c.overnode(&["launch", "--id", "2", "--token", "another-password", "host1", "host2"])?
            .success()?;
        let (one, two, thief) = (attached(a, "one")?, attached(b, "two")?, attached(c, "thief")?);
        one.reach(two.address(), TIMEOUT)?;
        let stats = one.ping(two.address(), 1000, MILLISECOND)?;
        assert_eq!(stats.lost(), 0);
        assert_eq!(thief.ping(one.address(), 100, MILLISECOND)?.received, 0);
        assert_eq!(list(&c.status()?, "peers")?.len(), 1, "the outsider knows other nodes");
        Ok(())
    })
}

fn connect(from: &Host, to: SocketAddr) -> Result<TcpStream> {
    let stream =
        from.netns().enter(move || Ok(TcpStream::connect_timeout(&to, Duration::from_secs(5))?))?;
    stream.set_read_timeout(Some(Duration::from_secs(15)))?;
    Ok(stream)
}

#[test]
fn strangers_on_the_control_port_learn_nothing() -> Result<()> {
    in_lab(Lab::new("strangers").hosts(2), |lab| {
        let [a, b] = lab.hosts() else { unreachable!() };
        launch(lab, a)?;
        let port = SocketAddr::new(a.address(), 6783);
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        for length in [0usize, 1, 2, 3, 47, 48, 96, 1000, 65_537, 1_000_000] {
            let garbage: Vec<u8> = (0..length)
                .map(|_| {
                    seed = seed
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    (seed >> 56) as u8
                })
                .collect();
            let mut stream = connect(b, port)?;
            // The node may close the connection at any time.
            let _ = stream.write_all(&garbage);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut said = Vec::new();
            let _ = stream.read_to_end(&mut said);
            assert!(said.len() <= 128, "a stranger received {} bytes", said.len());
            assert!(
                !said.windows(5).any(|window| window == b"host1"),
                "a stranger received the name of the node"
            );
        }
        assert_eq!(list(&a.status()?, "peers")?.len(), 1);
        launch(lab, b)?;
        wait_for_sessions(lab)
    })
}

#[test]
fn idle_connections_do_not_keep_nodes_out() -> Result<()> {
    in_lab(Lab::new("idle").hosts(2), |lab| {
        let [a, b] = lab.hosts() else { unreachable!() };
        launch(lab, a)?;
        let port = SocketAddr::new(a.address(), 6783);
        // The node may refuse some of them, because the slots per source are limited.
        let idle: Vec<_> = (0..100).filter_map(|_| connect(b, port).ok()).collect();
        ensure!(!idle.is_empty(), "no connection was accepted");
        launch(lab, b)?;
        wait_for_sessions(lab)?;
        drop(idle);
        Ok(())
    })
}

#[test]
fn tokens_may_come_from_a_file_or_the_environment() -> Result<()> {
    in_lab(Lab::new("sources").hosts(3), |lab| {
        let [a, b, c] = lab.hosts() else { unreachable!() };
        let file = lab.folder().join("token");
        std::fs::write(&file, format!("{TOKEN}\n"))?;
        launch(lab, a)?;
        let words = ["launch", "--id", "2", "--token-file", &file.to_string_lossy(), "host1"];
        b.overnode(&words)?.success()?;
        c.overnode_with(&["launch", "--id", "3", "host1"], &[("OVERNODE_TOKEN", TOKEN)])?
            .success()?;
        wait_for_sessions(lab)
    })
}

#[test]
fn generated_tokens_are_strong_and_work() -> Result<()> {
    in_lab(Lab::new("generated").hosts(2), |lab| {
        let host = lab.host(1);
        let (one, two) =
            (host.overnode(&["token"])?.success()?, host.overnode(&["token"])?.success()?);
        assert_ne!(one, two);
        let token = one.trim();
        assert!(token.len() >= 20 && !token.contains(char::is_whitespace), "{token:?}");
        for host in lab.hosts() {
            let id = host.number.to_string();
            let words = [&["launch", "--id", &id, "--token", token], &lab.targets()[..]].concat();
            host.overnode(&words)?.success()?;
        }
        wait_for_sessions(lab)
    })
}

#[test]
fn two_nodes_with_the_same_id_report_the_clash() -> Result<()> {
    in_lab(Lab::new("clash").hosts(3), |lab| {
        let [a, b, c] = lab.hosts() else { unreachable!() };
        launch_all_but_last(lab)?;
        c.overnode(&["launch", "--id", "2", "--token", TOKEN, "host1", "host2"])?.success()?;
        for host in [a, b, c] {
            clash_is_shown(host)?;
        }
        let (one, two) = (attached(a, "one")?, attached(b, "two")?);
        one.reach(two.address(), TIMEOUT)?;
        assert_eq!(one.ping(two.address(), 500, MILLISECOND)?.lost(), 0);
        Ok(())
    })
}

/// Two clusters, each with a node 2, are joined by a connection between their other nodes. No node
/// dials those that it learns of through gossip.
#[test]
fn two_nodes_with_the_same_id_joined_only_by_gossip_report_the_clash() -> Result<()> {
    in_lab(Lab::new("twins").hosts(4), |lab| {
        let [a, b, c, d] = lab.hosts() else { unreachable!() };
        for (host, id, target) in
            [(a, "1", "host2"), (b, "2", "host1"), (c, "3", "host4"), (d, "2", "host3")]
        {
            let words = ["launch", "--id", id, "--token", TOKEN, "--no-discovery", target];
            host.overnode(&words)?.success()?;
        }
        eventually(TIMEOUT, || {
            ensure!(
                peer(a, 2)?.is_some_and(|peer| peer["reachable"] == true),
                "nodes 1 and 2 are not connected"
            );
            ensure!(
                peer(c, 2)?.is_some_and(|peer| peer["reachable"] == true),
                "nodes 3 and 2 are not connected"
            );
            Ok(())
        })?;
        let keys =
            [peer(a, 2)?, peer(c, 2)?].map(|peer| peer.map(|peer| peer["public_key"].clone()));
        a.overnode(&["connect", "host3"])?.success()?;
        for host in [a, b, c, d] {
            clash_is_shown(host)?;
        }
        let now =
            [peer(a, 2)?, peer(c, 2)?].map(|peer| peer.map(|peer| peer["public_key"].clone()));
        assert_eq!(now, keys, "a side changed its node 2");
        assert!(keys[0] != keys[1] && peer(a, 3)?.is_some());
        Ok(())
    })
}

/// Waits until `status --connections` shows the clash with advice.
fn clash_is_shown(host: &Host) -> Result<()> {
    eventually(TIMEOUT, || {
        let status = host.status()?;
        let connections = list(&status, "connections")?;
        let is_told = connections.iter().any(|connection| {
            let message = connection["last_error"]["message"].as_str().unwrap_or_default();
            message.contains("ID 2 is used twice") && message.contains("overnode reset")
        });
        ensure!(is_told, "{} does not report the ID clash: {}", host.name, status["connections"]);
        Ok(())
    })
}

fn launch_all_but_last(lab: &Lab) -> Result<()> {
    let [a, b, _] = lab.hosts() else { unreachable!() };
    launch(lab, a)?;
    launch(lab, b)?;
    eventually(TIMEOUT, || {
        ensure!(
            peer(a, 2)?.is_some_and(|peer| peer["data"]["session"] == "established"),
            "no session yet"
        );
        Ok(())
    })
}

#[test]
fn a_cluster_with_other_addresses_is_refused_with_a_reason() -> Result<()> {
    in_lab(Lab::new("ranges").hosts(2), |lab| {
        let [a, b] = lab.hosts() else { unreachable!() };
        launch(lab, a)?;
        let words = [
            "launch",
            "--id",
            "2",
            "--token",
            TOKEN,
            "--subnet",
            "172.16.0.0/12",
            "--range",
            "172.24.0.0/13",
        ];
        b.overnode(&[&words[..], &["host1"]].concat())?.success()?;
        eventually(TIMEOUT, || {
            let table = b.overnode(&["status", "--connections"])?.success()?;
            ensure!(
                table.contains("172.16.0.0/12") || table.contains("10.32.0.0/12"),
                "no reason is shown: {table}"
            );
            Ok(())
        })?;
        assert!(peer(a, 2)?.is_none());
        Ok(())
    })
}

#[test]
fn members_exchange_data_only_with_members() -> Result<()> {
    in_lab(Lab::new("members").hosts(2), |lab| {
        launch_all(lab)?;
        let containers = one_each(lab)?;
        containers[0].reach(containers[1].address(), TIMEOUT)?;
        // One node of the same cluster starts over with another token, and cannot use its former
        // state.
        let b = lab.host(2);
        b.overnode(&["reset", "--force"])?.success()?;
        b.overnode(&["launch", "--id", "2", "--token", "another-password", "host1"])?.success()?;
        let two = &containers[1];
        b.attach(two, &[])?;
        assert_eq!(two.ping(containers[0].address(), 200, MILLISECOND)?.received, 0);
        Ok(())
    })
}
