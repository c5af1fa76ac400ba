//! Packet access, the same for TC and XDP, and the headers as they lie in packets.
//!
//! Header fields are read and written with plain loads and stores although packets are aligned to
//! nothing: the kernel allows that on x86-64 and arm64, and `read_unaligned` would become one load
//! per byte.

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::bindings::{
    __sk_buff, BPF_CSUM_LEVEL_INC, BPF_CSUM_LEVEL_QUERY, BPF_F_ADJ_ROOM_FIXED_GSO,
    BPF_F_ADJ_ROOM_NO_CSUM_RESET, TC_ACT_SHOT, xdp_action, xdp_md,
};
use aya_ebpf::helpers::generated::{
    bpf_csum_level, bpf_csum_update, bpf_l4_csum_replace, bpf_redirect, bpf_redirect_peer,
    bpf_skb_adjust_room, bpf_skb_change_proto, bpf_skb_change_tail, bpf_skb_load_bytes,
    bpf_skb_pull_data, bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_load_bytes,
};
use overnode_ebpf::map::VLAN_PRESENT;
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{ETHERNET_LEN, ETHERTYPE_IPV4, IPV4_LEN, IPV6_LEN};

use super::cipher::Packet;

/// The context of a TC program.
pub type Skb = *mut __sk_buff;

/// A hardware address, in units that are always aligned.
pub type Mac = [u16; 3];

/// Ethernet II.
#[repr(C)]
pub struct Ethernet {
    pub destination: Mac,
    pub source: Mac,
    pub kind_be: u16,
}

/// IPv4 without options (RFC 791).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv4 {
    /// Version and header length in words.
    pub version_ihl: u8,
    pub tos: u8,
    pub total_len_be: u16,
    pub id_be: u16,
    pub fragment_be: u16,
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: u16,
    pub source: u32,
    pub destination: u32,
}

/// IPv6 (RFC 8200).
#[repr(C)]
pub struct Ipv6 {
    /// Version, traffic class and flow label.
    pub version_class_label_be: u32,
    pub payload_len_be: u16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: [u32; 4],
    pub destination: [u32; 4],
}

/// UDP (RFC 768).
#[repr(C)]
pub struct Udp {
    pub source_be: u16,
    pub destination_be: u16,
    pub len_be: u16,
    pub checksum: u16,
}

/// Header of a transport data message (WireGuard whitepaper section 5.4.6).
#[repr(C)]
pub struct DataHeader {
    pub kind: u32,
    pub receiver: u32,
    pub counter_low: u32,
    pub counter_high: u32,
}

impl Ipv4 {
    /// Length of the header, options included, in bytes.
    #[inline(always)]
    pub fn header_len(&self) -> u32 {
        u32::from(self.version_ihl & 0xf) * 4
    }

    /// True if this is not a whole packet: more fragments follow, or it has an offset.
    #[inline(always)]
    pub fn is_fragment(&self) -> bool {
        self.fragment_be & 0x3fff_u16.to_be() != 0
    }

    /// True if the version is 4 and the lengths fit each other and the `available` bytes.
    #[inline(always)]
    pub fn is_sane(&self, available: u32) -> bool {
        let total = u32::from(u16::from_be(self.total_len_be));
        self.version_ihl >> 4 == 4
            && self.header_len() >= IPV4_LEN as u32
            && total >= self.header_len()
            && total <= available
    }
}

/// Bits of [`Ipv4::fragment_be`] that say where a fragment lies in its packet.
pub const FRAGMENT_OFFSET: u16 = 0x1fff;

/// Packet type of `skb->pkt_type`: for this host.
pub const PACKET_HOST: u32 = 0;

pub use overnode_ebpf::wire::{PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP};

/// The only way to a packet's bytes: a pointer to `T` at `offset`, if the linear part holds all of
/// it.
///
/// Valid until the next helper that may move the packet's data. The reason is for callers to whom a
/// short packet is a fault. `T` has two bytes at least: for one, the compiler turns the check into
/// one that the verifier does not understand.
#[inline(always)]
pub fn at<T>(frame: impl Frame, offset: usize) -> Result<*mut T, Reason> {
    const { assert!(size_of::<T>() > 1) }
    let (start, end) = frame.bounds();
    let start = start + offset;
    if start + size_of::<T>() > end {
        return Err(Reason::Malformed);
    }
    Ok(start as *mut T)
}

