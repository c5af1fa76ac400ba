//! To a peer: seal what comes out of the normaliser, put the outer headers in front, and send.

use aya_ebpf::helpers::generated::bpf_redirect_neigh;
use overnode_ebpf::map::{Address, Peer, ROUTE_PEER, SESSION_LIVE, Session};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{
    DATA_HEADER_LEN, DATA_PORT, ECN_MASK, ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_KEEPALIVE,
    IPV4_LEN, IPV6_LEN, OVERHEAD_IPV4, OVERHEAD_IPV6, PADDING, REJECT_AFTER_MESSAGES, TAG_LEN, TYPE_DATA,
    UDP_LEN,
};

use super::checksum::{ipv4_checksum, udp_v6};
use super::frame::{
    DataHeader, Ethernet, Frame, Ipv4, Ipv6, PROTOCOL_UDP, Skb, Udp, adjust_room, at, change_protocol,
    redirect_ingress, resize,
};
use super::maps::{Routes, Words};
use super::{Sent, cipher, maps};

const TTL: u8 = 64;
const DONT_FRAGMENT: u16 = 0x4000;

/// What to seal for whom.
pub struct Job {
    /// Peer index.
    pub peer: u32,
    /// Length of the inner packet; 0 makes a keepalive.
    pub inner_len: u32,
    /// ECN codepoint of the inner packet.
    pub ecn: u8,
}

pub fn run(skb: Skb) -> Result<Sent, Reason> {
    if skb.gso_size() != 0 {
        return Err(Reason::Offload);
    }
    let ethernet = at::<Ethernet>(skb, 0)?;
    // SAFETY: `at` has checked the bounds.
    match u16::from_be(unsafe { (*ethernet).kind_be }) {
        ETHERTYPE_IPV4 => seal(skb, &job(skb)?),
        ETHERTYPE_KEEPALIVE => restart(skb),
        _ => Err(Reason::Unsupported),
    }
}

/// Makes the daemon's frame an IPv4 one and lets it come in again: the kernel gives only to such frames
/// room for outer headers, and the next hop. What IPv4 header it has says version 0, which no packet of a container can.
#[inline(always)]
fn restart(skb: Skb) -> Result<Sent, Reason> {
    let peer = at::<u32>(skb, ETHERNET_LEN)?;
    // SAFETY: `at` has checked the bounds.
    let peer = u32::from_le(unsafe { *peer });
    resize(skb, ETHERNET_LEN as u32)?;
    resize(skb, (ETHERNET_LEN + IPV4_LEN) as u32)?;
    skb.set_ethernet(&[0; 6], &[0; 6])?;
    let ip = at::<Ipv4>(skb, ETHERNET_LEN)?;
    // SAFETY: `at` has checked the bounds.
    unsafe { (*ip).destination = peer };
    Ok(Sent { counted: None, verdict: redirect_ingress(skb.ifindex()) })
}

#[inline(always)]
fn job(skb: Skb) -> Result<Job, Reason> {
    skb.linearize((ETHERNET_LEN + IPV4_LEN) as u32)?;
    let ip = at::<Ipv4>(skb, ETHERNET_LEN)?;
    // SAFETY: `at` has checked the bounds.
    let (version_ihl, destination, tos, total_len, sane) = unsafe {
        (
            (*ip).version_ihl,
            (*ip).destination,
            (*ip).tos,
            u32::from(u16::from_be((*ip).total_len_be)),
            (*ip).is_sane(skb.len() - ETHERNET_LEN as u32),
        )
    };
    if version_ihl == 0 {
        return Ok(Job { peer: destination, inner_len: 0, ecn: 0 });
    }
    if !sane {
        return Err(Reason::Malformed);
    }
    match Routes::new().v4(destination) {
        Some(route) if route.kind == ROUTE_PEER => {
            Ok(Job { peer: route.target, inner_len: total_len, ecn: tos & ECN_MASK })
        }
        _ => Err(Reason::NoRoute),
    }
}

