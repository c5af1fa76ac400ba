//! Measures throughput between two namespaces with `iperf3`.

use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::process::{Child, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::netns::{Entry, Netns};

/// An `iperf3` server in a namespace. It serves one client after the other until it is dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    address: IpAddr,
}

impl Server {
    /// Starts the server on this address. Returns once it is listening.
    pub fn start(netns: &Netns, address: IpAddr) -> Result<Self> {
        let mut child = netns
            .command(Entry::Setns, "iperf3")
            .args(["--server", "--forceflush", "--bind", &address.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start iperf3")?;
        let mut lines = BufReader::new(child.stdout.take().context("no pipe")?);
        let mut said = String::new();
        while !said.contains("Server listening") {
            if lines.read_line(&mut said)? == 0 {
                let _ = child.wait();
                bail!("iperf3 --server ended: {}", said.trim());
            }
        }
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        Ok(Self { child, address })
    }

    /// Runs a client in `netns` with further arguments (`-t`, `-P`, `-u`, …). Returns iperf3's JSON
    /// document.
    pub fn client(&self, netns: &Netns, arguments: &[&str]) -> Result<Value> {
        let output = netns
            .command(Entry::Setns, "iperf3")
            .args(["--client", &self.address.to_string(), "--json"])
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .context("cannot start iperf3")?;
        let report: Value =
            serde_json::from_slice(&output.stdout).context("iperf3 printed no JSON")?;
        match report["error"].as_str() {
            Some(error) => bail!("iperf3: {error}"),
            None => Ok(report),
        }
    }

    /// Sends TCP for this many seconds over `flows` flows. Returns the received bits per second.
    pub fn tcp(&self, netns: &Netns, seconds: u32, flows: u32) -> Result<f64> {
        let report = self.client(netns, &["-t", &seconds.to_string(), "-P", &flows.to_string()])?;
        report["end"]["sum_received"]["bits_per_second"].as_f64().context("iperf3 printed no sum")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