/// What the programs need from a TC or an XDP context.
pub trait Frame: Packet {
    /// Addresses of the first byte and of the one behind the last of the linear part. Read from the
    /// context each time: an address that the compiler kept in a 32-bit register would be no
    /// pointer to the verifier.
    fn bounds(self) -> (usize, usize);
    /// Bytes from the Ethernet header to the end.
    fn len(self) -> u32;
    /// The interface that it came in by.
    fn ifindex(self) -> u32;
    /// `VLAN_PRESENT` and the tag that the kernel keeps beside the packet, or 0.
    fn vlan(self) -> u32;
    /// Copies `len` bytes, 1 at least, from an offset on, wherever they lie. False if there are
    /// fewer.
    ///
    /// # Safety
    /// `to` has room for them.
    unsafe fn copy_to(self, offset: u32, to: *mut u8, len: u32) -> bool;
    /// Size of the segments if this is more than one packet, else 0.
    fn gso_size(self) -> u32;
    /// Makes the first `len` bytes readable by pointer.
    fn linearize(self, len: u32) -> Result<(), Reason>;
    /// Makes everything readable and writable by pointer.
    fn linearize_all(self) -> Result<(), Reason>;
    /// Removes the `outer` bytes after the Ethernet header and what lies behind `inner` more bytes,
    /// in a packet whose payload was authenticated and changed. `from_v6`: the outer header is
    /// IPv6.
    fn strip(self, outer: u32, inner: u32, from_v6: bool) -> Result<(), Reason>;
    /// The context of a TC program, if it is one.
    fn skb(self) -> Option<Skb>;
    /// Hands the packet to the container behind a host end; `by_host_end`: through that end,
    /// because the kernel may join the packet with others like it there, or because the other end
    /// is in the same namespace.
    fn hand_over(self, ifindex: u32, by_host_end: bool) -> i64;

    /// The verdict on a packet that has arrived and is needed no more.
    fn consumed(self) -> i64;

    /// Bytes that [`at`] can reach.
    #[inline(always)]
    fn linear(self) -> u32 {
        let (start, end) = self.bounds();
        // Hidden, for the compiler would subtract in 32 bits, which the verifier allows to no
        // pointer.
        core::hint::black_box(end - start) as u32
    }

    /// Writes an Ethernet header for IPv4 at the front.
    #[inline(always)]
    fn set_ethernet(self, destination: &[u8; 6], source: &[u8; 6]) -> Result<(), Reason> {
        let ethernet = at::<Ethernet>(self, 0)?;
        // SAFETY: `at` has checked the bounds; the hardware addresses lie in a map at even offsets.
        unsafe {
            copy_mac(&raw mut (*ethernet).destination, destination.as_ptr().cast());
            copy_mac(&raw mut (*ethernet).source, source.as_ptr().cast());
            (*ethernet).kind_be = ETHERTYPE_IPV4.to_be();
        }
        Ok(())
    }
}

impl Frame for Skb {
    #[inline(always)]
    fn bounds(self) -> (usize, usize) {
        // SAFETY: the kernel hands a valid context to the program.
        unsafe {
            let start = (&raw const (*self).data).read_volatile();
            (start as usize, (&raw const (*self).data_end).read_volatile() as usize)
        }
    }

    #[inline(always)]
    fn len(self) -> u32 {
        // SAFETY: the kernel hands a valid context to the program.
        unsafe { (*self).len }
    }

    #[inline(always)]
    fn ifindex(self) -> u32 {
        // SAFETY: the kernel hands a valid context to the program.
        unsafe { (*self).ifindex }
    }

    #[inline(always)]
    fn vlan(self) -> u32 {
        // SAFETY: the kernel hands a valid context to the program.
        unsafe { if (*self).vlan_present == 0 { 0 } else { VLAN_PRESENT | (*self).vlan_tci } }
    }

    #[inline(always)]
    unsafe fn copy_to(self, offset: u32, to: *mut u8, len: u32) -> bool {
        // SAFETY: the context is valid; the rest by the contract above.
        unsafe { bpf_skb_load_bytes(self.cast(), offset, to.cast(), len) == 0 }
    }

    #[inline(always)]
    fn gso_size(self) -> u32 {
        // SAFETY: the kernel hands a valid context to the program.
        unsafe { (*self).gso_size }
    }

    #[inline(always)]
    fn linearize(self, len: u32) -> Result<(), Reason> {
        if self.linear() >= len || self.linear() == self.len() {
            return Ok(());
        }
        pull(self, len.min(self.len()))
    }

