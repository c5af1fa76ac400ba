//! Answers packets with ICMP "destination unreachable" (RFC 792), made from the packet itself.

use aya_ebpf::helpers::generated::bpf_csum_diff;
use overnode_ebpf::map::{Config, ERROR_ALLOWANCE, ERROR_COST, Endpoint};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{ETHERNET_LEN, IPV4_LEN};

use super::checksum::{fold, ipv4_checksum};
use super::frame::{
    FRAGMENT_OFFSET, Frame, Ipv4, PROTOCOL_ICMP, Skb, adjust_room, at, redirect_to_container,
    resize,
};
use super::{Verdict, maps};

const TYPE_UNREACHABLE: u8 = 3;
const CODE_HOST_UNREACHABLE: u8 = 1;
const CODE_FRAGMENTATION_NEEDED: u8 = 4;
const TYPE_ECHO_REPLY: u8 = 0;
const TYPE_ECHO: u8 = 8;

#[repr(C)]
struct Icmp {
    kind: u8,
    code: u8,
    checksum: u16,
    unused: u16,
    mtu_be: u16,
}

/// Bytes quoted from the packet: the longest IPv4 header and 8 bytes.
const QUOTE_LEN: usize = 60 + 8;
const ANSWER_LEN: usize = IPV4_LEN + size_of::<Icmp>() + QUOTE_LEN;
/// Bytes removed at the front. Pulling past the start of a partial checksum makes the kernel drop
/// it. Otherwise, the kernel would later overwrite two bytes of the answer.
const PULLED_LEN: usize = 160;

/// Tells a container that its packet is too big: "fragmentation needed and DF set" (RFC 1191).
/// `mtu` is the largest packet that fits the path, in bytes from the IP header on.
#[inline(always)]
pub fn too_big(
    skb: Skb,
    endpoint: &Endpoint,
    config: &Config,
    mtu: u32,
) -> Result<Verdict, Reason> {
    if !may_be_answered(skb)? {
        return Err(Reason::TooBigDropped);
    }
    let verdict = answer(skb, endpoint, config, CODE_FRAGMENTATION_NEEDED, mtu as u16)?;
    Ok(Verdict::Redirected(Reason::TooBig, verdict))
}

/// Tells a container that nobody has the destination of its packet: "host unreachable". Without
/// it, connections would hang until they time out. `drop` counts and records the packet before it
/// becomes the answer.
///
/// # Errors
/// Returns `reason` if the packet gets no answer. It is not counted then.
#[inline(always)]
pub fn unreachable(
    skb: Skb,
    endpoint: &Endpoint,
    reason: Reason,
    drop: impl FnOnce(),
) -> Result<Verdict, Reason> {
    let config = maps::config().ok_or(reason)?;
    let until = maps::errors_until(skb.ifindex()).ok_or(reason)?;
    // SAFETY: array map values are aligned and stay valid while the program runs.
    let may = may_be_answered(skb)?
        && unsafe { maps::take_allowance(until, ERROR_COST, ERROR_ALLOWANCE) };
    if !may {
        return Err(reason);
    }
    drop();
    // Now it is counted: another error must not count it again.
    answer(skb, endpoint, config, CODE_HOST_UNREACHABLE, 0)
        .map(Verdict::HandedOn)
        .or(Ok(Verdict::HandedOn(skb.drop())))
}

/// Turns the packet into the error and redirects it to the container.
#[inline(always)]
fn answer(
    skb: Skb,
    endpoint: &Endpoint,
    config: &Config,
    code: u8,
    mtu: u16,
) -> Result<i64, Reason> {
    let (Some(source), Some(destination)) = (config.node.to_v4(), endpoint.address.to_v4()) else {
        return Err(Reason::TooBigDropped);
    };
    resize(skb, (ETHERNET_LEN + PULLED_LEN + ANSWER_LEN) as u32)?;
    let original = at::<[u32; QUOTE_LEN / 4]>(skb, ETHERNET_LEN)?;
    let quote =
        at::<[u32; QUOTE_LEN / 4]>(skb, ETHERNET_LEN + PULLED_LEN + ANSWER_LEN - QUOTE_LEN)?;
    let mut word = 0;
    while word < QUOTE_LEN / 4 {
        // SAFETY: `at` has checked the bounds.
        unsafe { (*quote)[word] = (*original)[word] };
        word += 1;
    }
    adjust_room(skb, -(PULLED_LEN as i32))?;

    skb.set_ethernet(&endpoint.mac, &endpoint.gateway_mac)?;
    let ip = at::<Ipv4>(skb, ETHERNET_LEN)?;
    let mut header = Ipv4 {
        version_ihl: 0x45,
        tos: 0,
        total_len_be: (ANSWER_LEN as u16).to_be(),
        id_be: 0,
        fragment_be: 0,
        ttl: 64,
        protocol: PROTOCOL_ICMP,
        checksum: 0,
        source: u32::from_ne_bytes(source),
        destination: u32::from_ne_bytes(destination),
    };
    header.checksum = ipv4_checksum(&header);
    // SAFETY: `at` has checked the bounds.
    unsafe { *ip = header };
    const MESSAGE_LEN: usize = size_of::<Icmp>() + QUOTE_LEN;
    let message = at::<[u8; MESSAGE_LEN]>(skb, ETHERNET_LEN + IPV4_LEN)?;
    let icmp = message.cast::<Icmp>();
    // SAFETY: `at` has checked the bounds, also for the helper.
    unsafe {
        *icmp = Icmp { kind: TYPE_UNREACHABLE, code, checksum: 0, unused: 0, mtu_be: mtu.to_be() };
        let sum = bpf_csum_diff(core::ptr::null_mut(), 0, message.cast(), MESSAGE_LEN as u32, 0);
        (*icmp).checksum = !fold(sum as u64);
    }
    Ok(redirect_to_container(skb, skb.ifindex()))
}

/// Returns true if RFC 1122 section 3.2.2 allows an answer: not to an ICMP error, and not to any
/// fragment but the first.
#[inline(always)]
fn may_be_answered(skb: Skb) -> Result<bool, Reason> {
    let ip = at::<Ipv4>(skb, ETHERNET_LEN)?;
    // SAFETY: `at` has checked the bounds.
    let (fragment, protocol, header) =
        unsafe { (u16::from_be((*ip).fragment_be), (*ip).protocol, (*ip).header_len()) };
    if fragment & FRAGMENT_OFFSET != 0 {
        return Ok(false);
    }
    if protocol != PROTOCOL_ICMP {
        return Ok(true);
    }
    skb.linearize(ETHERNET_LEN as u32 + header + 2)?;
    let offset = core::hint::black_box(u64::from(header)) & 0x3c;
    // SAFETY: `at` has checked the bounds.
    let [kind, _] = unsafe { *at::<[u8; 2]>(skb, ETHERNET_LEN + offset as usize)? };
    Ok(matches!(kind, TYPE_ECHO | TYPE_ECHO_REPLY))
}
