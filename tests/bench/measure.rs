//! One round of measurements on one network.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use lab::iperf::Server;
use serde_json::Value;

use crate::network::Network;
use crate::probe;

/// Payload of the small datagrams, in bytes.
const SMALL: usize = 64;
/// Time that a flow runs before the pings next to it start.
const RAMP: Duration = Duration::from_millis(300);
const PING_INTERVAL: Duration = Duration::from_millis(1);

/// Duration of each part of a round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    pings: u64,
    flood: Duration,
    stream_seconds: u32,
    /// Number of times that pings next to a flow are compared.
    pub turns: u32,
}

impl Times {
    /// Durations for meaningful results.
    pub(crate) const FULL: Self =
        Self { pings: 3000, flood: Duration::from_secs(2), stream_seconds: 3, turns: 10 };
    /// Durations for a quick check that everything works.
    pub(crate) const QUICK: Self =
        Self { pings: 300, flood: Duration::from_millis(500), stream_seconds: 1, turns: 1 };

    /// Returns the approximate length of a round.
    pub(crate) fn of_a_round(&self) -> Duration {
        let pings = PING_INTERVAL * u32::try_from(self.pings).unwrap_or(u32::MAX);
        pings + self.flood * 2 + Duration::from_secs(u64::from(self.stream_seconds) * 5 + 1)
    }

    /// Returns the length of one measurement of pings next to a flow.
    pub(crate) fn of_a_flow(&self) -> Duration {
        Duration::from_secs(u64::from(self.stream_seconds))
    }
}

/// Results of one round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Round {
    /// Mean round-trip time of the pings, in µs.
    pub rtt_average: f64,
    /// Median round-trip time, in µs.
    pub rtt_median: f64,
    /// 99th percentile of the round-trip times, in µs.
    pub rtt_p99: f64,
    /// Pings without a reply.
    pub lost: u64,
    /// Datagrams of 64 bytes that arrived, per second.
    pub packets: f64,
    /// Goodput of one TCP flow, in Gbit/s.
    pub one_flow: f64,
    /// Goodput of four TCP flows together, in Gbit/s.
    pub four_flows: f64,
    /// Goodput of sixteen TCP flows together, in Gbit/s.
    pub sixteen_flows: f64,
    /// Summed goodput of one TCP flow in each direction at once, in Gbit/s.
    pub both_ways: f64,
    /// Goodput of UDP sent with segmentation offload, many segments per call, in Gbit/s.
    pub udp_gso: f64,
    /// Processor time of the whole machine per gigabyte of one TCP flow, in seconds. Includes both
    /// ends and the sender's own work.
    pub cpu_per_gigabyte: f64,
    /// Mean round-trip time of pings next to one TCP flow, in µs.
    pub loaded_rtt_average: f64,
    /// 99th percentile of the same round-trip times, in µs.
    pub loaded_rtt_p99: f64,
    /// Segments that the sender of one TCP flow retransmitted, per gigabyte.
    pub retransmits: f64,
}

/// Measures a network once.
///
/// # Errors
/// When nothing arrives, or when more than one ping in a hundred is lost.
pub(crate) fn round(network: &Network, times: Times) -> Result<Round> {
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
        one["end"]["sum_received"]["bytes"].as_f64().context("iperf3 reported no byte count")?
            / 1e9;
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
        udp_gso: probe::gso(a, b, to, times.flood).context("UDP with segmentation offload")? / 1e9,
        cpu_per_gigabyte: busy.as_secs_f64() / gigabytes.max(1e-9),
        loaded_rtt_average: loaded.average,
        loaded_rtt_p99: loaded.p99,
        retransmits: retransmits / gigabytes.max(1e-9),
    })
}

/// Results of pings next to one TCP flow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loaded {
    /// Goodput of the flow, in Gbit/s.
    pub rate: f64,
    /// Mean round-trip time, in µs.
    pub average: f64,
    /// Median round-trip time, in µs.
    pub median: f64,
    /// 99th percentile of the round-trip times, in µs.
    pub p99: f64,
}

/// Measures pings next to one TCP flow. The flow is limited to `limit` Gbit/s, or unlimited if
/// `None`.
///
/// # Errors
/// When nothing arrives.
pub(crate) fn beside_a_flow(network: &Network, times: Times, limit: Option<f64>) -> Result<Loaded> {
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
        let report = flow.join().map_err(|_| anyhow!("the thread of the flow panicked"))?;
        anyhow::Ok((report?, pings?))
    })
    .context("pings next to a flow")?;
    Ok(Loaded {
        rate: goodput(&report, "sum_received")?,
        average: micros(pings.average()),
        median: micros(pings.percentile(50)),
        p99: micros(pings.percentile(99)),
    })
}

/// Returns the rate that iperf3 reports in the given sum, in Gbit/s.
fn goodput(report: &Value, sum: &str) -> Result<f64> {
    report["end"][sum]["bits_per_second"]
        .as_f64()
        .context("iperf3 reported no rate")
        .map(|rate| rate / 1e9)
}

/// Returns the time that all processors together have been busy since the machine started.
fn busy() -> Result<Duration> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("/proc/stat is empty")?;
    let fields: Vec<u64> =
        line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq (proc(5)), in hundredths of a second.
    let [user, nice, system, _, _, irq, softirq, ..] = fields[..] else {
        bail!("cannot parse /proc/stat")
    };
    Ok(Duration::from_millis(10 * (user + nice + system + irq + softirq)))
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1000.0
}
