//! Invariant C1: `reset`, a failed `launch` and a removed container leave nothing behind.

use std::net::{TcpListener, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Host, Lab, eventually};

use crate::support::{
    MILLISECOND, TIMEOUT, TOKEN, attached, dns_interface, in_lab, launch, launch_containers, list,
};

/// Time within which orphans are removed. The daemon searches for them every minute, but usually an
/// event announces them at once.
const SWEEP: Duration = Duration::from_secs(75);

/// Fails with a list of what a node left on the host, if it left anything.
pub(crate) fn ensure_clean(host: &Host) -> Result<()> {
    eventually(Duration::from_secs(5), || {
        let remains = host.remains()?;
        ensure!(remains.is_empty(), "left on {}: {}", host.name, remains.join(", "));
        Ok(())
    })
}

#[test]
fn reset_leaves_nothing() -> Result<()> {
    in_lab(Lab::new("reset").hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        let host = lab.host(1);
        assert!(
            !host.remains()?.is_empty() && !host.pins()?.is_empty(),
            "the node created nothing"
        );
        let complaint = host.overnode(&["reset"])?.failure(1)?;
        assert!(complaint.contains(&containers[0].target()), "{complaint}");
        assert!(complaint.contains("--force"), "{complaint}");
        assert_eq!(containers[0].ping(containers[1].address(), 100, MILLISECOND)?.lost(), 0);
        host.detach(&containers[0])?;
        host.overnode(&["reset"])?.success()?;
        ensure_clean(host)?;
        lab.host(2).overnode(&["reset", "--force"])?.success()?;
        ensure_clean(lab.host(2))?;
        assert_eq!(containers[1].netns().interfaces()?, Vec::<String>::new());
        Ok(())
    })
}

#[test]
fn reset_works_on_a_node_that_is_not_running() -> Result<()> {
    in_lab(Lab::new("dead").hosts(1), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        let container = attached(host, "c")?;
        host.kill_daemon()?;
        let complaint = host.overnode(&["reset"])?.failure(1)?;
        assert!(complaint.contains(&container.target()), "{complaint}");
        host.overnode(&["reset", "--force"])?.success()?;
        ensure_clean(host)?;
        assert_eq!(container.netns().interfaces()?, Vec::<String>::new());
        // Resetting again works even though nothing is left.
        let _ = host.overnode(&["reset"])?;
        ensure_clean(host)
    })
}

#[test]
fn resetting_a_node_does_not_disturb_others_on_the_machine() -> Result<()> {
    in_lab(Lab::new("apart").hosts(3), |lab| {
        let containers = launch_containers(lab)?;
        let pings = lab::ping::Pinging::start(
            containers[0].netns(),
            containers[1].address(),
            Some(2000),
            MILLISECOND,
        )?;
        lab.host(3).overnode(&["reset", "--force"])?.success()?;
        ensure_clean(lab.host(3))?;
        assert_eq!(pings.finish()?.lost(), 0);
        Ok(())
    })
}

#[test]
fn a_launch_that_fails_leaves_nothing() -> Result<()> {
    in_lab(Lab::new("failed").hosts(1), |lab| {
        let host = lab.host(1);
        let id_and_token = ["launch", "--id", "1", "--token", TOKEN];
        let tcp = host.netns().enter(|| Ok(TcpListener::bind(("0.0.0.0", 6783))?))?;
        let complaint = host.overnode(&id_and_token)?.failure(1)?;
        assert!(complaint.contains("6783"), "{complaint}");
        ensure_clean(host)?;
        drop(tcp);

        let udp = host.netns().enter(|| Ok(UdpSocket::bind(("0.0.0.0", 6784))?))?;
        let complaint = host.overnode(&id_and_token)?.failure(1)?;
        assert!(complaint.contains("6784"), "{complaint}");
        ensure_clean(host)?;
        drop(udp);

        let words = [&id_and_token[..], &["--interface", "nosuch0"]].concat();
        let complaint = host.overnode(&words)?.complaint()?;
        assert!(complaint.contains("nosuch0"), "{complaint}");
        ensure_clean(host)?;

        host.overnode(&id_and_token)?.success()?;
        host.overnode(&["reset"])?.success()?;
        ensure_clean(host)
    })
}

fn wait_until_nothing_is_attached(host: &Host) -> Result<()> {
    eventually(SWEEP, || {
        let status = host.status()?;
        let endpoints = list(&status, "endpoints")?;
        ensure!(endpoints.is_empty(), "still attached: {endpoints:?}");
        let interfaces = host.netns().interfaces()?;
        let is_of_a_container = |name: &&String| {
            name.starts_with("ov") && !name.starts_with("ovn") && **name != dns_interface(host)
        };
        let left: Vec<_> = interfaces.iter().filter(is_of_a_container).collect();
        ensure!(left.is_empty(), "interfaces are left: {left:?}");
        Ok(())
    })
}

#[test]
fn a_container_that_dies_is_cleaned_up() -> Result<()> {
    in_lab(Lab::new("dies").hosts(1), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        let container = attached(host, "c")?;
        drop(container);
        wait_until_nothing_is_attached(host)
    })
}

#[test]
fn a_container_that_dies_while_no_daemon_runs_is_cleaned_up() -> Result<()> {
    in_lab(Lab::new("dies-alone").hosts(1), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        let (dies, lives) = (attached(host, "dies")?, attached(host, "lives")?);
        host.kill_daemon()?;
        drop(dies);
        host.overnode(&["resume"])?.success()?;
        eventually(SWEEP, || {
            let status = host.status()?;
            let endpoints = list(&status, "endpoints")?;
            ensure!(endpoints.len() == 1, "{endpoints:?}");
            ensure!(
                endpoints[0]["address"]
                    .as_str()
                    .is_some_and(|it| it.starts_with(&lives.address().to_string()))
            );
            Ok(())
        })
    })
}

#[test]
fn a_failed_attach_leaves_nothing() -> Result<()> {
    in_lab(Lab::new("attach").hosts(1), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        let container = host.container("c")?;
        let before = host.netns().interfaces()?;
        // The name that the interface would get is taken.
        container.netns().ip(&["link", "add", "overnode0", "type", "bridge"])?;
        host.overnode(&["attach", &container.target()])?.failure(1)?;
        assert_eq!(host.netns().interfaces()?, before);
        assert_eq!(list(&host.status()?, "endpoints")?.len(), 0);
        container.netns().ip(&["link", "del", "overnode0"])?;
        host.attach(&container, &[])?;
        let status = host.status()?;
        let own = status["ipam"]["owners"]
            .as_array()
            .and_then(|owners| owners.iter().find(|it| it["id"] == 1));
        let active = own.context("the node owns nothing")?["active"].clone();
        assert_eq!(active, 1, "the address of the failed attach was not released");
        Ok(())
    })
}

#[test]
fn leftovers_of_a_node_are_removed_when_its_state_is_gone() -> Result<()> {
    in_lab(Lab::new("stateless").hosts(1), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        let container = attached(host, "c")?;
        host.kill_daemon()?;
        std::fs::remove_dir_all(host.state_directory())?;
        assert!(!host.pins()?.is_empty(), "nothing is left to remove");
        let _daemon = lab::background::Background::start(host.command("overnoded")?)?;
        eventually(TIMEOUT, || {
            ensure!(host.pins()?.is_empty(), "still pinned: {:?}", host.pins()?);
            ensure!(host.netns().interfaces()? == [host.interface()], "interfaces are left");
            ensure!(container.netns().interfaces()?.is_empty(), "the container is still attached");
            Ok(())
        })
    })
}
