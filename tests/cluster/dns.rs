//! Tests of name resolution as containers see it.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hickory_proto::op::{Message, Metadata, ResponseCode};
use hickory_proto::rr::rdata::{A, SOA, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use lab::lookups::Lookups;
use lab::{Container, Host, Lab, eventually};
use serde_json::Value;

use crate::support::{
    MILLISECOND, TIMEOUT, TOKEN, attached, dns_interface, in_lab, launch, launch_all,
};

/// Result of a query.
#[derive(Debug)]
struct Reply {
    status: String,
    flags: String,
    /// The data of each answer.
    data: Vec<String>,
}

/// Returns the address of a host's name server, which is 10.39.240.0 plus the node's ID.
fn server_of(host: &Host) -> IpAddr {
    IpAddr::from([10, 39, 240, host.number as u8])
}

fn dig_at(container: &Container, server: IpAddr, arguments: &[&str]) -> Result<Reply> {
    let server = format!("@{server}");
    let options = ["+tries=1", "+time=4", "+noall", "+comments", "+answer"];
    let text = container.run("dig", &[&[server.as_str()], &options[..], arguments].concat())?;
    let after = |start: &str, end: char| {
        let rest = text.split_once(start).map(|(_, rest)| rest)?;
        Some(rest.split(end).next().unwrap_or(rest).trim().to_owned())
    };
    let answers = text.lines().filter(|line| !line.starts_with(';') && !line.trim().is_empty());
    Ok(Reply {
        status: after("status: ", ',').with_context(|| format!("dig printed no status: {text}"))?,
        flags: after("flags: ", ';').unwrap_or_default(),
        data: answers
            .map(|line| line.split_whitespace().skip(4).collect::<Vec<_>>().join(" "))
            .collect(),
    })
}

fn dig(host: &Host, container: &Container, arguments: &[&str]) -> Result<Reply> {
    dig_at(container, server_of(host), arguments)
}

fn named(host: &Host, container: &str, name: &str) -> Result<Container> {
    let container = host.container(container)?;
    host.attach(&container, &["--name", name])?;
    Ok(container)
}

/// Waits until a name resolves to exactly these addresses.
fn wait_for(
    host: &Host,
    from: &Container,
    name: &str,
    addresses: &[IpAddr],
    limit: Duration,
) -> Result<()> {
    let wanted: BTreeSet<String> = addresses.iter().map(IpAddr::to_string).collect();
    let status = if wanted.is_empty() { "NXDOMAIN" } else { "NOERROR" };
    eventually(limit, || {
        let reply = dig(host, from, &[name])?;
        let found: BTreeSet<String> = reply.data.iter().cloned().collect();
        ensure!(reply.status == status && found == wanted, "{name} on {}: {reply:?}", host.name);
        Ok(())
    })
}

fn dns(host: &Host) -> Result<Value> {
    Ok(host.status()?["dns"].clone())
}

#[test]
fn containers_find_each_other_by_name() -> Result<()> {
    in_lab(Lab::new("names").hosts(2), |lab| {
        launch_all(lab)?;
        let [one, two] = [lab.host(1), lab.host(2)];
        let here = named(one, "w1", "Web")?;
        let there = named(two, "w2", "web.overnode.local")?;
        let client = attached(one, "client")?;
        let both = [here.address(), there.address()];
        wait_for(one, &client, "web.overnode.local", &both, TIMEOUT)?;
        wait_for(two, &there, "web.weave.local", &both, TIMEOUT)?;

        // The asker's own host comes first, and a name needs no domain.
        for (host, from, near) in [(one, &client, &here), (two, &there, &there)] {
            for name in ["web.overnode.local", "web"].repeat(10) {
                let reply = dig(host, from, &[name])?;
                assert_eq!(reply.data[0], near.address().to_string(), "{name}: {reply:?}");
            }
        }

        let reply = dig(one, &client, &["WEB.overnode.local", "+tcp"])?;
        assert_eq!((reply.status.as_str(), reply.data.len()), ("NOERROR", 2), "{reply:?}");
        assert!(reply.flags.split(' ').any(|flag| flag == "aa"), "{reply:?}");
        assert!(reply.flags.split(' ').any(|flag| flag == "ra"), "{reply:?}");
        for kind in ["AAAA", "TXT", "HTTPS"] {
            let reply = dig(one, &client, &["web.overnode.local", kind])?;
            assert_eq!(
                (reply.status.as_str(), reply.data.len()),
                ("NOERROR", 0),
                "{kind}: {reply:?}"
            );
        }
        for kind in ["A", "AAAA"] {
            let reply = dig(one, &client, &["nobody.overnode.local", kind])?;
            assert_eq!(
                (reply.status.as_str(), reply.data.len()),
                ("NXDOMAIN", 0),
                "{kind}: {reply:?}"
            );
        }
        for address in both {
            let reply = dig(two, &there, &["-x", &address.to_string()])?;
            assert_eq!(reply.data, ["web.overnode.local."], "{address}: {reply:?}");
        }
        let reply = dig(two, &there, &["-x", &client.address().to_string()])?;
        assert_eq!(
            (reply.status.as_str(), reply.data.len()),
            ("NXDOMAIN", 0),
            "an unnamed container has a name: {reply:?}"
        );

        // The C library's resolver, with the configuration from docs/guide/dns.md.
        let folder = std::path::Path::new("/etc/netns").join(client.netns().name());
        std::fs::create_dir_all(&folder)?;
        let written = std::fs::write(
            folder.join("resolv.conf"),
            format!("nameserver {}\nsearch overnode.local\n", server_of(one)),
        );
        let found = written.map_err(anyhow::Error::from).and_then(|()| {
            let mut getent = std::process::Command::new("ip");
            getent.args(["netns", "exec", client.netns().name(), "getent", "ahostsv4", "web"]);
            Ok(String::from_utf8(getent.output()?.stdout)?)
        });
        std::fs::remove_dir_all(&folder)?;
        let found = found?;
        assert!(both.iter().all(|address| found.contains(&address.to_string())), "{found}");

        let status = dns(one)?;
        assert_eq!(status["serving"], true);
        assert_eq!(status["address"], "10.39.240.1");
        assert_eq!(status["domain"], "overnode.local");
        assert!(status["queries"].as_u64() > Some(40), "{status}");
        let entries = status["entries"].as_array().context("no entries")?;
        let found: Vec<_> =
            entries.iter().map(|it| (&it["name"], &it["address"], &it["node"])).collect();
        assert_eq!(entries.len(), 2, "{found:?}");
        let shown = one.overnode(&["status", "--dns"])?.success()?;
        let row = format!("web   {}  2(host2)  reachable", there.address());
        assert!(shown.contains("at 10.39.240.1, under overnode.local and weave.local"), "{shown}");
        assert!(
            shown.lines().any(|line| line.split_whitespace().eq(row.split_whitespace())),
            "{shown}"
        );

        two.detach(&there)?;
        wait_for(one, &client, "web.overnode.local", &[here.address()], TIMEOUT)?;
        drop(here);
        wait_for(one, &client, "web.overnode.local", &[], TIMEOUT)
    })
}

#[test]
fn the_name_server_serves_only_local_containers_and_exposes_nothing() -> Result<()> {
    in_lab(Lab::new("dns-reach").hosts(2), |lab| {
        launch_all(lab)?;
        let [one, two] = [lab.host(1), lab.host(2)];
        let (client, other) = (named(one, "c", "client")?, attached(two, "other")?);
        client.reach(other.address(), TIMEOUT)?;
        wait_for(one, &client, "client.overnode.local", &[client.address()], TIMEOUT)?;
        wait_for(two, &other, "client.overnode.local", &[client.address()], TIMEOUT)?;
        // Another node's server does not answer.
        dig_at(&client, server_of(two), &["client.overnode.local", "+time=1"])
            .expect_err("the name server of another node answers");
        // No server is bound to the host's own address, and the host does not reach the node's
        // server either.
        for address in [server_of(one), one.address()] {
            let refused = one.netns().enter(|| {
                let socket = UdpSocket::bind("0.0.0.0:0")?;
                socket.set_read_timeout(Some(Duration::from_millis(700)))?;
                let query = [
                    &[1, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..],
                    b"\x06client\x08overnode\x05local\0\0\x01\0\x01",
                ];
                let sent = socket.send_to(&query.concat(), (address, 53));
                Ok(sent.is_err() || socket.recv(&mut [0; 512]).is_err())
            })?;
            assert!(refused, "{address} answers queries of the host");
        }
        // Only port 53 is open at the node's address. The daemon's other ports and the host's ports
        // are not.
        let listener = one.netns().enter(|| Ok(TcpListener::bind("0.0.0.0:8080")?))?;
        client.netns().enter(|| {
            for port in [8080, 6783, 6784, 22, 54] {
                let place = SocketAddr::new(server_of(one), port);
                let error =
                    TcpStream::connect_timeout(&place, Duration::from_secs(5)).err().with_context(
                        || format!("port {port} of the node's address is open to containers"),
                    )?;
                ensure!(error.kind() == ErrorKind::ConnectionRefused, "port {port}: {error}");
            }
            Ok(())
        })?;
        drop(listener);
        Ok(())
    })
}

#[test]
fn names_are_added_and_removed_by_hand() -> Result<()> {
    in_lab(Lab::new("dns-add").hosts(2), |lab| {
        launch_all(lab)?;
        let [one, two] = [lab.host(1), lab.host(2)];
        let clients = [attached(one, "c")?, attached(two, "c")?];
        let [first, second, third]: [IpAddr; 3] =
            ["192.0.2.1", "192.0.2.2", "2001:db8::3"].map(|text| text.parse().expect("an address"));
        let said = one.overnode(&["dns-add", "db", "192.0.2.1", "2001:db8::3"])?.success()?;
        assert_eq!(said, "db.overnode.local: added on this node: 192.0.2.1, 2001:db8::3\n");
        two.overnode(&["dns-add", "DB.overnode.local", "192.0.2.2"])?.success()?;
        for (host, client) in [one, two].into_iter().zip(&clients) {
            wait_for(host, client, "db.overnode.local", &[first, second], TIMEOUT)?;
            assert_eq!(
                dig(host, client, &["db.overnode.local", "AAAA"])?.data,
                [third.to_string()]
            );
            assert_eq!(dig(host, client, &["-x", "192.0.2.2"])?.data, ["db.overnode.local."]);
            let found = host.overnode(&["dns-lookup", "db"])?.success()?;
            assert_eq!(
                found.lines().collect::<BTreeSet<_>>(),
                ["192.0.2.1", "192.0.2.2", "2001:db8::3"].into()
            );
        }

        for (arguments, code, expected) in [
            (
                &["dns-remove", "db", "192.0.2.2"][..],
                1,
                "db has no address 192.0.2.2 that was added on this node",
            ),
            (&["dns-remove", "web"], 1, "no name web was added on this node"),
            (&["dns-lookup", "web"], 1, "web.overnode.local has no address"),
            (&["dns-add", "a..b", "192.0.2.1"], 2, "is not a valid DNS name"),
            (&["dns-add", "*", "192.0.2.1"], 2, "is not a valid DNS name"),
            (&["dns-add", "db", "0.0.0.0"], 2, "cannot point to 0.0.0.0"),
            (&["dns-add", "db", "127.0.0.1"], 2, "cannot point to 127.0.0.1"),
        ] {
            let complaint = one.overnode(arguments)?.failure(code)?;
            assert!(complaint.contains(expected), "{arguments:?}: {complaint}");
        }

        // Names survive a restart of the daemon.
        one.kill_daemon()?;
        one.overnode(&["resume"])?.success()?;
        wait_for(one, &clients[0], "db.overnode.local", &[first, second], TIMEOUT)?;
        wait_for(two, &clients[1], "db.overnode.local", &[first, second], TIMEOUT)?;

        one.overnode(&["dns-remove", "db", "192.0.2.1"])?.success()?;
        wait_for(two, &clients[1], "db.overnode.local", &[second], TIMEOUT)?;
        assert_eq!(
            dig(two, &clients[1], &["db.overnode.local", "AAAA"])?.data,
            [third.to_string()]
        );
        two.overnode(&["dns-remove", "db"])?.success()?;
        one.overnode(&["dns-remove", "db"])?.success()?;
        for (host, client) in [one, two].into_iter().zip(&clients) {
            wait_for(host, client, "db.overnode.local", &[], TIMEOUT)?;
        }
        for (host, client) in [one, two].into_iter().zip(&clients) {
            host.detach(client)?;
            host.overnode(&["reset"])?.success()?;
            assert_eq!(host.remains()?, [""; 0]);
        }
        Ok(())
    })
}

#[test]
fn names_of_an_unreachable_node_are_in_doubt_and_removed_ones_stay_gone() -> Result<()> {
    in_lab(Lab::new("dns-cut").hosts(3), |lab| {
        launch_all(lab)?;
        let [one, two, three] = [lab.host(1), lab.host(2), lab.host(3)];
        let web = named(one, "w", "web")?;
        let [near, far] = [attached(two, "c")?, attached(three, "c")?];
        let shared: IpAddr = "192.0.2.3".parse()?;
        for name in ["stays", "goes"] {
            one.overnode(&["dns-add", name, "192.0.2.1"])?.success()?;
        }
        two.overnode(&["dns-add", "stays", "192.0.2.3"])?.success()?;
        let kept: [IpAddr; 2] = ["192.0.2.1".parse()?, shared];
        for (host, client) in [(two, &near), (three, &far)] {
            wait_for(host, client, "web.overnode.local", &[web.address()], TIMEOUT)?;
            wait_for(host, client, "goes.overnode.local", &[kept[0]], TIMEOUT)?;
            wait_for(host, client, "stays.overnode.local", &kept, TIMEOUT)?;
        }

        let began = Instant::now();
        lab.cut(one, two)?;
        lab.cut(one, three)?;
        for (host, client) in [(two, &near), (three, &far)] {
            eventually(TIMEOUT, || {
                let reply = dig(host, client, &["web.overnode.local"])?;
                ensure!(reply.status == "SERVFAIL", "web on {}: {reply:?}", host.name);
                Ok(())
            })?;
            wait_for(host, client, "stays.overnode.local", &[shared], TIMEOUT)?;
        }
        let left = began.elapsed();
        assert!(left < Duration::from_secs(12), "{left:?}");
        // The status still shows the names, marked as those of an unreachable node.
        let entries = dns(two)?["entries"].as_array().context("no entries")?.clone();
        let lost = entries.iter().find(|it| it["name"] == "web").context("web is not shown")?;
        assert_eq!(lost["reachable"], false);

        one.overnode(&["dns-remove", "goes"])?.success()?;
        lab.heal(one, two)?;
        lab.heal(one, three)?;
        let began = Instant::now();
        let mut is_back = [false; 2];
        // From here on, no node may answer for the removed name, although the others still remember
        // it.
        while began.elapsed() < TIMEOUT * 2 && is_back != [true; 2] {
            for (place, (host, client)) in [(two, &near), (three, &far)].into_iter().enumerate() {
                is_back[place] = dig(host, client, &["web.overnode.local"])?.status == "NOERROR";
                if is_back[place] {
                    let reply = dig(host, client, &["goes.overnode.local"])?;
                    assert_eq!(reply.status, "NXDOMAIN", "{}: {reply:?}", host.name);
                }
            }
        }
        let back = began.elapsed();
        assert_eq!(is_back, [true; 2], "the names do not return");
        for _ in 0..20 {
            for (host, client) in [(two, &near), (three, &far)] {
                let reply = dig(host, client, &["goes.overnode.local"])?;
                assert_eq!(reply.status, "NXDOMAIN", "{}: {reply:?}", host.name);
            }
            std::thread::sleep(100 * MILLISECOND);
        }
        wait_for(three, &far, "stays.overnode.local", &kept, TIMEOUT)?;
        let _ = writeln!(
            std::io::stderr(),
            "names were in doubt after {left:?} and returned after {back:?}"
        );
        Ok(())
    })
}

/// Looks a name up from a container at 100 a second, at the name server of its host.
fn look_up(host: &Host, from: &Container, name: &str) -> Result<Lookups> {
    let socket = from.netns().enter(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
    Lookups::start(socket, (server_of(host), 53).into(), name, 10 * MILLISECOND)
}

#[test]
fn no_lookup_fails_while_daemons_restart() -> Result<()> {
    in_lab(Lab::new("dns-restart").hosts(2), |lab| {
        launch_all(lab)?;
        let [one, two] = [lab.host(1), lab.host(2)];
        let web = named(two, "w", "web")?;
        let client = attached(one, "c")?;
        wait_for(one, &client, "web.overnode.local", &[web.address()], TIMEOUT)?;
        use nix::sys::signal::{Signal, kill};
        let orders = [(two, Signal::SIGKILL), (one, Signal::SIGKILL), (two, Signal::SIGTERM)];
        for (host, signal) in orders.into_iter().chain([(one, Signal::SIGTERM)]) {
            let lookups = look_up(one, &client, "web.overnode.local")?;
            std::thread::sleep(300 * MILLISECOND);
            let pid = host.daemon_pid().context("no daemon")?;
            kill(nix::unistd::Pid::from_raw(pid), signal)?;
            eventually(TIMEOUT, || {
                let is_gone = host.daemon_pid().is_none();
                ensure!(is_gone, "the daemon still runs");
                Ok(())
            })?;
            std::thread::sleep(Duration::from_secs(1));
            host.overnode(&["resume"])?.success()?;
            std::thread::sleep(Duration::from_secs(4));
            let outcome = lookups.stop()?;
            let _ = writeln!(std::io::stderr(), "{} {signal}: {outcome:?}", host.name);
            ensure!(outcome.failed.is_empty() && outcome.asked > 300, "{outcome:?}");
            let is_own = host.number == one.number;
            ensure!(is_own || outcome.slow == 0, "another host's daemon matters: {outcome:?}");
        }
        Ok(())
    })
}

#[test]
fn names_are_served_while_packets_pass_and_control_connections_do_not() -> Result<()> {
    in_lab(Lab::new("dns-no-tcp").hosts(2), |lab| {
        launch_all(lab)?;
        let [one, two] = [lab.host(1), lab.host(2)];
        let web = named(two, "w", "web")?;
        let client = attached(one, "c")?;
        wait_for(one, &client, "web.overnode.local", &[web.address()], TIMEOUT)?;
        let lookups = look_up(one, &client, "web.overnode.local")?;
        for host in [one, two] {
            let rules = "add table inet cut; \
                         add chain inet cut input { type filter hook input priority 0; }; \
                         add rule inet cut input tcp dport 6783 drop; \
                         add rule inet cut input tcp sport 6783 drop";
            host.netns().run("nft", &[rules])?;
        }
        // The connection is given up after 15 s.
        eventually(TIMEOUT * 2, || {
            let connections = one.status()?["connections"].clone();
            let is_up = |it: &Value| it["state"] == "established";
            let up = connections.as_array().into_iter().flatten().filter(|it| is_up(it)).count();
            ensure!(up == 0, "still connected: {connections}");
            Ok(())
        })?;
        std::thread::sleep(Duration::from_secs(12));
        let outcome = lookups.stop()?;
        ensure!(outcome.failed.is_empty() && outcome.asked > 1000, "{outcome:?}");
        Ok(())
    })
}

/// A resolver in the underlay that knows a few names.
struct Resolver {
    stop: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Resolver {
    fn start(host: &Host, address: IpAddr) -> Result<Self> {
        let (udp, tcp) = host
            .netns()
            .enter(|| Ok((UdpSocket::bind((address, 53))?, TcpListener::bind((address, 53))?)))
            .with_context(|| format!("cannot start a resolver at {address}"))?;
        udp.set_read_timeout(Some(50 * MILLISECOND))?;
        tcp.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::new(AtomicUsize::new(0));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&asked));
        let datagrams = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((len, from)) = udp.recv_from(&mut buffer) else { continue };
                count.fetch_add(1, Ordering::Relaxed);
                if let Some(answer) = answer(&buffer[..len], false) {
                    let _ = udp.send_to(&answer, from);
                }
            }
        });
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&asked));
        let connections = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let Ok((mut stream, _)) = tcp.accept() else {
                    std::thread::sleep(5 * MILLISECOND);
                    continue;
                };
                let mut converse = || -> Result<()> {
                    stream.set_nonblocking(false)?;
                    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
                    let mut length = [0; 2];
                    stream.read_exact(&mut length)?;
                    let mut query = vec![0; u16::from_be_bytes(length).into()];
                    stream.read_exact(&mut query)?;
                    count.fetch_add(1, Ordering::Relaxed);
                    let answer = answer(&query, true).context("no answer")?;
                    stream
                        .write_all(&[&(answer.len() as u16).to_be_bytes()[..], &answer].concat())?;
                    Ok(())
                };
                let _ = converse();
            }
        });
        Ok(Self { stop, asked, threads: vec![datagrams, connections] })
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn answer(query: &[u8], whole: bool) -> Option<Vec<u8>> {
    let query = Message::from_vec(query).ok()?;
    let question = query.queries.first()?;
    let mut reply = Message::response(query.metadata.id, query.metadata.op_code);
    reply.metadata = Metadata::response_from_request(&query.metadata);
    reply.metadata.recursion_available = true;
    reply.add_query(question.clone());
    let name = question.name().clone();
    let record = |data: RData| Record::from_rdata(name.clone(), 300, data);
    let a = |a, b, c, d| RData::A(A(Ipv4Addr::new(a, b, c, d)));
    match (name.to_ascii().to_lowercase().as_str(), question.query_type()) {
        ("plain.example.", RecordType::A) => _ = reply.add_answer(record(a(192, 0, 2, 80))),
        ("big.example.", RecordType::TXT) if !whole => reply.metadata.truncation = true,
        ("big.example.", RecordType::TXT) => {
            for number in 0..60 {
                let text = format!("{number:03} {}", "x".repeat(100));
                reply.add_answer(record(RData::TXT(TXT::new(vec![text]))));
            }
        }
        ("rebind.example.", RecordType::A) => {
            reply.add_answer(record(a(10, 40, 0, 1)));
        }
        ("mixed.example.", RecordType::A) => {
            reply.add_answer(record(a(10, 40, 0, 1))).add_answer(record(a(192, 0, 2, 81)));
        }
        ("silent.example.", _) => return None,
        ("plain.example.", _) => {}
        ("broken.example.", _) => reply.metadata.response_code = ResponseCode::ServFail,
        _ => {
            reply.metadata.response_code = ResponseCode::NXDomain;
            let zone = Name::from_ascii("example.").ok()?;
            let soa = SOA::new(zone.clone(), zone.clone(), 1, 2, 3, 4, 5);
            reply.add_authority(Record::from_rdata(zone, 5, RData::SOA(soa)));
        }
    }
    reply.to_vec().ok()
}