    #[inline(always)]
    fn linearize_all(self) -> Result<(), Reason> {
        // Clones were made private before the first instruction: the kernel does so for programs
        // that write packets.
        if self.linear() == self.len() {
            return Ok(());
        }
        pull(self, self.len())
    }

    #[inline(always)]
    fn strip(self, outer: u32, inner: u32, from_v6: bool) -> Result<(), Reason> {
        forget_checksum(self)?;
        // The inner packet's protocol has to be the packet's, which only this helper changes on
        // 6.1.
        let outer = if from_v6 {
            change_protocol(self, ETHERTYPE_IPV4)?;
            outer - (IPV6_LEN - IPV4_LEN) as u32
        } else {
            outer
        };
        adjust_room(self, -(outer as i32))?;
        // Refused for what never left the machine, from a host that is a namespace of it, and is a
        // tunnel's inside (see `tail`). The container's kernel cuts off what is too much, too.
        let _ = resize(self, ETHERNET_LEN as u32 + inner);
        // Poly1305 has proven the payload: the container need not sum it up again. A checksum that
        // was left unfinished in the outer headers has gone with them; one that is still there
        // would change what was proven. SAFETY: the context is valid. A refusal changes nothing.
        let level = unsafe {
            bpf_csum_level(self, u64::from(BPF_CSUM_LEVEL_INC));
            bpf_csum_level(self, u64::from(BPF_CSUM_LEVEL_QUERY))
        };
        if level < 0 { Err(Reason::Checksum) } else { Ok(()) }
    }

    #[inline(always)]
    fn skb(self) -> Option<Skb> {
        Some(self)
    }

    #[inline(always)]
    fn consumed(self) -> i64 {
        TC_ACT_SHOT.into()
    }

    #[inline(always)]
    fn hand_over(self, ifindex: u32, by_host_end: bool) -> i64 {
        // Through the host end a packet passes the NAPI of the veth, which joins segments (GRO).
        // What is never joined takes the shorter way, unless the frame would have to be parsed
        // again to be the container's. SAFETY: the context is valid.
        if by_host_end || unsafe { (*self).pkt_type } != PACKET_HOST {
            return redirect(ifindex);
        }
        redirect_peer(ifindex)
    }
}

impl Frame for *mut xdp_md {
    #[inline(always)]
    fn bounds(self) -> (usize, usize) {
        // SAFETY: the kernel hands a valid context to the program.
        unsafe {
            let start = (&raw const (*self).data).read_volatile();
            (start as usize, (&raw const (*self).data_end).read_volatile() as usize)
        }
    }

    #[inline(always)]
    fn len(self) -> u32 {
        self.linear()
    }

    #[inline(always)]
    fn ifindex(self) -> u32 {
        // SAFETY: the kernel hands a valid context to the program.
        unsafe { (*self).ingress_ifindex }
    }

    #[inline(always)]
    fn vlan(self) -> u32 {
        0
    }

    #[inline(always)]
    unsafe fn copy_to(self, offset: u32, to: *mut u8, len: u32) -> bool {
        // SAFETY: the context is valid; the rest by the contract above.
        unsafe { bpf_xdp_load_bytes(self, offset, to.cast(), len) == 0 }
    }

    #[inline(always)]
    fn gso_size(self) -> u32 {
        0
    }

    #[inline(always)]
    fn linearize(self, _: u32) -> Result<(), Reason> {
        Ok(())
    }

    #[inline(always)]
    fn linearize_all(self) -> Result<(), Reason> {
        Ok(())
    }

    #[inline(always)]
    fn strip(self, outer: u32, inner: u32, _: bool) -> Result<(), Reason> {
        // SAFETY: the context is valid.
        if unsafe { bpf_xdp_adjust_head(self, outer as i32) } != 0 {
            return Err(Reason::Helper);
        }
        let surplus = (self.linear() - inner) as i32 - ETHERNET_LEN as i32;
        // SAFETY: the context is valid.
        if unsafe { bpf_xdp_adjust_tail(self, -surplus) } != 0 {
            return Err(Reason::Helper);
        }
        Ok(())
    }

    #[inline(always)]
    fn skb(self) -> Option<Skb> {
        None
    }

    #[inline(always)]
    fn consumed(self) -> i64 {
        xdp_action::XDP_DROP.into()
    }

    #[inline(always)]
    fn hand_over(self, ifindex: u32, _: bool) -> i64 {
        redirect(ifindex)
    }
}