/// Seals and sends an IPv4 packet that is complete: its checksums are finished, and it is one packet.
#[inline(always)]
pub fn seal(skb: Skb, job: &Job) -> Result<Sent, Reason> {
    let peer = maps::peer(job.peer).ok_or(Reason::NoRoute)?;
    // SAFETY: values of an array map are valid for the whole program, here and below.
    let (slot, mtu) = unsafe { ((*peer).tx_slot, (*peer).mtu) };
    if job.inner_len > mtu {
        return Err(Reason::TooBig);
    }
    let now = maps::now();
    let session = sealing_session(slot, job.peer, now)?;
    let counter = draw_counter(session)?;
    let text_len = job.inner_len.next_multiple_of(PADDING as u32).min(mtu);
    // SAFETY: as above.
    let remote_v4 = unsafe { (*peer).remote.to_v4() };

    if skb.len() != ETHERNET_LEN as u32 + job.inner_len {
        resize(skb, ETHERNET_LEN as u32 + job.inner_len)?;
    }
    resize(skb, (ETHERNET_LEN + TAG_LEN) as u32 + text_len)?;
    if remote_v4.is_none() {
        change_protocol(skb, ETHERTYPE_IPV6)?;
    }
    adjust_room(skb, OVERHEAD_IPV4 as i32)?;

    // SAFETY: as above.
    let key = unsafe { &raw const (*session).tx_key };
    let udp_len = (UDP_LEN + DATA_HEADER_LEN + TAG_LEN) as u32 + text_len;
    let overhead = if let Some(remote) = remote_v4 {
        write_v4(skb, peer, remote, udp_len, job.ecn)?;
        OVERHEAD_IPV4
    } else {
        write_v6(skb, peer, udp_len, job.ecn)?;
        OVERHEAD_IPV6
    };
    write_message(skb, ETHERNET_LEN + overhead - DATA_HEADER_LEN, session, counter)?;
    // SAFETY: as above.
    unsafe { cipher::seal(skb, key, counter, (ETHERNET_LEN + overhead) as u32, text_len)? };
    if remote_v4.is_none() {
        let checksum = udp_v6(skb, udp_len)?;
        let udp = at::<Udp>(skb, ETHERNET_LEN + IPV6_LEN)?;
        // SAFETY: `at` has checked the bounds.
        unsafe { (*udp).checksum = checksum };
    }
    account(peer, now, job.inner_len);
    let counted = if job.inner_len == 0 { Reason::KeepaliveSent } else { Reason::Sealed };
    // SAFETY: as above; without parameters the helper looks the next hop up by the packet's own addresses.
    let verdict = unsafe { bpf_redirect_neigh((*peer).ifindex, core::ptr::null_mut(), 0, 0) };
    Ok(Sent { counted: Some(counted), verdict })
}

