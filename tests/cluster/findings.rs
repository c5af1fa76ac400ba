//! Tests of the findings in `status`: a finding exists while its cause exists, names the
//! responsible node, is listed once, and ends when its advice is followed.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::{Host, Lab, eventually};
use serde_json::Value;

use crate::monitor::watch;
use crate::support::{TIMEOUT, attached, in_lab, launch_all, launch_as, list, wait_for_peers};

/// Returns the findings of a host's node, each with its advice.
fn findings(host: &Host) -> Result<Vec<String>> {
    let status = host.status()?;
    let found = list(&status["health"], "findings")?;
    let text = |it: &Value| {
        format!("{}: {}", it["what"].as_str().unwrap_or(""), it["advice"].as_str().unwrap_or(""))
    };
    let found: Vec<String> = found.iter().map(text).collect();
    let mut once = found.clone();
    once.sort();
    once.dedup();
    ensure!(once.len() == found.len(), "{} has duplicate findings: {found:#?}", host.name);
    Ok(found)
}

fn finds(host: &Host, words: &[&str]) -> Result<String> {
    let found = findings(host)?;
    let all = |it: &&String| words.iter().all(|words| it.contains(words));
    match found.iter().find(all) {
        Some(finding) => Ok(finding.clone()),
        None => anyhow::bail!("{} has no finding with {words:?}: {found:#?}", host.name),
    }
}

fn finds_nothing(host: &Host) -> Result<()> {
    let found = findings(host)?;
    ensure!(found.is_empty(), "{} has findings: {found:#?}", host.name);
    Ok(())
}

#[test]
fn status_is_never_all_well_while_the_only_target_is_silent() -> Result<()> {
    in_lab(Lab::new("silent").hosts(2), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        lab.unplug(two)?;
        launch_as(lab, one, 1)?;
        let begun = Instant::now();
        let mut looks = 0;
        // Long enough for several attempts, each of which may take as long as the pauses between
        // them.
        while begun.elapsed() < Duration::from_secs(25) {
            finds(one, &["host2", "overnode forget host2"])?;
            let shown = one.overnode(&["status"])?.success()?;
            ensure!(!shown.contains("all is well"), "in look {looks}: {shown}");
            looks += 1;
            std::thread::sleep(Duration::from_millis(300));
        }
        ensure!(looks > 20, "only {looks} looks");
        // Follow the advice.
        one.overnode(&["forget", "host2"])?.success()?;
        finds_nothing(one)?;
        one.overnode(&["connect", "host2"])?.success()?;
        finds(one, &["host2"])?;
        lab.plug(two)?;
        launch_as(lab, two, 2)?;
        eventually(TIMEOUT * 2, || lab.hosts().iter().try_for_each(finds_nothing))
    })
}

#[test]
fn a_program_that_cannot_be_attached_is_reported_as_a_local_problem() -> Result<()> {
    in_lab(Lab::new("here").hosts(2), |lab| {
        launch_all(lab)?;
        let (one, two) = (lab.host(1), lab.host(2));
        eventually(TIMEOUT * 2, || lab.hosts().iter().try_for_each(finds_nothing))?;
        let watcher = watch(lab, one, &["--events"])?;
        let far = two.address().to_string();
        let ip = |arguments: &[&str]| one.netns().ip(arguments);
        ip(&["tuntap", "add", "tun0", "mode", "tun"])?;
        ip(&["link", "set", "tun0", "up"])?;
        ip(&["route", "add", &far, "dev", "tun0"])?;
        eventually(TIMEOUT * 2, || {
            finds(one, &["this host cannot receive packets", "tun0"])?;
            // Findings that follow from this point to this host and not to the other one.
            let found = findings(one)?;
            for finding in found.iter().filter(|it| it.contains("node 2")) {
                ensure!(finding.contains("this host's own interfaces"), "{finding}");
            }
            ensure!(one.status()?["node"]["state"] == "impaired");
            ensure!(
                found.iter().any(|it| it.contains("node 2")),
                "node 2 is not mentioned: {found:#?}"
            );
            Ok(())
        })?;
        let is_it = |event: &Value| event["problem"].as_str().is_some_and(|it| it.contains("tun0"));
        watcher.wait_for(|event| event["event"] == "problem" && is_it(event))?;
        ip(&["route", "del", &far, "dev", "tun0"])?;
        eventually(TIMEOUT * 3, || lab.hosts().iter().try_for_each(finds_nothing))?;
        watcher.wait_for(|event| event["event"] == "problem-resolved" && is_it(event))?;
        Ok(())
    })
}

