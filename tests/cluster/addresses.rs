//! Tests of address space: lent, kept through partitions, handed over and reclaimed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use lab::{Host, Lab, eventually};
use serde_json::Value;

use crate::support::{
    TIMEOUT, all_reach_all, attached, ensure_unique, in_lab, launch, launch_as, wait_for_peers,
};

/// Returns the owners of address space, and how many addresses each has, as a host reports them.
fn owners(host: &Host) -> Result<Vec<(u64, f64)>> {
    let status = host.status()?;
    let owners = status["ipam"]["owners"].as_array().context("no owners")?;
    let owner = |it: &Value| Some((it["id"].as_u64()?, it["addresses"].as_f64()?));
    Ok(owners.iter().filter_map(owner).collect())
}

#[test]
fn a_fifth_node_borrows_addresses_and_keeps_them_without_its_lender() -> Result<()> {
    in_lab(Lab::new("borrow").hosts(2), |lab| {
        let (lender, borrower) = (lab.host(1), lab.host(2));
        launch_as(lab, lender, 1)?;
        launch_as(lab, borrower, 5)?;
        borrower.overnode(&["prime", "--timeout", "20"])?.success()?;
        let mut containers = vec![attached(lender, "a")?, attached(borrower, "b")?];
        all_reach_all(&containers)?;
        let five =
            owners(lender)?.into_iter().find(|(id, _)| *id == 5).context("node 5 holds nothing")?;
        ensure!(five.1 <= 64.0, "it holds {} addresses for one container", five.1);
        // The borrower is cut off and its daemon was killed, but it still allocates addresses from
        // its space.
        lab.cut(lender, borrower)?;
        borrower.kill_daemon()?;
        borrower.overnode(&["resume"])?.success()?;
        containers.push(attached(borrower, "c")?);
        containers.push(attached(lender, "d")?);
        lab.heal(lender, borrower)?;
        wait_for_peers(lender, 2)?;
        all_reach_all(&containers)?;
        ensure_unique(&containers)
    })
}

/// Checks the JSON and the tables on both sides: tables fit the terminal, and unreachable nodes are
/// marked.
#[test]
fn status_shows_loans_and_unreachable_nodes() -> Result<()> {
    in_lab(Lab::new("loans").hosts(2), |lab| {
        let (lender, borrower) = (lab.host(1), lab.host(2));
        launch_as(lab, lender, 1)?;
        launch_as(lab, borrower, 5)?;
        let _one = attached(borrower, "one")?;
        let ipam = |host: &Host| Ok::<_, anyhow::Error>(host.status()?["ipam"].clone());
        let table = |host: &Host, columns: &str| -> Result<Vec<String>> {
            let shown =
                host.overnode_with(&["status", "--ipam"], &[("COLUMNS", columns)])?.success()?;
            Ok(shown
                .lines()
                .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
                .collect())
        };
        let mut networks = Value::Null;
        for (host, other) in [(lender, 5), (borrower, 1)] {
            eventually(TIMEOUT, || {
                let ipam = ipam(host)?;
                let [loan] = &ipam["loans"].as_array().context("no loans")?[..] else {
                    anyhow::bail!("{}: {}", host.name, ipam["loans"]);
                };
                ensure!(loan["lender"] == 1 && loan["borrower"] == 5, "{loan}");
                ensure!(
                    loan["lender_reachable"] == true && loan["borrower_reachable"] == true,
                    "{loan}"
                );
                let lent = loan["addresses"].as_u64().context("no number")?;
                ensure!((1..=64).contains(&lent), "{loan}");
                ensure!(
                    networks.is_null() || networks == loan["networks"],
                    "{} sees {loan}",
                    host.name
                );
                networks = loan["networks"].clone();
                let addresses = |id: u64| -> Result<u64> {
                    let owners = owners(host)?;
                    let owner = owners.iter().find(|(owner, _)| *owner == id);
                    Ok(owner.with_context(|| format!("node {id} owns nothing: {owners:?}"))?.1
                        as u64)
                };
                ensure!(addresses(1)? == 131_072 - lent && addresses(5)? == lent, "{ipam}");
                // Nodes 2 to 4 never joined.
                ensure!(
                    (2..=4).all(|id| addresses(id).is_ok_and(|count| count == 131_072)),
                    "{ipam}"
                );
                let lines = table(host, "80")?;
                let network = loan["networks"][0].as_str().unwrap_or_default();
                let line = format!("1(host1) 5(host2) {lent} reachable {network}");
                ensure!(lines.iter().any(|it| it.starts_with(&line)), "no {line:?} in {lines:#?}");
                for id in 2..=4 {
                    let line = format!("{id} 131072 25.0% - unreachable");
                    ensure!(lines.contains(&line), "no {line:?} in {lines:#?}");
                }
                ensure!(
                    lines.iter().any(
                        |it| it.starts_with(&format!("{other}(")) && it.ends_with(" reachable")
                    )
                );
                Ok(())
            })?;
        }
        lab.unplug(lender)?;
        for (host, other, mark) in
            [(lender, 5, "borrower unreachable"), (borrower, 1, "lender unreachable")]
        {
            eventually(TIMEOUT * 2, || {
                let ipam = ipam(host)?;
                let owner = ipam["owners"]
                    .as_array()
                    .and_then(|all| all.iter().find(|it| it["id"] == other));
                ensure!(
                    owner.is_some_and(|owner| owner["reachable"] == false),
                    "{}: {ipam}",
                    host.name
                );
                let loan = &ipam["loans"][0];
                ensure!(loan["lender_reachable"] != loan["borrower_reachable"], "{loan}");
                ensure!(
                    table(host, "80")?.iter().any(|line| line.contains(mark)),
                    "{:#?}",
                    table(host, "80")?
                );
                let narrow =
                    host.overnode_with(&["status", "--ipam"], &[("COLUMNS", "40")])?.success()?;
                ensure!(narrow.lines().all(|line| line.chars().count() <= 40), "{narrow}");
                ensure!(narrow.contains(mark), "{narrow}");
                Ok(())
            })?;
        }
        Ok(())
    })
}

