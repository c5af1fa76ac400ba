//! Access to packets, the same for TC and XDP, and the layout of their headers.
//!
//! Header fields are accessed with plain loads and stores, although packets have no alignment. The
//! kernel allows that on x86-64 and arm64, while `read_unaligned` would become one load per byte.

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::bindings::{
    __sk_buff, BPF_CSUM_LEVEL_INC, BPF_CSUM_LEVEL_QUERY, BPF_F_ADJ_ROOM_FIXED_GSO,
    BPF_F_ADJ_ROOM_NO_CSUM_RESET, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action, xdp_md,
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

/// A MAC address, in units that are always aligned.
pub type Mac = [u16; 3];

/// Returns a MAC address in these units.
pub const fn mac([a, b, c, d, e, f]: [u8; 6]) -> Mac {
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]), u16::from_ne_bytes([e, f])]
}

/// Ethernet II header.
#[repr(C)]
pub struct Ethernet {
    pub destination: Mac,
    pub source: Mac,
    pub ether_type_be: u16,
}

/// IPv4 header without options (RFC 791).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv4 {
    /// Version, and header length in 32-bit words.
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

/// IPv6 header (RFC 8200).
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

/// UDP header (RFC 768).
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
    /// Returns the length of the header in bytes, including options.
    #[inline(always)]
    pub fn header_len(&self) -> u32 {
        u32::from(self.version_ihl & 0xf) * 4
    }

    /// Returns true for a fragment: more fragments follow, or the offset is not 0.
    #[inline(always)]
    pub fn is_fragment(&self) -> bool {
        self.fragment_be & 0x3fff_u16.to_be() != 0
    }

    /// Returns true if the version is 4 and the lengths are consistent with each other and with the
    /// `available` bytes.
    #[inline(always)]
    pub fn is_sane(&self, available: u32) -> bool {
        let total = u32::from(u16::from_be(self.total_len_be));
        self.version_ihl >> 4 == 4
            && self.header_len() >= IPV4_LEN as u32
            && total >= self.header_len()
            && total <= available
    }
}

/// Bits of [`Ipv4::fragment_be`], in host byte order, that hold the fragment's offset.
pub const FRAGMENT_OFFSET: u16 = 0x1fff;

/// Value of `skb->pkt_type` for packets to this host.
pub const PACKET_HOST: u32 = 0;

pub use overnode_ebpf::wire::{PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP};

/// Returns a pointer to a `T` at `offset`, if all of it is in the packet's linear part. Packet
/// headers are accessed only through this function.
///
/// The pointer is valid until the next helper that may move the packet's data. The error is meant
/// for callers that treat a short packet as malformed. `T` must have at least two bytes: for one
/// byte, the compiler turns the check into one that the verifier does not understand.
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

/// The operations on a TC or an XDP context that the programs need.
pub trait Frame: Packet {
    /// Returns the addresses of the first byte and after the last byte of the linear part. Reads
    /// them from the context each time: if the compiler kept an address in a 32-bit register, the
    /// verifier would no longer treat it as a pointer.
    fn bounds(self) -> (usize, usize);
    /// Returns the length in bytes from the Ethernet header on.
    fn len(self) -> u32;
    /// Returns the ifindex of the interface that received the packet.
    fn ifindex(self) -> u32;
    /// Returns `VLAN_PRESENT` and the tag that the kernel keeps outside of the packet, or 0.
    fn vlan(self) -> u32;
    /// Copies `len` bytes (at least 1) from `offset` on, linear or not. Returns false if there are
    /// fewer.
    ///
    /// # Safety
    /// `to` must have room for `len` bytes.
    unsafe fn copy_to(self, offset: u32, to: *mut u8, len: u32) -> bool;
    /// Returns the segment size in bytes if this is more than one packet, else 0.
    fn gso_size(self) -> u32;
    /// Makes the first `len` bytes readable through pointers.
    fn linearize(self, len: u32) -> Result<(), Reason>;
    /// Makes the whole packet readable and writable through pointers.
    fn linearize_all(self) -> Result<(), Reason>;
    /// Removes `decap` bytes after the Ethernet header, and everything after the next `inner`
    /// bytes. The packet's payload was authenticated and changed. `from_v6` is true if the outer
    /// header is IPv6.
    fn strip(self, decap: u32, inner: u32, from_v6: bool) -> Result<(), Reason>;
    /// Returns the context of a TC program, or `None` for XDP.
    fn skb(self) -> Option<Skb>;
    /// Hands the packet to the container behind a host end. `by_host_end` redirects to that end,
    /// because the kernel may coalesce packets there, or because the other end is in the same
    /// namespace.
    fn hand_over(self, ifindex: u32, by_host_end: bool) -> i64;

    /// Returns the verdict that leaves the packet to the next program, or to the host.
    fn pass(self) -> i64;

    /// Returns the verdict that frees the packet.
    fn drop(self) -> i64;

