//! Tests the command against a node with canned answers, through the real server and socket.

mod common;
mod node;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::thread;
use std::time::Duration;

use common::{Outcome, install, install_overnode, overnode};
use node::{Canned, sample};
use overnode_daemon::api::{
    ApiError, Attached, Host as Target, LaunchOutcome, Launched, Primed, Reply, Request, Targets,
    Version,
};
use serde_json::{Value, json};

const KEY: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";

fn targets(hosts: &[&str]) -> Vec<Target> {
    hosts.iter().map(|host| host.parse().unwrap()).collect()
}

/// Starts a node that answers only `status`.
fn with_status() -> Canned {
    Canned::start(|request| match request {
        Request::Status(()) => Ok(Reply::Status(sample())),
        other => panic!("unexpected: {other:?}"),
    })
}

#[test]
fn status_shows_every_section_with_one_line_per_row() {
    let node = with_status();
    let outcome = node.host.run(&["status"]);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    for expected in [
        "node        1(host1)\n",
        "version     0.1.0, up 3h25m\n",
        "critical  UDP port 6783 is in use",
        "critical  node 3 is unreachable; check that its host and its node are running",
        "warning   packets to node 2 (host2) go through node 3: probes are not answered; \
         check that UDP 6784 passes",
        "warning   the target host9 is not connected: the name does not resolve; run \
         `overnode forget host9` to",
        "\nTargets\nHOST",
        "host9  retrying     -     the name does not resolve (3s ago); next try in 12s\n",
        "\nPeers\nNODE",
        "3         10.39.240.3  unreachable",
        "\nConnections\n",
        "->  192.0.2.12:6783  established  2(host2)  0.340 ms  via 3  1.5%  1420  3h25m  \
         AES-256-GCM 5.3 Gbit/s  Noise_XXpsk3_25519_ChaChaPoly_BLAKE2s  -\n",
        "->  192.0.2.14:6783  failed       4(host4)  -         -      -     -     -      \
         -                       -                                      \
         the token differs (1m0s ago)\n",
        "4.00 KiB  probes are not answered (1m10s ago)\n",
        "\nEndpoints\nADDRESS",
        "10.40.0.1/12  web   ov1a2b3c4d  attached",
        "\nAddresses\n",
        "2(host2)  131072     25.0%   -       unreachable\n",
        "5(host5)  96         0.018%  -       reachable\n",
        "critical  the address 10.40.0.9 is in use here and on node 7",
        "\nLoans\nLENDER    BORROWER  ADDRESSES  STATE               NETWORKS\n",
        "1(host1)  5(host5)  80         reachable           10.41.0.0/26, 10.41.0.64/28\n",
        "2(host2)  5(host5)  16         lender unreachable  10.43.0.0/28\n",
        "\nPackets\nREASON",
        "spoofed  7           dropped  A container",
    ] {
        assert!(outcome.stdout.contains(expected), "{expected:?} is not in\n{}", outcome.stdout);
    }
    assert!(!outcome.stdout.contains('\u{1b}'), "no colors in a pipe");
    assert!(outcome.stdout.is_ascii());
    assert!(
        !outcome.stdout.contains("Connections between nodes"),
        "grows with the square of the cluster"
    );
    assert_eq!(
        outcome.stdout.matches("the address 10.40.0.9 is in use").count(),
        1,
        "reported once"
    );
    let ipam = node.host.run(&["status", "--ipam"]).stdout;
    for expected in [
        "problem  the address 10.40.0.9 is in use here and on node 7",
        "notice   node 3 now lends the quarter of node 4",
    ] {
        assert!(ipam.contains(expected), "{expected:?} is not in\n{ipam}");
    }
}

