//! Tests the lab itself, without any node, because the other tests rely on it.

use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::flow::{self, Amount, MARKER, Manner, TcpFlow};
use lab::{Container, Entry, Family, Host, Lab};

const TICK: Duration = Duration::from_millis(10);

/// Connects a container directly to the host's own network, for flows and pings over the underlay.
fn bare(host: &Host, name: &str) -> Result<Container> {
    let container = host.container(name)?;
    let (inside, outside) =
        (container.netns().name().to_owned(), format!("192.168.{}", 100 + host.number));
    host.netns()
        .ip(&["link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", &inside])?;
    host.netns().ip(&["address", "add", &format!("{outside}.1/24"), "dev", name])?;
    host.netns().ip(&["link", "set", name, "up"])?;
    container.netns().ip(&["address", "add", &format!("{outside}.2/24"), "dev", "eth0"])?;
    container.netns().ip(&["link", "set", "eth0", "up"])?;
    container.netns().ip(&["route", "add", "default", "via", &format!("{outside}.1")])?;
    host.netns().enter(|| Ok(std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?))?;
    container.set_address(Some(format!("{outside}.2").parse()?));
    Ok(container)
}

/// Creates two bare containers that reach each other through routes between their hosts.
fn bare_pair(lab: &Lab) -> Result<(Container, Container)> {
    let (a, b) = (bare(lab.host(1), "one")?, bare(lab.host(2), "two")?);
    for (from, to) in [(lab.host(1), lab.host(2)), (lab.host(2), lab.host(1))] {
        let subnet = format!("192.168.{}.0/24", 100 + to.number);
        from.netns().ip(&["route", "add", &subnet, "via", &to.address().to_string()])?;
    }
    a.reach(b.address(), Duration::from_secs(5))?;
    Ok((a, b))
}

fn answers(from: &Host, to: IpAddr) -> Result<bool> {
    Ok(lab::ping::Pinging::start(from.netns(), to, Some(2), TICK)?.finish()?.received > 0)
}

fn every_host_reaches_every_other(lab: &Lab) -> Result<()> {
    for from in lab.hosts() {
        for to in lab.hosts() {
            for address in &to.addresses {
                ensure!(answers(from, *address)?, "{} gets no answer from {address}", from.name);
            }
        }
    }
    Ok(())
}

#[test]
fn bridged_hosts_reach_each_other() -> Result<()> {
    every_host_reaches_every_other(&Lab::new("bridged").hosts(3).family(Family::Dual).build()?)
}

#[test]
fn routed_hosts_reach_each_other() -> Result<()> {
    let lab = Lab::new("routed").hosts(3).family(Family::Dual).routed().build()?;
    assert_ne!(lab.host(1).addresses, lab.host(2).addresses);
    every_host_reaches_every_other(&lab)
}

#[test]
fn cuts_can_be_one_way_and_be_healed() -> Result<()> {
    for routed in [false, true] {
        let builder = Lab::new("cuts").hosts(3).family(Family::Dual);
        let lab = if routed { builder.routed() } else { builder }.build()?;
        let [a, b, c] = lab.hosts() else { unreachable!() };
        every_host_reaches_every_other(&lab)?;
        lab.cut(a, b)?;
        for address in &b.addresses {
            assert!(!answers(a, *address)?, "routed: {routed}, {address}");
        }
        assert!(answers(a, c.address())? && answers(b, c.address())?);
        lab.heal(a, b)?;
        every_host_reaches_every_other(&lab)?;

        lab.cut_one_way(a, b)?;
        let seen = b.capture()?;
        assert!(!answers(b, a.address())?, "host1's answers arrive although they are cut");
        let seen = seen.stop()?;
        let from_a = seen.count(|packet| packet.ip.is_some_and(|ip| ip.from == a.address()))?;
        let to_a = seen.count(|packet| packet.ip.is_some_and(|ip| ip.to == a.address()))?;
        assert!(from_a == 0 && to_a > 0, "{from_a} packets from host1, {to_a} to it");
        lab.heal(a, b)?;

        lab.unplug(c)?;
        assert!(!answers(a, c.address())?);
        lab.plug(c)?;
        lab::eventually(Duration::from_secs(5), || every_host_reaches_every_other(&lab))?;
    }
    Ok(())
}

#[test]
fn a_host_can_get_another_address() -> Result<()> {
    let lab = Lab::new("renumbered").family(Family::V6).build()?;
    let [a, b] = lab.hosts() else { unreachable!() };
    let new = lab.renumber(b, 99)?;
    assert_ne!(new, b.address());
    assert!(answers(a, new)? && !answers(a, b.address())?);
    Ok(())
}