    /// Returns the number of bytes that [`at`] can access.
    #[inline(always)]
    fn linear(self) -> u32 {
        let (start, end) = self.bounds();
        // Hidden from the compiler, which would otherwise subtract in 32 bits. The verifier does
        // not allow that for pointers.
        core::hint::black_box(end - start) as u32
    }

    /// Writes an Ethernet header for IPv4 at the start of the packet.
    #[inline(always)]
    fn set_ethernet(self, destination: &[u8; 6], source: &[u8; 6]) -> Result<(), Reason> {
        let ethernet = at::<Ethernet>(self, 0)?;
        // SAFETY: `at` has checked the bounds; the MAC addresses are at even offsets in a map.
        unsafe {
            copy_mac(&raw mut (*ethernet).destination, destination.as_ptr().cast());
            copy_mac(&raw mut (*ethernet).source, source.as_ptr().cast());
            (*ethernet).ether_type_be = ETHERTYPE_IPV4.to_be();
        }
        Ok(())
    }
}

impl Frame for Skb {
    #[inline(always)]
    fn bounds(self) -> (usize, usize) {
        // SAFETY: the kernel passes a valid context to the program.
        unsafe {
            let start = (&raw const (*self).data).read_volatile();
            (start as usize, (&raw const (*self).data_end).read_volatile() as usize)
        }
    }

    #[inline(always)]
    fn len(self) -> u32 {
        // SAFETY: the kernel passes a valid context to the program.
        unsafe { (*self).len }
    }

    #[inline(always)]
    fn ifindex(self) -> u32 {
        // SAFETY: the kernel passes a valid context to the program.
        unsafe { (*self).ifindex }
    }

    #[inline(always)]
    fn vlan(self) -> u32 {
        // SAFETY: the kernel passes a valid context to the program.
        unsafe { if (*self).vlan_present == 0 { 0 } else { VLAN_PRESENT | (*self).vlan_tci } }
    }

    #[inline(always)]
    unsafe fn copy_to(self, offset: u32, to: *mut u8, len: u32) -> bool {
        // SAFETY: the context is valid; the caller upholds the rest.
        unsafe { bpf_skb_load_bytes(self.cast(), offset, to.cast(), len) == 0 }
    }

    #[inline(always)]
    fn gso_size(self) -> u32 {
        // SAFETY: the kernel passes a valid context to the program.
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
        // A cloned packet is already private: the kernel copies it before the first instruction of
        // a program that writes packets.
        if self.linear() == self.len() {
            return Ok(());
        }
        pull(self, self.len())
    }

    #[inline(always)]
    fn strip(self, decap: u32, inner: u32, from_v6: bool) -> Result<(), Reason> {
        drop_complete_checksum(self)?;
        // The packet's protocol must be that of the inner packet. On Linux 6.1, only this helper
        // changes it.
        let decap = if from_v6 {
            change_protocol(self, ETHERTYPE_IPV4)?;
            decap - (IPV6_LEN - IPV4_LEN) as u32
        } else {
            decap
        };
        adjust_room(self, -(decap as i32))?;
        // The kernel refuses this for packets that a tunnel inside the sending container
        // encapsulated (see `tail`), if the sending host is a network namespace of this machine and
        // they never left it. That is harmless: the receiving container's kernel trims the excess,
        // too.
        let _ = resize(self, ETHERNET_LEN as u32 + inner);
        // Poly1305 has authenticated the payload, so the container need not verify its checksum. A
        // partial checksum of the outer headers was removed with them. One that is still pending
        // would change authenticated bytes. SAFETY: the context is valid. A refusal changes
        // nothing.
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
    fn pass(self) -> i64 {
        // TCX_NEXT.
        TC_ACT_UNSPEC.into()
    }

    #[inline(always)]
    fn drop(self) -> i64 {
        TC_ACT_SHOT.into()
    }

    #[inline(always)]
    fn hand_over(self, ifindex: u32, by_host_end: bool) -> i64 {
        // A packet redirected to the host end passes the veth's NAPI, which coalesces segments
        // (GRO). Packets that are never coalesced take the shorter path, except if the kernel must
        // parse the frame again to see that it is for the container. SAFETY: the context is valid.
        if by_host_end || unsafe { (*self).pkt_type } != PACKET_HOST {
            return redirect_to_container(self, ifindex);
        }
        redirect_peer(ifindex)
    }
}

impl Frame for *mut xdp_md {
    #[inline(always)]
    fn bounds(self) -> (usize, usize) {
        // SAFETY: the kernel passes a valid context to the program.
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
        // SAFETY: the kernel passes a valid context to the program.
        unsafe { (*self).ingress_ifindex }
    }

    #[inline(always)]
    fn vlan(self) -> u32 {
        0
    }

