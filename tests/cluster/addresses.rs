//! Address space that is borrowed, kept through separations, handed over and taken back.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{Host, Lab, eventually};
use serde_json::Value;

use crate::support::{PATIENCE, TOKEN, all_reach_all, attached, in_lab, list};

/// Launches a node with this ID, with every host as a target.
fn launch_as(lab: &Lab, host: &Host, id: usize) -> Result<()> {
    let id = id.to_string();
    host.overnode(&[&["launch", "--id", &id, "--token", TOKEN], &lab.targets()[..]].concat())?.success()?;
    Ok(())
}

/// Who holds address space, as a host has it.
fn owners(host: &Host) -> Result<Vec<(u64, f64)>> {
    let status = host.status()?;
    let owners = status["ipam"]["owners"].as_array().context("no owners")?;
    let owner = |it: &Value| Some((it["id"].as_u64()?, it["addresses"].as_f64()?));
    Ok(owners.iter().filter_map(owner).collect())
}

fn wait_for_peers(host: &Host, count: usize) -> Result<()> {
    eventually(PATIENCE, || {
        let status = host.status()?;
        let reachable = list(&status, "peers")?.iter().filter(|peer| peer["reachable"] == true).count();
        ensure!(reachable == count, "{} reaches {reachable} nodes instead of {count}", host.name);
        Ok(())
    })
}

#[test]
fn a_fifth_node_borrows_what_it_needs_and_keeps_it_alone() -> Result<()> {
    in_lab(Lab::new("borrow").hosts(2), |lab| {
        let (lender, borrower) = (lab.host(1), lab.host(2));
        launch_as(lab, lender, 1)?;
        launch_as(lab, borrower, 5)?;
        borrower.overnode(&["prime", "--timeout", "20"])?.success()?;
        let mut containers = vec![attached(lender, "a")?, attached(borrower, "b")?];
        all_reach_all(&containers)?;
        let five = owners(lender)?.into_iter().find(|(id, _)| *id == 5).context("node 5 holds nothing")?;
        ensure!(five.1 <= 64.0, "for one container it holds {} addresses", five.1);
        // Alone, with a daemon that was killed, it still gives addresses from what it has.
        lab.cut(lender, borrower)?;
        borrower.kill_daemon()?;
        borrower.overnode(&["resume"])?.success()?;
        containers.push(attached(borrower, "c")?);
        containers.push(attached(lender, "d")?);
        lab.heal(lender, borrower)?;
        wait_for_peers(lender, 2)?;
        all_reach_all(&containers)?;
        let addresses: BTreeSet<_> = containers.iter().map(|container| container.address()).collect();
        ensure!(addresses.len() == containers.len(), "an address was given twice: {addresses:?}");
        Ok(())
    })
}

/// In JSON and in tables that fit the terminal, on both sides; who cannot be reached is marked.
#[test]
fn status_tells_who_lent_what_to_whom_and_who_is_unreachable() -> Result<()> {
    in_lab(Lab::new("loans").hosts(2), |lab| {
        let (lender, borrower) = (lab.host(1), lab.host(2));
        launch_as(lab, lender, 1)?;
        launch_as(lab, borrower, 5)?;
        let _one = attached(borrower, "one")?;
        let ipam = |host: &Host| Ok::<_, anyhow::Error>(host.status()?["ipam"].clone());
        let table = |host: &Host, columns: &str| -> Result<Vec<String>> {
            let shown = host.overnode_with(&["status", "--ipam"], &[("COLUMNS", columns)])?.success()?;
            Ok(shown.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect())
        };
        let mut networks = Value::Null;
        for (host, other) in [(lender, 5), (borrower, 1)] {
            eventually(PATIENCE, || {
                let ipam = ipam(host)?;
                let [loan] = &ipam["loans"].as_array().context("no loans")?[..] else {
                    anyhow::bail!("{}: {}", host.name, ipam["loans"]);
                };
                ensure!(loan["lender"] == 1 && loan["borrower"] == 5, "{loan}");
                ensure!(loan["lender_reachable"] == true && loan["borrower_reachable"] == true, "{loan}");
                let lent = loan["addresses"].as_u64().context("no number")?;
                ensure!((1..=64).contains(&lent), "{loan}");
                ensure!(networks.is_null() || networks == loan["networks"], "{} sees {loan}", host.name);
                networks = loan["networks"].clone();
                let addresses = |id: u64| -> Result<u64> {
                    let owners = owners(host)?;
                    let owner = owners.iter().find(|(owner, _)| *owner == id);
                    Ok(owner.with_context(|| format!("{id} has nothing: {owners:?}"))?.1 as u64)
                };
                ensure!(addresses(1)? == 131_072 - lent && addresses(5)? == lent, "{ipam}");
                // Of 2 to 4 nobody has heard.
                ensure!((2..=4).all(|id| addresses(id).is_ok_and(|count| count == 131_072)), "{ipam}");
                let lines = table(host, "80")?;
                let network = loan["networks"][0].as_str().unwrap_or_default();
                let line = format!("1(host1) 5(host2) {lent} reachable {network}");
                ensure!(lines.iter().any(|it| it.starts_with(&line)), "no {line:?} in {lines:#?}");
                for id in 2..=4 {
                    let line = format!("{id} 131072 25.0% - unreachable");
                    ensure!(lines.contains(&line), "no {line:?} in {lines:#?}");
                }
                ensure!(
                    lines.iter().any(|it| it.starts_with(&format!("{other}(")) && it.ends_with(" reachable"))
                );
                Ok(())
            })?;
        }
        lab.unplug(lender)?;
        for (host, other, mark) in [(lender, 5, "borrower unreachable"), (borrower, 1, "lender unreachable")]
        {
            eventually(PATIENCE * 2, || {
                let ipam = ipam(host)?;
                let owner = ipam["owners"].as_array().and_then(|all| all.iter().find(|it| it["id"] == other));
                ensure!(owner.is_some_and(|owner| owner["reachable"] == false), "{}: {ipam}", host.name);
                let loan = &ipam["loans"][0];
                ensure!(loan["lender_reachable"] != loan["borrower_reachable"], "{loan}");
                ensure!(
                    table(host, "80")?.iter().any(|line| line.contains(mark)),
                    "{:#?}",
                    table(host, "80")?
                );
                let narrow = host.overnode_with(&["status", "--ipam"], &[("COLUMNS", "40")])?.success()?;
                ensure!(narrow.lines().all(|line| line.chars().count() <= 40), "{narrow}");
                ensure!(narrow.contains(mark), "{narrow}");
                Ok(())
            })?;
        }
        Ok(())
    })
}