#[test]
fn the_mtu_is_enforced() -> Result<()> {
    let lab = Lab::new("mtu").mtu(9000).build()?;
    let [a, b] = lab.hosts() else { unreachable!() };
    let address = b.address().to_string();
    let ping = |size: &str| {
        a.netns().run("ping", &["-M", "do", "-c", "1", "-W", "1", "-s", size, &address])
    };
    ping("8972")?;
    assert!(ping("8973").is_err());
    Ok(())
}

#[test]
fn captures_find_a_pattern_sent_in_the_clear() -> Result<()> {
    let lab = Lab::new("capture").build()?;
    let (a, b) = bare_pair(&lab)?;
    let capture = lab.capture()?;
    let stats = a.ping(b.address(), 20, Duration::from_millis(1))?;
    assert_eq!((stats.sent, stats.received), (20, 20));
    assert!(stats.rtt.context("no round-trip times")?.average > 0.0);
    let captured = capture.stop()?;
    assert_eq!(captured.missed, 0);
    // Each request and each answer is captured once.
    assert_eq!(captured.containing(&MARKER)?.len(), 40);
    assert_eq!(captured.containing(b"not in there")?.len(), 0);
    Ok(())
}

#[test]
fn captures_see_routed_packets_once() -> Result<()> {
    let lab = Lab::new("router").routed().build()?;
    let [a, b] = lab.hosts() else { unreachable!() };
    assert!(answers(a, b.address())?);
    let capture = lab.capture()?;
    lab::ping::Pinging::start(a.netns(), b.address(), Some(20), TICK)?.finish()?;
    assert_eq!(capture.stop()?.containing(&MARKER)?.len(), 40);
    Ok(())
}

#[test]
fn streams_are_verified_and_can_be_found_in_captures() -> Result<()> {
    let lab = Lab::new("streams").build()?;
    let (a, b) = bare_pair(&lab)?;
    let capture = lab.host(1).capture()?;
    let received = flow::tcp(&a, &b, Amount::Bytes(1_000_003))?;
    assert_eq!(received.bytes, 1_000_003);
    assert!(!capture.stop()?.containing(&MARKER)?.is_empty());

    let timed = flow::tcp(&b, &a, Amount::Time(Duration::from_millis(300)))?;
    assert!(timed.took > Duration::from_millis(200) && timed.gigabits() > 0.0);

    let datagrams = flow::udp(&a, &b, 100, 1000, Duration::from_millis(1))?;
    assert_eq!((datagrams.sent, datagrams.received, datagrams.corrupt), (100, 100, 0));
    Ok(())
}

#[test]
fn a_stream_measures_an_interruption() -> Result<()> {
    let lab = Lab::new("interruption").build()?;
    let (a, b) = bare_pair(&lab)?;
    let flow = TcpFlow::start_as(&a, &b, Amount::UntilStopped, Manner::Rate(10_000_000))?;
    flow.wait_for(1_000_000, Duration::from_secs(5))?;
    lab.cut(lab.host(1), lab.host(2))?;
    std::thread::sleep(Duration::from_millis(400));
    let before = flow.progress();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(flow.progress(), before);
    lab.heal(lab.host(1), lab.host(2))?;
    flow.wait_for(1_000_000, Duration::from_secs(10))?;
    let received = flow.stop()?;
    assert!(received.longest_pause >= Duration::from_millis(300), "{:?}", received.longest_pause);
    Ok(())
}

#[test]
fn iperf_measures_throughput() -> Result<()> {
    let lab = Lab::new("iperf").build()?;
    let server = lab::iperf::Server::start(lab.host(2).netns(), lab.host(2).address())?;
    assert!(server.tcp(lab.host(1).netns(), 1, 2)? > 1e6);
    Ok(())
}

#[test]
fn names_resolve_in_processes_of_ip_netns_exec() -> Result<()> {
    let lab = Lab::new("names").build()?;
    let [a, b] = lab.hosts() else { unreachable!() };
    let output = a.netns().command(Entry::IpNetns, "getent").args(["hosts", &b.name]).output()?;
    let found = String::from_utf8(output.stdout)?;
    assert!(found.starts_with(&b.address().to_string()), "{found}");
    assert_eq!(lab.targets(), ["host1", "host2"]);
    let other = Lab::new("addresses").entry(Entry::Setns).build()?;
    assert_eq!(other.targets(), ["192.168.48.11", "192.168.48.12"]);
    Ok(())
}

#[test]
fn a_host_without_a_node_has_no_leftovers() -> Result<()> {
    let lab = Lab::new("remains").build()?;
    assert_eq!(lab.host(1).remains()?, Vec::<String>::new());
    lab.host(1).netns().ip(&["link", "add", "stray", "type", "bridge"])?;
    lab.host(1).netns().run("tc", &["qdisc", "add", "dev", "eth0", "clsact"])?;
    assert_eq!(lab.host(1).remains()?, ["interface stray", "program clsact"]);
    assert_eq!(lab.host(2).remains()?, Vec::<String>::new());
    assert_eq!(lab.host(1).daemon_pid(), None);
    Ok(())
}