#[test]
fn tables_fit_the_terminal() {
    let node = with_status();
    for columns in [120_usize, 80, 40] {
        let outcome =
            Outcome::of(node.host.command(&["status"]).env("COLUMNS", columns.to_string()));
        assert_eq!(outcome.code, 0);
        for line in outcome.stdout.lines() {
            assert!(line.chars().count() <= columns, "{columns}: {line:?}\n{}", outcome.stdout);
        }
        for whole in ["host2", "10.40.0.1/12", "spoofed", "established"] {
            assert!(
                outcome.stdout.contains(whole),
                "{columns}: {whole} is broken in\n{}",
                outcome.stdout
            );
        }
    }
}

#[test]
fn sections_are_shown_alone_and_together() {
    let node = with_status();
    let targets = node.host.run(&["status", "--targets"]).stdout;
    assert!(targets.starts_with("HOST"), "{targets}");
    assert_eq!(targets.lines().count(), 4, "{targets}");
    let two = node.host.run(&["status", "--targets", "--endpoints"]).stdout;
    assert!(
        two.starts_with("Targets\n") && two.contains("\nEndpoints\n") && !two.contains("Peers"),
        "{two}"
    );
    let peers = node.host.run(&["status", "--peers"]).stdout;
    assert!(
        peers.contains("Connections between nodes") && peers.contains("WireGuard peers"),
        "{peers}"
    );
    assert!(peers.contains("1(host1)  ->  192.0.2.12:6783  2(host2)  established"), "{peers}");
}

#[test]
fn status_as_json_has_the_selected_sections() {
    let node = with_status();
    let whole: Value = serde_json::from_str(&node.host.run(&["status", "--json"]).stdout).unwrap();
    assert_eq!(whole, serde_json::to_value(sample()).unwrap());
    let some: Value =
        serde_json::from_str(&node.host.run(&["status", "--json", "--ipam", "--peers"]).stdout)
            .unwrap();
    let names: Vec<&String> = some.as_object().unwrap().keys().collect();
    assert_eq!(names, ["external_peers", "ipam", "peers"]);
}

#[test]
fn text_from_other_nodes_cannot_control_the_terminal() {
    let node = Canned::start(|_| {
        let mut status = sample();
        status.peers[1].nickname = "\u{1b}]0;owned\u{7}\nhost".into();
        Ok(Reply::Status(status))
    });
    let shown = node.host.run(&["status", "--peers"]).stdout;
    assert!(shown.contains("2(?]0;owned??host)"), "{shown}");
}

#[test]
fn refusals_become_one_line_and_an_exit_status() {
    for (error, code) in [
        (ApiError::usage("10.99.0.1 is outside the subnet: give another one"), 2),
        (ApiError::refused("this host is already node 1:\n  `overnode reset` it first"), 1),
        (ApiError::missing("host3 is not a target: `overnode status --targets` lists them"), 1),
        (ApiError::failed("the disk is full: make room"), 1),
    ] {
        let expected = error.message.clone();
        let node = Canned::start(move |_| Err(error.clone()));
        for arguments in
            [&["status"][..], &["forget", "host3"], &["inspect"], &["prime"], &["peer", "list"]]
        {
            let outcome = node.host.run(arguments);
            assert_eq!(outcome.code, code, "{arguments:?}");
            assert_eq!(outcome.error_line(), format!("overnode: {expected}"));
            assert_eq!(outcome.stdout, "");
        }
    }
}

#[test]
fn targets_are_passed_on() {
    let node = Canned::start(|request| match request {
        Request::Connect(connect) => {
            assert!(connect.replace);
            assert_eq!(connect.hosts, targets(&["host2", "fd00::1"]));
            Ok(Reply::Connect(Targets { targets: connect.hosts }))
        }
        Request::Forget(forget) => {
            assert_eq!(forget.hosts, targets(&["host2"]));
            Ok(Reply::Forget(Targets { targets: Vec::new() }))
        }
        other => panic!("unexpected: {other:?}"),
    });
    assert_eq!(
        node.host.run(&["connect", "--replace", "host2", "FD00::0:1"]).stdout,
        "targets: host2, fd00::1\n"
    );
    assert_eq!(node.host.run(&["forget", "host2"]).stdout, "targets: none\n");
}

