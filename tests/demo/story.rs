//! The steps of the demo.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::flow::{self, Amount, MARKER, Manner, TcpFlow};
use lab::ping::Pinging;
use lab::{Capture, Container, Host, Lab, eventually};

const STEPS: usize = 9;
/// The targets of the manual's first example. The fourth host need not exist.
const TARGETS: [&str; 4] = ["host1", "host2", "host3", "host4"];
const TOKEN: &str = "my-cluster-password";
const CONTAINERS_PER_HOST: usize = 2;
const MILLISECOND: Duration = Duration::from_millis(1);
/// Time after `launch` within which packets must flow.
const TIMEOUT: Duration = Duration::from_secs(10);

/// State of the demo.
pub(crate) struct Story<'a> {
    lab: &'a Lab,
    capture: Option<Capture>,
    containers: Vec<Container>,
    step: usize,
    since: Instant,
}

impl<'a> Story<'a> {
    /// Starts the demo on hosts that never had a node.
    pub(crate) fn new(lab: &'a Lab) -> Result<Self> {
        println!("Three hosts, as network namespaces on one bridge; real daemons, real packets.\n");
        let capture = Some(lab.capture()?);
        Ok(Self { lab, capture, containers: Vec::new(), step: 0, since: Instant::now() })
    }

    /// Runs all steps in order.
    ///
    /// # Errors
    /// The first claim that does not hold.
    pub(crate) fn tell(mut self) -> Result<()> {
        self.launch()?;
        self.attach()?;
        self.ping_everything()?;
        self.show_status()?;
        self.transfer_under_capture()?;
        self.search()?;
        self.measure()?;
        self.kill_daemon()?;
        self.clean_up()
    }

    fn begin(&mut self, what: &str) {
        self.step += 1;
        self.since = Instant::now();
        println!("{}", bold(&format!("[{}/{STEPS}] {what}", self.step)));
        let _ = std::io::stdout().flush();
    }

    fn done(&mut self, result: &str) {
        let took = self.since.elapsed().as_secs_f32();
        if result.is_empty() {
            println!("    ({took:.1} s)\n");
        } else {
            println!("    {} ({took:.1} s)\n", bold(&format!("✓ {result}")));
        }
        let _ = std::io::stdout().flush();
    }

    fn launch(&mut self) -> Result<()> {
        self.begin("launch a node on each host");
        for host in self.lab.hosts() {
            let id = host.number.to_string();
            let words = [&["launch", "--id", &id, "--token", TOKEN], &TARGETS[..]].concat();
            overnode(host, &words)?;
        }
        self.done("three nodes answer");
        Ok(())
    }

    fn attach(&mut self) -> Result<()> {
        self.begin("attach two containers to each node");
        for host in self.lab.hosts() {
            for number in 1..=CONTAINERS_PER_HOST {
                let container = host.container(&format!("c{number}"))?;
                let address = host.attach(&container, &["--name", &container.name])?;
                say(&format!(
                    "{} > overnode attach {} --name {}",
                    host.name,
                    container.target(),
                    container.name
                ));
                say(&format!("{address}"));
                self.containers.push(container);
            }
        }
        self.done("six containers have addresses");
        Ok(())
    }

    fn ping_everything(&mut self) -> Result<()> {
        self.begin("every container pings every other");
        let mut pairs = 0;
        let mut slowest = 0.0_f64;
        for from in &self.containers {
            for to in self.containers.iter().filter(|to| to.address() != from.address()) {
                from.reach(to.address(), TIMEOUT)?;
                let stats = from.ping(to.address(), 5, MILLISECOND)?;
                ensure!(
                    stats.lost() == 0,
                    "{} of {} pings from {} to {} were lost",
                    stats.lost(),
                    stats.sent,
                    from.address(),
                    to.address()
                );
                slowest = slowest.max(stats.rtt.context("no round-trip times")?.average);
                pairs += 1;
            }
        }
        self.done(&format!("{pairs} pairs, no ping lost, slowest average {slowest:.0} µs"));
        Ok(())
    }

    fn show_status(&mut self) -> Result<()> {
        self.begin("what the nodes report");
        for section in ["--targets", "--peers", "--connections", "--endpoints"] {
            let table = overnode(self.lab.host(1), &["status", section])?;
            println!("{}", indent(&table));
        }
        for host in &self.lab.hosts()[1..] {
            println!("{}", indent(&overnode(host, &["status", "--connections"])?));
        }
        self.done("");
        Ok(())
    }

    fn transfer_under_capture(&mut self) -> Result<()> {
        self.begin("send 32 MB over TCP from host1 to host2 while the underlay is captured");
        let received =
            flow::tcp(&self.containers[0], &self.containers[2], Amount::Bytes(32_000_000))?;
        self.done(&format!("{} bytes, all unchanged", received.bytes));
        Ok(())
    }

