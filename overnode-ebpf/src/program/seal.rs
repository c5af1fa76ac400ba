//! Seals packets for peers, either complete ones or those from the offload veth, encapsulates them,
//! and sends them.

use core::hint::black_box;

use overnode_ebpf::map::{Peer, ROUTE_PEER, SESSION_LIVE, Session};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{
    DAEMON_MAC, DATA_HEADER_LEN, ECN_MASK, ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, IPV4_LEN,
    OVERHEAD_IPV4, PADDING, REJECT_AFTER_MESSAGES, RELAY_LEN, TAG_LEN, TYPE_DATA, UDP_LEN,
};

use super::checks::{self, Leaving};
use super::checksum::is_ipv4_header_intact;
use super::frame::{
    DataHeader, Ethernet, Frame, Ipv4, Mac, Skb, adjust_room, at, change_protocol, mac, resize,
};
use super::{Verdict, cipher, encap, maps, offload_veth, relay, tailroom};

/// Destination MAC address of frames from the daemon, in words.
const FROM_DAEMON: Mac = mac(DAEMON_MAC);

/// The kind of message to seal.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A packet of a container.
    Data,
    /// An empty message.
    Keepalive,
    /// A packet of the daemon that takes only the direct path.
    Probe,
}

/// The message to seal, and its peer.
pub struct Job {
    /// Index of the peer.
    pub peer: u32,
    /// Length of the inner packet in bytes; 0 for a keepalive.
    pub inner_len: u32,
    /// ECN codepoint of the inner packet.
    pub ecn: u8,
    /// Kind of the message.
    pub kind: Kind,
    /// Addresses of a container's packet that were checked, in network byte order.
    pub source: u32,
    pub destination: u32,
}

impl Job {
    /// Describes a container's packet that may leave to a peer.
    #[inline(always)]
    pub fn data(leaving: &Leaving) -> Self {
        Self {
            peer: leaving.route.target,
            inner_len: leaving.len,
            ecn: leaving.tos & ECN_MASK,
            kind: Kind::Data,
            source: leaving.source,
            destination: leaving.destination,
        }
    }
}

pub fn run(skb: Skb) -> Result<Verdict, Reason> {
    if skb.gso_size() != 0 {
        return Err(Reason::Offload);
    }
    let ethernet = at::<Ethernet>(skb, 0)?;
    // SAFETY: `at` has checked the bounds.
    if unsafe { (*ethernet).ether_type_be } != ETHERTYPE_IPV4.to_be() {
        return Err(Reason::Unsupported);
    }
    let job = job(skb)?;
    if job.kind == Kind::Data {
        maps::peer(job.peer).map(offload_veth::leave);
    }
    seal(skb, &job)
}

/// Describes the packet to seal. A packet without a mark is the daemon's. It cannot be a
/// container's, because those are marked with the source address that they must have
/// (`offload_veth::enter`).
#[inline(always)]
fn job(skb: Skb) -> Result<Job, Reason> {
    // SAFETY: the kernel passes a valid context to the program.
    let mark = unsafe { (*skb).mark };
    if mark == 0 {
        return of_daemon(skb);
    }
    let leaving = checks::leaving(skb, mark)?;
    // On the way, the kernel completed a checksum at an offset that the container chose. It must
    // not have changed this header, nor its options.
    if !is_ipv4_header_intact(skb) {
        return Err(Reason::Checksum);
    }
    if leaving.route.kind == ROUTE_PEER { Ok(Job::data(&leaving)) } else { Err(Reason::NoRoute) }
}

#[inline(always)]
fn of_daemon(skb: Skb) -> Result<Job, Reason> {
    skb.linearize((ETHERNET_LEN + IPV4_LEN) as u32)?;
    let ethernet = at::<Ethernet>(skb, 0)?;
    let ip = at::<Ipv4>(skb, ETHERNET_LEN)?;
    // SAFETY: `at` has checked the bounds.
    let (to, from, version_ihl, total_len, sane) = unsafe {
        (
            (*ethernet).destination,
            (*ethernet).source,
            (*ip).version_ihl,
            u32::from(u16::from_be((*ip).total_len_be)),
            (*ip).is_sane(skb.len() - ETHERNET_LEN as u32),
        )
    };
    if to != FROM_DAEMON {
        return Err(Reason::Unsupported);
    }
    let peer = u32::from(u16::from_le(from[0])) | u32::from(u16::from_le(from[1])) << 16;
    let kind = if from[2] == 0 { Kind::Keepalive } else { Kind::Probe };
    let inner_len = match kind {
        Kind::Probe if version_ihl == 0 || !sane => return Err(Reason::Malformed),
        Kind::Probe => total_len,
        _ => 0,
    };
    Ok(Job { peer, inner_len, ecn: 0, kind, source: 0, destination: 0 })
}

