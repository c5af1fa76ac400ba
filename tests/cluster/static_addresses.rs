//! Tests of static addresses that several hosts request.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::{Container, Host, Lab, eventually};
use serde_json::{Value, json};

use crate::monitor::watch;
use crate::support::{TIMEOUT, attached, in_lab, launch_all, list, wait_for_peers};

/// Attaches a container at the address. Returns the duration and, if it was refused, the error.
fn attach_at(
    host: &Host,
    container: &Container,
    address: &str,
) -> Result<(Duration, Option<String>)> {
    let begun = Instant::now();
    let outcome = host.overnode(&["attach", &container.target(), "--ip", address])?;
    let took = begun.elapsed();
    Ok((took, if outcome.status.success() { None } else { Some(outcome.failure(1)?) }))
}

/// Attaches on both hosts, on the second one `later` than on the first. Returns both results.
fn race(
    hosts: [(&Host, &Container); 2],
    address: &str,
    later: Duration,
) -> Result<[(Duration, Option<String>); 2]> {
    let start = Barrier::new(2);
    let attach = |place: usize| {
        let (host, container) = hosts[place];
        start.wait();
        thread::sleep(later * place as u32);
        attach_at(host, container, address)
    };
    let [first, second] = thread::scope(|scope| {
        [0, 1].map(|place| scope.spawn(move || attach(place))).map(|thread| thread.join())
    });
    let ended =
        |result: thread::Result<Result<_>>| result.unwrap_or_else(|_| bail!("a thread panicked"));
    Ok([ended(first)?, ended(second)?])
}

#[test]
fn two_hosts_that_request_one_address_at_once_do_not_both_get_it() -> Result<()> {
    in_lab(Lab::new("one").hosts(2), |lab| {
        launch_all(lab)?;
        let (one, two) = (lab.host(1), lab.host(2));
        let containers = [one.container("a")?, two.container("a")?];
        for round in 0..20 {
            let address = format!("10.33.7.{}/12", round + 1);
            let later = if round < 10 { Duration::ZERO } else { Duration::from_millis(20) };
            let hosts = [(one, &containers[0]), (two, &containers[1])];
            // Each host is the first one in half of the rounds.
            let hosts = if round % 2 == 0 { hosts } else { [hosts[1], hosts[0]] };
            let outcomes = race(hosts, &address, later)?;
            let what = format!("{later:?} apart: {outcomes:?}");
            let won: Vec<bool> = outcomes.iter().map(|(_, refused)| refused.is_none()).collect();
            ensure!(won == [true, false] || won == [false, true], "{what}");
            let (winner, loser) = if won[0] { (0, 1) } else { (1, 0) };
            let refused = outcomes[loser].1.as_deref().unwrap_or_default();
            ensure!(refused.contains(&format!("node {}", hosts[winner].0.number)), "{what}");
            hosts[winner].0.detach(hosts[winner].1)?;
            // Until the other node hears of that, it may still refuse the address.
            eventually(TIMEOUT, || {
                for host in lab.hosts() {
                    let records = host.inspect()?["records"].clone();
                    let all = records.as_array().context("no records")?;
                    ensure!(
                        all.iter().all(|it| it["claims"] == json!([])),
                        "{}: {records}",
                        host.name
                    );
                }
                Ok(())
            })?;
        }
        // Asking the other nodes costs almost nothing. On a busy machine, only the fastest of
        // several attachments shows that.
        let mut quickest = [Duration::MAX; 2];
        for round in 0..60 {
            let chosen = format!("10.33.8.{}/12", round + 1);
            for (place, options) in [&[][..], &["--ip", &chosen]].into_iter().enumerate() {
                let begun = Instant::now();
                one.attach(&containers[0], options)?;
                quickest[place] = quickest[place].min(begun.elapsed());
                one.detach(&containers[0])?;
            }
            if round >= 5 && quickest[1] < quickest[0] + Duration::from_millis(50) {
                return Ok(());
            }
        }
        bail!("attached in {:?}, with --ip in {:?}", quickest[0], quickest[1])
    })
}