#[test]
fn other_names_are_forwarded_to_the_hosts_resolvers() -> Result<()> {
    in_lab(Lab::new("dns-upstream").hosts(1), |lab| {
        let host = lab.host(1);
        let resolver = Resolver::start(host, host.address())?;
        // There is no resolver at this address.
        host.write_resolv_conf("nameserver 192.0.2.250\n")?;
        launch(lab, host)?;
        let client = named(host, "c", "client")?;
        wait_for(host, &client, "client.overnode.local", &[client.address()], TIMEOUT)?;
        assert_eq!(dig(host, &client, &["plain.example", "+time=8"])?.status, "SERVFAIL");
        // The host moves to another network.
        host.write_resolv_conf(&format!("search example\nnameserver {}\n", host.address()))?;
        eventually(TIMEOUT, || {
            let reply = dig(host, &client, &["plain.example", "+time=8"])?;
            ensure!(reply.data == ["192.0.2.80"], "{reply:?}");
            Ok(())
        })?;
        assert_eq!(dns(host)?["upstream"][0], host.address().to_string());

        let reply = dig(host, &client, &["plain.example"])?;
        assert!(!reply.flags.split(' ').any(|flag| flag == "aa"), "{reply:?}");
        assert_eq!(dig(host, &client, &["plain.example", "+tcp"])?.data, ["192.0.2.80"]);
        let reply = dig(host, &client, &["plain.example", "AAAA"])?;
        assert_eq!((reply.status.as_str(), reply.data.len()), ("NOERROR", 0), "{reply:?}");
        assert_eq!(dig(host, &client, &["unknown.example"])?.status, "NXDOMAIN");
        assert_eq!(dig(host, &client, &["broken.example"])?.status, "SERVFAIL");
        assert_eq!(dig(host, &client, &["silent.example", "+time=10"])?.status, "SERVFAIL");
        // dig repeats a query over TCP when the answer is truncated, and so does the node.
        let reply = dig(host, &client, &["big.example", "TXT"])?;
        assert_eq!((reply.status.as_str(), reply.data.len()), ("NOERROR", 60), "{reply:?}");
        let cut = dig(host, &client, &["big.example", "TXT", "+ignore"])?;
        assert!(cut.flags.split(' ').any(|flag| flag == "tc") && cut.data.len() < 60, "{cut:?}");
        // No name from upstream resolvers may resolve to the container network.
        let reply = dig(host, &client, &["rebind.example"])?;
        assert!(reply.data.is_empty(), "{reply:?}");
        assert_eq!(dig(host, &client, &["mixed.example"])?.data, ["192.0.2.81"]);

        // Queries for our own zones are not forwarded.
        let before = resolver.asked();
        for arguments in [
            &["client.overnode.local"][..],
            &["nobody.overnode.local"],
            &["nobody.weave.local", "AAAA"],
            &["overnode.local", "NS"],
            &["-x", "10.40.99.99"],
            &["plain.example", "+norecurse"],
            &["overnode.local", "AXFR"],
        ] {
            let _ = dig(host, &client, arguments);
        }
        assert_eq!(resolver.asked(), before);
        let status = dns(host)?;
        assert!(
            status["forwarded"].as_u64() >= Some(10) && status["failed"].as_u64() >= Some(3),
            "{status}"
        );
        Ok(())
    })
}