#[test]
fn attach_prints_the_address_and_nothing_else() {
    let node = Canned::start(|request| match request {
        Request::Attach(attach) => {
            assert_eq!(attach.target.to_string(), "netns:blue");
            assert_eq!(attach.netns, None);
            assert_eq!(attach.name.as_deref(), Some("web"));
            assert_eq!(attach.address.unwrap().to_string(), "10.32.0.7/12");
            Ok(Reply::Attach(Attached {
                address: attach.address.unwrap(),
                interface: "overnode0".into(),
                host_interface: "ov1a2b3c4d".into(),
                mtu: 1420,
                mac: None,
            }))
        }
        other => panic!("unexpected: {other:?}"),
    });
    let outcome = node.host.run(&["attach", "netns:blue", "--ip", "10.32.0.7/12", "--name", "web"]);
    assert_eq!(
        (outcome.code, outcome.stdout.as_str(), outcome.stderr.as_str()),
        (0, "10.32.0.7/12\n", "")
    );
}

#[test]
fn containers_are_found_through_their_engine() {
    let node = Canned::start(|request| match request {
        Request::Attach(attach) => Err(ApiError::failed(serde_json::to_string(&attach).unwrap())),
        Request::Detach(detach) => Err(ApiError::failed(detach.target)),
        other => panic!("unexpected: {other:?}"),
    });
    let bin = node.host.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let docker = "#!/bin/sh\nfor last; do :; done\ncase $last in\n\
                  web) echo 'abc123 4711 /web';;\ndead) echo 'abc124 0 /dead';;\n\
                  *) echo \"Error: No such container: $last\" >&2; exit 1;;\nesac\n";
    install(&bin.join("docker"), docker.as_bytes());
    let said = |arguments: &[&str]| {
        let mut command = node.host.command(arguments);
        command.env("PATH", format!("{}:/usr/bin:/bin", bin.display()));
        let outcome = Outcome::of(&mut command);
        assert_eq!(outcome.code, 1, "{outcome:?}");
        outcome.error_line()["overnode: ".len()..].to_owned()
    };
    let sent: Value = serde_json::from_str(&said(&["attach", "web"])).unwrap();
    assert_eq!(sent, json!({"target": "abc123", "netns": {"pid": 4711}, "name": "web"}));
    assert_eq!(
        said(&["attach", "dead"]),
        "container \"dead\" is not running: start it, then attach it"
    );
    let unknown = said(&["attach", "nosuch"]);
    assert!(
        unknown.contains("docker: No such container: nosuch") && unknown.contains("netns:NAME"),
        "{unknown}"
    );
    assert_eq!(said(&["detach", "web"]), "abc123");
    assert_eq!(
        said(&["detach", "gone"]),
        "gone",
        "a container that its engine no longer knows can still be detached"
    );
}

#[test]
fn prime_waits_and_gives_up_in_time() {
    let mut asked = 0;
    let node = Canned::start(move |_| {
        asked += 1;
        Ok(Reply::Prime(Primed {
            ready: asked == 3,
            waiting_for: Some("no node 1 to 4 is reachable".into()),
        }))
    });
    let outcome = node.host.run(&["prime", "--timeout", "0"]);
    assert_eq!(outcome.code, 1);
    assert!(outcome.error_line().contains("no node 1 to 4 is reachable"));
    let outcome = node.host.run(&["prime", "--timeout", "20"]);
    assert_eq!((outcome.code, outcome.stdout.as_str(), outcome.stderr.as_str()), (0, "", ""));
}

