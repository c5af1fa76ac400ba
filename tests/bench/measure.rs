//! One round on one network.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use lab::iperf::Server;
use serde_json::Value;

use crate::network::Network;
use crate::probe;

/// Payload of the small datagrams, in bytes.
const SMALL: usize = 64;
/// A flow runs for so long before pings are measured beside it.
const RAMP: Duration = Duration::from_millis(300);
const PING_INTERVAL: Duration = Duration::from_millis(1);

/// How long each part of a round takes.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    pings: u64,
    flood: Duration,
    stream_seconds: u32,
    /// How often pings beside a flow are compared.
    pub turns: u32,
}

impl Times {
    /// For figures.
    pub const FULL: Self =
        Self { pings: 3000, flood: Duration::from_secs(2), stream_seconds: 3, turns: 10 };
    /// For seeing that all works.
    pub const QUICK: Self =
        Self { pings: 300, flood: Duration::from_millis(500), stream_seconds: 1, turns: 1 };

    /// A round's length, roughly.
    pub fn of_a_round(&self) -> Duration {
        let pings = PING_INTERVAL * u32::try_from(self.pings).unwrap_or(u32::MAX);
        pings + self.flood * 2 + Duration::from_secs(u64::from(self.stream_seconds) * 5 + 1)
    }

    /// The length of one measurement of pings beside a flow.
    pub fn of_a_flow(&self) -> Duration {
        Duration::from_secs(u64::from(self.stream_seconds))
    }
}

/// What one round found.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// Mean round-trip time of the pings, µs.
    pub rtt_average: f64,
    /// Median, µs.
    pub rtt_median: f64,
    /// 99th percentile, µs.
    pub rtt_p99: f64,
    /// Pings without an answer.
    pub lost: u64,
    /// Datagrams of 64 bytes that arrived, per second.
    pub packets: f64,
    /// Goodput of one TCP flow, Gbit/s.
    pub one_flow: f64,
    /// Goodput of four TCP flows together, Gbit/s.
    pub four_flows: f64,
    /// Goodput of sixteen TCP flows together, Gbit/s.
    pub sixteen_flows: f64,
    /// Goodput of one TCP flow in each direction at once, together, Gbit/s.
    pub both_ways: f64,
    /// Goodput of UDP that is sent many segments at once, Gbit/s.
    pub udp_gso: f64,
    /// Processor time of the whole machine for each gigabyte of one TCP flow, both ends and the
    /// sender's own work included, s.
    pub cpu_per_gigabyte: f64,
    /// Mean round-trip time of pings beside one TCP flow, µs.
    pub loaded_rtt_average: f64,
    /// 99th percentile of the same, µs.
    pub loaded_rtt_p99: f64,
    /// Segments that the sender of one TCP flow sent again, per gigabyte.
    pub retransmits: f64,
}

/// Measures a network once.
///
/// # Errors
/// When nothing arrives, or more than one ping in a hundred is lost.
pub fn round(network: &Network, times: Times) -> Result<Round> {
    let (a, b, to) = (network.a.netns(), network.b.netns(), network.to);
    probe::ping(a, to, 50, PING_INTERVAL).context("warming up")?;
    let pings = probe::ping(a, to, times.pings, PING_INTERVAL)?;
    ensure!(pings.lost() * 100 <= pings.sent, "{} of {} pings were lost", pings.lost(), pings.sent);
    let packets = probe::flood(a, b, to, SMALL, times.flood).context("small datagrams")?;
    let server = Server::start(b, to.into())?;
    let seconds = times.stream_seconds.to_string();
    let stream = |what: &[&str]| {
        let arguments = [&["-t", &seconds], what].concat();
        server.client(a, &arguments).with_context(|| format!("TCP {}", what.join(" ")))
    };
    let (before, one) = (busy()?, stream(&["-P", "1"])?);
    let busy = busy()? - before;
    let gigabytes =
        one["end"]["sum_received"]["bytes"].as_f64().context("iperf3 printed no bytes")? / 1e9;
    let retransmits = one["end"]["sum_sent"]["retransmits"].as_f64().unwrap_or_default();
    let both = stream(&["--bidir"])?;
    let loaded = beside(network, &server, times, &[])?;
    Ok(Round {
        rtt_average: micros(pings.average()),
        rtt_median: micros(pings.percentile(50)),
        rtt_p99: micros(pings.percentile(99)),
        lost: pings.lost(),
        packets,
        one_flow: goodput(&one, "sum_received")?,
        four_flows: goodput(&stream(&["-P", "4"])?, "sum_received")?,
        sixteen_flows: goodput(&stream(&["-P", "16"])?, "sum_received")?,
        both_ways: goodput(&both, "sum_received")? + goodput(&both, "sum_received_bidir_reverse")?,
        udp_gso: probe::gso(a, b, to, times.flood).context("UDP, many segments at once")? / 1e9,
        cpu_per_gigabyte: busy.as_secs_f64() / gigabytes.max(1e-9),
        loaded_rtt_average: loaded.average,
        loaded_rtt_p99: loaded.p99,
        retransmits: retransmits / gigabytes.max(1e-9),
    })
}

/// Pings beside one TCP flow.
#[derive(Clone, Copy, Debug)]
pub struct Loaded {
    /// Goodput of the flow, Gbit/s.
    pub rate: f64,
    /// Mean round-trip time, µs.
    pub average: f64,
    /// Median, µs.
    pub median: f64,
    /// 99th percentile, µs.
    pub p99: f64,
}

/// Measures pings beside one TCP flow, which sends what it can, or no more than `limit` Gbit/s.
///
/// # Errors
/// When nothing arrives.
pub fn beside_a_flow(network: &Network, times: Times, limit: Option<f64>) -> Result<Loaded> {
    let server = Server::start(network.b.netns(), network.to.into())?;
    let limit = limit.map(|limit| format!("{:.0}M", limit * 1e3));
    let limit: Vec<_> = limit.iter().flat_map(|limit| ["-b", limit]).collect();
    beside(network, &server, times, &limit)
}

fn beside(network: &Network, server: &Server, times: Times, flow: &[&str]) -> Result<Loaded> {
    let (a, seconds) = (network.a.netns(), times.stream_seconds.to_string());
    let (report, pings) = std::thread::scope(|scope| {
        let flow = scope.spawn(|| server.client(a, &[&["-t", &seconds], flow].concat()));
        std::thread::sleep(RAMP);
        let pings =
            probe::ping(a, network.to, u64::from(times.stream_seconds) * 700, PING_INTERVAL);
        let report = flow.join().map_err(|_| anyhow!("the flow beside the pings panicked"))?;
        anyhow::Ok((report?, pings?))
    })
    .context("pings beside a flow")?;
    Ok(Loaded {
        rate: goodput(&report, "sum_received")?,
        average: micros(pings.average()),
        median: micros(pings.percentile(50)),
        p99: micros(pings.percentile(99)),
    })
}

/// What iperf3 says of one of its sums, Gbit/s.
fn goodput(report: &Value, sum: &str) -> Result<f64> {
    report["end"][sum]["bits_per_second"]
        .as_f64()
        .context("iperf3 printed no sum")
        .map(|rate| rate / 1e9)
}

/// Time that the processors have been busy since the machine started.
fn busy() -> Result<Duration> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("/proc/stat is empty")?;
    let fields: Vec<u64> =
        line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq (proc(5)), in hundredths of a second.
    let [user, nice, system, _, _, irq, softirq, ..] = fields[..] else {
        bail!("/proc/stat is not understood")
    };
    Ok(Duration::from_millis(10 * (user + nice + system + irq + softirq)))
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1000.0
}
