//! Puts bulk messages into the receive rings of workers. A worker reads this memory, so a message
//! needs neither the kernel's UDP nor a system call.
//!
//! This is only for packets that hold one message. Those that the kernel coalesced are cheap enough
//! through the socket. Messages are neither opened nor authenticated here. Packets with unusual
//! headers go to the socket.

use core::hint::black_box;

use overnode_ebpf::map::{
    BULK_MESSAGE_LEN, BulkMessage, BulkRing, RING_ASLEEP, RING_CLOSED, RING_OPEN,
};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{
    BULK_PORT, ECN_MASK, ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, IPV4_LEN, IPV6_LEN,
    TYPE_DATA, UDP_LEN,
};

use super::decap;
use super::frame::{Ethernet, Frame, Ipv4, Ipv6, PROTOCOL_UDP, Udp, at};
use super::maps::{self, Words};

/// Attempts to claim a slot in competition with other CPUs.
const ATTEMPTS: u32 = 8;
/// First word of the addresses in `fe80::/10`, and the mask of its significant bits.
const LINK_LOCAL: u32 = 0xfe80_0000;
const LINK_LOCAL_MASK: u32 = 0xffc0_0000;

/// Bytes of a message that are parsed.
const MESSAGE_START: usize = 4;

/// An IP header, a UDP header, and the start of a message: type, cipher, sending worker, flags.
#[repr(C)]
struct Start<Ip> {
    ip: Ip,
    udp: Udp,
    message: [u8; MESSAGE_START],
}

/// Fields parsed from the headers.
struct Message {
    offset: u32,
    len: u32,
    worker: u8,
    ecn: u8,
    port_be: u16,
}

/// Result for a packet. `None` means that the packet is not a data message for this host, or goes
/// to the socket.
type Put = Option<Result<(), Reason>>;

/// Puts a data message for this host into its worker's receive ring.
///
/// # Errors
/// [`Reason::RingFull`] if the ring is full. Through the socket, the message would overtake those
/// in the ring and cost the overloaded worker even more time.
#[inline(always)]
pub fn put(frame: impl Frame) -> Put {
    let ethernet = at::<Ethernet>(frame, 0).ok()?;
    // SAFETY: `at` has checked the bounds.
    match u16::from_be(unsafe { (*ethernet).ether_type_be }) {
        ETHERTYPE_IPV4 => v4(frame),
        ETHERTYPE_IPV6 => v6(frame),
        _ => None,
    }
}

#[inline(always)]
fn v4(frame: impl Frame) -> Put {
    let start = at::<Start<Ipv4>>(frame, ETHERNET_LEN).ok()?;
    // SAFETY: `at` has checked the bounds.
    let (remote, local, message) = unsafe {
        let Start { ip, udp, message: [kind, _, worker, _] } = &*start;
        let is_plain = ip.version_ihl == 0x45 && ip.protocol == PROTOCOL_UDP && !ip.is_fragment();
        if !is_plain || udp.destination_be != BULK_PORT.to_be() || *kind != TYPE_DATA {
            return None;
        }
        let available = u32::from(u16::from_be(ip.total_len_be)).checked_sub(IPV4_LEN as u32)?;
        let len = decap::udp_len(frame, udp, IPV4_LEN, available)?.checked_sub(UDP_LEN as u32)?;
        let message = Message {
            offset: (ETHERNET_LEN + IPV4_LEN + UDP_LEN) as u32,
            len,
            worker: *worker,
            ecn: ip.tos & ECN_MASK,
            port_be: udp.source_be,
        };
        (maps::v4_mapped(ip.source), maps::v4_mapped(ip.destination), message)
    };
    deliver(frame, &remote, &local, &message)
}

