//! Tests that nodes can start in any order.
//!
//! Five nodes have 120 orders. Only two things about an order may matter: which nodes already run
//! when a node starts, and which one starts next. The ten orders here contain all six orders of
//! every three nodes. Each node has each position twice, and follows every other node directly. A
//! test checks these properties.

use std::collections::BTreeSet;
use std::process::{Child, Stdio};

use anyhow::{Context, Result, ensure};
use lab::{Container, Host, Lab};

use crate::support::{
    all_reach_all, ensure_unique, in_lab, launch, wait_for_peers, wait_for_sessions,
};

const NODES: usize = 5;

const ORDERS: [[usize; NODES]; 10] = [
    [2, 4, 5, 1, 3],
    [5, 4, 3, 2, 1],
    [3, 1, 4, 5, 2],
    [1, 2, 3, 5, 4],
    [5, 1, 4, 2, 3],
    [4, 3, 2, 1, 5],
    [3, 5, 2, 4, 1],
    [2, 3, 1, 4, 5],
    [4, 5, 1, 3, 2],
    [1, 2, 5, 3, 4],
];

#[test]
fn the_orders_cover_all_triples_positions_and_successions() {
    let (mut triples, mut places, mut neighbors) = (BTreeSet::new(), Vec::new(), BTreeSet::new());
    for order in ORDERS {
        for (place, node) in order.into_iter().enumerate() {
            places.push((node, place));
            let (before, after) = (&order[..place], &order[place + 1..]);
            neighbors.extend(before.last().map(|last| (*last, node)));
            for one in before {
                triples.extend(after.iter().map(|other| (*one, node, *other)));
            }
        }
    }
    assert_eq!(triples.len(), NODES * (NODES - 1) * (NODES - 2));
    assert_eq!(neighbors.len(), NODES * (NODES - 1));
    for node in 1..=NODES {
        for place in 0..NODES {
            assert_eq!(places.iter().filter(|it| **it == (node, place)).count(), 2);
        }
    }
}

/// A running `overnode attach`. A node without addresses waits for another node to lend it some.
struct Attaching {
    child: Child,
    container: Container,
}

impl Attaching {
    fn start(host: &Host) -> Result<Self> {
        let container = host.container("c")?;
        let mut command = host.command("overnode")?;
        command.args(["attach", &container.target()]).stdin(Stdio::null());
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        Ok(Self { child, container })
    }

    fn finish(self) -> Result<Container> {
        let output = self.child.wait_with_output()?;
        let said =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        let address = said[0].trim().split('/').next().and_then(|it| it.parse().ok());
        ensure!(output.status.success() && address.is_some(), "attach: {said:?}");
        self.container.set_address(address);
        Ok(self.container)
    }
}

/// Launches the nodes in this order and attaches a container on each at once. The first ones wait
/// for a lender.
fn start(lab: &Lab, order: [usize; NODES]) -> Result<()> {
    let mut attaching = Vec::new();
    for number in order {
        launch(lab, lab.host(number))?;
        attaching.push(Attaching::start(lab.host(number))?);
    }
    let containers: Vec<Container> =
        attaching.into_iter().map(Attaching::finish).collect::<Result<_>>()?;
    ensure_unique(&containers)?;
    wait_for_sessions(lab)?;
    all_reach_all(&containers)?;
    lab.hosts().iter().try_for_each(|host| wait_for_peers(host, NODES))
}

/// Resets all nodes at once, so that no node remembers an earlier cluster.
fn reset_all(lab: &Lab) -> Result<()> {
    std::thread::scope(|scope| {
        let reset = |host: &Host| host.overnode(&["reset", "--force"])?.success();
        let resets: Vec<_> =
            lab.hosts().iter().map(|host| scope.spawn(move || reset(host))).collect();
        resets.into_iter().try_for_each(|reset| {
            reset.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map(drop)
        })
    })?;
    for host in lab.hosts() {
        ensure!(host.remains()?.is_empty(), "{}: {:?}", host.name, host.remains()?);
    }
    Ok(())
}

fn start_in(name: &str, orders: &[[usize; NODES]]) -> Result<()> {
    in_lab(Lab::new(name).hosts(NODES), |lab| {
        for order in orders {
            start(lab, *order).with_context(|| format!("in the order {order:?}"))?;
            reset_all(lab)?;
        }
        Ok(())
    })
}

#[test]
fn five_nodes_find_each_other_in_any_start_order() -> Result<()> {
    start_in("orders", &ORDERS[..5])
}

#[test]
fn five_nodes_find_each_other_in_the_remaining_start_orders() -> Result<()> {
    start_in("more-orders", &ORDERS[5..])
}
