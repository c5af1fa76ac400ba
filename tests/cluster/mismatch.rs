//! Tests of incompatible nodes: `status --connections` says so on both sides with advice, and the
//! advice helps.

use std::net::{SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, Result, bail, ensure};
use lab::{Host, Lab, eventually};
use overnode_core::control::hello::{
    Hello, LocalIdentity, NEWEST_VERSION, OLDEST_VERSION, Refusal,
};
use overnode_core::control::key;
use overnode_core::control::renewal::Role;
use overnode_daemon::net::session::{self, ConnectOptions};
use overnode_types::{Network, NodeId};
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};

use crate::support::{TIMEOUT, TOKEN, in_lab, list, peer};

/// The side of a connection that a host is on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Called,
    WasCalled,
}

/// Waits until a host reports all these words about its connection to a host: in JSON, with the
/// time, and in one line of the table.
fn told(host: &Host, side: Side, of: &Host, words: &[&str]) -> Result<()> {
    let (direction, state, arrow) = match side {
        Side::Called => ("outbound", "retrying", "-> "),
        Side::WasCalled => ("inbound", "failed", "<- "),
    };
    let from = format!("{}:", of.address());
    let fits = |it: &Value| {
        let message = it["last_error"]["message"].as_str().unwrap_or_default();
        it["direction"] == direction
            // The last error remains while another attempt is in progress.
            && (it["state"] == state || side == Side::Called && it["state"] == "connecting")
            && it["remote"].as_str().is_some_and(|remote| remote.starts_with(&from))
            && it["last_error"]["seconds_ago"].is_u64()
            && words.iter().all(|word| message.contains(word))
    };
    eventually(TIMEOUT, || {
        let status = host.status()?;
        let connections = list(&status, "connections")?;
        ensure!(
            connections.iter().any(fits),
            "{} does not report {words:?} about {}: {}",
            host.name,
            of.name,
            status["connections"]
        );
        let table = host.overnode(&["status", "--connections"])?.success()?;
        let line = table.lines().find(|line| {
            line.starts_with(arrow)
                && line.contains(&from)
                && words.iter().all(|word| line.contains(word))
        });
        let line = line.with_context(|| {
            format!("the table of {} does not show {words:?}:\n{table}", host.name)
        })?;
        ensure!(
            line.contains(state) || side == Side::Called && line.contains("connecting"),
            "{line}"
        );
        ensure!(line.contains(" ago)"), "no time in {line:?}");
        Ok(())
    })
}

/// Waits until two hosts' nodes have a control connection and neither reports an error about the
/// other.
fn joined(one: &Host, id: usize, other: &Host, other_id: usize) -> Result<()> {
    for (host, id) in [(one, other_id), (other, id)] {
        eventually(TIMEOUT, || {
            let status = host.status()?;
            let connections = list(&status, "connections")?;
            let with = |it: &&Value| it["peer"] == id && it["state"] == "established";
            ensure!(
                connections.iter().any(|it| with(&it)),
                "{}: {}",
                host.name,
                status["connections"]
            );
            ensure!(
                connections.iter().all(|it| it["state"] != "failed"),
                "{} still reports an error: {}",
                host.name,
                status["connections"]
            );
            Ok(())
        })?;
    }
    Ok(())
}

fn start(host: &Host, id: &str, token: &str, more: &[&str]) -> Result<()> {
    host.overnode(&[&["launch", "--id", id, "--token", token], more].concat())?.success().map(drop)
}

#[test]
fn a_different_token_is_reported_on_both_sides_and_the_advice_helps() -> Result<()> {
    in_lab(Lab::new("tokens").hosts(2), |lab| {
        let [a, b] = lab.hosts() else { unreachable!() };
        start(a, "1", TOKEN, &[])?;
        start(b, "2", "another-password", &["host1"])?;
        let words = ["the token differs", "`overnode reset`", "launch it with the cluster's token"];
        told(a, Side::WasCalled, b, &words)?;
        told(b, Side::Called, a, &words)?;
        // In the other direction as well.
        a.overnode(&["connect", "host2"])?.success()?;
        told(a, Side::Called, b, &words)?;
        told(b, Side::WasCalled, a, &words)?;
        ensure!(peer(a, 2)?.is_none() && peer(b, 1)?.is_none(), "the nodes know each other");
        b.overnode(&["reset"])?.success()?;
        start(b, "2", TOKEN, &["host1"])?;
        joined(a, 1, b, 2)
    })
}

#[test]
fn different_ranges_are_reported_on_both_sides_and_the_advice_helps() -> Result<()> {
    in_lab(Lab::new("networks").hosts(3), |lab| {
        let [a, b, c] = lab.hosts() else { unreachable!() };
        start(a, "1", TOKEN, &[])?;
        start(b, "2", TOKEN, &["--range", "10.44.0.0/14", "host1"])?;
        start(c, "3", TOKEN, &["--subnet", "172.16.0.0/12", "--range", "172.24.0.0/13", "host1"])?;
        let usual = "subnet 10.32.0.0/12 and range 10.40.0.0/13";
        let advice = "run `overnode reset` on the node with the wrong ones, then launch it with \
                      the right --subnet and --range";
        for (host, name, network) in [
            (b, "node 2 (host2)", "subnet 10.32.0.0/12 and range 10.44.0.0/14"),
            (c, "node 3 (host3)", "subnet 172.16.0.0/12 and range 172.24.0.0/13"),
        ] {
            let (here, there) = (format!("this node has {usual}"), format!("{name} has {network}"));
            told(a, Side::WasCalled, host, &[&here, &there, advice])?;
            let (here, there) =
                (format!("this node has {network}"), format!("node 1 (host1) has {usual}"));
            told(host, Side::Called, a, &[&here, &there, advice])?;
        }
        ensure!(list(&a.status()?, "peers")?.len() == 1, "the node knows others");
        b.overnode(&["reset"])?.success()?;
        start(b, "2", TOKEN, &["--subnet", "10.32.0.0/12", "--range", "10.40.0.0/13", "host1"])?;
        eventually(TIMEOUT, || {
            ensure!(
                peer(a, 2)?.is_some_and(|peer| peer["reachable"] == true),
                "nodes 1 and 2 are not connected"
            );
            Ok(())
        })
    })
}