#[test]
fn hostile_queries_do_no_harm() -> Result<()> {
    const QUERY: &[u8] =
        b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x06client\x08overnode\x05local\0\0\x01\0\x01";
    in_lab(Lab::new("dns-hostile").hosts(1), |lab| {
        let host = lab.host(1);
        // This resolver never answers, so every forwarded query waits.
        let _silent = host.netns().enter(|| Ok(UdpSocket::bind((host.address(), 53))?))?;
        host.write_resolv_conf(&format!("nameserver {}\n", host.address()))?;
        launch(lab, host)?;
        let (client, hostile) = (named(host, "c", "client")?, attached(host, "hostile")?);
        wait_for(host, &client, "client.overnode.local", &[client.address()], TIMEOUT)?;
        let place = SocketAddr::new(server_of(host), 53);
        let pid = host.daemon_pid().context("no daemon")?;
        let held = hostile.netns().enter(|| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(place)?;
            socket.set_read_timeout(Some(Duration::from_secs(5)))?;
            for length in 0..QUERY.len() {
                socket.send(&QUERY[..length])?;
            }
            for seed in 0..2000_u32 {
                let mut bytes = QUERY.to_vec();
                let at = seed as usize % bytes.len();
                bytes[at] = bytes[at].wrapping_add((seed / 37) as u8 + 1);
                socket.send(&bytes)?;
            }
            socket.send(&[0; 65507])?;
            socket.send(&[QUERY, &[0xff; 9000]].concat())?;
            // Queries that are never answered, more of them than may wait.
            for number in 0..500_u16 {
                let mut query = QUERY.to_vec();
                query[..2].copy_from_slice(&number.to_be_bytes());
                query[22..27].copy_from_slice(format!("{number:05}").as_bytes());
                socket.send(&query)?;
            }
            let mut held = Vec::new();
            for _ in 0..64 {
                let mut stream = TcpStream::connect_timeout(&place, Duration::from_secs(5))?;
                let _ = stream.write_all(&[0xff, 0xff, 1, 2, 3]);
                held.push(stream);
            }
            Ok(held)
        })?;
        // Other containers are still served, over UDP and over TCP.
        for arguments in [&["client.overnode.local"][..], &["client.overnode.local", "+tcp"]] {
            let reply = dig(host, &client, arguments)?;
            assert_eq!(reply.data, [client.address().to_string()]);
        }
        // Idle connections are closed, and too many connections from one container are refused.
        let mut ended = 0;
        for mut stream in held {
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            match stream.read(&mut [0; 16]) {
                Ok(0) => ended += 1,
                Ok(_) => bail!("a malformed query was answered"),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => ended += 1,
                Err(error) => return Err(error.into()),
            }
        }
        assert_eq!(ended, 64);
        assert_eq!(
            dig(host, &hostile, &["client.overnode.local"])?.data,
            [client.address().to_string()]
        );
        assert_eq!(host.daemon_pid(), Some(pid), "the daemon died");
        assert!(dns(host)?["refused"].as_u64() > Some(100));
        Ok(())
    })
}