#[test]
fn a_wrong_token_is_reported_until_it_is_corrected() -> Result<()> {
    in_lab(Lab::new("mended").hosts(2), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        launch_as(lab, one, 1)?;
        two.overnode(&["launch", "--id", "2", "--token", "another-password", "host1"])?
            .success()?;
        eventually(TIMEOUT, || {
            finds(two, &["host1", "token"])?;
            finds(one, &["the connection from", "was refused", "token"])
        })?;
        two.overnode(&["reset"])?.success()?;
        launch_as(lab, two, 2)?;
        eventually(TIMEOUT * 2, || lab.hosts().iter().try_for_each(finds_nothing))
    })
}

/// Node 6 is cut off alive, and node 1 declares it gone. Node 6 learns of it when only node 2 is
/// reachable.
#[test]
fn a_finding_names_the_reclaiming_node_not_the_messenger() -> Result<()> {
    in_lab(Lab::new("named").hosts(3), |lab| {
        let [one, two, six] = [1, 2, 3].map(|number| lab.host(number));
        for (host, id) in [(one, 1), (two, 2), (six, 6)] {
            launch_as(lab, host, id)?;
        }
        lab.hosts().iter().try_for_each(|host| wait_for_peers(host, 3))?;
        let _used = attached(six, "c")?;
        lab.unplug(six)?;
        for host in [one, two] {
            wait_for_peers(host, 2)?;
        }
        eventually(TIMEOUT * 2, || {
            one.overnode(&["reclaim", "6", "--timeout", "5"])?.success()?;
            let reclaimed = two.inspect()?["allocation"]["tombstones"].clone();
            ensure!(reclaimed[0]["by"] == 1, "{reclaimed}");
            Ok(())
        })?;
        // A node that is gone for good is no problem any more.
        for host in [one, two] {
            eventually(TIMEOUT, || {
                let health = host.status()?["health"].clone();
                ensure!(health["level"] != "critical", "{}: {health}", host.name);
                Ok(())
            })?;
            let table = host.overnode(&["status", "--peers"])?.success()?;
            ensure!(table.contains("gone, reclaimed"), "{table}");
        }
        lab.unplug(one)?;
        wait_for_peers(two, 1)?;
        // After a restart, node 6 asks its lender, node 2, whether it still has its borrowed
        // addresses.
        six.kill_daemon()?;
        six.overnode(&["resume"])?.success()?;
        lab.plug(six)?;
        eventually(TIMEOUT * 3, || {
            let told = six.status()?["ipam"]["notices"].to_string();
            ensure!(told.contains("node 1 has reclaimed"), "{told}");
            ensure!(!told.contains("node 2"), "{told}");
            finds(six, &["node 1 has reclaimed"])?;
            Ok(())
        })?;
        lab.plug(one)?;
        Ok(())
    })
}

#[test]
fn a_pending_reclaim_is_reported_until_no_consent_is_missing() -> Result<()> {
    in_lab(Lab::new("agree").hosts(3), |lab| {
        launch_all(lab)?;
        let one = lab.host(1);
        let away = [lab.host(2), lab.host(3)];
        away.into_iter().try_for_each(|host| lab.unplug(host))?;
        wait_for_peers(one, 1)?;
        finds(one, &["2 nodes are unreachable: 2, 3"])?;
        eventually(TIMEOUT * 2, || {
            one.overnode(&["reclaim", "2", "--timeout", "1"])?.failure(1)?;
            finds(
                one,
                &["the addresses of node 2 are not reclaimed yet", "node 3 must agree first"],
            )
        })?;
        // Node 2 is back, so nothing needs to be reclaimed. If node 3 came back at the same time,
        // it might agree before it reaches node 2.
        let [two, three] = away;
        lab.plug(two)?;
        eventually(TIMEOUT * 3, || {
            let found = findings(one)?;
            ensure!(!found.iter().any(|it| it.contains("not reclaimed yet")), "{found:#?}");
            Ok(())
        })?;
        lab.plug(three)?;
        eventually(TIMEOUT * 3, || lab.hosts().iter().try_for_each(finds_nothing))
    })
}

#[test]
fn a_deleted_interface_is_reported_until_it_is_back() -> Result<()> {
    in_lab(Lab::new("gone").hosts(1), |lab| {
        let one = lab.host(1);
        launch_as(lab, one, 1)?;
        let container = attached(one, "c")?;
        eventually(TIMEOUT, || finds_nothing(one))?;
        let interface =
            one.status()?["endpoints"][0]["interface"].as_str().unwrap_or_default().to_owned();
        one.netns().ip(&["link", "del", &interface])?;
        eventually(TIMEOUT * 4, || {
            finds_nothing(one)?;
            ensure!(!container.netns().interfaces()?.is_empty(), "the container is not attached");
            Ok(())
        })
    })
}