    fn search(&mut self) -> Result<()> {
        self.begin("search the capture for what the containers sent");
        let capture = self.capture.take().context("the capture has ended")?;
        let captured = capture.stop()?;
        ensure!(
            captured.missed == 0,
            "the capture missed {} packets, so it proves nothing",
            captured.missed
        );
        let packets = captured.packets()?;
        let control = packets.iter().filter(|packet| packet.is_tcp(6783)).count();
        let messages = |kinds: &[u8]| {
            packets
                .iter()
                .filter(|packet| packet.wireguard_type().is_some_and(|kind| kinds.contains(&kind)))
                .count()
        };
        let (handshakes, data) = (messages(&[1, 2]), messages(&[4]));
        say(&format!("{control} packets of control connections (TCP 6783)"));
        say(&format!(
            "{handshakes} WireGuard handshake messages and {data} data messages (UDP 6784)"
        ));
        say(&format!(
            "{} other packets: ARP, IPv6 neighbor discovery",
            packets.len() - control - handshakes - data
        ));
        ensure!(control > 0, "no control connection was seen on the underlay");
        ensure!(handshakes > 0 && data > 20_000, "the transfer was not seen on the underlay");
        // A search that cannot find anything proves nothing, so the same search must succeed
        // inside a container.
        let inside = Capture::start(self.containers[2].netns(), self.lab.folder(), &["-i", "any"])?;
        self.containers[0].ping(self.containers[2].address(), 5, MILLISECOND)?;
        let inside = inside.stop()?;
        let seen = inside.containing(&MARKER)?.len();
        ensure!(seen >= 10, "the search does not find the pattern inside the container");
        let found = captured.containing(&MARKER)?.len();
        ensure!(found == 0, "{found} packets on the underlay show the containers' payload");
        self.done(&format!(
            "the pattern {:?} is in no packet of {}",
            String::from_utf8_lossy(&MARKER),
            packets.len()
        ));
        Ok(())
    }

    fn measure(&mut self) -> Result<()> {
        self.begin("repeat the transfer without the capture for two seconds");
        let received = flow::tcp(
            &self.containers[0],
            &self.containers[2],
            Amount::Time(Duration::from_secs(2)),
        )?;
        self.done(&format!(
            "{:.2} Gbit/s, one flow; both hosts share this machine",
            received.gigabits()
        ));
        Ok(())
    }

    fn kill_daemon(&mut self) -> Result<()> {
        const PINGS: u32 = 3000;
        self.begin("kill host2's daemon (SIGKILL) during a transfer and 1000 pings per second");
        let (from, to, host) = (&self.containers[0], &self.containers[2], self.lab.host(2));
        let pings = Pinging::start(from.netns(), to.address(), Some(PINGS), MILLISECOND)?;
        let transfer = TcpFlow::start_as(from, to, Amount::UntilStopped, Manner::Rate(40_000_000))?;
        transfer.wait_for(1_000_000, TIMEOUT)?;
        let pid = host.daemon_pid().context("host2 has no daemon")?;
        host.kill_daemon()?;
        say(&format!("kill -9 {pid}"));
        // Packets still flow without the daemon.
        let before = transfer.progress();
        transfer.wait_for(20_000_000, TIMEOUT)?;
        say(&format!(
            "{} MB arrived while no daemon ran",
            (transfer.progress() - before) / 1_000_000
        ));
        ensure!(host.daemon_pid().is_none(), "a daemon runs although none was started");
        overnode(host, &["resume"])?;
        eventually(TIMEOUT, || {
            let status = host.status()?;
            ensure!(status["node"]["state"] == "running", "host2 is {}", status["node"]["state"]);
            Ok(())
        })?;
        transfer.wait_for(20_000_000, TIMEOUT)?;
        let stats = pings.finish()?;
        let received = transfer.stop()?;
        ensure!(stats.lost() == 0, "{} of {} pings were lost", stats.lost(), stats.sent);
        self.done(&format!(
            "{} of {} pings answered; {} MB, all unchanged; longest pause {} ms",
            stats.received,
            stats.sent,
            received.bytes / 1_000_000,
            received.longest_pause.as_millis()
        ));
        Ok(())
    }

    fn clean_up(mut self) -> Result<()> {
        self.begin("reset the nodes");
        let refusal = self.lab.host(1).overnode(&["reset"])?.failure(1)?;
        say(&format!("host1 > overnode reset\n    {refusal}"));
        for host in self.lab.hosts() {
            overnode(host, &["reset", "--force"])?;
            let remains = eventually(Duration::from_secs(5), || {
                let remains = host.remains()?;
                ensure!(
                    remains.is_empty(),
                    "`overnode reset` left on {}: {}",
                    host.name,
                    remains.join(", ")
                );
                Ok(remains)
            })?;
            debug_assert!(remains.is_empty());
        }
        for container in &self.containers {
            let interfaces = container.netns().interfaces()?;
            ensure!(
                interfaces.is_empty(),
                "`overnode reset` left {interfaces:?} inside {}",
                container.name
            );
        }
        self.done("no interface, program, map or file is left");
        Ok(())
    }
}

/// Runs `overnode` on a host and prints the command as it would be typed.
fn overnode(host: &Host, words: &[&str]) -> Result<String> {
    say(&format!("{} > overnode {}", host.name, words.join(" ")));
    host.overnode(words)?.success()
}

fn say(text: &str) {
    println!("    {text}");
    let _ = std::io::stdout().flush();
}

fn indent(text: &str) -> String {
    text.trim_end().lines().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}

fn bold(text: &str) -> String {
    let plain = std::env::var_os("NO_COLOR").is_some() || !std::io::stdout().is_terminal();
    if plain { text.to_owned() } else { format!("\u{1b}[1m{text}\u{1b}[0m") }
}