#[test]
fn a_node_without_addresses_names_its_lenders_and_waits_for_one() -> Result<()> {
    in_lab(Lab::new("waits").hosts(2), |lab| {
        let (borrower, lender) = (lab.host(1), lab.host(2));
        launch_as(lab, borrower, 5)?;
        let refused = borrower.overnode(&["prime", "--timeout", "1"])?.failure(1)?;
        ensure!(refused.contains("nodes 1 to 4"), "{refused}");
        let mut prime = borrower.command("overnode")?;
        let mut prime = prime.arg("prime").spawn()?;
        let container = borrower.container("c")?;
        let begun = Instant::now();
        let refused = borrower.overnode(&["attach", &container.target()])?.failure(1)?;
        let waited = begun.elapsed();
        ensure!(
            waited > Duration::from_secs(5) && waited < Duration::from_secs(30),
            "attach waited {waited:?}"
        );
        for named in ["node 5 ", "node 1 ", "node 2 ", "node 3 ", "node 4 ", "overnode connect"] {
            ensure!(refused.contains(named), "no {named:?} in {refused:?}");
        }
        ensure!(
            container.netns().interfaces()?.is_empty(),
            "an interface is left in the container"
        );
        ensure!(prime.try_wait()?.is_none(), "prime does not wait");
        // The next attachment waits as well. Node 2 joins in the meantime.
        let mut attach = borrower.command("overnode")?;
        attach.args(["attach", &container.target()]).stdout(std::process::Stdio::piped());
        let mut waiting = attach.spawn()?;
        std::thread::sleep(Duration::from_secs(1));
        ensure!(waiting.try_wait()?.is_none(), "attach does not wait");
        launch(lab, lender)?;
        let output = waiting.wait_with_output()?;
        ensure!(output.status.success(), "{output:?}");
        ensure!(prime.wait()?.success(), "prime failed");
        let address = String::from_utf8(output.stdout)?;
        container.set_address(address.trim().split('/').next().and_then(|it| it.parse().ok()));
        let other = attached(lender, "d")?;
        all_reach_all(&[container, other])
    })
}

#[test]
fn a_lender_that_resets_hands_over_its_ledger() -> Result<()> {
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
        ensure_unique(&containers)?;
        all_reach_all(&containers)
    })
}

/// The half of node 1's quarter that it lends out.
const LENT_BY_ONE: &str = "10.41.0.0/16";

/// Returns the nodes that hold [`LENT_BY_ONE`], as a host reports them.
fn holders(host: &Host) -> Result<BTreeSet<u64>> {
    let half: IpNet = LENT_BY_ONE.parse()?;
    let status = host.status()?;
    let owners = status["ipam"]["owners"].as_array().context("no owners")?;
    let lends = |owner: &&Value| {
        let ranges = owner["ranges"].as_array().into_iter().flatten().filter_map(Value::as_str);
        ranges.filter_map(|range| range.parse::<IpNet>().ok()).any(|range| range.contains(&half))
    };
    Ok(owners.iter().filter(lends).filter_map(|owner| owner["id"].as_u64()).collect())
}