#[test]
fn a_duplicate_id_is_reported_on_both_sides_and_the_advice_helps() -> Result<()> {
    in_lab(Lab::new("ids").hosts(3), |lab| {
        let [a, b, c] = lab.hosts() else { unreachable!() };
        start(a, "1", TOKEN, &[])?;
        start(b, "2", TOKEN, &["host1"])?;
        joined(a, 1, b, 2)?;
        let key = |host: &Host| -> Result<Value> {
            Ok(peer(host, 1)?.context("node 1 is not known")?["public_key"].clone())
        };
        let holder = key(b)?;
        // The later node dials the holder of its ID and a node that knows the holder.
        start(c, "1", TOKEN, &["host1", "host2"])?;
        let advice = "run `overnode reset` on one of them, then launch it with an ID of its own";
        let twice = ["ID 1 is used twice", "host1", "host3", advice];
        for host in [a, b] {
            told(host, Side::WasCalled, c, &twice)?;
            told(c, Side::Called, host, &twice)?;
        }
        ensure!(key(b)? == holder && key(a)? == holder, "the later node was not refused");
        ensure!(list(&c.status()?, "peers")?.len() == 1, "the later node was admitted");
        c.overnode(&["reset"])?.success()?;
        start(c, "3", TOKEN, &["host1", "host2"])?;
        joined(a, 1, c, 3)?;
        joined(b, 2, c, 3)
    })
}

/// A node of another version: the real code with other version numbers, on a host of the lab.
struct Stranger {
    me: LocalIdentity,
    runtime: Runtime,
}

impl Stranger {
    fn new(versions: (u16, u16)) -> Result<Self> {
        let seed = key::new_secret()?;
        let static_secret = key::exchange_secret(&seed);
        let hello = Hello {
            versions,
            id: NodeId::new(2)?,
            incarnation: 1,
            nickname: "stranger".to_owned(),
            network: Network::default(),
            verifying_key: key::verifying_key(&seed),
            process: 7,
            public_key: key::public_key(&static_secret),
        };
        let me = LocalIdentity { static_secret, cluster_key: key::cluster_key(TOKEN)?, hello };
        Ok(Self { me, runtime: Builder::new_current_thread().enable_all().build()? })
    }

    fn meet(&self, stream: TcpStream, role: Role) -> Result<Refusal> {
        stream.set_nonblocking(true)?;
        let met = self.runtime.block_on(async {
            let stream = tokio::net::TcpStream::from_std(stream)?;
            anyhow::Ok(
                session::connect(stream, role, &self.me, ConnectOptions::default(), |_| Ok(()))
                    .await,
            )
        })?;
        match met {
            Ok(link) => bail!("version {} was negotiated", link.version),
            Err(refusal) => Ok(refusal),
        }
    }
}

#[test]
fn a_version_mismatch_is_reported_on_both_sides_with_the_advice() -> Result<()> {
    in_lab(Lab::new("versions").hosts(2), |lab| {
        let [a, b] = lab.hosts() else { unreachable!() };
        let to = SocketAddr::new(a.address(), 6783);
        let own = format!("{OLDEST_VERSION} to {NEWEST_VERSION}");
        start(a, "1", TOKEN, &[])?;
        let newer = (NEWEST_VERSION + 1, NEWEST_VERSION + 3);
        let older = (OLDEST_VERSION - 1, OLDEST_VERSION - 1);
        let call = |stranger: &Stranger| {
            let stream = b.netns().enter(move || Ok(TcpStream::connect(to)?))?;
            stranger.meet(stream, Role::Initiator)
        };
        for (versions, here, there) in
            [(newer, "this host", "the other host"), (older, "the other host", "this host")]
        {
            let theirs = format!("{} to {}", versions.0, versions.1);
            let refusal = call(&Stranger::new(versions)?)?.to_string();
            let expected = format!(
                "no common protocol version: this node supports {theirs}, the other node {own}; \
                 upgrade overnode on {there}"
            );
            ensure!(refusal == expected, "the dialer gets {refusal:?}");
            let expected = format!(
                "no common protocol version: this node supports {own}, the other node {theirs}; \
                 upgrade overnode on {here}"
            );
            told(a, Side::WasCalled, b, &[&expected])?;
        }
        // The daemon dials.
        let listener = b.netns().enter(|| Ok(TcpListener::bind("0.0.0.0:6783")?))?;
        a.overnode(&["connect", "host2"])?.success()?;
        let refusal = Stranger::new(newer)?.meet(listener.accept()?.0, Role::Responder)?;
        ensure!(
            refusal.to_string().contains("upgrade overnode on the other host"),
            "the listener gets {refusal}"
        );
        told(a, Side::Called, b, &["no common protocol version", "upgrade overnode on this host"])?;
        // The daemon keeps dialing in case a compatible node appears.
        let refusal = Stranger::new(older)?.meet(listener.accept()?.0, Role::Responder)?;
        ensure!(
            refusal.to_string().contains("upgrade overnode on this host"),
            "the listener gets {refusal}"
        );
        told(
            a,
            Side::Called,
            b,
            &["no common protocol version", "upgrade overnode on the other host"],
        )?;
        ensure!(list(&a.status()?, "peers")?.len() == 1, "the node knows others");
        Ok(())
    })
}
