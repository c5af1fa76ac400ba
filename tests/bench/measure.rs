//! One round on one network.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::rig::{probe, space};
use serde_json::Value;

use crate::network::Network;

/// Payload of the small datagrams, in bytes.
const SMALL: usize = 64;
const PING_INTERVAL: Duration = Duration::from_millis(1);

/// How long each part of a round takes.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    pings: u64,
    flood: Duration,
    stream: Duration,
}

impl Times {
    /// For figures.
    pub const FULL: Self =
        Self { pings: 3000, flood: Duration::from_secs(2), stream: Duration::from_secs(3) };
    /// For seeing that all works.
    pub const QUICK: Self =
        Self { pings: 300, flood: Duration::from_millis(500), stream: Duration::from_secs(1) };

    /// A round's length, roughly.
    pub fn of_a_round(&self) -> Duration {
        let pings = PING_INTERVAL * u32::try_from(self.pings).unwrap_or(u32::MAX);
        pings + self.flood + self.stream * 2 + Duration::from_secs(1)
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
}

/// Measures a network once.
///
/// # Errors
/// When nothing arrives, or more than one ping in a hundred is lost.
pub fn round(network: &Network, times: Times) -> Result<Round> {
    let Network { a, b, to, .. } = network;
    probe::ping(a, *to, 50, PING_INTERVAL).context("warming up")?;
    let pings = probe::ping(a, *to, times.pings, PING_INTERVAL)?;
    ensure!(pings.lost() * 100 <= pings.sent, "{} of {} pings were lost", pings.lost(), pings.sent);
    let flood = probe::flood(a, b, *to, SMALL, times.flood).context("small datagrams")?;
    Ok(Round {
        rtt_average: micros(pings.average()),
        rtt_median: micros(pings.percentile(50)),
        rtt_p99: micros(pings.percentile(99)),
        lost: pings.lost(),
        packets: flood.received_per_second,
        one_flow: stream(network, 1, times.stream).context("TCP, one flow")?,
        four_flows: stream(network, 4, times.stream).context("TCP, four flows")?,
    })
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1000.0
}

/// Goodput in Gbit/s as iperf3's receiver sees it.
fn stream(network: &Network, flows: u32, time: Duration) -> Result<f64> {
    let mut server = network.b.command("iperf3")?;
    let mut server = space::Process::start(server.args(["-s", "-1", "--forceflush"]))?;
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while !server.last_words().contains("listening") {
        server.check()?;
        ensure!(std::time::Instant::now() < deadline, "iperf3 does not start to listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut client = network.a.command("iperf3")?;
    client.args(["-J", "--connect-timeout", "3000", "-c", &network.to.to_string()]);
    client.args(["-t", &time.as_secs().to_string(), "-O", "0", "-P", &flows.to_string()]);
    let text = space::run(&mut client)?;
    let document: Value = serde_json::from_str(&text).context("iperf3 printed something that is no JSON")?;
    let bits = document["end"]["sum_received"]["bits_per_second"].as_f64().with_context(|| {
        format!("iperf3 reports no goodput: {}", document["error"].as_str().unwrap_or("it does not say why"))
    })?;
    Ok(bits / 1e9)
}