/// Seals and sends a complete IPv4 packet: a single packet without a partial checksum. Nothing else
/// writes into the packet from here on, so this is the last check of its addresses.
#[inline(always)]
pub fn seal(skb: Skb, job: &Job) -> Result<Verdict, Reason> {
    if job.kind == Kind::Data {
        let ip = at::<Ipv4>(skb, ETHERNET_LEN)?;
        // SAFETY: `at` has checked the bounds.
        if unsafe { (*ip).source != job.source || (*ip).destination != job.destination } {
            return Err(Reason::Spoofed);
        }
    }
    // Clear the mark: the kernel would use it to look up the next hop of the outer packet.
    // SAFETY: the kernel passes a valid context to the program.
    unsafe { (*skb).mark = 0 };
    let peer = maps::peer(job.peer).ok_or(Reason::NoRoute)?;
    // SAFETY: array map values stay valid while the program runs, here and below.
    let (slot, mtu, via) = unsafe { ((*peer).tx_slot, (*peer).mtu, (*peer).via) };
    let is_probe = job.kind == Kind::Probe;
    if job.inner_len > mtu && !is_probe {
        return Err(Reason::TooBigDropped);
    }
    let now = maps::now();
    let session = sealing_session(slot, job.peer, now)?;
    let is_relayed = via != 0 && !is_probe;
    let hop = if is_relayed { maps::peer(via).ok_or(Reason::NoRoute)? } else { peer };
    let counter = draw_counter(session)?;
    // A probe is not padded, because its length is what it tests.
    let ciphertext_len = if is_probe {
        job.inner_len
    } else {
        job.inner_len.next_multiple_of(PADDING as u32).min(mtu)
    };
    let relay_len = if is_relayed { RELAY_LEN as u32 } else { 0 };

    if skb.len() != ETHERNET_LEN as u32 + job.inner_len {
        resize(skb, ETHERNET_LEN as u32 + job.inner_len.max(IPV4_LEN as u32))?;
    }
    let padded = (ETHERNET_LEN + TAG_LEN) as u32 + ciphertext_len;
    if resize(skb, padded).is_err() {
        tailroom::extend(skb, padded)?;
    }
    if !encap::is_v4(hop) {
        change_protocol(skb, ETHERTYPE_IPV6)?;
    }
    adjust_room(skb, (OVERHEAD_IPV4 as u32 + relay_len) as i32)?;

    let udp_len = (UDP_LEN + DATA_HEADER_LEN + TAG_LEN) as u32 + relay_len + ciphertext_len;
    let ip_len = encap::write(skb, hop, udp_len, job.ecn)?;
    let relay = black_box(ETHERNET_LEN + ip_len + UDP_LEN) & 0x7f;
    if is_relayed {
        relay::write(skb, relay, job.peer)?;
    }
    let message = black_box(relay + relay_len as usize) & 0x7f;
    write_message(skb, message, session, counter)?;
    // SAFETY: as above.
    unsafe {
        cipher::seal(
            skb,
            &raw const (*session).tx_key,
            counter,
            (message + DATA_HEADER_LEN) as u32,
            ciphertext_len,
        )?;
    }
    encap::finish(skb, hop)?;
    let (counted, data_len) = match job.kind {
        Kind::Data => (Reason::Sealed, job.inner_len),
        Kind::Keepalive => (Reason::KeepaliveSent, 0),
        Kind::Probe => (Reason::ProbeSent, 0),
    };
    account(peer, now, data_len);
    Ok(Verdict::Redirected(counted, encap::send(hop)))
}

#[inline(always)]
fn sealing_session(slot: u32, peer: u32, now: u64) -> Result<*mut Session, Reason> {
    if slot == 0 {
        return Err(Reason::NoSession);
    }
    let session = maps::session(slot).ok_or(Reason::NoSession)?;
    // SAFETY: array map values stay valid while the program runs.
    unsafe {
        if (*session).state != SESSION_LIVE || (*session).peer != peer {
            return Err(Reason::NoSession);
        }
        if now >= (*session).expires_ns {
            return Err(Reason::Expired);
        }
    }
    Ok(session)
}

/// Returns the next counter of a session. Every call returns a different one.
#[inline(always)]
fn draw_counter(session: *mut Session) -> Result<u64, Reason> {
    // SAFETY: array map values stay valid while the program runs.
    unsafe {
        // Check before adding, so that an exhausted counter stops increasing, however often it is
        // used. It must never wrap around.
        if (*session).tx_counter >= REJECT_AFTER_MESSAGES {
            return Err(Reason::Exhausted);
        }
        let counter = maps::fetch_add(&raw mut (*session).tx_counter, 1);
        if counter >= REJECT_AFTER_MESSAGES { Err(Reason::Exhausted) } else { Ok(counter) }
    }
}

#[inline(always)]
fn write_message(
    skb: Skb,
    offset: usize,
    session: *mut Session,
    counter: u64,
) -> Result<(), Reason> {
    let header = at::<DataHeader>(skb, offset)?;
    // SAFETY: `at` has checked the bounds; array map values stay valid while the program runs.
    unsafe {
        (*header).kind = u32::from(TYPE_DATA).to_le();
        (*header).receiver = (*session).remote_index.to_le();
        (*header).counter_low = (counter as u32).to_le();
        (*header).counter_high = ((counter >> 32) as u32).to_le();
    }
    Ok(())
}

#[inline(always)]
fn account(peer: *mut Peer, now: u64, inner_len: u32) {
    // SAFETY: array map values stay valid while the program runs.
    unsafe {
        maps::fetch_add(&raw mut (*peer).tx_packets, 1);
        (*peer).last_tx_ns = now;
        if inner_len != 0 {
            maps::fetch_add(&raw mut (*peer).tx_bytes, u64::from(inner_len));
            (*peer).last_data_tx_ns = now;
        }
    }
}
