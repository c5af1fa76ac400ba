//! One round on one network.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::iperf::Server;

use crate::network::Network;
use crate::probe;

/// Payload of the small datagrams, in bytes.
const SMALL: usize = 64;
const PING_INTERVAL: Duration = Duration::from_millis(1);

/// How long each part of a round takes.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    pings: u64,
    flood: Duration,
    stream_seconds: u32,
}

impl Times {
    /// For figures.
    pub const FULL: Self = Self { pings: 3000, flood: Duration::from_secs(2), stream_seconds: 3 };
    /// For seeing that all works.
    pub const QUICK: Self = Self { pings: 300, flood: Duration::from_millis(500), stream_seconds: 1 };

    /// A round's length, roughly.
    pub fn of_a_round(&self) -> Duration {
        let pings = PING_INTERVAL * u32::try_from(self.pings).unwrap_or(u32::MAX);
        pings + self.flood + Duration::from_secs(u64::from(self.stream_seconds) * 2 + 1)
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
    let (a, b, to) = (network.a.netns(), network.b.netns(), network.to);
    probe::ping(a, to, 50, PING_INTERVAL).context("warming up")?;
    let pings = probe::ping(a, to, times.pings, PING_INTERVAL)?;
    ensure!(pings.lost() * 100 <= pings.sent, "{} of {} pings were lost", pings.lost(), pings.sent);
    let packets = probe::flood(a, b, to, SMALL, times.flood).context("small datagrams")?;
    let server = Server::start(b, to.into())?;
    let stream =
        |flows| server.tcp(a, times.stream_seconds, flows).with_context(|| format!("TCP, flows: {flows}"));
    Ok(Round {
        rtt_average: micros(pings.average()),
        rtt_median: micros(pings.percentile(50)),
        rtt_p99: micros(pings.percentile(99)),
        lost: pings.lost(),
        packets,
        one_flow: stream(1)? / 1e9,
        four_flows: stream(4)? / 1e9,
    })
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1000.0
}
