//! Tests of names: containers find those of all hosts without any option, and the engine's own
//! names keep working.

use std::fs::File;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::docker::{Engine, IMAGE};
use lab::eventually;
use lab::lookups::Lookups;
use nix::sched::{CloneFlags, setns};

use crate::support::{TIMEOUT, with_engines};

/// How soon a change must be visible on all hosts.
const CHANGE: Duration = Duration::from_secs(5);

/// Looks a name up in a container, with its own resolver. Returns the addresses, sorted.
fn lookup(engine: &Engine<'_>, container: &str, name: &str) -> Result<Vec<String>> {
    let outcome = engine.docker(&["exec", container, "nslookup", name])?;
    let answers = outcome.stdout.split_once("\n\n").map_or("", |(_, answers)| answers);
    let addresses = answers.lines().filter_map(|line| line.trim().strip_prefix("Address: "));
    let mut addresses: Vec<String> = addresses.map(|it| it.trim().to_owned()).collect();
    addresses.sort();
    ensure!(!addresses.is_empty(), "{name}: {}{}", outcome.stdout, outcome.stderr);
    Ok(addresses)
}

fn finds(engine: &Engine<'_>, container: &str, name: &str, expected: &[&str]) -> Result<()> {
    let found = lookup(engine, container, name)?;
    ensure!(found == expected, "{name} is {found:?} instead of {expected:?}");
    Ok(())
}

fn find_soon(engine: &Engine<'_>, container: &str, name: &str, expected: &[&str]) -> Result<()> {
    eventually(CHANGE, || finds(engine, container, name, expected))
}

#[test]
fn containers_find_those_of_all_hosts_without_an_option() -> Result<()> {
    with_engines("docker-names", 2, |_, engines| {
        let [one, two] = engines else { unreachable!() };
        let web = one.run("web", &["--network-alias", "www"])?;
        let app = two.run("app", &[])?;
        for name in ["web", "web.overnode.local", "www", "www.overnode.local"] {
            find_soon(two, "app", name, &[&web])?;
            find_soon(one, "web", name, &[&web])?;
        }
        find_soon(one, "web", "app", &[&app])?;

        // The very first query of a container that has just started.
        let first =
            two.docker(&["run", "--rm", "--network", "overnode", IMAGE, "nslookup", "web"])?;
        ensure!(first.stdout.contains(&web), "{}{}", first.stdout, first.stderr);

        // Replicas on both hosts.
        let more = two.run("web2", &["--network-alias", "www"])?;
        let mut both = [web.as_str(), more.as_str()];
        both.sort_unstable();
        find_soon(one, "web", "www", &both)?;
        find_soon(two, "app", "www", &both)?;
        two.docker(&["rm", "--force", "web2"])?.success()?;
        find_soon(two, "app", "www", &[&web])?;
        find_soon(one, "web", "www", &[&web])
    })
}

#[test]
fn names_in_other_networks_of_the_engine_stay_its_own() -> Result<()> {
    with_engines("docker-own-names", 2, |_, engines| {
        let [one, two] = engines else { unreachable!() };
        one.docker(&["network", "create", "inner"])?.success()?;
        let sleep = [IMAGE, "/bin/sleep", "100000"];
        let inner = ["run", "--detach", "--network", "inner", "--name", "db"];
        one.docker(&[&inner[..], &sleep].concat())?.success()?;
        let format = "{{(index .NetworkSettings.Networks \"inner\").IPAddress}}";
        let here = one.docker(&["inspect", "--format", format, "db"])?.success()?;
        let there = two.run("db", &[])?;
        one.run("app", &[])?;
        two.run("other", &[])?;
        find_soon(one, "app", "db", &[&there])?;
        find_soon(two, "other", "db", &[&there])?;
        // The user connects the container to a network that has this name.
        one.docker(&["network", "connect", "inner", "app"])?.success()?;
        find_soon(one, "app", "db", &[here.trim()])?;
        find_soon(one, "app", "db.overnode.local", &[&there])?;
        // A container outside asks its engine only.
        finds(one, "db", "app", &[lookup(one, "db", "app")?[0].as_str()])?;
        ensure!(lookup(one, "db", "other").is_err());
        one.docker(&["network", "disconnect", "overnode", "app"])?.success()?;
        eventually(TIMEOUT, || {
            ensure!(lookup(one, "app", "other").is_err(), "it is still served");
            Ok(())
        })?;
        finds(one, "app", "db", &[here.trim()])
    })
}

#[test]
fn a_container_whose_health_check_fails_leaves_the_answers() -> Result<()> {
    with_engines("docker-health", 2, |_, engines| {
        let [one, two] = engines else { unreachable!() };
        let check = ["--health-cmd", "cat /ok", "--health-interval", "500ms"];
        let options = [&["--network-alias", "www", "--health-retries", "1"], &check[..]].concat();
        let checked = one.run("checked", &options)?;
        let other = two.run("other", &["--network-alias", "www"])?;
        let mut both = [checked.as_str(), other.as_str()];
        both.sort_unstable();
        // The check fails from the start, because there is no such file.
        find_soon(two, "other", "www", &[&other])?;
        find_soon(one, "checked", "www", &[&other])?;
        one.exec("checked", &["sh", "-c", ": > /ok"])?;
        find_soon(two, "other", "www", &both)?;
        find_soon(two, "other", "checked", &[&checked])
    })
}

#[test]
fn no_lookup_fails_while_daemons_and_engines_are_killed() -> Result<()> {
    with_engines("docker-lookups", 2, |lab, engines| {
        let [one, two] = engines else { unreachable!() };
        let web = two.run("web", &[])?;
        one.run("app", &[])?;
        find_soon(one, "app", "web", &[&web])?;
        let pid = one.docker(&["inspect", "--format", "{{.State.Pid}}", "app"])?.success()?;
        let netns = File::open(format!("/proc/{}/ns/net", pid.trim()))?;
        let open = move || -> Result<UdpSocket> {
            setns(&netns, CloneFlags::CLONE_NEWNET)?;
            Ok(UdpSocket::bind("0.0.0.0:0")?)
        };
        let socket = std::thread::scope(|scope| scope.spawn(open).join()).expect("no panic")?;
        let server = (Ipv4Addr::new(127, 0, 0, 11), 53).into();
        let lookups = Lookups::start(socket, server, "web", Duration::from_millis(10))?;
        for host in [lab.host(2), lab.host(1)] {
            host.kill_daemon()?;
            std::thread::sleep(Duration::from_secs(1));
            let engine = if host.number == 1 { &*one } else { &*two };
            engine.overnode(&["resume"])?.success()?;
            std::thread::sleep(Duration::from_secs(3));
        }
        two.kill()?;
        one.kill()?;
        std::thread::sleep(Duration::from_secs(2));
        let outcome = lookups.stop()?;
        ensure!(outcome.failed.is_empty() && outcome.asked > 900, "{outcome:?}");
        Ok(())
    })
}