#[test]
fn only_one_of_several_nodes_reclaims_a_dead_node() -> Result<()> {
    in_lab(Lab::new("successors").hosts(4), |lab| {
        let [one, two, three, five] = [1, 2, 3, 4].map(|number| lab.host(number));
        let living = [(two, 2), (three, 3), (five, 5)];
        // Node 5 joins while node 1 is the only possible lender.
        launch_as(lab, one, 1)?;
        launch_as(lab, five, 5)?;
        let mut containers = vec![attached(one, "a")?, attached(five, "a")?];
        for (host, id) in [(two, 2), (three, 3)] {
            launch_as(lab, host, id)?;
            containers.push(attached(host, "a")?);
        }
        lab.hosts().iter().try_for_each(|host| wait_for_peers(host, 4))?;
        all_reach_all(&containers)?;
        let early = two.overnode(&["reclaim", "1"])?.failure(1)?;
        ensure!(early.contains("reachable"), "{early}");

        one.kill_daemon()?;
        lab.unplug(one)?;
        for other in [three, five] {
            lab.cut(two, other)?;
        }
        // Neither side of the partition can reclaim alone.
        for (host, count, missing) in [(two, 1, "3"), (three, 2, "2")] {
            wait_for_peers(host, count)?;
            // An unreachable node counts as gone once its control connections have ended and 20 s
            // have passed.
            eventually(TIMEOUT * 3, || {
                let pending = host.overnode(&["reclaim", "1", "--timeout", "1"])?.failure(1)?;
                ensure!(
                    pending.contains("have to agree") && pending.contains(missing),
                    "{pending}"
                );
                Ok(())
            })?;
            let table = host.overnode(&["status", "--ipam"])?.success()?;
            ensure!(table.contains("of node 1: waiting for"), "{table}");
        }
        for host in [two, three, five] {
            containers.push(attached(host, "apart")?);
        }
        for (host, id) in &living {
            ensure!(
                holders(host)? == BTreeSet::from([1]),
                "node {id} reports the holders {:?}",
                holders(host)?
            );
        }
        for other in [three, five] {
            lab.heal(two, other)?;
        }
        eventually(TIMEOUT * 2, || {
            let mut successors = BTreeSet::new();
            for (host, id) in &living {
                let waiting = host.status()?["ipam"]["reclaims"].clone();
                ensure!(
                    waiting.as_array().is_none_or(Vec::is_empty),
                    "node {id} still has pending reclaims: {waiting}"
                );
                let theirs = holders(host)?.into_iter().find(|holder| *holder != 1);
                successors.insert(theirs.with_context(|| format!("node {id} knows no holder"))?);
            }
            ensure!(successors.len() == 1, "the holders are {successors:?}");
            Ok(())
        })?;
        for host in [two, three, five] {
            containers.push(attached(host, "healed")?);
        }
        ensure_unique(&containers)?;
        all_reach_all(&containers[1..])?;

        // Node 1 comes back and still allocates addresses from its space, because it does not know
        // yet. Once it learns that its space was reclaimed, it reports that.
        one.overnode(&["resume"])?.success()?;
        containers.push(attached(one, "risen")?);
        lab.plug(one)?;
        eventually(TIMEOUT * 2, || {
            let status = one.status()?;
            let notices = &status["ipam"]["notices"];
            ensure!(
                notices.to_string().contains("has reclaimed the address space of this node"),
                "node 1 does not know that it was reclaimed: {notices}"
            );
            Ok(())
        })?;
        for section in [&["status"][..], &["status", "--ipam"]] {
            let table = one.overnode(section)?.success()?;
            ensure!(table.contains("has reclaimed"), "{table}");
        }
        lab.hosts().iter().try_for_each(|host| wait_for_peers(host, 4))?;
        for host in lab.hosts() {
            containers.push(attached(host, "late")?);
        }
        ensure_unique(&containers)?;
        all_reach_all(&containers)?;
        eventually(TIMEOUT, || {
            let all = lab.hosts().iter().map(holders).collect::<Result<BTreeSet<_>>>()?;
            let agree = all.len() == 1 && all.iter().all(|holders| holders.len() == 1);
            ensure!(agree, "the holders are {all:?}");
            Ok(())
        })?;
        for (host, _) in &living {
            // A node may report that it lost the race for the space, but it must not report a
            // conflict.
            let problems = host.status()?["ipam"]["problems"].to_string();
            let clash = ["in use", "belongs to other nodes", "lent to another"];
            ensure!(
                !clash.iter().any(|words| problems.contains(words)),
                "{}: {problems}",
                host.name
            );
        }
        Ok(())
    })
}

