//! The headers around a data message, over IPv4 and over IPv6.

use core::hint::black_box;

use overnode_ebpf::map::Peer;
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{
    DATA_HEADER_LEN, DATA_PORT, ECN_MASK, ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, IPV4_LEN, IPV6_LEN,
    TAG_LEN, TYPE_DATA, UDP_LEN,
};

use super::frame::{Ethernet, Frame, Ipv4, Ipv6, PROTOCOL_UDP, Udp, at};
use super::maps;

const FRAGMENT_OFFSET: u16 = 0x1fff;
const MORE_FRAGMENTS: u16 = 0x2000;
const NEXT_HEADER_FRAGMENT: u8 = 44;
const FRAGMENT_HEADER_LEN: usize = 8;
/// The longest headers up to the message's type.
const HEADERS_LEN: usize = ETHERNET_LEN + 60 + UDP_LEN + DATA_HEADER_LEN;

/// Where a data message lies.
///
/// Fields of full words: the compiler packs smaller ones into one, with operations that the verifier forbids when
/// a register still holds a pointer.
pub struct Outer {
    /// 1 if the IP header is an IPv6 one, else 0.
    v6: u64,
    /// ECN codepoint.
    ecn: u64,
    /// Bytes of ciphertext, without the tag.
    text_len: u64,
}

/// An IP header with UDP behind it.
#[repr(C)]
struct Stack<Ip> {
    ip: Ip,
    udp: Udp,
}

impl Outer {
    /// True if the IP header is an IPv6 one.
    #[inline(always)]
    pub fn is_v6(&self) -> bool {
        self.v6 != 0
    }

    /// ECN codepoint of the IP header.
    #[inline(always)]
    pub fn ecn(&self) -> u8 {
        self.ecn as u8
    }

    /// Bytes of ciphertext, without the tag.
    #[inline(always)]
    pub fn text_len(&self) -> u32 {
        self.text_len as u32
    }

    /// Offset of the message's header.
    #[inline(always)]
    pub fn message(&self) -> usize {
        let offset = ETHERNET_LEN + UDP_LEN + if self.is_v6() { IPV6_LEN } else { IPV4_LEN };
        black_box(offset) & 0x3f
    }

    /// Makes the peer's endpoints those of this message. Compares first, in place: nothing is written, and no
    /// address is on the stack, as long as all stays the same.
    #[inline(always)]
    pub fn update(&self, frame: impl Frame, peer: *mut Peer) -> Result<(), Reason> {
        // SAFETY: `at` has checked the bounds; values of an array map are valid for the whole program.
        unsafe {
            let remote = (&raw mut (*peer).remote).cast::<[u32; 4]>();
            let local = (&raw mut (*peer).local).cast::<[u32; 4]>();
            if self.is_v6() {
                let headers = at::<Stack<Ipv6>>(frame, ETHERNET_LEN)?;
                let (ip, udp) = (&(*headers).ip, &(*headers).udp);
                for word in 0..4 {
                    set(remote.cast::<u32>().add(word), ip.source[word]);
                    set(local.cast::<u32>().add(word), ip.destination[word]);
                }
                set(&raw mut (*peer).remote_port_be, udp.source_be);
            } else {
                let headers = at::<Stack<Ipv4>>(frame, ETHERNET_LEN)?;
                let (ip, udp) = (&(*headers).ip, &(*headers).udp);
                for (word, prefix) in [0, 0, maps::V4_MAPPED].into_iter().enumerate() {
                    set(remote.cast::<u32>().add(word), prefix);
                    set(local.cast::<u32>().add(word), prefix);
                }
                set(remote.cast::<u32>().add(3), ip.source);
                set(local.cast::<u32>().add(3), ip.destination);
                set(&raw mut (*peer).remote_port_be, udp.source_be);
            }
            set(&raw mut (*peer).ifindex, frame.ifindex());
        }
        Ok(())
    }
}

/// Writes what is not there yet: other CPUs read the same cache line.
///
/// # Safety
/// `place` points into a map's value and is aligned.
#[inline(always)]
unsafe fn set<T: PartialEq + Copy>(place: *mut T, value: T) {
    // SAFETY: by the contract above.
    unsafe {
        if *place != value {
            *place = value;
        }
    }
}

/// Finds the data message that a packet is. `None`: it is none, or none for this host.
#[inline(always)]
pub fn parse(frame: impl Frame) -> Result<Option<Outer>, Reason> {
    let Ok(ethernet) = at::<Ethernet>(frame, 0) else { return Ok(None) };
    // SAFETY: `at` has checked the bounds.
    match u16::from_be(unsafe { (*ethernet).kind_be }) {
        ETHERTYPE_IPV4 => v4(frame),
        ETHERTYPE_IPV6 => v6(frame),
        _ => Ok(None),
    }
}