#[test]
fn launch_sets_the_domain_and_can_disable_the_name_server() -> Result<()> {
    in_lab(Lab::new("dns-options").hosts(2), |lab| {
        let [one, two] = [lab.host(1), lab.host(2)];
        let launch = |host: &Host, more: &[&str]| {
            let id = host.number.to_string();
            let words = [&["launch", "--id", &id, "--token", TOKEN, one.target()], more].concat();
            host.overnode(&words)
        };
        launch(one, &["--dns-domain", "Lab.Example."])?.success()?;
        launch(two, &["--no-dns"])?.success()?;
        let client = named(one, "c", "web")?;
        wait_for(one, &client, "web.lab.example", &[client.address()], TIMEOUT)?;
        wait_for(one, &client, "web.weave.local", &[client.address()], TIMEOUT)?;
        assert_eq!(
            dig(one, &client, &["-x", &client.address().to_string()])?.data,
            ["web.lab.example."]
        );
        let said = launch(one, &["--dns-domain", "other.example"])?.success()?;
        assert!(said.contains("restarted with dns-domain=other.example"), "{said}");
        wait_for(one, &client, "web.other.example", &[client.address()], TIMEOUT)?;
        let said = launch(one, &["--dns-domain", "lab.example"])?.success()?;
        assert!(said.contains("restarted with dns-domain=lab.example"), "{said}");
        let said = launch(one, &["--dns-domain", "lab.example"])?.success()?;
        assert!(said.contains("already running"), "{said}");

        let other = named(two, "c", "other")?;
        wait_for(one, &client, "other.lab.example", &[other.address()], TIMEOUT)?;
        dig_at(&other, server_of(two), &["web.overnode.local", "+time=1"])
            .expect_err("the name server runs despite --no-dns");
        assert_eq!(dns(two)?["serving"], false);
        eventually(TIMEOUT, || {
            let found = two.overnode(&["dns-lookup", "web"])?.success()?;
            ensure!(found == format!("{}\n", client.address()), "{found}");
            Ok(())
        })?;
        assert!(
            two.overnode(&["status", "--dns"])?.success()?.contains("not served to containers")
        );
        assert!(!two.netns().interfaces()?.contains(&dns_interface(two)));

        // The interface of the name server is removed from outside, and comes back.
        one.netns().ip(&["link", "del", &dns_interface(one)])?;
        wait_for(one, &client, "web.lab.example", &[client.address()], TIMEOUT)?;
        Ok(())
    })
}
