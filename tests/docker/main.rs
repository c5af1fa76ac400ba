//! Tests of hosts with a Docker engine each: containers that are managed with `docker` work across
//! hosts.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "measurements and the logs of nodes and engines"
)]

mod failures;
mod life;
mod load;
mod monitor;
mod names;
mod protocol;
mod support;

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::docker::{Engine, IMAGE};
use lab::{Capture, Host, eventually};

use support::{TIMEOUT, endpoint, endpoints, nothing_left, with_engines};

#[test]
fn containers_of_two_engines_talk() -> Result<()> {
    with_engines("docker-talk", 2, |lab, engines| {
        let [one, two] = engines else { unreachable!() };
        let here = one.run("here", &[])?;
        let there = two.run("there", &[])?;
        ensure!(here != there);
        one.reach("here", &there, TIMEOUT)?;
        two.reach("there", &here, TIMEOUT)?;

        let capture: Capture = lab.capture()?;
        two.docker(&["exec", "--detach", "there", "nc", "-l", "-p", "7000", "-e", "/bin/cat"])?
            .success()?;
        let echoed = eventually(TIMEOUT, || {
            let said = one.exec(
                "here",
                &["sh", "-c", &format!("echo overnode-echo | nc -w 2 {there} 7000")],
            )?;
            ensure!(said == "overnode-echo\n", "the echo is {said:?}");
            Ok(said)
        })?;
        ensure!(!echoed.is_empty());
        let captured = capture.stop()?;
        ensure!(
            captured.containing(b"overnode-echo")?.is_empty(),
            "the containers' payload is readable on the underlay"
        );

        let listed = endpoint(lab.host(1), "here")?;
        ensure!(listed["kind"] == "docker", "{listed}");
        ensure!(listed["image"] == IMAGE, "{listed}");
        ensure!(listed["address"] == format!("{here}/12"), "{listed}");
        ensure!(listed["state"] == "attached", "{listed}");
        ensure!(listed["attached_unix_seconds"].is_u64(), "{listed}");
        let id = one.docker(&["inspect", "--format", "{{.Id}}", "here"])?.success()?;
        ensure!(id.get(..12) == listed["target"].as_str(), "{listed}: {id}");
        let table = one.overnode(&["status", "--endpoints"])?.success()?;
        ensure!(
            table.contains("here") && table.contains(IMAGE) && table.contains(&here),
            "{table}"
        );

        ensure_interface_unchanged(one, "here")?;
        for target in ["here", id.trim()] {
            let complaint = one.overnode(&["detach", target])?.complaint()?;
            let (_, command) = complaint.split_once("run `").context("no command is named")?;
            let (command, _) = command.split_once('`').context("the command has no end")?;
            ensure!(command.starts_with("docker network disconnect "), "{complaint}");
            ensure!(command.ends_with(" here"), "{complaint}");
            // The advice is right.
            let words: Vec<&str> = command.split(' ').skip(1).collect();
            one.docker(&words)?.success()?;
            eventually(TIMEOUT, || {
                let listed = endpoints(lab.host(1))?;
                ensure!(listed.iter().all(|it| it["name"] != "here"), "{listed:?}");
                Ok(())
            })?;
            one.docker(&["network", "connect", "overnode", "here"])?.success()?;
            endpoint(lab.host(1), "here")?;
        }
        let by_hand = [("DOCKER_HOST", format!("unix://{}", one.socket().display()))];
        let by_hand: Vec<(&str, &str)> =
            by_hand.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let attach = lab.host(1).overnode_with(&["attach", "here"], &by_hand)?.complaint()?;
        ensure!(attach.contains("because its engine attached it"), "{attach}");

        // A released address is reused only after all other free ones.
        one.docker(&["restart", "--time", "0", "here"])?.success()?;
        one.reach("here", &there, TIMEOUT)?;
        two.reach("there", &one.address("here")?, TIMEOUT)?;

        for (engine, name) in [(&*one, "here"), (&*two, "there")] {
            engine.docker(&["rm", "--force", name])?.success()?;
        }
        lab.hosts().iter().try_for_each(nothing_left)
    })
}

/// Checks that the container's interface still has what the data plane needs after the engine moved
/// it.
fn ensure_interface_unchanged(engine: &Engine<'_>, name: &str) -> Result<()> {
    let inspect = |what: &str| -> Result<String> {
        Ok(engine.docker(&["inspect", "--format", what, name])?.success()?.trim().to_owned())
    };
    let pid = inspect("{{.State.Pid}}")?;
    let features =
        engine.client("nsenter", &["-t", &pid, "-n", "ethtool", "-k", "overnode0"])?.success()?;
    ensure!(features.contains("generic-receive-offload: on"), "{features}");
    let link = engine.exec(name, &["ip", "link", "show", "overnode0"])?;
    ensure!(link.contains("mtu 1420"), "{link}");
    let mac =
        inspect("{{with index .NetworkSettings.Networks \"overnode\"}}{{.MacAddress}}{{end}}")?;
    ensure!(link.contains(&mac), "{link} instead of {mac}");
    Ok(())
}