#[test]
fn wireguard_peers_are_added_listed_and_removed() {
    let node = Canned::start(|request| match request {
        Request::AddExternalPeer(peer) => {
            assert_eq!(peer.public_key.to_string(), KEY);
            assert_eq!(peer.preshared_key.unwrap().0, [0x41; 32]);
            assert_eq!(peer.endpoint, Some("192.0.2.77:51820".parse().unwrap()));
            assert_eq!(peer.allowed_ips.len(), 2);
            assert_eq!(peer.persistent_keepalive_seconds, Some(25));
            Ok(Reply::AddExternalPeer(overnode_daemon::api::ExternalPeerAdded {
                public_key: peer.public_key,
                port: 6784,
                subnet: "10.32.0.0/12".parse().unwrap(),
                replaced: false,
            }))
        }
        Request::ExternalPeers(()) => Ok(Reply::ExternalPeers(sample().external_peers)),
        Request::RemoveExternalPeer(peer) => {
            assert_eq!(peer.public_key.to_string(), KEY);
            let allowed_ips = vec!["10.39.250.1/32".parse().unwrap()];
            Ok(Reply::RemoveExternalPeer(overnode_daemon::api::ExternalPeerRemoved { allowed_ips }))
        }
        other => panic!("unexpected: {other:?}"),
    });
    let file = node.host.path().join("psk");
    fs::write(&file, "QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE=\n").unwrap();
    let outcome = node.host.run(&[
        "peer",
        "add",
        KEY,
        "--allowed-ips",
        "10.39.250.1/32,10.39.250.2/32",
        "--endpoint",
        "192.0.2.77:51820",
        "--keepalive",
        "25",
        "--preshared-key-file",
        file.to_str().unwrap(),
    ]);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert!(outcome.stdout.contains(&format!("PublicKey = {KEY}\n")), "{outcome:?}");
    assert!(outcome.stdout.contains("AllowedIPs = 10.32.0.0/12\n"), "{outcome:?}");
    let list = node.host.run(&["peer", "list"]).stdout;
    assert!(list.contains("10.39.250.1/32  laptop  established 1m30s"), "{list}");
    let list: Value =
        serde_json::from_str(&node.host.run(&["peer", "list", "--json"]).stdout).unwrap();
    assert_eq!(list[0]["public_key"], KEY);
    assert_eq!(
        node.host.run(&["peer", "remove", KEY]).stdout,
        "removed; its allowed IPs were 10.39.250.1/32\n"
    );
}

#[test]
fn a_running_node_is_not_started_again() {
    let node = Canned::start(|request| match request {
        Request::Version(()) => Ok(Reply::Version(node::version(std::process::id()))),
        Request::Launch(launch) => {
            assert!(!launch.restart);
            assert_eq!(launch.token.expose(), "from the environment");
            Ok(Reply::Launch(Launched {
                outcome: LaunchOutcome::AlreadyRunning,
                id: launch.id,
                nickname: "host1".into(),
                targets: launch.hosts,
                changed: Vec::new(),
            }))
        }
        other => panic!("unexpected: {other:?}"),
    });
    let mut command = node.host.command(&["launch", "--id", "1", "host2", "host3"]);
    let outcome = Outcome::of(command.env("OVERNODE_TOKEN", "from the environment"));
    assert_eq!(
        outcome.stdout, "node 1 (host1): already running; targets: host2, host3\n",
        "{outcome:?}"
    );
    assert_eq!(node.host.run(&["resume"]).stdout, "node 1: already running\n");
    assert!(!node.host.run_dir().join("overnoded.log").exists());
}

/// Starts a node that is already running and accepts any token.
fn with_launch() -> Canned {
    Canned::start(|request| match request {
        Request::Version(()) => Ok(Reply::Version(node::version(std::process::id()))),
        Request::Launch(launch) => Ok(Reply::Launch(Launched {
            outcome: LaunchOutcome::AlreadyRunning,
            id: launch.id,
            nickname: "host1".into(),
            targets: launch.hosts,
            changed: Vec::new(),
        })),
        other => panic!("unexpected: {other:?}"),
    })
}

