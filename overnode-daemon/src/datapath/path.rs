//! Sets the route to each peer (direct or through a relay), and sends and receives the probes that
//! test the direct path.

use std::net::IpAddr;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{MapData, RingBuf};
use overnode_ebpf::map::{self, FIRST_EXTERNAL_PEER};
use overnode_ebpf::wire::{IPV4_LEN, PROBE_LEN, PROBE_PORT, UDP_LEN, daemon_header};
use tokio::io::unix::AsyncFd;

use super::Datapath;
use crate::checksum::{fold, sum};
use overnode_types::PeerIndex;

/// Length of the headers of the inner packet that carries a probe, in bytes.
const HEADERS_LEN: usize = IPV4_LEN + UDP_LEN;
const PROTOCOL_UDP: u8 = 17;

/// A probe that a peer sent over the direct path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Peer whose session opened it.
    pub peer: PeerIndex,
    /// Length of the inner packet, in bytes.
    pub inner_len: u32,
    /// Payload, as the peer's daemon wrote it.
    pub payload: [u8; PROBE_LEN],
}

/// Receives the probes that the programs pass up.
pub struct Probes(AsyncFd<RingBuf<MapData>>);

impl Probes {
    /// Returns the next probe. This method is cancel safe.
    ///
    /// # Errors
    /// Fails if the ring buffer cannot be polled.
    pub async fn recv(&mut self) -> Result<Probe> {
        loop {
            let mut ready = self.0.readable_mut().await.context("probes cannot be received")?;
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
    /// Returns the receiver of all probes from peers. It can be taken only once.
    ///
    /// # Errors
    /// Fails if it was taken already, or if the descriptor cannot be registered with the event
    /// loop.
    pub fn probes(&mut self) -> Result<Probes> {
        let ring = self.maps.probes.take().context("the receiver of probes was already taken")?;
        // SAFETY: the ring owns its descriptor, which never changes. The returned value owns the
        // ring.
        let ring = unsafe { AsyncFd::register(ring) };
        Ok(Probes(ring.context("probes cannot be received")?))
    }

    /// Sends a probe to a peer over the direct path, inside a UDP datagram to the peer's node
    /// address. Without a session the programs drop it and count the drop.
    ///
    /// # Errors
    /// Fails if either node address is not IPv4, if the packet exceeds the IPv4 maximum, or if the
    /// offload veth is gone.
    pub fn send_probe(&self, peer: PeerIndex, to: IpAddr, payload: &[u8]) -> Result<()> {
        let (IpAddr::V4(from), IpAddr::V4(to)) = (self.node_address, to) else {
            bail!("node addresses must be IPv4 for now");
        };
        let total = u16::try_from(HEADERS_LEN + payload.len())
            .context("the probe is too large for a packet")?;
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
        // The UDP checksum is 0 (none), because Poly1305 protects the packet better.
        for field in [PROBE_PORT, PROBE_PORT, total - IPV4_LEN as u16, 0] {
            frame.extend(field.to_be_bytes());
        }
        frame.extend(payload);
        self.offload_veth.send(&frame)
    }

    /// Sets the relay for messages to a peer. `None` selects the direct path.
    ///
    /// # Errors
    /// Fails if either index is not a configured node, or if the peer is its own relay.
    pub fn set_via(&self, peer: PeerIndex, via: Option<PeerIndex>) -> Result<()> {
        for index in [Some(peer), via].into_iter().flatten() {
            ensure!(index.0 < FIRST_EXTERNAL_PEER, "peer {index} is not a node");
            let present = self.peer_cell(index)?.present().load(Ordering::Acquire);
            ensure!(present != 0, "peer {index} is not configured");
        }
        ensure!(via != Some(peer), "a node cannot be its own relay");
        self.peer_cell(peer)?.via().store(via.map_or(0, |via| via.0), Ordering::Release);
        Ok(())
    }

    /// Returns the largest inner packet that fits the underlay interface on the direct path to a
    /// peer, in bytes.
    pub fn largest(&self, peer: PeerIndex) -> u32 {
        self.largest.get(&peer).copied().unwrap_or_else(|| self.container_mtu())
    }

    /// Sets the largest inner packet for a peer, in bytes.
    ///
    /// # Errors
    /// Fails if the index is out of range.
    pub fn set_mtu(&self, peer: PeerIndex, mtu: u32) -> Result<()> {
        self.peer_cell(peer)?.mtu().store(mtu, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_that_the_programs_record_are_parsed() {
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