/// Tries the features of Docker's own networks together with overnode's network.
#[test]
fn static_addresses_ports_and_further_networks_work() -> Result<()> {
    with_engines("docker-use", 2, |lab, engines| {
        let [one, two] = engines else { unreachable!() };
        let says_no = |engine: &Engine<'_>, words: &[&str], why: &str| -> Result<()> {
            let outcome = engine.docker(words)?;
            ensure!(!outcome.status.success(), "`{}` succeeded", outcome.command);
            ensure!(outcome.stderr.contains(why), "`{}` says: {}", outcome.command, outcome.stderr);
            Ok(())
        };

        // Static addresses, and a chosen MAC address.
        let fixed =
            two.run("fixed", &["--ip", "10.33.7.5", "--mac-address", "02:11:22:33:44:55"])?;
        ensure!(fixed == "10.33.7.5");
        ensure!(endpoint(lab.host(2), "fixed")?["static"] == true);
        let link = two.exec("fixed", &["ip", "link", "show", "overnode0"])?;
        ensure!(link.contains("02:11:22:33:44:55"), "{link}");
        one.run("plain", &[])?;
        one.reach("plain", "10.33.7.5", TIMEOUT)?;
        let run =
            |address| ["run", "--network", "overnode", "--ip", address, IMAGE, "/bin/sleep", "1"];
        says_no(two, &run("10.33.7.5"), "in use")?;
        eventually(TIMEOUT, || says_no(one, &run("10.33.7.5"), "node 2"))?;
        says_no(one, &run("10.40.0.77"), "allocate the addresses of the range themselves")?;

        // A published port, and access to the underlay through the engine.
        let serve = ["--publish", "8080:80"];
        let web = [
            &["run", "--detach", "--network", "overnode", "--name", "web"][..],
            &serve,
            &[IMAGE, "/bin/nc", "-ll", "-p", "80", "-e", "/bin/cat"],
        ]
        .concat();
        one.docker(&web)?.success()?;
        let outside = format!("echo from outside | busybox nc -w 2 {} 8080", lab.host(1).address());
        eventually(TIMEOUT, || {
            let said = lab.host(2).netns().run("sh", &["-c", &outside])?;
            ensure!(said == "from outside\n", "the published port says {said:?}");
            Ok(())
        })?;
        one.reach("plain", &lab.host(2).address().to_string(), TIMEOUT)?;

        // A second network with another driver.
        one.docker(&["network", "create", "beside"])?.success()?;
        one.docker(&["network", "connect", "beside", "plain"])?.success()?;
        one.reach("plain", "10.33.7.5", TIMEOUT)?;
        let routes = one.exec("plain", &["ip", "route"])?;
        ensure!(routes.contains("10.32.0.0/12 dev overnode0"), "{routes}");

        // Further overnode networks are the same network under other names.
        let create = |options: &[&'static str]| {
            [
                &["network", "create", "--driver", "overnode", "--ipam-driver", "overnode"][..],
                options,
            ]
            .concat()
        };
        one.docker(&create(&["second"]))?.success()?;
        one.docker(&create(&["--subnet", "10.32.0.0/12", "third"]))?.success()?;
        says_no(one, &create(&["--subnet", "10.99.0.0/16", "bad"]), "subnet 10.32.0.0/12")?;
        says_no(
            one,
            &create(&["--subnet", "10.32.0.0/12", "--ip-range", "10.32.1.0/24", "bad"]),
            "--ip-range",
        )?;
        says_no(
            one,
            &create(&["--subnet", "10.32.0.0/12", "--gateway", "10.32.0.1", "bad"]),
            "no gateway",
        )?;
        says_no(
            one,
            &["network", "create", "--driver", "overnode", "bad"],
            "--ipam-driver overnode",
        )?;
        let other =
            ["run", "--detach", "--network", "third", "--ip", "10.34.0.9", "--name", "other"];
        one.docker(&[&other[..], &[IMAGE, "/bin/sleep", "100000"]].concat())?.success()?;
        one.reach("plain", "10.34.0.9", TIMEOUT)?;
        two.reach("fixed", "10.34.0.9", TIMEOUT)?;
        says_no(
            one,
            &["network", "connect", "second", "plain"],
            "all overnode networks are one network",
        )?;
        one.reach("plain", "10.33.7.5", TIMEOUT)?;

        // A running container leaves the network and joins it again.
        one.docker(&["network", "disconnect", "third", "other"])?.success()?;
        one.docker(&["network", "connect", "--ip", "10.34.0.9", "third", "other"])?.success()?;
        two.reach("fixed", "10.34.0.9", TIMEOUT)?;

        one.docker(&["rm", "--force", "plain", "web", "other"])?.success()?;
        one.docker(&["network", "rm", "second", "third", "beside"])?.success()?;
        two.docker(&["rm", "--force", "fixed"])?.success()?;
        lab.hosts().iter().try_for_each(nothing_left)
    })
}

