//! The bulk path: flows that move a lot go through workers, and whatever happens to those, nothing is lost but time.

use anyhow::{Result, ensure};
use lab::flow::{self, Amount};
use lab::{Lab, eventually};

use crate::support::{PATIENCE, counter, in_lab, launch_all, one_each};

/// Waits until the workers of both hosts serve each other.
fn wait_for_workers(lab: &Lab) -> Result<()> {
    for host in lab.hosts() {
        eventually(PATIENCE, || {
            let status = host.status()?;
            let served = status["peers"].as_array().into_iter().flatten();
            let served = served.filter(|peer| peer["data"]["bulk"]["in_use"] == true).count();
            ensure!(
                served == lab.hosts().len() - 1,
                "{} serves {served} peers: {}",
                host.name,
                status["peers"]
            );
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_large_flow_goes_through_the_workers_and_arrives_whole() -> Result<()> {
    in_lab(Lab::new("bulk").hosts(2), |lab| {
        launch_all(lab)?;
        let containers = one_each(lab)?;
        wait_for_workers(lab)?;
        let before = counter(&lab.hosts()[0], "bulk-sent")?;
        let received = flow::tcp(&containers[0], &containers[1], Amount::Bytes(1_000_000_007))?;
        println!("{:.2} Gbit/s", received.gigabits());
        println!("{}", lab.hosts()[0].status()?["counters"]);
        println!("{}", lab.hosts()[1].status()?["counters"]);
        println!("{}", lab.hosts()[1].status()?["peers"]);
        assert_eq!(received.bytes, 1_000_000_007);
        ensure!(counter(&lab.hosts()[0], "bulk-sent")? > before + 10_000, "the workers got little");
        Ok(())
    })
}
