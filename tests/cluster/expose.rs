//! Tests of the host itself in the container network: `expose` and `hide`.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use lab::ping::Pinging;
use lab::{Host, Lab, Netns, eventually};

use crate::cleanliness::ensure_clean;
use crate::support::{
    MILLISECOND, TIMEOUT, attached, ensure_sealed, in_lab, launch, launch_all, list,
    wait_for_sessions,
};

/// Name of the exposed interface on the host.
const INTERFACE: &str = "overnode0";

fn expose(host: &Host, arguments: &[&str]) -> Result<IpAddr> {
    let printed = host.overnode(&[&["expose"], arguments].concat())?.success()?;
    let address: IpNet =
        printed.trim_end().parse().with_context(|| format!("expose printed {printed:?}"))?;
    ensure!(address.prefix_len() == 12, "{address} does not have the subnet's prefix");
    Ok(address.addr())
}

fn reaches(from: &Netns, to: IpAddr) -> Result<()> {
    eventually(TIMEOUT, || {
        let stats = Pinging::start(from, to, Some(1), MILLISECOND)?.finish()?;
        ensure!(stats.received == 1, "{} does not reach {to}", from.name());
        Ok(())
    })
}

/// Sends one stream of large segments, which must arrive completely.
fn moves_tcp(from: &Netns, to: &Netns, address: IpAddr) -> Result<()> {
    let listener = to.enter(|| Ok(TcpListener::bind((address, 0))?))?;
    let place = listener.local_addr()?;
    let sent: Vec<u8> = (0..16_000_000_u32).map(|at| (at % 251) as u8).collect();
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let mut stream = from.enter(|| Ok(TcpStream::connect_timeout(&place, TIMEOUT)?))?;
            stream.set_write_timeout(Some(TIMEOUT))?;
            stream.write_all(&sent)?;
            stream.shutdown(Shutdown::Write)?;
            anyhow::Ok(())
        });
        listener.set_nonblocking(true)?;
        let (mut stream, from) = eventually(TIMEOUT, || Ok(listener.accept()?))?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut received = Vec::new();
        stream.read_to_end(&mut received)?;
        ensure!(received == sent, "{} bytes of {} arrived from {from}", received.len(), sent.len());
        sending.join().expect("the sending thread panicked")
    })
}

#[test]
fn hosts_and_containers_of_all_hosts_reach_each_other() -> Result<()> {
    in_lab(Lab::new("expose").hosts(2), |lab| {
        launch_all(lab)?;
        let [a, b] = lab.hosts() else { unreachable!() };
        let (near, far) = (attached(a, "near")?, attached(b, "far")?);
        let firewall = |host: &Host| host.netns().run("nft", &["list", "ruleset"]);
        let rules = firewall(a)?;
        let capture = lab.capture()?;
        let host = expose(a, &["--name", "storage"])?;
        for (name, netns, address) in
            [("near", near.netns(), near.address()), ("far", far.netns(), far.address())]
        {
            reaches(a.netns(), address).with_context(|| format!("the host to {name}"))?;
            reaches(netns, host).with_context(|| format!("{name} to the host"))?;
            moves_tcp(a.netns(), netns, address).with_context(|| format!("the host to {name}"))?;
            moves_tcp(netns, a.netns(), host).with_context(|| format!("{name} to the host"))?;
        }
        // The other host is exposed as well. Nothing but its address is known.
        let other = expose(b, &[])?;
        ensure!(host != other, "both hosts have {host}");
        moves_tcp(a.netns(), b.netns(), other)?;
        ensure_sealed(&capture.stop()?)?;

        let status = a.status()?;
        let endpoint = list(&status, "endpoints")?.iter().find(|it| it["kind"] == "host");
        let endpoint = endpoint.context("status --endpoints does not show the host")?;
        ensure!(endpoint["name"] == "storage" && endpoint["state"] == "attached", "{endpoint}");
        // Peers must not be told to reach the underlay through the tunnel.
        ensure!(
            !status["node"]["underlay"].to_string().contains(&host.to_string()),
            "{}",
            status["node"]
        );
        let found = b.overnode(&["dns-lookup", "storage"])?.success()?;
        ensure!(found.trim() == host.to_string(), "storage resolves to {found:?}");
        ensure!(firewall(a)? == rules, "the firewall rules changed");

        // Exposing again changes nothing.
        ensure!(expose(a, &[])? == host, "the host got a different address");
        let complaint = a.overnode(&["expose", "--ip", "10.32.0.9/12"])?.failure(1)?;
        ensure!(
            complaint.contains(&host.to_string()) && complaint.contains("overnode hide"),
            "{complaint}"
        );
        let complaint = a.overnode(&["reset"])?.failure(1)?;
        ensure!(
            complaint.contains("this host") && complaint.contains(&host.to_string()),
            "{complaint}"
        );

        a.overnode(&["hide"])?.success()?;
        ensure!(
            !a.netns().interfaces()?.iter().any(|name| name == INTERFACE),
            "{INTERFACE} is still there"
        );
        let complaint = a.overnode(&["hide"])?.failure(1)?;
        ensure!(complaint.contains("not exposed"), "{complaint}");
        // The remaining containers and hosts are reachable as before.
        ensure!(near.ping(far.address(), 20, MILLISECOND)?.lost() == 0);
        reaches(near.netns(), other)?;
        // The old interface is gone, and the host can be exposed again with a chosen address.
        ensure!(expose(a, &["--ip", "10.32.0.9/12"])? == "10.32.0.9".parse::<IpAddr>()?);
        reaches(far.netns(), "10.32.0.9".parse()?)?;
        for host in lab.hosts() {
            host.overnode(&["reset", "--force"])?.success()?;
            ensure_clean(host)?;
        }
        Ok(())
    })
}