#[test]
fn a_weak_token_is_accepted_with_a_warning() {
    let node = with_launch();
    for (token, why) in [
        ("my-cluster-password", "the token is easy to guess"),
        ("password", "(this is a top-10 common password)"),
        ("another-password", "finds it within"),
    ] {
        let outcome = node.host.run(&["launch", "--id", "1", "--token", token]);
        assert_eq!(
            (outcome.code, outcome.stdout.as_str()),
            (0, "node 1 (host1): already running; targets: none\n")
        );
        let line = outcome.stderr.strip_suffix('\n').unwrap();
        assert!(line.starts_with("overnode: warning: ") && !line.contains('\n'), "{line}");
        assert!(line.contains(why) && line.contains("`overnode token`"), "{line}");
        assert!(token == "password" || !line.contains(token), "{line}");
    }
}

#[test]
fn a_generated_token_is_accepted_without_a_warning() {
    let node = with_launch();
    let token = node.host.run(&["token"]).stdout;
    let file = node.host.path().join("token");
    fs::write(&file, &token).unwrap();
    let path = file.to_str().unwrap();
    for (mode, is_warned) in [(0o600, false), (0o400, false), (0o640, true), (0o644, true)] {
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        let outcome = node.host.run(&["launch", "--id", "1", "--token-file", path]);
        assert_eq!(outcome.code, 0, "{outcome:?}");
        let warning =
            format!("overnode: warning: other users of this host can read the token in {path}: ");
        assert_eq!(outcome.stderr.starts_with(&warning), is_warned, "{outcome:?}");
        assert_eq!(outcome.stderr.is_empty(), !is_warned, "{outcome:?}");
    }
    let outcome = node.host.run(&["launch", "--id", "1", "--token", token.trim_end()]);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
}

#[test]
fn a_daemon_of_another_version_is_reported() {
    let node = Canned::start(|_| Ok(Reply::Inspect(json!({"peers": "many"}))));
    let outcome = node.host.run(&["status"]);
    assert_eq!(outcome.code, 1);
    assert!(outcome.error_line().contains("another version than this command"), "{outcome:?}");
}

#[test]
fn inspect_prints_the_whole_document() {
    let document = json!({"node": {"id": 1}, "peers": [1, 2, 3]});
    let copy = document.clone();
    let node = Canned::start(move |_| Ok(Reply::Inspect(copy.clone())));
    let outcome = node.host.run(&["inspect"]);
    assert!(outcome.stdout.lines().count() > 5, "not readable for a human: {}", outcome.stdout);
    assert_eq!(serde_json::from_str::<Value>(&outcome.stdout).unwrap(), document);
}

