//! Tests with two hosts that each run podman.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::podman::{IMAGE, Podman};
use lab::{Host, Lab, eventually};

pub(crate) const TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) fn nothing_left(host: &Host) -> Result<()> {
    eventually(TIMEOUT, || {
        let status = host.status()?;
        ensure!(
            status["endpoints"].as_array().is_some_and(Vec::is_empty),
            "{}",
            status["endpoints"]
        );
        let owners = status["ipam"]["owners"].as_array().into_iter().flatten();
        let active = owners.filter_map(|it| it["active"].as_u64()).next();
        ensure!(active == Some(0), "{} still has {active:?} addresses in use", host.name);
        let left = host.netns().interfaces()?.into_iter().find(|it| it.starts_with("veth"));
        ensure!(left.is_none(), "{left:?} is left");
        Ok(())
    })
}

/// Runs a test with podman and a node on each of two hosts. Prints the nodes' logs if it fails.
pub(crate) fn with_podmans(
    name: &str,
    test: impl FnOnce(&Lab, &Podman<'_>, &Podman<'_>) -> Result<()>,
) -> Result<()> {
    let lab = Lab::new(name).hosts(2).build()?;
    let podmans = lab.hosts().iter().map(Podman::prepare).collect::<Result<Vec<_>>>()?;
    let [one, two] = &podmans[..] else { unreachable!() };
    for (id, host) in (1..).zip(lab.hosts()) {
        let id = i32::to_string(&id);
        let words =
            [vec!["launch", "--id", &id, "--token", "podman test", "--no-docker"], lab.targets()]
                .concat();
        host.overnode(&words)?.success()?;
    }
    let result = test(&lab, one, two);
    if result.is_err() {
        for host in lab.hosts() {
            eprintln!("--- {}: overnoded\n{}", host.name, host.log());
        }
    }
    result
}

#[test]
fn containers_of_two_podman_hosts_talk() -> Result<()> {
    with_podmans("cni-podman", story)
}

fn story(lab: &Lab, one: &Podman<'_>, two: &Podman<'_>) -> Result<()> {
    // Two containers start on one host at the same time.
    let (here, beside) = std::thread::scope(|scope| {
        let beside = scope.spawn(|| one.sleep("beside", "overnode", &[]));
        let here = one.sleep("here", "overnode", &[]);
        (here, beside.join())
    });
    let here = here?;
    let beside = beside.map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    ensure!(here != beside);
    let serve = [
        "--detach",
        "--restart",
        "always",
        "--publish",
        "8080:80",
        "--network",
        "overnode",
        "--name",
        "there",
    ];
    let server = ["/bin/nc", "-ll", "-p", "80", "-e", "/bin/cat"];
    two.run(&[&["run"][..], &serve, &[IMAGE], &server].concat())?.success()?;
    let there = two.address("there")?;
    one.reach("here", &there, TIMEOUT)?;
    two.reach("there", &beside, TIMEOUT)?;

    // By name, from the other host.
    let served_by_name = || {
        eventually(TIMEOUT, || {
            let said = one.exec("here", &["/bin/sh", "-c", "echo by name | nc -w 2 there 80"])?;
            ensure!(said == "by name\n", "the server says {said:?}");
            Ok(())
        })
    };
    one.reach("here", "there", TIMEOUT)?;
    served_by_name()?;

    // The published port is reachable from its own host and from the other one, and containers
    // reach the underlay.
    let outside = format!("echo from outside | busybox nc -w 2 {} 8080", lab.host(2).address());
    for host in [lab.host(2), lab.host(1)] {
        eventually(TIMEOUT, || {
            let said = host.netns().run("sh", &["-c", &outside])?;
            ensure!(said == "from outside\n", "the published port says {said:?} on {}", host.name);
            Ok(())
        })?;
    }
    one.reach("here", &lab.host(2).address().to_string(), TIMEOUT)?;

    // A container in the container network only, with a static address.
    let alone = two.sleep("alone", "plain", &["--restart", "always", "--ip", "10.33.4.5"])?;
    two.sleep("once", "overnode", &[])?;
    ensure!(alone == "10.33.4.5");
    one.reach("here", "10.33.4.5", TIMEOUT)?;

    // After a power failure, the runtime starts its containers again without having deleted
    // anything.
    two.lose_power()?;
    lab.host(2).overnode(&["resume"])?.success()?;
    nothing_left(lab.host(2))?;
    // This is what podman-restart.service runs.
    two.run(&["start", "--all", "--filter", "restart-policy=always"])?.success()?;
    let running = two.run(&["ps", "--format", "{{.Names}}"])?.success()?;
    let mut running: Vec<&str> = running.lines().collect();
    running.sort_unstable();
    ensure!(running == ["alone", "there"], "the running containers are {running:?}");
    one.reach("here", "10.33.4.5", TIMEOUT)?;
    one.reach("here", &two.address("there")?, TIMEOUT)?;
    served_by_name()?;

    for (podman, host) in [(one, lab.host(1)), (two, lab.host(2))] {
        podman.run(&["rm", "--all", "--force", "--time", "0"])?.success()?;
        nothing_left(host)?;
    }
    Ok(())
}