#[test]
fn sockets_created_in_a_namespace_stay_there() -> Result<()> {
    let lab = Lab::new("sockets").build()?;
    let [a, b] = lab.hosts() else { unreachable!() };
    let bind = |host: &Host| {
        let address = host.address();
        host.netns().enter(move || Ok(std::net::TcpListener::bind((address, 6783))?))
    };
    let (_one, _two) = (bind(a)?, bind(b)?);
    assert!(
        std::net::TcpListener::bind((a.address(), 6783)).is_err(),
        "the test itself is not in a host's namespace"
    );
    Ok(())
}

/// Lists the namespaces and folders whose names contain the prefix of a lab.
fn traces(prefix: &str) -> Vec<String> {
    ["/run/netns", "/etc/netns", "/tmp"]
        .iter()
        .flat_map(|folder| std::fs::read_dir(folder).into_iter().flatten())
        .filter_map(|entry| Some(entry.ok()?.path().to_string_lossy().into_owned()))
        .filter(|path| path.contains(prefix))
        .collect()
}

#[test]
fn a_panic_leaves_nothing_behind() {
    let prefix = std::sync::Mutex::new(String::new());
    let sleeper = std::sync::atomic::AtomicI32::new(0);
    let outcome = std::panic::catch_unwind(|| {
        let lab = Lab::new("panic").build().unwrap();
        let container = lab.host(1).container("c").unwrap();
        let folder = lab.folder().file_name().unwrap().to_string_lossy().into_owned();
        assert!(traces(&folder).len() >= 7, "{:?}", traces(&folder));
        *prefix.lock().unwrap() = folder;
        // Detached from its parent, as a daemon is.
        let mut child = container
            .command("sh")
            .args(["-c", "setsid sleep 1000 & echo $!"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(
            &mut std::io::BufReader::new(child.stdout.take().unwrap()),
            &mut line,
        )
        .unwrap();
        sleeper.store(line.trim().parse().unwrap(), std::sync::atomic::Ordering::SeqCst);
        child.wait().unwrap();
        panic!("on purpose");
    });
    assert!(outcome.is_err());
    assert_eq!(traces(&prefix.lock().unwrap()), Vec::<String>::new());
    let sleeper = sleeper.into_inner();
    assert!(sleeper > 0);
    assert!(
        !Path::new(&format!("/proc/{sleeper}")).exists() || is_zombie(sleeper),
        "the process is still alive"
    );
}

fn is_zombie(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

/// Not a test by itself. The next two tests run it in a process that they kill.
#[test]
fn victim() -> Result<()> {
    if std::env::var_os("LAB_VICTIM").is_none() {
        return Ok(());
    }
    let lab = Lab::new("victim").build()?;
    let _container = lab.host(1).container("c")?;
    std::fs::write(
        std::env::var("LAB_VICTIM")?,
        lab.folder().file_name().context("the folder has no name")?.to_string_lossy().as_bytes(),
    )?;
    std::thread::sleep(Duration::from_secs(60));
    Ok(())
}

/// Starts a process that builds a lab, ends it with the signal, and returns the lab's prefix.
fn end_victim(signal: nix::sys::signal::Signal) -> Result<String> {
    let note = std::env::temp_dir().join(format!("lab-victim-{}-{signal}", std::process::id()));
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--exact", "victim", "--nocapture"])
        .env("LAB_VICTIM", &note)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let prefix = lab::eventually(Duration::from_secs(20), || {
        let text = std::fs::read_to_string(&note)?;
        ensure!(!text.is_empty(), "not written yet");
        Ok(text)
    });
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), signal)?;
    let started = Instant::now();
    child.wait()?;
    ensure!(started.elapsed() < Duration::from_secs(20), "it took 20 s or more to end");
    std::fs::remove_file(&note)?;
    prefix
}

#[test]
fn sigterm_leaves_nothing_behind() -> Result<()> {
    let prefix = end_victim(nix::sys::signal::Signal::SIGTERM)?;
    assert_eq!(traces(&prefix), Vec::<String>::new());
    Ok(())
}

#[test]
fn the_next_lab_removes_what_a_killed_one_left() -> Result<()> {
    let prefix = end_victim(nix::sys::signal::Signal::SIGKILL)?;
    // Another test's lab may have swept already. What matters is that nothing is left after this
    // lab was built.
    let _lab = Lab::new("next").hosts(1).build()?;
    assert_eq!(traces(&prefix), Vec::<String>::new());
    Ok(())
}
