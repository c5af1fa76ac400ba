//! Filters datagrams for the daemon before the kernel's UDP sees them. A flood from senders that do
//! not know this node's public key costs neither the kernel's stack nor the daemon anything.
//!
//! Checks type, length, and the first MAC, which only senders that know this node's public key can
//! compute. The daemon checks all of it again, so this filter serves speed only. Packets that these
//! programs cannot parse (IPv6 extension headers) pass.

use core::hint::black_box;

use overnode_ebpf::mac1;
use overnode_ebpf::map::{COOKIE_ALLOWANCE, COOKIE_COST};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{
    BULK_PORT, COOKIE_REPLY_LEN, DATA_PORT, ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6,
    INITIATION_LEN, IPV6_LEN, RESPONSE_LEN, TYPE_COOKIE_REPLY, TYPE_DATA, TYPE_INITIATION,
    TYPE_RESPONSE, UDP_LEN,
};

use super::frame::{Ethernet, FRAGMENT_OFFSET, Frame, Ipv4, Ipv6, PROTOCOL_UDP, Udp, at};
use super::{Verdict, maps};

/// Length of the first word of a message in bytes: its type, and three bytes that are zero in a
/// handshake.
const MESSAGE_START: usize = 4;

/// Offset and length in bytes of a message for the daemon.
#[derive(Clone, Copy)]
pub struct Place {
    pub offset: usize,
    pub len: u32,
}

/// Finds the message in a datagram to a port of the daemon. Returns `None` for other packets, and
/// for data messages of the bulk path.
#[inline(always)]
pub fn find(frame: impl Frame) -> Result<Option<Place>, Reason> {
    let Ok(ethernet) = at::<Ethernet>(frame, 0) else { return Ok(None) };
    // SAFETY: `at` has checked the bounds.
    let (ip_len, is_whole) = match u16::from_be(unsafe { (*ethernet).ether_type_be }) {
        ETHERTYPE_IPV4 => {
            let Ok(ip) = at::<Ipv4>(frame, ETHERNET_LEN) else { return Ok(None) };
            // SAFETY: `at` has checked the bounds.
            let (is_udp, is_later, is_whole, header_len, destination) = unsafe {
                (
                    (*ip).version_ihl >> 4 == 4 && (*ip).protocol == PROTOCOL_UDP,
                    u16::from_be((*ip).fragment_be) & FRAGMENT_OFFSET != 0,
                    (*ip).version_ihl == 0x45 && !(*ip).is_fragment(),
                    (*ip).header_len(),
                    (*ip).destination,
                )
            };
            if !is_udp || is_later || !maps::is_local(&maps::v4_mapped(destination)) {
                return Ok(None);
            }
            (header_len as usize, is_whole)
        }
        ETHERTYPE_IPV6 => {
            let Ok(ip) = at::<Ipv6>(frame, ETHERNET_LEN) else { return Ok(None) };
            // SAFETY: `at` has checked the bounds.
            let (first, next_header, destination) = unsafe {
                (u32::from_be((*ip).version_class_label_be), (*ip).next_header, (*ip).destination)
            };
            if first >> 28 != 6 || next_header != PROTOCOL_UDP || !maps::is_local(&destination) {
                return Ok(None);
            }
            (IPV6_LEN, true)
        }
        _ => return Ok(None),
    };
    let udp = ETHERNET_LEN + (black_box(ip_len as u64) & 0x3c) as usize;
    let Ok(header) = at::<Udp>(frame, udp) else { return Ok(None) };
    // SAFETY: `at` has checked the bounds.
    let (port_be, udp_len) =
        unsafe { ((*header).destination_be, u32::from(u16::from_be((*header).len_be))) };
    let offset = udp + UDP_LEN;
    if port_be == BULK_PORT.to_be() {
        if kind(frame, offset)? & 0xff == u32::from(TYPE_DATA) {
            return Ok(None);
        }
    } else if port_be != DATA_PORT.to_be() {
        return Ok(None);
    }
    if !is_whole {
        return Err(Reason::Fragment);
    }
    let joined = frame.gso_size();
    // If the interface coalesced several datagrams, check the first.
    let len = if joined != 0 {
        joined
    } else {
        udp_len.checked_sub(UDP_LEN as u32).ok_or(Reason::Malformed)?
    };
    Ok(Some(Place { offset, len }))
}

/// Passes on a message for the daemon that withstands the checks.
#[inline(always)]
pub fn admit(frame: impl Frame, offset: usize, len: u32) -> Result<Verdict, Reason> {
    check(frame, offset, len).map(|()| Verdict::Pass)
}

/// Checks a message for the daemon.
#[inline(never)]
fn check(frame: impl Frame, offset: usize, len: u32) -> Result<(), Reason> {
    const INITIATION: u32 = TYPE_INITIATION as u32;
    const RESPONSE: u32 = TYPE_RESPONSE as u32;
    const COOKIE_REPLY: u32 = TYPE_COOKIE_REPLY as u32;
    let state = &maps::config().ok_or(Reason::Unconfigured)?.mac1;
    let offset = black_box(offset as u64) as usize & 0x7f;
    let is_right = match kind(frame, offset)? {
        INITIATION if len == INITIATION_LEN as u32 => {
            frame.linearize(offset as u32 + len)?;
            let message = at::<[u8; INITIATION_LEN]>(frame, offset)?;
            // SAFETY: `at` has checked the bounds.
            unsafe { mac1::is_initiation(*state, message.cast()) }
        }
        RESPONSE if len == RESPONSE_LEN as u32 => {
            frame.linearize(offset as u32 + len)?;
            let message = at::<[u8; RESPONSE_LEN]>(frame, offset)?;
            // SAFETY: `at` has checked the bounds.
            unsafe { mac1::is_response(*state, message.cast()) }
        }
        COOKIE_REPLY if len == COOKIE_REPLY_LEN as u32 => {
            return if may_reply() { Ok(()) } else { Err(Reason::CookieFlood) };
        }
        _ => return Err(Reason::Malformed),
    };
    if is_right { Ok(()) } else { Err(Reason::Stranger) }
}

/// Returns the first word of a message.
#[inline(always)]
fn kind(frame: impl Frame, offset: usize) -> Result<u32, Reason> {
    let start = at::<[u8; MESSAGE_START]>(frame, offset)?;
    // SAFETY: `at` has checked the bounds.
    Ok(u32::from_le_bytes(unsafe { *start }))
}

/// Returns false if cookie replies exceed the rate that nodes send. Their sender cannot be verified
/// here.
#[inline(always)]
fn may_reply() -> bool {
    let Some(until) = maps::cookies_until() else { return false };
    // SAFETY: array map values stay valid while the program runs.
    unsafe { maps::take_allowance(until, COOKIE_COST, COOKIE_ALLOWANCE) }
}