/// A range of 64 addresses. Of node 3's quarter, eight are only for the node itself and eight are
/// lent.
const SMALL: &str = "10.40.0.0/26";
const LENT_BY_THREE: &str = "10.40.0.40/29";

fn launch_small(lab: &Lab, host: &Host, id: usize) -> Result<String> {
    let (id, targets) = (id.to_string(), lab.targets());
    let options = ["launch", "--id", &id, "--token", crate::support::TOKEN, "--range", SMALL];
    host.overnode(&[&options[..], &targets[..]].concat())?.success()
}

/// Returns the nodes that claim the lent half of node 3's quarter, as a host reports them.
fn lenders_of_three(host: &Host) -> Result<BTreeSet<u64>> {
    let half: IpNet = LENT_BY_THREE.parse()?;
    let status = host.status()?;
    let mut lenders = BTreeSet::new();
    for owner in status["ipam"]["owners"].as_array().context("no owners")? {
        let ranges = owner["ranges"].as_array().into_iter().flatten().filter_map(Value::as_str);
        if ranges.filter_map(|range| range.parse::<IpNet>().ok()).any(|range| range.contains(&half))
        {
            lenders.extend(owner["id"].as_u64());
        }
    }
    Ok(lenders)
}

/// Node 3 is cut off alive and reclaimed. Others borrow from its quarter and are cut off. Then node
/// 3 comes back, with the same process or after a restart.
fn rejoin_after_reclaim(lab: &Lab, restarted: bool) -> Result<()> {
    let [one, two, three, seven] = [1, 2, 3, 4].map(|number| lab.host(number));
    for (host, id) in [(one, 1), (two, 2), (three, 3)] {
        launch_small(lab, host, id)?;
    }
    for host in [one, two, three] {
        wait_for_peers(host, 3)?;
        eventually(TIMEOUT, || {
            let lenders = lenders_of_three(host)?;
            ensure!(lenders == BTreeSet::from([3]), "{}: the lenders are {lenders:?}", host.name);
            Ok(())
        })?;
    }
    for other in [one, two, seven] {
        lab.cut(three, other)?;
    }
    // Node 3 keeps using its own half, which is never lent.
    let mut containers = Vec::new();
    for number in 0..8 {
        containers.push(attached(three, &format!("own{number}"))?);
    }
    eventually(TIMEOUT * 4, || {
        one.overnode(&["reclaim", "3", "--timeout", "5"])?.success()?;
        Ok(())
    })?;
    launch_small(lab, seven, 7)?;
    wait_for_peers(seven, 3)?;
    let half: IpNet = LENT_BY_THREE.parse()?;
    // The first address may be from another quarter, if node 7 heard of that lender first.
    let mut lent = 0;
    for number in 0..20 {
        let container = attached(seven, &format!("lent{number}"))?;
        lent += usize::from(half.contains(&container.address()));
        containers.push(container);
        if lent == 5 {
            break;
        }
    }
    ensure!(lent == 5, "{lent} addresses of quarter 3 are lent");
    for other in [one, two] {
        lab.cut(seven, other)?;
    }
    wait_for_peers(seven, 1)?;
    if restarted {
        three.kill_daemon()?;
        three.overnode(&["resume"])?.success()?;
    }
    for other in [one, two] {
        lab.heal(three, other)?;
    }
    wait_for_peers(three, 3)?;
    for number in 0..4 {
        containers.push(attached(three, &format!("more{number}"))?);
        ensure_unique(&containers)?;
    }
    eventually(TIMEOUT, || {
        let status = three.status()?;
        ensure!(
            status["ipam"]["notices"].to_string().contains("has reclaimed"),
            "node 3 does not know that it was reclaimed"
        );
        // That does not require node 7 to be back.
        let lenders = lenders_of_three(two)?;
        ensure!(lenders.len() == 1, "the lenders of its quarter are {lenders:?}");
        Ok(())
    })?;
    for other in [one, two, three] {
        lab.heal(seven, other)?;
    }
    lab.hosts().iter().try_for_each(|host| wait_for_peers(host, 4))?;
    containers.push(attached(seven, "late")?);
    ensure_unique(&containers)?;
    all_reach_all(&containers[8..])
}

#[test]
fn a_node_reclaimed_alive_gives_no_address_twice_when_it_returns() -> Result<()> {
    in_lab(Lab::new("returns").hosts(4), |lab| rejoin_after_reclaim(lab, false))
}

#[test]
fn a_node_reclaimed_alive_gives_no_address_twice_after_a_restart() -> Result<()> {
    in_lab(Lab::new("returns-restarted").hosts(4), |lab| rejoin_after_reclaim(lab, true))
}
