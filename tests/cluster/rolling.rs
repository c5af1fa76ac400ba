//! Tests of a cluster whose nodes are reset and launched again, one after another.

use anyhow::{Context, Result, ensure};
use lab::ping::Pinging;
use lab::{Container, Lab};

use crate::support::{
    MILLISECOND, all_reach_all, attached, ensure_unique, in_lab, launch_as, list, wait_for_peers,
};

/// The last node has to borrow its addresses.
const IDS: [usize; 4] = [1, 2, 3, 5];

#[test]
fn the_other_nodes_keep_talking_while_each_is_reset_and_relaunched() -> Result<()> {
    in_lab(Lab::new("rolling").hosts(IDS.len()), |lab| {
        for (host, id) in lab.hosts().iter().zip(IDS) {
            launch_as(lab, host, id)?;
        }
        lab.hosts().iter().try_for_each(|host| wait_for_peers(host, IDS.len()))?;
        let mut containers: Vec<Option<Container>> =
            lab.hosts().iter().map(|host| attached(host, "c0").map(Some)).collect::<Result<_>>()?;
        all_reach_all(&containers.iter().flatten().collect::<Vec<_>>())?;
        for (place, (host, id)) in lab.hosts().iter().zip(IDS).enumerate() {
            let others: Vec<_> =
                lab.hosts().iter().filter(|other| other.number != host.number).collect();
            let leaving = containers[place].take().context("no container")?;
            host.detach(&leaving)?;
            drop(leaving);
            let staying: Vec<&Container> = containers.iter().flatten().collect();
            let pings: Vec<Pinging> = (0..staying.len())
                .map(|it| {
                    let to = staying[(it + 1) % staying.len()];
                    Pinging::start(staying[it].netns(), to.address(), None, MILLISECOND * 10)
                })
                .collect::<Result<_>>()?;
            host.overnode(&["reset"])?.success().with_context(|| format!("node {id}"))?;
            for other in &others {
                wait_for_peers(other, IDS.len() - 1)?;
                let status = other.status()?;
                let is_known = list(&status, "peers")?.iter().any(|peer| peer["id"] == id);
                ensure!(!is_known, "{} still knows node {id}, which has left", other.name);
            }
            launch_as(lab, host, id)?;
            let back = attached(host, &format!("c{}", place + 1))?;
            for host in lab.hosts() {
                wait_for_peers(host, IDS.len())?;
            }
            // A new container on each host: allocation continues where it was.
            let mut guests = Vec::new();
            for host in lab.hosts() {
                guests.push(attached(host, "guest")?);
            }
            for pings in pings {
                let stats = pings.stop()?;
                // The last ping may still be in flight.
                ensure!(
                    stats.received > 0 && stats.lost() <= 1,
                    "while node {id} was away: {stats:?}"
                );
            }
            containers[place] = Some(back);
            let all: Vec<&Container> = containers.iter().flatten().chain(&guests).collect();
            ensure_unique(all.iter().copied())?;
            all_reach_all(&all)?;
            for (host, guest) in lab.hosts().iter().zip(&guests) {
                host.detach(guest)?;
            }
        }
        for host in lab.hosts() {
            let problems = host.status()?["node"]["problems"].clone();
            ensure!(problems.as_array().is_some_and(Vec::is_empty), "{}: {problems}", host.name);
        }
        Ok(())
    })
}
