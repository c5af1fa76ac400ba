//! Runs `ping` and parses its output.

use std::net::IpAddr;
use std::process::{Child, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::flow::MARKER;
use crate::netns::{Entry, Netns};

/// Statistics of a finished `ping`.
#[derive(Clone, Debug, PartialEq)]
pub struct PingStats {
    /// Requests sent.
    pub sent: u32,
    /// Answers received, not counting duplicates.
    pub received: u32,
    /// Duplicate answers.
    pub duplicates: u32,
    /// Round-trip times; `None` if nothing came back.
    pub rtt: Option<Rtt>,
    /// Requests without an answer: the first and last number of each run. Numbers start at 1.
    pub missing: Vec<(u32, u32)>,
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
    /// Returns the number of requests without an answer.
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
            let mut numbers = line
                .strip_prefix("rtt ")?
                .split(" = ")
                .nth(1)?
                .split([' ', '/'])
                .map(str::parse::<f64>);
            let mut next = || numbers.next()?.ok().map(|milliseconds| milliseconds * 1000.0);
            Some(Rtt { min: next()?, average: next()?, max: next()? })
        });
        let sent = number("transmitted").context("ping printed no number of requests")?;
        Ok(Self {
            sent,
            missing: missing(text, sent),
            received: number("received").context("ping printed no number of answers")?,
            duplicates: number("duplicates").unwrap_or(0),
            rtt,
        })
    }
}

/// Returns the runs of numbers from 1 to `sent` that have no answer in the output.
fn missing(text: &str, sent: u32) -> Vec<(u32, u32)> {
    // The sequence number on the wire has 16 bits and wraps around.
    let mut seen = vec![false; sent as usize + 1];
    let mut rounds = 0;
    let mut last = 0;
    for line in text.lines() {
        let Some((_, rest)) = line.split_once("icmp_seq=") else { continue };
        let Some(number) = rest.split(' ').next().and_then(|number| number.parse::<u32>().ok())
        else {
            continue;
        };
        if line.contains("nreachable") {
            continue;
        }
        if number + 0x8000 < last {
            rounds += 1;
        }
        last = number;
        if let Some(seen) = seen.get_mut((rounds * 0x1_0000 + number) as usize) {
            *seen = true;
        }
    }
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for number in (1..=sent).filter(|number| !seen[*number as usize]) {
        match runs.last_mut() {
            Some((_, end)) if *end + 1 == number => *end = number,
            Some(_) | None => runs.push((number, number)),
        }
    }
    runs
}

/// A running `ping`.
#[derive(Debug)]
pub struct Pinging {
    child: Option<Child>,
    output: Option<JoinHandle<std::io::Result<String>>>,
}

impl Pinging {
    /// Starts `ping`, endlessly or for `count` requests. The payload repeats [`MARKER`].
    pub fn start(
        netns: &Netns,
        to: IpAddr,
        count: Option<u32>,
        interval: Duration,
    ) -> Result<Self> {
        let pattern: String = MARKER.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut command = netns.command(Entry::Setns, "ping");
        command.args([
            "-n",
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
        let mut child = command
            .arg(to.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start ping")?;
        // Without a reader, the pipe would fill up and `ping` would block.
        let output = child
            .stdout
            .take()
            .map(|stdout| std::thread::spawn(|| std::io::read_to_string(stdout)));
        Ok(Self { child: Some(child), output })
    }

    /// Stops `ping` and returns its statistics. A request in flight counts as lost. If every answer
    /// matters, start it with a count and call [`Self::finish`].
    pub fn stop(self) -> Result<PingStats> {
        if let Some(child) = &self.child {
            kill(Pid::from_raw(child.id() as i32), Signal::SIGINT)?;
        }
        self.finish()
    }

    /// Waits until `ping` ends by itself, and returns its statistics.
    pub fn finish(mut self) -> Result<PingStats> {
        let Some(child) = self.child.take() else { bail!("ping has ended already") };
        let output = child.wait_with_output()?;
        let Some(Ok(Ok(stdout))) = self.output.take().map(JoinHandle::join) else {
            bail!("the output of ping is lost")
        };
        // Exit status 1 means that nothing came back. The statistics show that too.
        match output.status.code() {
            Some(0 | 1) => PingStats::parse(&stdout),
            _ => bail!(
                "ping failed ({}): {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            ),
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
    fn ping_statistics_are_parsed() {
        let text = "PING 10.0.0.2 (10.0.0.2) 56(84) bytes of data.\n\n\
                    --- 10.0.0.2 ping statistics ---\n\
                    1000 packets transmitted, 998 received, +3 duplicates, 0.2% packet loss, \
                    time 1009ms\n\
                    rtt min/avg/max/mdev = 0.004/0.006/0.153/0.005 ms, pipe 2\n";
        let stats = PingStats::parse(text).unwrap();
        assert_eq!((stats.sent, stats.received, stats.duplicates, stats.lost()), (1000, 998, 3, 2));
        let rtt = stats.rtt.unwrap();
        assert_eq!((rtt.min.round(), rtt.average.round(), rtt.max.round()), (4.0, 6.0, 153.0));
    }

    #[test]
    fn missing_answers_are_listed() {
        let line = |number: u32| {
            format!("64 bytes from 10.0.0.2: icmp_seq={number} ttl=64 time=0.005 ms\n")
        };
        let text: String = [1, 2, 5, 7, 8].into_iter().map(line).collect();
        assert_eq!(missing(&text, 10), [(3, 4), (6, 6), (9, 10)]);
        let wrapped: String = (1..=70_000).map(|number| line(number % 0x1_0000)).collect();
        assert_eq!(missing(&wrapped, 70_001), [(70_001, 70_001)]);
    }

    #[test]
    fn unanswered_pings_have_no_round_trip() {
        let text = "2 packets transmitted, 0 received, +2 errors, 100% packet loss, time 10ms\n";
        let stats = PingStats::parse(text).unwrap();
        assert_eq!((stats.sent, stats.received, stats.rtt), (2, 0, None));
        assert_eq!(stats.missing, [(1, 2)]);
        assert!(PingStats::parse("ping: unknown host\n").is_err());
    }
}
