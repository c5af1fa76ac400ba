//! Which way messages take to a peer, and the probes that tell whether the straight one works.

use std::net::IpAddr;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{MapData, RingBuf};
use overnode_ebpf::map::{self, FIRST_EXTERNAL_PEER};
use overnode_ebpf::wire::{IPV4_LEN, PROBE_LEN, PROBE_PORT, UDP_LEN, daemon_header};
use tokio::io::unix::AsyncFd;

use super::Datapath;
use crate::checksum::{fold, sum};
use crate::types::PeerIndex;

/// Bytes of headers of the inner packet that a probe comes in.
const HEADERS_LEN: usize = IPV4_LEN + UDP_LEN;
const PROTOCOL_UDP: u8 = 17;

/// A probe that a peer sent over the straight path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Whose session opened it.
    pub peer: PeerIndex,
    /// Length of the inner packet, bytes.
    pub inner_len: u32,
    /// What the peer's daemon wrote.
    pub payload: [u8; PROBE_LEN],
}

/// The probes that the programs hand up.
pub struct Probes(AsyncFd<RingBuf<MapData>>);

impl Probes {
    /// The next one. Cancelling loses nothing.
    ///
    /// # Errors
    /// The kernel refuses to wait.
    pub async fn recv(&mut self) -> Result<Probe> {
        loop {
            let mut ready = self.0.readable_mut().await.context("no probes can be received")?;
            if let Some(item) = ready.get_inner_mut().next() {
                if let Some(probe) = parse(&item) {
                    return Ok(probe);
                }
                continue;
            }
            ready.clear_ready();
        }
    }
}

fn parse(bytes: &[u8]) -> Option<Probe> {
    const _: () = assert!(size_of::<map::Probe>() == 8 + PROBE_LEN);
    let (peer, rest) = bytes.split_first_chunk()?;
    let (inner_len, payload) = rest.split_first_chunk()?;
    Some(Probe {
        peer: PeerIndex(u32::from_ne_bytes(*peer)),
        inner_len: u32::from_ne_bytes(*inner_len),
        payload: payload.try_into().ok()?,
    })
}

impl Datapath {
    /// The probes of peers. Once: who has them has all.
    ///
    /// # Errors
    /// They are taken already; the event loop refuses.
    pub fn probes(&mut self) -> Result<Probes> {
        let ring = self.maps.probes.take().context("somebody else receives the probes already")?;
        // SAFETY: the ring owns its descriptor, always names the same, and is owned by what is
        // returned.
        let ring = unsafe { AsyncFd::register(ring) };
        Ok(Probes(ring.context("no probes can be received")?))
    }

    /// Sends a probe over the straight path to a peer, inside a UDP datagram to the peer's node
    /// address. Without a session nothing is sent (and the drop is counted).
    ///
    /// # Errors
    /// The packet is larger than any interface takes, or the normaliser is gone.
    pub fn send_probe(&self, peer: PeerIndex, to: IpAddr, payload: &[u8]) -> Result<()> {
        let (IpAddr::V4(from), IpAddr::V4(to)) = (self.node_address, to) else {
            bail!("node addresses are IPv4 for now");
        };
        let total =
            u16::try_from(HEADERS_LEN + payload.len()).context("no packet is that large")?;
        let mut frame = daemon_header(peer.0, true).to_vec();
        let mut ip = [0; IPV4_LEN];
        ip[0] = 0x45;
        ip[2..4].copy_from_slice(&total.to_be_bytes());
        ip[8] = 64;
        ip[9] = PROTOCOL_UDP;
        ip[12..16].copy_from_slice(&from.octets());
        ip[16..20].copy_from_slice(&to.octets());
        let checksum = !fold(sum(&ip));
        ip[10..12].copy_from_slice(&checksum.to_be_bytes());
        frame.extend(ip);
        // Without a checksum of its own: Poly1305 is better.
        for field in [PROBE_PORT, PROBE_PORT, total - IPV4_LEN as u16, 0] {
            frame.extend(field.to_be_bytes());
        }
        frame.extend(payload);
        self.normaliser.send(&frame)
    }

    /// Sends messages to a peer through another one from now on, or straight.
    ///
    /// # Errors
    /// One of the two is no node, or is not configured.
    pub fn set_via(&self, peer: PeerIndex, via: Option<PeerIndex>) -> Result<()> {
        for index in [Some(peer), via].into_iter().flatten() {
            ensure!(index.0 < FIRST_EXTERNAL_PEER, "{index} is no node");
            let present = self.peer_cell(index)?.present().load(Ordering::Acquire);
            ensure!(present != 0, "peer {index} is not configured");
        }
        ensure!(via != Some(peer), "no node is its own relay");
        self.peer_cell(peer)?.via().store(via.map_or(0, |via| via.0), Ordering::Release);
        Ok(())
    }

    /// Largest inner packet that the underlay interface leaves room for on the straight way to a
    /// peer, bytes.
    pub fn largest(&self, peer: PeerIndex) -> u32 {
        self.largest.get(&peer).copied().unwrap_or_else(|| self.container_mtu())
    }

    /// Sets the largest inner packet that the way to a peer takes, bytes.
    ///
    /// # Errors
    /// The index is out of range.
    pub fn set_mtu(&self, peer: PeerIndex, mtu: u32) -> Result<()> {
        self.peer_cell(peer)?.mtu().store(mtu, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_programs_write_is_understood() {
        let mut bytes = vec![7, 0, 0, 0, 0x8c, 5, 0, 0];
        bytes.extend([9; PROBE_LEN]);
        let probe = parse(&bytes).unwrap();
        assert_eq!(
            (probe.peer, probe.inner_len, probe.payload),
            (PeerIndex(7), 1420, [9; PROBE_LEN])
        );
        assert_eq!(parse(&bytes[..8 + PROBE_LEN - 1]), None);
    }
}
