//! Parses the headers around a data message, over IPv4 and IPv6.

use core::hint::black_box;

use overnode_ebpf::map::Peer;
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{
    DATA_HEADER_LEN, DATA_PORT, ECN_MASK, ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, IPV4_LEN,
    IPV6_LEN, RELAY_LEN, TAG_LEN, TYPE_DATA, TYPE_RELAY, UDP_LEN,
};

use super::frame::{Ethernet, FRAGMENT_OFFSET, Frame, Ipv4, Ipv6, PROTOCOL_UDP, Udp, at};
use super::maps;

const MORE_FRAGMENTS: u16 = 0x2000;
const NEXT_HEADER_FRAGMENT: u8 = 44;
const FRAGMENT_HEADER_LEN: usize = 8;
/// Length in bytes of the longest possible headers, up to and including the message's header.
const HEADERS_LEN: usize = ETHERNET_LEN + 60 + UDP_LEN + RELAY_LEN + DATA_HEADER_LEN;

/// Location of a data message.
///
/// All fields are full words. The compiler would pack smaller ones into one word, with operations
/// that the verifier forbids on a register that may still hold a pointer.
pub struct OuterHeaders {
    /// 1 for an IPv6 header, 0 for IPv4.
    v6: u64,
    /// ECN codepoint.
    ecn: u64,
    /// Length of the ciphertext in bytes, without the tag.
    ciphertext_len: u64,
    /// Length of the relay header in bytes, or 0.
    relay_len: u64,
}

/// An IP header followed by a UDP header.
#[repr(C)]
struct Stack<Ip> {
    ip: Ip,
    udp: Udp,
}

impl OuterHeaders {
    /// Returns true if the IP header is IPv6.
    #[inline(always)]
    pub fn is_v6(&self) -> bool {
        self.v6 != 0
    }

    /// Returns the ECN codepoint of the IP header.
    #[inline(always)]
    pub fn ecn(&self) -> u8 {
        self.ecn as u8
    }

    /// Returns the length of the ciphertext in bytes, without the tag.
    #[inline(always)]
    pub fn ciphertext_len(&self) -> u32 {
        self.ciphertext_len as u32
    }

    /// Returns the length of the message in bytes, from its type on.
    #[inline(always)]
    pub fn message_len(&self) -> u32 {
        (self.ciphertext_len + (DATA_HEADER_LEN + TAG_LEN) as u64) as u32
    }

    /// Returns true if there is a relay header.
    #[inline(always)]
    pub fn is_relayed(&self) -> bool {
        self.relay_len != 0
    }

    /// Returns the offset of the relay header, if there is one.
    #[inline(always)]
    pub fn relay(&self) -> usize {
        let offset = ETHERNET_LEN + UDP_LEN + if self.is_v6() { IPV6_LEN } else { IPV4_LEN };
        black_box(offset) & 0x7f
    }

    /// Returns the offset of the message's header.
    #[inline(always)]
    pub fn message(&self) -> usize {
        black_box(self.relay() + self.relay_len as usize) & 0x7f
    }

    /// Returns true if the message came from the peer's known endpoint.
    #[inline(always)]
    pub fn is_from(&self, frame: impl Frame, peer: *mut Peer) -> Result<bool, Reason> {
        // SAFETY: `at` has checked the bounds; array map values stay valid while the program runs.
        unsafe {
            let remote = (&raw const (*peer).remote).cast::<u32>();
            let mut differs = 0;
            let port = if self.is_v6() {
                let headers = at::<Stack<Ipv6>>(frame, ETHERNET_LEN)?;
                for word in 0..4 {
                    differs |= *remote.add(word) ^ (*headers).ip.source[word];
                }
                (*headers).udp.source_be
            } else {
                let headers = at::<Stack<Ipv4>>(frame, ETHERNET_LEN)?;
                for (word, expected) in
                    maps::v4_mapped((*headers).ip.source).into_iter().enumerate()
                {
                    differs |= *remote.add(word) ^ expected;
                }
                (*headers).udp.source_be
            };
            Ok(differs == 0 && port == (*peer).remote_port_be)
        }
    }

