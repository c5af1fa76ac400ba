//! Captures packets with `tcpdump`.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netns::{Entry, Netns};
use crate::pcap::{Packet, packets};

/// How long the kernel may hold back packets. `tcpdump` asks for one second.
const BLOCK_TIMEOUT: Duration = Duration::from_millis(1100);

/// A running capture. Dropping it ends it.
#[derive(Debug)]
pub struct Capture {
    child: Child,
    messages: BufReader<ChildStderr>,
    file: PathBuf,
}

/// A finished capture, complete on disk.
#[derive(Clone, Debug)]
pub struct Captured {
    /// The pcap file.
    pub file: PathBuf,
    /// Number of packets that the kernel could not hand over. A search in a capture with losses
    /// proves nothing.
    pub missed: u64,
    bytes: Vec<u8>,
}

impl Capture {
    /// Starts `tcpdump` with these arguments. Returns once it is listening.
    pub fn start(netns: &Netns, folder: &Path, arguments: &[&str]) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let file = folder.join(format!("capture-{}.pcap", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let mut child = netns
            .command(Entry::Setns, "tcpdump")
            // A buffer of 64 MiB, whole packets, no name lookups.
            .args(["-B", "65536", "-s", "0", "-n", "-Z", "root", "-w"])
            .arg(&file)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start tcpdump")?;
        let mut messages = BufReader::new(child.stderr.take().context("no pipe")?);
        let mut said = String::new();
        loop {
            let start = said.len();
            if messages.read_line(&mut said)? == 0 {
                let _ = child.wait();
                bail!("tcpdump ended: {}", said.trim());
            }
            if said[start..].contains("listening on") {
                return Ok(Self { child, messages, file });
            }
        }
    }

    /// Ends the capture. Every packet so far is on disk then.
    pub fn stop(mut self) -> Result<Captured> {
        self.wait_until_read()?;
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGINT)?;
        let mut said = String::new();
        self.messages.read_to_string(&mut said)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "tcpdump failed ({status}): {}", said.trim());
        let missed = said
            .lines()
            .find_map(|line| line.split_once(" packets dropped by kernel")?.0.trim().parse().ok())
            .with_context(|| format!("tcpdump printed no number of dropped packets: {said}"))?;
        let bytes = std::fs::read(&self.file).with_context(|| self.file.display().to_string())?;
        Ok(Captured { file: self.file.clone(), missed, bytes })
    }
}

impl Capture {
    /// Waits until `tcpdump` has read all packets. The kernel hands packets over in blocks, and an
    /// incomplete block after one second. `tcpdump` reads no more once it was told to end.
    fn wait_until_read(&self) -> Result<()> {
        std::thread::sleep(BLOCK_TIMEOUT);
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut length = 0;
        loop {
            let now = std::fs::metadata(&self.file)?.len();
            if now == length || Instant::now() > deadline {
                return Ok(());
            }
            length = now;
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Captured {
    /// Returns the packets in the order in which they were seen.
    pub fn packets(&self) -> Result<Vec<Packet<'_>>> {
        packets(&self.bytes)
    }

    /// Counts the packets that satisfy `wanted`.
    pub fn count(&self, wanted: impl Fn(&Packet<'_>) -> bool) -> Result<usize> {
        Ok(self.packets()?.iter().filter(|packet| wanted(packet)).count())
    }

    /// Returns the packets that contain these bytes anywhere, headers included.
    pub fn containing(&self, pattern: &[u8]) -> Result<Vec<Packet<'_>>> {
        ensure!(!pattern.is_empty(), "the pattern is empty");
        let mut found = self.packets()?;
        found.retain(|packet| contains(packet.bytes, pattern));
        Ok(found)
    }
}

fn contains(bytes: &[u8], pattern: &[u8]) -> bool {
    let (first, rest) = (pattern[0], &pattern[1..]);
    let mut left = bytes;
    while let Some(place) = left.iter().position(|byte| *byte == first) {
        left = &left[place + 1..];
        if left.starts_with(rest) {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::contains;

    #[test]
    fn patterns_are_found_anywhere() {
        assert!(contains(b"aaab", b"aab"));
        assert!(contains(b"overnode", b"overnode"));
        assert!(contains(b"overnode", b"e"));
        assert!(!contains(b"overnod", b"overnode"));
        assert!(!contains(b"", b"x"));
    }
}