#[inline(always)]
fn sealing_session(slot: u32, peer: u32, now: u64) -> Result<*mut Session, Reason> {
    if slot == 0 {
        return Err(Reason::NoSession);
    }
    let session = maps::session(slot).ok_or(Reason::NoSession)?;
    // SAFETY: values of an array map are valid for the whole program.
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

/// The next counter of a session; no two callers get the same.
#[inline(always)]
fn draw_counter(session: *mut Session) -> Result<u64, Reason> {
    // SAFETY: values of an array map are valid for the whole program.
    unsafe {
        // Looked at first so that an exhausted counter stays where it is, however often it is asked: it must never wrap around.
        if (*session).tx_counter >= REJECT_AFTER_MESSAGES {
            return Err(Reason::Exhausted);
        }
        let counter = maps::fetch_add(&raw mut (*session).tx_counter, 1);
        if counter >= REJECT_AFTER_MESSAGES { Err(Reason::Exhausted) } else { Ok(counter) }
    }
}

#[inline(always)]
fn write_v4(skb: Skb, peer: *mut Peer, remote: [u8; 4], udp_len: u32, ecn: u8) -> Result<(), Reason> {
    // SAFETY: values of an array map are valid for the whole program.
    let (local, port_be) = unsafe { ((*peer).local.to_v4().ok_or(Reason::NoRoute)?, (*peer).remote_port_be) };
    let mut header = Ipv4 {
        version_ihl: 0x45,
        tos: ecn,
        total_len_be: ((IPV4_LEN as u32 + udp_len) as u16).to_be(),
        id_be: 0,
        fragment_be: DONT_FRAGMENT.to_be(),
        ttl: TTL,
        protocol: PROTOCOL_UDP,
        checksum: 0,
        source: u32::from_ne_bytes(local),
        destination: u32::from_ne_bytes(remote),
    };
    header.checksum = ipv4_checksum(&header);
    let ip = at::<Ipv4>(skb, ETHERNET_LEN)?;
    // SAFETY: `at` has checked the bounds.
    unsafe { *ip = header };
    write_udp(skb, ETHERNET_LEN + IPV4_LEN, port_be, udp_len)
}

#[inline(always)]
fn write_v6(skb: Skb, peer: *mut Peer, udp_len: u32, ecn: u8) -> Result<(), Reason> {
    let ethernet = at::<Ethernet>(skb, 0)?;
    // SAFETY: `at` has checked the bounds.
    unsafe { (*ethernet).kind_be = ETHERTYPE_IPV6.to_be() };
    let ip = at::<Ipv6>(skb, ETHERNET_LEN)?;
    // SAFETY: `at` has checked the bounds; values of an array map are valid for the whole program.
    let port_be = unsafe {
        (*ip).version_class_label_be = (6 << 28 | u32::from(ecn) << 20).to_be();
        (*ip).payload_len_be = (udp_len as u16).to_be();
        (*ip).next_header = PROTOCOL_UDP;
        (*ip).hop_limit = TTL;
        copy_address(&raw mut (*ip).source, &raw const (*peer).local);
        copy_address(&raw mut (*ip).destination, &raw const (*peer).remote);
        (*peer).remote_port_be
    };
    write_udp(skb, ETHERNET_LEN + IPV6_LEN, port_be, udp_len)
}

#[inline(always)]
fn write_udp(skb: Skb, offset: usize, port_be: u16, udp_len: u32) -> Result<(), Reason> {
    let udp = at::<Udp>(skb, offset)?;
    // SAFETY: `at` has checked the bounds.
    unsafe {
        (*udp).source_be = DATA_PORT.to_be();
        (*udp).destination_be = port_be;
        (*udp).len_be = (udp_len as u16).to_be();
        (*udp).checksum = 0;
    }
    Ok(())
}

#[inline(always)]
fn write_message(skb: Skb, offset: usize, session: *mut Session, counter: u64) -> Result<(), Reason> {
    let header = at::<DataHeader>(skb, offset)?;
    // SAFETY: `at` has checked the bounds; values of an array map are valid for the whole program.
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
    // SAFETY: values of an array map are valid for the whole program.
    unsafe {
        maps::fetch_add(&raw mut (*peer).tx_packets, 1);
        (*peer).last_tx_ns = now;
        if inner_len != 0 {
            maps::fetch_add(&raw mut (*peer).tx_bytes, u64::from(inner_len));
            (*peer).last_data_tx_ns = now;
        }
    }
}

/// Copies an address by words: as a whole, the compiler would call a loop over its bytes.
///
/// # Safety
/// `from` points into a map's value, `to` into the packet.
#[inline(always)]
unsafe fn copy_address(to: *mut Words, from: *const Address) {
    for word in 0..4 {
        // SAFETY: by the contract above; addresses in maps are aligned to 4.
        unsafe { to.cast::<u32>().add(word).write(from.cast::<u32>().add(word).read_volatile()) };
    }
}