/// A reboot removes interfaces and processes but not the state. An administrator may also delete
/// the interface.
#[test]
fn an_exposed_host_stays_exposed_through_kills_deletions_and_reboots() -> Result<()> {
    in_lab(Lab::new("expose-again").hosts(2), |lab| {
        launch_all(lab)?;
        let [a, b] = lab.hosts() else { unreachable!() };
        let far = attached(b, "far")?;
        let host = expose(a, &[])?;
        reaches(far.netns(), host)?;
        let pings = far.start_pinging(host, 10 * MILLISECOND)?;
        a.kill_daemon()?;
        a.overnode(&["resume"])?.success()?;
        let stats = pings.stop()?;
        ensure!(
            stats.lost() == 0,
            "{} of {} pings were lost after the daemon was killed",
            stats.lost(),
            stats.sent
        );
        let interfaces = || a.netns().interfaces();
        let made: Vec<String> =
            interfaces()?.into_iter().filter(|it| it.starts_with("ov")).collect();
        ensure!(made.iter().any(|name| name == INTERFACE), "{made:?}");
        a.kill_daemon()?;
        for interface in made.iter().filter(|name| interfaces().is_ok_and(|all| all.contains(name)))
        {
            // Deleting one end of a pair also deletes the other.
            let _ = a.netns().ip(&["link", "del", interface]);
        }
        a.overnode(&["resume"])?.success()?;
        wait_for_sessions(lab)?;
        reaches(far.netns(), host)?;
        ensure!(expose(a, &[])? == host, "the host has a different address");
        a.netns().ip(&["link", "del", INTERFACE])?;
        eventually(Duration::from_secs(75), || {
            ensure!(
                interfaces()?.iter().any(|name| name == INTERFACE),
                "{INTERFACE} does not return"
            );
            Ok(())
        })?;
        reaches(far.netns(), host)?;
        reaches(a.netns(), far.address())
    })
}

/// Other routes into the container network would be shadowed by the exposed interface or take
/// precedence over it, and the tunnel's own packets could loop.
#[test]
fn a_host_with_another_route_into_the_subnet_is_not_exposed() -> Result<()> {
    in_lab(Lab::new("expose-route").hosts(1), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        host.netns().ip(&["link", "add", "office", "type", "veth", "peer", "office1"])?;
        for end in ["office", "office1"] {
            host.netns().ip(&["link", "set", end, "up"])?;
        }
        // A route to an unrelated network does no harm.
        host.netns().ip(&["route", "add", "192.168.77.0/24", "dev", "office"])?;
        for route in ["10.35.0.0/16", "10.0.0.0/8"] {
            host.netns().ip(&["route", "add", route, "dev", "office"])?;
            let complaint = host.overnode(&["expose"])?.failure(1)?;
            ensure!(complaint.contains(route) && complaint.contains("office"), "{complaint}");
            let status = host.status()?;
            ensure!(list(&status, "endpoints")?.is_empty(), "{}", status["endpoints"]);
            host.netns().ip(&["route", "del", route, "dev", "office"])?;
        }
        expose(host, &[])?;
        host.overnode(&["hide"])?.success()?;
        host.overnode(&["reset"])?.success()?;
        host.netns().ip(&["link", "del", "office"])?;
        ensure_clean(host)
    })
}
