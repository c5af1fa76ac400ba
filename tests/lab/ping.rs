//! `ping`, and its closing statistics.

use std::net::IpAddr;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::flow::MARKER;
use crate::netns::{Entry, Netns};

/// What `ping` says at its end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PingStats {
    /// Requests sent.
    pub sent: u32,
    /// Answers received, duplicates not counted.
    pub received: u32,
    /// Answers received more than once.
    pub duplicates: u32,
    /// Shortest, average and longest round trip, in microseconds; `None` when nothing came back.
    pub rtt: Option<Rtt>,
}

/// Round-trip times in microseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rtt {
    /// Shortest.
    pub min: f64,
    /// Mean.
    pub average: f64,
    /// Longest.
    pub max: f64,
}

impl PingStats {
    /// Requests without an answer.
    pub fn lost(&self) -> u32 {
        self.sent - self.received
    }

    fn parse(text: &str) -> Result<Self> {
        let counts = text
            .lines()
            .find(|line| line.contains(" packets transmitted"))
            .with_context(|| format!("ping printed no statistics: {text}"))?;
        let number = |what: &str| -> Option<u32> {
            let part = counts.split(", ").find(|part| part.contains(what))?;
            part.trim_start_matches('+').split(' ').next()?.parse().ok()
        };
        let rtt = text.lines().find_map(|line| {
            let mut numbers =
                line.strip_prefix("rtt ")?.split(" = ").nth(1)?.split([' ', '/']).map(str::parse::<f64>);
            let mut next = || numbers.next()?.ok().map(|milliseconds| milliseconds * 1000.0);
            Some(Rtt { min: next()?, average: next()?, max: next()? })
        });
        Ok(Self {
            sent: number("transmitted").context("ping printed no count of requests")?,
            received: number("received").context("ping printed no count of answers")?,
            duplicates: number("duplicates").unwrap_or(0),
            rtt,
        })
    }
}

/// A `ping` under way.
#[derive(Debug)]
pub struct Pinging {
    child: Option<Child>,
}

impl Pinging {
    /// Starts it: for ever, or for `count` requests. The payload repeats [`MARKER`].
    pub fn start(netns: &Netns, to: IpAddr, count: Option<u32>, interval: Duration) -> Result<Self> {
        let pattern: String = MARKER.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut command = netns.command(Entry::Setns, "ping");
        command.args([
            "-n",
            "-q",
            "-p",
            &pattern,
            "-W",
            "1",
            "-i",
            &format!("{:.4}", interval.as_secs_f64()),
        ]);
        if let Some(count) = count {
            command.args(["-c", &count.to_string()]);
        }
        let child = command
            .arg(to.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("ping cannot be started")?;
        Ok(Self { child: Some(child) })
    }

    /// Stops it and returns what it counted. A request that is under way just then counts as lost: where every answer
    /// matters, start it with a count and [`Self::finish`] it.
    pub fn stop(self) -> Result<PingStats> {
        if let Some(child) = &self.child {
            kill(Pid::from_raw(child.id() as i32), Signal::SIGINT)?;
        }
        self.finish()
    }

    /// Waits for its own end.
    pub fn finish(mut self) -> Result<PingStats> {
        let Some(child) = self.child.take() else { bail!("ping has ended already") };
        let output = child.wait_with_output()?;
        let stdout = String::from_utf8_lossy(&output.stdout);
        // 1 means that nothing came back, which the statistics tell as well.
        match output.status.code() {
            Some(0 | 1) => PingStats::parse(&stdout),
            _ => bail!("ping failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim()),
        }
    }
}

impl Drop for Pinging {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_of_ping_are_read() {
        let text = "PING 10.0.0.2 (10.0.0.2) 56(84) bytes of data.\n\n--- 10.0.0.2 ping statistics ---\n\
                    1000 packets transmitted, 998 received, +3 duplicates, 0.2% packet loss, time 1009ms\n\
                    rtt min/avg/max/mdev = 0.004/0.006/0.153/0.005 ms, pipe 2\n";
        let stats = PingStats::parse(text).unwrap();
        assert_eq!((stats.sent, stats.received, stats.duplicates, stats.lost()), (1000, 998, 3, 2));
        let rtt = stats.rtt.unwrap();
        assert_eq!((rtt.min.round(), rtt.average.round(), rtt.max.round()), (4.0, 6.0, 153.0));
    }

    #[test]
    fn unanswered_pings_have_no_round_trip() {
        let text = "2 packets transmitted, 0 received, +2 errors, 100% packet loss, time 10ms\n";
        let stats = PingStats::parse(text).unwrap();
        assert_eq!((stats.sent, stats.received, stats.rtt), (2, 0, None));
        assert!(PingStats::parse("ping: unknown host\n").is_err());
    }
}