#[inline(always)]
fn v4(frame: impl Frame) -> Result<Option<Outer>, Reason> {
    if frame.linearize((ETHERNET_LEN + IPV4_LEN) as u32).is_err() {
        return Ok(None);
    }
    let Ok(ip) = at::<Ipv4>(frame, ETHERNET_LEN) else { return Ok(None) };
    // SAFETY: `at` has checked the bounds.
    let (version, header_len, fragment, protocol) = unsafe {
        ((*ip).version_ihl >> 4, (*ip).header_len(), u16::from_be((*ip).fragment_be), (*ip).protocol)
    };
    if version != 4 || protocol != PROTOCOL_UDP || fragment & FRAGMENT_OFFSET != 0 {
        return Ok(None);
    }
    if frame.linearize(HEADERS_LEN as u32).is_err() {
        return Ok(None);
    }
    let plain = header_len == IPV4_LEN as u32 && fragment & MORE_FRAGMENTS == 0;
    let ours = if plain {
        is_data(frame, ETHERNET_LEN + IPV4_LEN)
    } else {
        is_data(frame, ETHERNET_LEN + (black_box(u64::from(header_len)) & 0x3c) as usize)
    };
    let Ok(ip) = at::<Ipv4>(frame, ETHERNET_LEN) else { return Ok(None) };
    // SAFETY: `at` has checked the bounds.
    let (destination, tos, total_len) =
        unsafe { ((*ip).destination, (*ip).tos, u32::from(u16::from_be((*ip).total_len_be))) };
    if !ours || !maps::is_local(&maps::v4_mapped(destination)) {
        return Ok(None);
    }
    if !plain {
        return Err(Reason::Fragment);
    }
    let available = total_len.checked_sub(IPV4_LEN as u32).ok_or(Reason::Malformed)?;
    let text_len = text_len(frame, IPV4_LEN, available)?;
    Ok(Some(Outer { v6: 0, ecn: u64::from(tos & ECN_MASK), text_len }))
}

#[inline(always)]
fn v6(frame: impl Frame) -> Result<Option<Outer>, Reason> {
    if frame.linearize(HEADERS_LEN as u32).is_err() {
        return Ok(None);
    }
    let Ok(ip) = at::<Ipv6>(frame, ETHERNET_LEN) else { return Ok(None) };
    // SAFETY: `at` has checked the bounds.
    let (first, next_header) = unsafe { (u32::from_be((*ip).version_class_label_be), (*ip).next_header) };
    if first >> 28 != 6 {
        return Ok(None);
    }
    let ours = match next_header {
        PROTOCOL_UDP => is_data(frame, ETHERNET_LEN + IPV6_LEN),
        NEXT_HEADER_FRAGMENT => {
            is_first_fragment(frame) && is_data(frame, ETHERNET_LEN + IPV6_LEN + FRAGMENT_HEADER_LEN)
        }
        _ => false,
    };
    // SAFETY: `at` has checked the bounds.
    let (destination, available) =
        unsafe { ((*ip).destination, u32::from(u16::from_be((*ip).payload_len_be))) };
    if !ours || !maps::is_local(&destination) {
        return Ok(None);
    }
    if next_header != PROTOCOL_UDP {
        return Err(Reason::Fragment);
    }
    let text_len = text_len(frame, IPV6_LEN, available)?;
    Ok(Some(Outer { v6: 1, ecn: u64::from(first >> 20) & u64::from(ECN_MASK), text_len }))
}

/// True if UDP at this offset is for the data port and carries a data message, by its first byte.
#[inline(always)]
fn is_data(frame: impl Frame, offset: usize) -> bool {
    let Ok(start) = at::<[u8; UDP_LEN + 1]>(frame, offset) else { return false };
    // SAFETY: `at` has checked the bounds.
    unsafe { (*start.cast::<Udp>()).destination_be == DATA_PORT.to_be() && (*start)[UDP_LEN] == TYPE_DATA }
}

#[inline(always)]
fn is_first_fragment(frame: impl Frame) -> bool {
    let Ok(header) = at::<[u8; 4]>(frame, ETHERNET_LEN + IPV6_LEN) else { return false };
    // SAFETY: `at` has checked the bounds.
    let [next_header, _, high, low] = unsafe { *header };
    next_header == PROTOCOL_UDP && u16::from_be_bytes([high, low]) & 0xfff8 == 0
}

/// Bytes of ciphertext in the datagram behind an IP header whose payload has `available` bytes.
#[inline(always)]
fn text_len(frame: impl Frame, ip_len: usize, available: u32) -> Result<u64, Reason> {
    let udp = at::<Udp>(frame, ETHERNET_LEN + ip_len)?;
    // SAFETY: `at` has checked the bounds.
    let udp_len = u32::from(u16::from_be(unsafe { (*udp).len_be }));
    if udp_len > available || (ETHERNET_LEN + ip_len) as u32 + udp_len > frame.len() {
        return Err(Reason::Malformed);
    }
    u64::from(udp_len).checked_sub((UDP_LEN + DATA_HEADER_LEN + TAG_LEN) as u64).ok_or(Reason::Malformed)
}