#[test]
fn a_reader_that_closes_the_pipe_causes_no_failure() {
    let node = with_status();
    let mut child =
        node.host.command(&["status"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
}

#[test]
fn the_socket_is_for_its_owner_only() {
    let node = with_status();
    let mode = fs::metadata(node.host.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(node.host.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let copy = install_overnode(dir.path());
    let outcome = Outcome::of(overnode(&copy, &node.host, &["status"]).uid(65534).gid(65534));
    assert_eq!(outcome.code, 1);
    assert!(
        outcome.error_line().contains("permission denied") && outcome.stderr.contains("as root"),
        "{outcome:?}"
    );
}

/// Makes one HTTP exchange by hand. Returns the status code and the body.
fn http(node: &Canned, request: &str, body: &[u8]) -> (u16, Value) {
    let mut stream = UnixStream::connect(node.host.socket()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let head = format!(
        "{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    // A server that refuses a large body need not read it.
    let _ = stream.write_all(body);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer:?}"));
    assert!(head.to_lowercase().contains("content-type: application/json"), "{head}");
    (head.split(' ').nth(1).unwrap().parse().unwrap(), serde_json::from_str(body).unwrap())
}

#[test]
fn malformed_requests_are_refused_in_json() {
    let node = Canned::start(|request| panic!("the node must not get {request:?}"));
    let large = vec![b' '; overnode_daemon::api::BODY_LIMIT + 1];
    let cases: &[(&str, &[u8], u16, &str)] = &[
        ("GET /", b"", 404, "/v1/"),
        ("GET /v2/status", b"", 404, "/v2/status"),
        ("GET /v1/nothing", b"", 404, "/v1/nothing"),
        ("GET /v1/launch", b"", 405, "GET"),
        ("DELETE /v1/status", b"", 405, "DELETE"),
        ("POST /v1/launch", b"", 400, "JSON"),
        ("POST /v1/launch", b"{", 400, "JSON"),
        ("POST /v1/launch", b"\xff\xfe", 400, "JSON"),
        ("POST /v1/launch", b"[]", 400, "JSON"),
        ("POST /v1/launch", b"{\"id\": 0, \"token\": \"t\"}", 400, "from 1 to 4095"),
        ("POST /v1/launch", b"{\"id\": 4096, \"token\": \"t\"}", 400, "from 1 to 4095"),
        ("POST /v1/launch", b"{\"id\": \"one\", \"token\": \"t\"}", 400, "string"),
        ("POST /v1/launch", b"{\"id\": 1, \"token\": \"\"}", 400, "empty"),
        (
            "POST /v1/launch",
            b"{\"id\": 1, \"token\": \"t\", \"nickname\": \"a b\"}",
            400,
            "letters",
        ),
        ("POST /v1/launch", b"{\"id\": 1, \"token\": \"t\", \"color\": 1}", 400, "color"),
        ("POST /v1/connect", b"{\"hosts\": [\"a b\"]}", 400, "host name"),
        ("POST /v1/connect", b"{}", 400, "hosts"),
        ("POST /v1/attach", b"{\"target\": \"pid:0\"}", 400, "pid:NUMBER"),
        (
            "POST /v1/attach",
            b"{\"target\": \"netns:a\", \"address\": \"10.0.0.1/33\"}",
            400,
            "JSON",
        ),
        ("POST /v1/reset", b"{\"force\": \"yes\"}", 400, "boolean"),
        (
            "POST /v1/external-peers",
            b"{\"public_key\": \"x\", \"allowed_ips\": []}",
            400,
            "44 characters",
        ),
        ("POST /v1/launch", &large, 413, "body"),
    ];
    for (request, body, status, expected) in cases {
        let (code, answer) = http(&node, request, body);
        assert_eq!(code, *status, "{request}: {answer}");
        let error = answer["error"].as_str().unwrap();
        assert!(error.contains(expected), "{request}: {error}");
    }
}

#[test]
fn concurrent_requests_are_all_answered() {
    let node = with_status();
    thread::scope(|scope| {
        let asked: Vec<_> =
            (0..50).map(|_| scope.spawn(|| http(&node, "GET /v1/status", b""))).collect();
        for thread in asked {
            assert_eq!(thread.join().unwrap().1["node"]["id"], 1);
        }
    });
}

#[test]
fn a_node_that_ends_during_a_request_is_reported() {
    let node = Canned::start_with(|mut calls| {
        drop(calls.blocking_recv());
        // The first request gets no answer, and nothing receives later ones.
    });
    let outcome = node.host.run(&["status"]);
    assert_eq!(outcome.code, 1);
    assert!(outcome.error_line().contains("stopped before it answered"), "{outcome:?}");
}

#[test]
fn version_describes_the_daemon() {
    let node = Canned::start(|_| {
        Ok(Reply::Version(Version {
            kernel: Some("6.1.0".into()),
            protocols: Some((1, 1)),
            ..node::version(42)
        }))
    });
    let shown = node.host.run(&["version"]).stdout;
    assert!(shown.ends_with("overnoded  9.9.9, process 42, protocol 1, kernel 6.1.0\n"), "{shown}");
}
