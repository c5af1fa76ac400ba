//! Tests of a cluster that is split into two halves and reunited.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::ping::Pinging;
use lab::{Container, Host, Lab};
use serde_json::Value;

use crate::support::{
    all_reach_all, attached, ensure_unique, in_lab, launch_as, list, one_each, wait_for_peers,
};

/// Time that the halves are apart.
const APART: Duration = Duration::from_secs(60);
/// Time within which lost peers are reported. They count as unreachable after three seconds, but
/// the machine may be busy.
const NOTICED: Duration = Duration::from_secs(6);
/// Time within which the halves reconnect. The longest pause between two attempts is 30 s.
const REUNITED: Duration = Duration::from_secs(45);
/// IDs of the nodes in each half. Each half has nodes that lend addresses and one that has to
/// borrow them.
const HALVES: [&[usize]; 2] = [&[1, 2, 5], &[3, 6]];

/// A host, the ID of its node, and the number of its half.
struct Member<'a> {
    host: &'a Host,
    id: usize,
    half: usize,
}

/// Fails unless each member's `status` reports its own half as reachable and the other half as
/// unreachable.
fn ensure_truthful(members: &[Member<'_>]) -> Result<()> {
    for member in members {
        let status = member.host.status()?;
        for other in members.iter().filter(|other| other.id != member.id) {
            let peer = list(&status, "peers")?.iter().find(|peer| peer["id"] == other.id);
            let peer =
                peer.with_context(|| format!("node {} lost node {}", member.id, other.id))?;
            let is_near = member.half == other.half;
            let route = &peer["data"]["route"]["path"];
            ensure!(
                peer["reachable"] == is_near
                    && (*route == if is_near { "direct".into() } else { Value::Null }),
                "node {} reports for node {}, {}: {peer}",
                member.id,
                other.id,
                if is_near { "which is in its half" } else { "which is in the other half" }
            );
        }
    }
    Ok(())
}

#[test]
fn halves_that_are_apart_for_a_minute_both_attach_and_merge_again() -> Result<()> {
    in_lab(Lab::new("halves").hosts(5), |lab| {
        let mut hosts = lab.hosts().iter();
        let mut members = Vec::new();
        for (half, ids) in HALVES.into_iter().enumerate() {
            for (&id, host) in ids.iter().zip(&mut hosts) {
                launch_as(lab, host, id)?;
                members.push(Member { host, id, half });
            }
        }
        lab.hosts().iter().try_for_each(|host| wait_for_peers(host, 5))?;
        let mut containers = one_each(lab)?;
        all_reach_all(&containers)?;
        let ping = |from: &Container, to: &Container| {
            Pinging::start(from.netns(), to.address(), None, Duration::from_millis(50))
        };
        // Pings from node 1 to node 5, and from node 3 to node 6.
        let pings = [ping(&containers[0], &containers[2])?, ping(&containers[3], &containers[4])?];

        let across: Vec<(&Host, &Host)> = members
            .iter()
            .filter(|it| it.half == 0)
            .flat_map(|near| {
                members.iter().filter(|it| it.half == 1).map(|far| (near.host, far.host))
            })
            .collect();
        across.iter().try_for_each(|(near, far)| lab.cut(near, far))?;
        let cut = Instant::now();
        lab::eventually(NOTICED, || ensure_truthful(&members))?;
        while cut.elapsed() < APART {
            ensure_truthful(&members)
                .with_context(|| format!("{:?} after the partition", cut.elapsed()))?;
            if containers.len() < 15 {
                for member in &members {
                    containers.push(attached(member.host, &format!("c{}", containers.len()))?);
                }
            }
            std::thread::sleep(Duration::from_secs(2));
        }
        let table = lab.host(1).overnode(&["status", "--peers"])?.success()?;
        ensure!(table.matches("unreachable").count() == 2, "{table}");
        for pings in pings {
            let stats = pings.stop()?;
            // The last ping may still be in flight.
            ensure!(stats.sent > 1000 && stats.lost() <= 1, "within a half: {stats:?}");
        }
        ensure_unique(&containers)?;

        across.iter().try_for_each(|(near, far)| lab.heal(near, far))?;
        containers[0].reach(containers[3].address(), REUNITED)?;
        lab.hosts().iter().try_for_each(|host| wait_for_peers(host, 5))?;
        all_reach_all(&containers)?;
        for (number, host) in lab.hosts().iter().enumerate() {
            containers.push(attached(host, &format!("after{number}"))?);
            let problems = host.status()?["node"]["problems"].clone();
            ensure!(problems.as_array().is_some_and(Vec::is_empty), "{}: {problems}", host.name);
        }
        ensure_unique(&containers)?;
        all_reach_all(&containers[15..])
    })
}