/// Copies a hardware address by words: as a whole, the compiler would call a loop over its bytes.
///
/// # Safety
/// Both are valid, `to` for writes.
#[inline(always)]
unsafe fn copy_mac(to: *mut Mac, from: *const Mac) {
    for word in 0..3 {
        // SAFETY: by the contract above.
        unsafe { to.cast::<u16>().add(word).write(from.cast::<u16>().add(word).read_volatile()) };
    }
}

/// Makes the first `len` bytes readable and writable by pointer.
#[inline(always)]
fn pull(skb: Skb, len: u32) -> Result<(), Reason> {
    // SAFETY: the context is valid.
    if unsafe { bpf_skb_pull_data(skb, len) } != 0 { Err(Reason::Helper) } else { Ok(()) }
}

/// Drops a checksum of the whole packet that the device computed (CHECKSUM_COMPLETE), for it no
/// longer fits. May add a byte at the end.
#[inline(always)]
pub fn forget_checksum(skb: Skb) -> Result<(), Reason> {
    // Only growing drops it, and only with such a checksum does bpf_csum_update succeed.
    // SAFETY: the context is valid.
    if unsafe { bpf_csum_update(skb, 0) } >= 0 { resize(skb, skb.len() + 1) } else { Ok(()) }
}

/// Sets a packet's length: cuts it, or appends zeros. Finishes nothing, but undoes GSO and makes
/// all linear.
#[inline(always)]
pub fn resize(skb: Skb, len: u32) -> Result<(), Reason> {
    // SAFETY: the context is valid.
    if unsafe { bpf_skb_change_tail(skb, len, 0) } != 0 { Err(Reason::Helper) } else { Ok(()) }
}

/// True if the kernel still has to finish a checksum in the packet (`CHECKSUM_PARTIAL`): whoever
/// sends it would have two of its bytes overwritten. Destroys the first two bytes of the packet.
///
/// No field of the context tells. But bpf_l4_csum_replace adjusts a checksum that is finished and
/// leaves one alone that is not, as the rest of the sum does not cover the change
/// (`inet_proto_csum_replace4`, Linux 4.1): so it is let loose on two bytes that do not matter.
#[inline(always)]
pub fn is_unfinished(skb: Skb) -> Result<bool, Reason> {
    const TWO_BYTES: u64 = 2;
    let word = at::<u16>(skb, 0)?;
    // SAFETY: `at` has checked the bounds; the context is valid.
    let changed = unsafe {
        word.write_volatile(0);
        bpf_l4_csum_replace(skb, 0, 0, 1, TWO_BYTES)
    };
    if changed != 0 {
        return Err(Reason::Helper);
    }
    // SAFETY: `at` has checked the bounds.
    Ok(unsafe { at::<u16>(skb, 0)?.read_volatile() } == 0)
}

/// Inserts bytes behind the Ethernet header, or removes them there.
#[inline(always)]
pub fn adjust_room(skb: Skb, by: i32) -> Result<(), Reason> {
    // SAFETY: the context is valid.
    if unsafe { bpf_skb_adjust_room(skb, by, BPF_ADJ_ROOM_MAC, 0) } != 0 {
        Err(Reason::Helper)
    } else {
        Ok(())
    }
}

/// Like [`adjust_room`], for bytes that come back: segments keep their size, and a checksum that
/// the device has verified stays so.
#[inline(always)]
pub fn shift(skb: Skb, by: i32) -> Result<(), Reason> {
    const FLAGS: u64 = (BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET) as u64;
    // SAFETY: the context is valid.
    if unsafe { bpf_skb_adjust_room(skb, by, BPF_ADJ_ROOM_MAC, FLAGS) } != 0 {
        Err(Reason::Helper)
    } else {
        Ok(())
    }
}

/// Makes an IPv4 packet an IPv6 one or the reverse, with 20 bytes more or fewer behind the Ethernet
/// header.
#[inline(always)]
pub fn change_protocol(skb: Skb, ethertype: u16) -> Result<(), Reason> {
    // SAFETY: the context is valid.
    if unsafe { bpf_skb_change_proto(skb, ethertype.to_be(), 0) } != 0 {
        Err(Reason::Helper)
    } else {
        Ok(())
    }
}

/// Sends out of an interface.
#[inline(always)]
pub fn redirect(ifindex: u32) -> i64 {
    // SAFETY: has no preconditions.
    unsafe { bpf_redirect(ifindex, 0) }
}

/// Hands the packet to the other end of a veth, in another network namespace, without a queue
/// between.
#[inline(always)]
pub fn redirect_peer(ifindex: u32) -> i64 {
    // SAFETY: has no preconditions.
    unsafe { bpf_redirect_peer(ifindex, 0) }
}