    #[inline(always)]
    unsafe fn copy_to(self, offset: u32, to: *mut u8, len: u32) -> bool {
        // SAFETY: the context is valid; the caller upholds the rest.
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
    fn strip(self, decap: u32, inner: u32, _: bool) -> Result<(), Reason> {
        // SAFETY: the context is valid.
        if unsafe { bpf_xdp_adjust_head(self, decap as i32) } != 0 {
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
    fn pass(self) -> i64 {
        xdp_action::XDP_PASS.into()
    }

    #[inline(always)]
    fn drop(self) -> i64 {
        xdp_action::XDP_DROP.into()
    }

    #[inline(always)]
    fn hand_over(self, ifindex: u32, _: bool) -> i64 {
        redirect(ifindex)
    }
}

/// Copies a MAC address in words. To copy it as a whole, the compiler would call a function that
/// loops over bytes.
///
/// # Safety
/// Both pointers must be valid, `to` for writes.
#[inline(always)]
unsafe fn copy_mac(to: *mut Mac, from: *const Mac) {
    for word in 0..3 {
        // SAFETY: upheld by the caller.
        unsafe { to.cast::<u16>().add(word).write(from.cast::<u16>().add(word).read_volatile()) };
    }
}

/// Makes the first `len` bytes readable and writable through pointers.
#[inline(always)]
fn pull(skb: Skb, len: u32) -> Result<(), Reason> {
    // SAFETY: the context is valid.
    if unsafe { bpf_skb_pull_data(skb, len) } != 0 { Err(Reason::Helper) } else { Ok(()) }
}

/// Discards a checksum of the whole packet that the device computed (CHECKSUM_COMPLETE) and that no
/// longer matches. May append a byte.
#[inline(always)]
pub fn drop_complete_checksum(skb: Skb) -> Result<(), Reason> {
    // Only growing the packet discards it. bpf_csum_update succeeds only if there is such a
    // checksum. SAFETY: the context is valid.
    if unsafe { bpf_csum_update(skb, 0) } >= 0 { resize(skb, skb.len() + 1) } else { Ok(()) }
}

/// Sets the length of a packet: trims it, or appends zeros. Completes no checksum, but removes GSO
/// and makes the whole packet linear.
#[inline(always)]
pub fn resize(skb: Skb, len: u32) -> Result<(), Reason> {
    // SAFETY: the context is valid.
    if unsafe { bpf_skb_change_tail(skb, len, 0) } != 0 { Err(Reason::Helper) } else { Ok(()) }
}

/// Returns true if the packet has a partial checksum (`CHECKSUM_PARTIAL`): the kernel will
/// overwrite two of its bytes when it sends the packet. Destroys the first two bytes of the packet.
///
/// The context has no field for this. But bpf_l4_csum_replace adjusts a complete checksum and
/// leaves a partial one alone, because the pseudo-header sum does not cover the change
/// (`inet_proto_csum_replace4`, Linux 4.1). So it is called on two bytes that do not matter.
#[inline(always)]
pub fn has_partial_checksum(skb: Skb) -> Result<bool, Reason> {
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

/// Inserts bytes after the Ethernet header, or removes them there if `by` is negative.
#[inline(always)]
pub fn adjust_room(skb: Skb, by: i32) -> Result<(), Reason> {
    // SAFETY: the context is valid.
    if unsafe { bpf_skb_adjust_room(skb, by, BPF_ADJ_ROOM_MAC, 0) } != 0 {
        Err(Reason::Helper)
    } else {
        Ok(())
    }
}

/// Like [`adjust_room`], for bytes that are put back later: segments keep their size, and a
/// checksum that the device verified stays verified.
#[inline(always)]
pub fn shift_keeping_offloads(skb: Skb, by: i32) -> Result<(), Reason> {
    const FLAGS: u64 = (BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET) as u64;
    // SAFETY: the context is valid.
    if unsafe { bpf_skb_adjust_room(skb, by, BPF_ADJ_ROOM_MAC, FLAGS) } != 0 {
        Err(Reason::Helper)
    } else {
        Ok(())
    }
}

/// Turns an IPv4 packet into an IPv6 one or the reverse, which inserts or removes 20 bytes after
/// the Ethernet header.
#[inline(always)]
pub fn change_protocol(skb: Skb, ethertype: u16) -> Result<(), Reason> {
    // SAFETY: the context is valid.
    if unsafe { bpf_skb_change_proto(skb, ethertype.to_be(), 0) } != 0 {
        Err(Reason::Helper)
    } else {
        Ok(())
    }
}

/// Mark of packets that programs deliver through a host end (`skb->mark`). Setting a mark takes
/// CAP_NET_ADMIN or CAP_NET_RAW in the host's namespace.
pub const DELIVERED: u32 = u32::from_be_bytes(*b"ovnd");

/// Sends the packet to the container behind a host end, past `to_container`.
#[inline(always)]
pub fn redirect_to_container(skb: Skb, ifindex: u32) -> i64 {
    // SAFETY: the kernel passes a valid context to the program.
    unsafe { (*skb).mark = DELIVERED };
    redirect(ifindex)
}

/// Sends the packet out of an interface.
#[inline(always)]
pub fn redirect(ifindex: u32) -> i64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_redirect(ifindex, 0) }
}

/// Hands the packet to the other end of a veth in another network namespace, without a queue in
/// between.
#[inline(always)]
pub fn redirect_peer(ifindex: u32) -> i64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_redirect_peer(ifindex, 0) }
}