#[test]
fn a_node_without_addresses_says_whom_it_waits_for_and_goes_on_by_itself() -> Result<()> {
    in_lab(Lab::new("waits").hosts(2), |lab| {
        let (lender, borrower) = (lab.host(1), lab.host(2));
        launch_as(lab, borrower, 5)?;
        let refused = borrower.overnode(&["prime", "--timeout", "1"])?;
        ensure!(refused.status.code() == Some(1) && refused.stderr.contains("nodes 1 to 4"), "{refused:?}");
        let container = borrower.container("c")?;
        let name = format!("netns:{}", container.netns().name());
        let begun = Instant::now();
        let refused = borrower.overnode(&["attach", &name])?;
        ensure!(
            refused.status.code() == Some(1) && refused.stderr.contains("overnode connect"),
            "{refused:?}"
        );
        ensure!(begun.elapsed() > Duration::from_secs(5), "it did not wait");
        // The next one waits, too, and meanwhile somebody comes.
        let mut attach = borrower.command("overnode")?;
        attach.args(["attach", &name]).stdout(std::process::Stdio::piped());
        let waiting = attach.spawn()?;
        launch_as(lab, lender, 1)?;
        let output = waiting.wait_with_output()?;
        ensure!(output.status.success(), "{output:?}");
        let address = String::from_utf8(output.stdout)?;
        container.set_address(address.trim().split('/').next().and_then(|it| it.parse().ok()));
        let other = attached(lender, "d")?;
        all_reach_all(&[container, other])
    })
}

#[test]
fn a_lender_that_resets_leaves_its_ledger_to_another() -> Result<()> {
    in_lab(Lab::new("ledger").hosts(3), |lab| {
        let [one, two, five] = [1, 2, 3].map(|number| lab.host(number));
        launch_as(lab, one, 1)?;
        launch_as(lab, five, 5)?;
        let kept = attached(five, "kept")?;
        launch_as(lab, two, 2)?;
        wait_for_peers(one, 3)?;
        one.overnode(&["reset"])?.success()?;
        launch_as(lab, one, 1)?;
        wait_for_peers(one, 3)?;
        wait_for_peers(five, 3)?;
        let mut containers = vec![kept];
        for (host, names) in [(one, ["a", "b"]), (two, ["c", "d"]), (five, ["e", "f"])] {
            for name in names {
                containers.push(attached(host, name)?);
            }
        }
        let addresses: BTreeSet<_> = containers.iter().map(|container| container.address()).collect();
        ensure!(addresses.len() == containers.len(), "an address was given twice: {addresses:?}");
        all_reach_all(&containers)
    })
}

#[test]
fn the_space_of_a_dead_node_has_one_heir_however_many_want_it() -> Result<()> {
    in_lab(Lab::new("heirs").hosts(3), |lab| {
        let [one, two, three] = [1, 2, 3].map(|number| lab.host(number));
        for (host, id) in [(one, 1), (two, 2), (three, 3)] {
            launch_as(lab, host, id)?;
        }
        for host in [one, two, three] {
            wait_for_peers(host, 3)?;
        }
        let early = two.overnode(&["reclaim", "1"])?;
        ensure!(early.status.code() == Some(1) && early.stderr.contains("reachable"), "{early:?}");
        one.kill_daemon()?;
        lab.unplug(one)?;
        lab.cut(two, three)?;
        for host in [two, three] {
            wait_for_peers(host, 1)?;
            let pending = host.overnode(&["reclaim", "1", "--timeout", "1"])?;
            ensure!(
                pending.status.code() == Some(1) && pending.stderr.contains("have to agree"),
                "{pending:?}"
            );
        }
        lab.heal(two, three)?;
        let holders = || -> Result<Vec<usize>> {
            let mut holders = Vec::new();
            for (host, id) in [(two, 2), (three, 3)] {
                let mine = owners(host)?.into_iter().find(|(owner, _)| *owner == id as u64);
                // A quarter of the default range has 131,072 addresses.
                if mine.is_some_and(|(_, addresses)| addresses > 131_072.0) {
                    holders.push(id);
                }
            }
            Ok(holders)
        };
        eventually(PATIENCE * 2, || {
            let holders = holders()?;
            ensure!(holders.len() == 1, "the space is held by {holders:?}");
            let waiting = two.status()?["ipam"]["reclaims"].clone();
            ensure!(waiting.as_array().is_none_or(Vec::is_empty), "{waiting}");
            Ok(())
        })?;
        ensure!(holders()?.len() == 1, "two heirs in the end");
        // The dead one rises: it is told, and says so.
        lab.plug(one)?;
        one.overnode(&["resume"])?.success()?;
        eventually(PATIENCE, || {
            let problems = one.status()?["node"]["problems"].to_string();
            ensure!(problems.contains("taken back"), "node 1 does not know: {problems}");
            Ok(())
        })
    })
}