#[test]
fn compose_services_of_two_hosts_reach_each_other() -> Result<()> {
    with_engines("docker-compose", 2, |lab, engines| {
        let [one, two] = engines else { unreachable!() };
        let file = |name: &str, services: &str| -> Result<String> {
            let path = lab.folder().join(name);
            let networks = "networks:\n  default:\n    name: overnode\n    external: true\n";
            fs::write(&path, format!("version: \"3.5\"\nservices:\n{services}{networks}"))?;
            Ok(path.to_string_lossy().into_owned())
        };
        let service = |name: &str, rest: &str| {
            format!("  {name}:\n    image: {IMAGE}\n    restart: always\n{rest}")
        };
        let web = file(
            "web.yml",
            &[
                service(
                    "web",
                    concat!(
                        "    command: [/bin/nc, -ll, -p, \"80\", -e, /bin/cat]\n",
                        "    networks: {default: {ipv4_address: 10.35.0.80}}\n"
                    ),
                ),
                service(
                    "beside",
                    concat!(
                        "    command: [/bin/sleep, \"100000\"]\n",
                        "    networks: {default: {aliases: [neighbor]}}\n"
                    ),
                ),
            ]
            .concat(),
        )?;
        let client =
            file("client.yml", &service("client", "    command: [/bin/sleep, \"100000\"]\n"))?;
        let compose = |engine: &Engine<'_>, file: &str, words: &[&str]| {
            engine
                .client("docker-compose", &[&["-f", file, "-p", "app"], words].concat())?
                .success()
        };
        compose(one, &web, &["up", "-d"])?;
        compose(two, &client, &["up", "-d"])?;
        let say = "echo hello | nc -w 2 10.35.0.80 80";
        eventually(TIMEOUT, || {
            let said = compose(two, &client, &["exec", "-T", "client", "sh", "-c", say])?;
            ensure!(said == "hello\n", "the other host's service says {said:?}");
            Ok(())
        })?;
        // Docker's own names and aliases work on one engine.
        let find = |name: &str| {
            compose(one, &web, &["exec", "-T", "web", "ping", "-c", "1", "-W", "2", name])
        };
        find("beside")?;
        find("neighbor")?;
        // So they do on all others, and with all replicas.
        for name in ["web", "beside", "neighbor"] {
            let ping = ["exec", "-T", "client", "ping", "-c", "1", "-W", "2", name];
            eventually(TIMEOUT, || compose(two, &client, &ping).map(drop))?;
        }
        let replicas = |count: usize| -> Result<()> {
            compose(one, &web, &["up", "-d", "--scale", &format!("beside={count}")])?;
            // A change is to be seen within a second. Looking once takes some of it.
            eventually(Duration::from_secs(3), || {
                let look = ["exec", "-T", "client", "nslookup", "beside"];
                let said = compose(two, &client, &look)?;
                let found = said.lines().filter(|it| it.trim().starts_with("Address: 10.")).count();
                ensure!(found == count, "{found} replicas instead of {count}: {said}");
                Ok(())
            })
        };
        replicas(3)?;
        replicas(1)?;
        let names: Vec<String> = endpoints(lab.host(1))?
            .iter()
            .map(|it| it["name"].as_str().map(str::to_owned).context("an endpoint has no name"))
            .collect::<Result<_>>()?;
        ensure!(names.len() == 2 && names.iter().all(|name| name.starts_with("app_")), "{names:?}");
        compose(one, &web, &["down", "--timeout", "0"])?;
        compose(two, &client, &["down", "--timeout", "0"])?;
        lab.hosts().iter().try_for_each(nothing_left)
    })
}

/// Returns whether there is an overnode network with this name.
fn has_network(engine: &Engine<'_>, name: &str) -> Result<bool> {
    let listed =
        engine.docker(&["network", "ls", "--format", "{{.Name}} {{.Driver}}"])?.success()?;
    Ok(listed.lines().any(|line| line == format!("{name} overnode")))
}

fn daemon_is_gone(host: &Host) -> Result<()> {
    eventually(Duration::from_secs(10), || {
        ensure!(host.daemon_pid().is_none(), "the daemon of {} still runs", host.name);
        Ok(())
    })
}