    /// Sets the peer's endpoint to that of this message (roaming). Compares in place first: while
    /// nothing changes, nothing is written, and no address is on the stack.
    #[inline(always)]
    pub fn update(&self, frame: impl Frame, peer: *mut Peer) -> Result<(), Reason> {
        // SAFETY: `at` has checked the bounds; array map values stay valid while the program runs.
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

/// Writes a value only if it differs, because other CPUs read the same cache line.
///
/// # Safety
/// `place` points into a map value and is aligned.
#[inline(always)]
unsafe fn set<T: PartialEq + Copy>(place: *mut T, value: T) {
    // SAFETY: upheld by the caller.
    unsafe {
        if *place != value {
            *place = value;
        }
    }
}

/// Finds a data message, or a relayed message of any type. Returns `None` if the packet is neither,
/// or not for this host.
#[inline(always)]
pub fn parse(frame: impl Frame) -> Result<Option<OuterHeaders>, Reason> {
    let Ok(ethernet) = at::<Ethernet>(frame, 0) else { return Ok(None) };
    // SAFETY: `at` has checked the bounds.
    match u16::from_be(unsafe { (*ethernet).ether_type_be }) {
        ETHERTYPE_IPV4 => v4(frame),
        ETHERTYPE_IPV6 => v6(frame),
        _ => Ok(None),
    }
}

#[inline(always)]
fn v4(frame: impl Frame) -> Result<Option<OuterHeaders>, Reason> {
    if frame.linearize((ETHERNET_LEN + IPV4_LEN) as u32).is_err() {
        return Ok(None);
    }
    let Ok(ip) = at::<Ipv4>(frame, ETHERNET_LEN) else { return Ok(None) };
    // SAFETY: `at` has checked the bounds.
    let (version, header_len, fragment, protocol) = unsafe {
        (
            (*ip).version_ihl >> 4,
            (*ip).header_len(),
            u16::from_be((*ip).fragment_be),
            (*ip).protocol,
        )
    };
    if version != 4 || protocol != PROTOCOL_UDP || fragment & FRAGMENT_OFFSET != 0 {
        return Ok(None);
    }
    if frame.linearize(HEADERS_LEN as u32).is_err() {
        return Ok(None);
    }
    let plain = header_len == IPV4_LEN as u32 && fragment & MORE_FRAGMENTS == 0;
    let kind = if plain {
        kind(frame, ETHERNET_LEN + IPV4_LEN)
    } else {
        kind(frame, ETHERNET_LEN + (black_box(u64::from(header_len)) & 0x3c) as usize)
    };
    let Ok(ip) = at::<Ipv4>(frame, ETHERNET_LEN) else { return Ok(None) };
    // SAFETY: `at` has checked the bounds.
    let (destination, tos, total_len) =
        unsafe { ((*ip).destination, (*ip).tos, u32::from(u16::from_be((*ip).total_len_be))) };
    if kind == OTHER || !maps::is_local(&maps::v4_mapped(destination)) {
        return Ok(None);
    }
    if !plain {
        return Err(Reason::Fragment);
    }
    let available = total_len.checked_sub(IPV4_LEN as u32).ok_or(Reason::Malformed)?;
    let relay_len = relay_len(kind);
    let ciphertext_len = ciphertext_len(frame, IPV4_LEN, available, relay_len)?;
    Ok(Some(OuterHeaders { v6: 0, ecn: u64::from(tos & ECN_MASK), ciphertext_len, relay_len }))
}

#[inline(always)]
fn v6(frame: impl Frame) -> Result<Option<OuterHeaders>, Reason> {
    if frame.linearize(HEADERS_LEN as u32).is_err() {
        return Ok(None);
    }
    let Ok(ip) = at::<Ipv6>(frame, ETHERNET_LEN) else { return Ok(None) };
    // SAFETY: `at` has checked the bounds.
    let (first, next_header) =
        unsafe { (u32::from_be((*ip).version_class_label_be), (*ip).next_header) };
    if first >> 28 != 6 {
        return Ok(None);
    }
    let kind = match next_header {
        PROTOCOL_UDP => kind(frame, ETHERNET_LEN + IPV6_LEN),
        NEXT_HEADER_FRAGMENT if is_first_fragment(frame) => {
            kind(frame, ETHERNET_LEN + IPV6_LEN + FRAGMENT_HEADER_LEN)
        }
        _ => OTHER,
    };
    // SAFETY: `at` has checked the bounds.
    let (destination, available) =
        unsafe { ((*ip).destination, u32::from(u16::from_be((*ip).payload_len_be))) };
    if kind == OTHER || !maps::is_local(&destination) {
        return Ok(None);
    }
    if next_header != PROTOCOL_UDP {
        return Err(Reason::Fragment);
    }
    let relay_len = relay_len(kind);
    let ciphertext_len = ciphertext_len(frame, IPV6_LEN, available, relay_len)?;
    Ok(Some(OuterHeaders {
        v6: 1,
        ecn: u64::from(first >> 20) & u64::from(ECN_MASK),
        ciphertext_len,
        relay_len,
    }))
}

/// Type of all messages that are neither data messages nor relayed. No real message has it.
const OTHER: u8 = 0;

/// Returns the type of the message after the UDP header at this offset, or [`OTHER`] if it is not
/// for the data port or not of a type that the programs process.
#[inline(always)]
fn kind(frame: impl Frame, offset: usize) -> u8 {
    let Ok(start) = at::<[u8; UDP_LEN + 1]>(frame, offset) else { return OTHER };
    // SAFETY: `at` has checked the bounds.
    let (port_be, kind) = unsafe { ((*start.cast::<Udp>()).destination_be, (*start)[UDP_LEN]) };
    if port_be == DATA_PORT.to_be() && (kind == TYPE_DATA || kind == TYPE_RELAY) {
        kind
    } else {
        OTHER
    }
}

#[inline(always)]
fn relay_len(kind: u8) -> u64 {
    if kind == TYPE_RELAY { RELAY_LEN as u64 } else { 0 }
}

#[inline(always)]
fn is_first_fragment(frame: impl Frame) -> bool {
    let Ok(header) = at::<[u8; 4]>(frame, ETHERNET_LEN + IPV6_LEN) else { return false };
    // SAFETY: `at` has checked the bounds.
    let [next_header, _, high, low] = unsafe { *header };
    next_header == PROTOCOL_UDP && u16::from_be_bytes([high, low]) & 0xfff8 == 0
}

/// Returns the length of the ciphertext in bytes. `available` is the length of the IP payload.
#[inline(always)]
fn ciphertext_len(
    frame: impl Frame,
    ip_len: usize,
    available: u32,
    relay_len: u64,
) -> Result<u64, Reason> {
    let udp = at::<Udp>(frame, ETHERNET_LEN + ip_len)?;
    // SAFETY: `at` has checked the bounds.
    let udp_len = udp_len(frame, unsafe { &*udp }, ip_len, available).ok_or(Reason::Malformed)?;
    let headers = (UDP_LEN + DATA_HEADER_LEN + TAG_LEN) as u64 + relay_len;
    u64::from(udp_len).checked_sub(headers).ok_or(Reason::Malformed)
}

/// Returns the length in the UDP header, in bytes, if it fits the IP header's `available` bytes and
/// the packet.
#[inline(always)]
pub fn udp_len(frame: impl Frame, udp: &Udp, ip_len: usize, available: u32) -> Option<u32> {
    let len = u32::from(u16::from_be(udp.len_be));
    (len <= available && (ETHERNET_LEN + ip_len) as u32 + len <= frame.len()).then_some(len)
}