/// Returns the nodes that a host routes an address to.
fn leads_to(host: &Host, address: &str) -> Result<Vec<u64>> {
    let inspected = host.inspect()?;
    let routes = list(&inspected, "routes")?;
    let prefix = json!(format!("{address}/32"));
    let has_it = |it: &&Value| it["prefixes"].as_array().is_some_and(|all| all.contains(&prefix));
    Ok(routes.iter().filter(has_it).filter_map(|it| it["peer"].as_u64()).collect())
}

fn address_problems(host: &Host) -> Result<String> {
    let status = host.status()?;
    let health = list(&status["health"], "findings")?;
    let problems = list(&status["ipam"], "problems")?;
    for problem in problems {
        let told = health.iter().filter(|it| it["what"] == *problem).count();
        ensure!(told == 1, "{problem} is reported {told} times: {health:?}");
        let text = host.overnode_with(&["status"], &[("COLUMNS", "1000")])?.success()?;
        let shown = text.matches(problem.as_str().unwrap_or_default()).count();
        // The problem may have ended in between.
        ensure!(shown <= 1, "{problem} is shown {shown} times: {text}");
    }
    Ok(problems.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("\n"))
}

#[test]
fn an_address_taken_twice_in_a_partition_gets_one_owner_and_advice_helps() -> Result<()> {
    const ADDRESS: &str = "10.33.7.5";
    in_lab(Lab::new("both").hosts(3), |lab| {
        launch_all(lab)?;
        let [one, two, three] = [1, 2, 3].map(|number| lab.host(number));
        let witness = attached(three, "w")?;
        let beside = attached(two, "b")?;
        let containers = [one.container("a")?, two.container("a")?];
        let watcher = watch(lab, two, &["--events"])?;
        // The advice works on either host.
        for lets_go in [two, one] {
            lab.unplug(two)?;
            wait_for_peers(one, 2)?;
            wait_for_peers(two, 1)?;
            for (host, container) in [one, two].into_iter().zip(&containers) {
                host.attach(container, &["--ip", &format!("{ADDRESS}/12")])?;
            }
            lab.plug(two)?;
            eventually(TIMEOUT * 2, || {
                let told = address_problems(two)?;
                let target = containers[1].target();
                for words in [ADDRESS, &target, "node 1, which keeps it", "overnode detach"] {
                    ensure!(told.contains(words), "no {words:?} in {told:?}");
                }
                ensure!(
                    leads_to(three, ADDRESS)? == [1],
                    "the address is routed to nodes {:?}",
                    leads_to(three, ADDRESS)?
                );
                ensure!(
                    address_problems(one)?.is_empty(),
                    "node 1 does not keep the address: {}",
                    address_problems(one)?
                );
                Ok(())
            })?;
            witness.reach(containers[0].address(), TIMEOUT)?;
            let is_it =
                |event: &Value| event["problem"].as_str().is_some_and(|it| it.contains(ADDRESS));
            watcher.wait_for(|event| event["event"] == "problem" && is_it(event))?;
            let (host, container) = if lets_go.number == 1 { (one, 0) } else { (two, 1) };
            host.detach(&containers[container])?;
            let left = 3 - lets_go.number as u64;
            eventually(TIMEOUT, || {
                for host in lab.hosts() {
                    ensure!(
                        address_problems(host)?.is_empty(),
                        "{}: {}",
                        host.name,
                        address_problems(host)?
                    );
                }
                ensure!(
                    leads_to(three, ADDRESS)? == [left],
                    "the address is routed to nodes {:?}",
                    leads_to(three, ADDRESS)?
                );
                Ok(())
            })?;
            watcher.wait_for(|event| event["event"] == "problem-resolved" && is_it(event))?;
            for guest in [&witness, &beside] {
                guest.reach(containers[1 - container].address(), TIMEOUT)?;
            }
            let (host, container) = if lets_go.number == 1 { (two, 1) } else { (one, 0) };
            host.detach(&containers[container])?;
            eventually(TIMEOUT, || {
                ensure!(leads_to(three, ADDRESS)?.is_empty(), "the address still has a route");
                ensure!(leads_to(two, ADDRESS)?.is_empty(), "the address still has a route");
                Ok(())
            })?;
        }
        Ok(())
    })
}
