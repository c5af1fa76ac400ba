//! Into the inboxes of the bulk path's workers: memory that a worker reads, so that a message needs
//! neither the kernel's UDP nor a system call. Only what comes in packets of one message each: what
//! the kernel has joined is cheap enough through the socket.
//!
//! A message is neither opened nor judged here, and whatever is not plain goes to the socket.

use core::hint::black_box;

use overnode_ebpf::map::{
    BULK_MESSAGE_LEN, BulkInbox, BulkMessage, INBOX_ASLEEP, INBOX_CLOSED, INBOX_OPEN,
};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{
    BULK_PORT, ECN_MASK, ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, IPV4_LEN, IPV6_LEN,
    TYPE_DATA, UDP_LEN,
};

use super::frame::{Ethernet, Frame, Ipv4, Ipv6, PROTOCOL_UDP, Udp, at};
use super::maps::{self, Words};
use super::outer;

/// How often it is tried to get a place before other CPUs.
const ATTEMPTS: u32 = 8;
/// First word of addresses in `fe80::/10`, and which bits of it count.
const LINK_LOCAL: u32 = 0xfe80_0000;
const LINK_LOCAL_MASK: u32 = 0xffc0_0000;

/// Bytes of a message that are looked at.
const MESSAGE_START: usize = 4;

/// An IP header, UDP, and the beginning of a message: its type, cipher, sending worker, flags.
#[repr(C)]
struct Start<Ip> {
    ip: Ip,
    udp: Udp,
    message: [u8; MESSAGE_START],
}

/// What the headers say.
struct Message {
    offset: u32,
    len: u32,
    worker: u8,
    ecn: u8,
    port_be: u16,
}

/// What became of a data message for this host; `None`: it is none, or goes to the socket.
type Put = Option<Result<(), Reason>>;

/// Puts a data message for this host into its worker's inbox.
///
/// # Errors
/// [`Reason::InboxFull`]: by the socket it would overtake what is there, and cost the worker more time, of which it has too little.
#[inline(always)]
pub fn put(frame: impl Frame) -> Put {
    let ethernet = at::<Ethernet>(frame, 0).ok()?;
    // SAFETY: `at` has checked the bounds.
    match u16::from_be(unsafe { (*ethernet).kind_be }) {
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
        let len = outer::udp_len(frame, udp, IPV4_LEN, available)?.checked_sub(UDP_LEN as u32)?;
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
            // Its address says nothing without the interface.
            || ip.source[0] & LINK_LOCAL_MASK.to_be() == LINK_LOCAL.to_be()
        {
            return None;
        }
        let available = u32::from(u16::from_be(ip.payload_len_be));
        let len = outer::udp_len(frame, udp, IPV6_LEN, available)?.checked_sub(UDP_LEN as u32)?;
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
    // SAFETY: values of an array map are valid for the whole program, here and below.
    let inboxes = unsafe { (&raw const (*maps::bulk_inbox(0)?).inboxes).read_volatile() };
    if inboxes == 0 {
        return None;
    }
    // As the kernel chooses among the sockets.
    let inbox = maps::bulk_inbox(u32::from(message.worker) % inboxes)?;
    // SAFETY: as above.
    unsafe {
        let state = &raw mut (*inbox).state;
        // Hidden, for the verifier is to see both comparisons: the helper below takes no length
        // that may be 0.
        let len = black_box(u64::from(message.len));
        if len < MESSAGE_START as u64
            || state.read_volatile() == INBOX_CLOSED
            || !maps::is_local(local)
        {
            return None;
        }
        if frame.gso_size() != 0 || len > BULK_MESSAGE_LEN as u64 {
            state.write_volatile(INBOX_CLOSED);
            return None;
        }
        let Some((place, number)) = reserve(inbox) else { return Some(Err(Reason::InboxFull)) };
        // After the place was taken: a worker that falls asleep looks for such places after it has
        // said so. One of both sees the other.
        let is_asleep = state.read_volatile() == INBOX_ASLEEP;
        let is_there = !is_asleep
            && frame.copy_to(message.offset, (&raw mut (*place).bytes).cast(), len as u32);
        if is_asleep {
            maps::compare_exchange(state, INBOX_ASLEEP, INBOX_OPEN);
        }
        (*place).len = if is_there { len as u32 } else { 0 };
        for word in 0..4 {
            (&raw mut (*place).remote).cast::<u32>().add(word).write_volatile(remote[word]);
            (&raw mut (*place).local).cast::<u32>().add(word).write_volatile(local[word]);
        }
        (*place).remote_port_be = message.port_be;
        (*place).ecn = message.ecn.into();
        // Orders all the above before it, on every architecture.
        maps::compare_exchange(&raw mut (*place).sequence, number, number.wrapping_add(1));
        is_there.then_some(Ok(()))
    }
}

/// The next place of an inbox, and the number of the message that it is for. `None`: it is full, or
/// other CPUs were always faster.
#[inline(always)]
fn reserve(inbox: *mut BulkInbox) -> Option<(*mut BulkMessage, u32)> {
    for _ in 0..ATTEMPTS {
        // SAFETY: values of an array map are valid for the whole program.
        unsafe {
            let (first, len) = (
                (&raw const (*inbox).first).read_volatile(),
                (&raw const (*inbox).len).read_volatile(),
            );
            let head = (&raw const (*inbox).head).read_volatile();
            let place = maps::bulk_message(first.wrapping_add(head & len.wrapping_sub(1)))?;
            if (&raw const (*place).sequence).read_volatile() != head {
                // Full; or taken meanwhile, which the next attempt finds out.
                if (&raw const (*inbox).head).read_volatile() == head {
                    return None;
                }
                continue;
            }
            if maps::compare_exchange(&raw mut (*inbox).head, head, head.wrapping_add(1)) {
                return Some((place, head));
            }
        }
    }
    None
}