#[inline(always)]
fn v6(frame: impl Frame) -> Put {
    let start = at::<Start<Ipv6>>(frame, ETHERNET_LEN).ok()?;
    // SAFETY: `at` has checked the bounds.
    let (remote, local, message) = unsafe {
        let Start { ip, udp, message: [kind, _, worker, _] } = &*start;
        let first = u32::from_be(ip.version_class_label_be);
        if first >> 28 != 6
            || ip.next_header != PROTOCOL_UDP
            || udp.destination_be != BULK_PORT.to_be()
            || *kind != TYPE_DATA
            // A link-local address is ambiguous without its interface.
            || ip.source[0] & LINK_LOCAL_MASK.to_be() == LINK_LOCAL.to_be()
        {
            return None;
        }
        let available = u32::from(u16::from_be(ip.payload_len_be));
        let len = decap::udp_len(frame, udp, IPV6_LEN, available)?.checked_sub(UDP_LEN as u32)?;
        let message = Message {
            offset: (ETHERNET_LEN + IPV6_LEN + UDP_LEN) as u32,
            len,
            worker: *worker,
            ecn: (first >> 20) as u8 & ECN_MASK,
            port_be: udp.source_be,
        };
        (ip.source, ip.destination, message)
    };
    deliver(frame, &remote, &local, &message)
}

#[inline(always)]
fn deliver(frame: impl Frame, remote: &Words, local: &Words, message: &Message) -> Put {
    // SAFETY: array map values stay valid while the program runs, here and below.
    let rings = unsafe { (&raw const (*maps::bulk_ring(0)?).rings).read_volatile() };
    if rings == 0 {
        return None;
    }
    // The same choice as the kernel's among the sockets.
    let ring = maps::bulk_ring(u32::from(message.worker) % rings)?;
    // SAFETY: as above.
    unsafe {
        let state = &raw mut (*ring).state;
        // Hidden from the compiler, so that the verifier sees both comparisons: the helper below
        // accepts no length that may be 0.
        let len = black_box(u64::from(message.len));
        if len < MESSAGE_START as u64
            || state.read_volatile() == RING_CLOSED
            || !maps::is_local(local)
        {
            return None;
        }
        if frame.gso_size() != 0 || len > BULK_MESSAGE_LEN as u64 {
            state.write_volatile(RING_CLOSED);
            return None;
        }
        let Some((place, number)) = reserve(ring) else { return Some(Err(Reason::RingFull)) };
        // Read the state after claiming the slot. A worker that falls asleep announces it first and
        // then looks for claimed slots. So at least one of the two sees the other.
        let is_asleep = state.read_volatile() == RING_ASLEEP;
        let is_there = !is_asleep
            && frame.copy_to(message.offset, (&raw mut (*place).bytes).cast(), len as u32);
        if is_asleep {
            maps::compare_exchange(state, RING_ASLEEP, RING_OPEN);
        }
        (*place).len = if is_there { len as u32 } else { 0 };
        for word in 0..4 {
            (&raw mut (*place).remote).cast::<u32>().add(word).write_volatile(remote[word]);
            (&raw mut (*place).local).cast::<u32>().add(word).write_volatile(local[word]);
        }
        (*place).remote_port_be = message.port_be;
        (*place).ecn = message.ecn.into();
        // Orders all of the above before it, on every architecture.
        maps::compare_exchange(&raw mut (*place).sequence, number, number.wrapping_add(1));
        is_there.then_some(Ok(()))
    }
}

/// Claims the next slot of a receive ring. Returns it with the number of its message, or `None` if
/// the ring is full or other CPUs won every attempt.
#[inline(always)]
fn reserve(ring: *mut BulkRing) -> Option<(*mut BulkMessage, u32)> {
    for _ in 0..ATTEMPTS {
        // SAFETY: array map values stay valid while the program runs.
        unsafe {
            let (first, len) = (
                (&raw const (*ring).first).read_volatile(),
                (&raw const (*ring).len).read_volatile(),
            );
            let head = (&raw const (*ring).head).read_volatile();
            let place = maps::bulk_message(first.wrapping_add(head & len.wrapping_sub(1)))?;
            if (&raw const (*place).sequence).read_volatile() != head {
                // Full, or claimed by another CPU in the meantime. The next attempt decides.
                if (&raw const (*ring).head).read_volatile() == head {
                    return None;
                }
                continue;
            }
            if maps::compare_exchange(&raw mut (*ring).head, head, head.wrapping_add(1)) {
                return Some((place, head));
            }
        }
    }
    None
}
