//! Opens messages that arrive on the underlay and delivers their packets. TC and XDP run the same
//! code.

use overnode_ebpf::map::{
    PROBE_ALLOWANCE, PROBE_COST, Peer, ROUTE_HOST, Route, SESSION_FREE, SESSION_LIVE,
    SESSION_SLOTS, SESSION_UNCONFIRMED, Session,
};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::replay::Window;
use overnode_ebpf::wire::{
    DATA_HEADER_LEN, ETHERNET_LEN, IPV4_LEN, PROBE_LEN, PROBE_PORT, TYPE_DATA, ecn_decapsulated,
};

use super::checksum::fold;
use super::decap::{self, OuterHeaders};
use super::frame::{DataHeader, Frame, Ipv4, PROTOCOL_TCP, PROTOCOL_UDP, Udp, at};
use super::handshake::Place;
use super::{Verdict, checks, cipher, handshake, maps, receive_ring, relay};

/// Processes a packet. Passes on packets for other programs, and handshake messages that are
/// admitted.
pub fn run(frame: impl Frame) -> Result<Verdict, Reason> {
    let decap = match classify(frame)? {
        Packet::Data(decap) => decap,
        Packet::ForTheDaemon(place) => return handshake::admit(frame, place.offset, place.len),
        Packet::Done(verdict) => return Ok(verdict),
    };
    frame.linearize_all()?;
    let now = maps::now();
    let (session, counter) = find_session(frame, &decap, now)?;
    // SAFETY: array map values stay valid while the program runs, here and below.
    let index = unsafe { (*session).peer };
    let peer = maps::peer(index).ok_or(Reason::UnknownIndex)?;
    let text = (decap.message() + DATA_HEADER_LEN) as u32;
    // SAFETY: as above.
    unsafe {
        Window::check(&raw const (*session).window, counter)?;
        cipher::open(frame, &raw const (*session).rx_key, counter, text, decap.ciphertext_len())?;
        Window::accept(&raw mut (*session).window, counter)?;
    }
    confirm(session, peer);
    if !decap.is_relayed() {
        // Replies go to the source of the last authenticated message (whitepaper section 6.5).
        decap.update(frame, peer)?;
    }
    if decap.ciphertext_len() == 0 {
        account(peer, now, 0);
        return Ok(Verdict::Consumed(Reason::KeepaliveReceived));
    }
    let inner_len = inner_len(frame, &decap)?;
    let ip = at::<Ipv4>(frame, decap.message() + DATA_HEADER_LEN)?;
    // SAFETY: `at` has checked the bounds.
    let (source, destination) = unsafe { ((*ip).source, (*ip).destination) };
    let arriving = checks::arriving(index, source, destination);
    // Probes do not count as container traffic. Refused packets do, because they keep the path just
    // as busy.
    account(peer, now, if matches!(arriving, Ok(None)) { 0 } else { inner_len });
    match arriving? {
        Some(route) => deliver(frame, &decap, route, inner_len),
        None => probe(frame, &decap, peer, index, inner_len),
    }
}

/// What a packet on the underlay is.
enum Packet {
    /// A data message to open.
    Data(OuterHeaders),
    /// Another message for this node. There is one such variant, and so one call of
    /// [`handshake::admit`], because old kernels verify the callee once for each place that calls
    /// it.
    ForTheDaemon(Place),
    /// Nothing remains to be done.
    Done(Verdict),
}

#[inline(always)]
fn classify(frame: impl Frame) -> Result<Packet, Reason> {
    let Some(decap) = decap::parse(frame)? else {
        if receive_ring::put(frame).transpose()?.is_some() {
            return Ok(Packet::Done(Verdict::Consumed(Reason::BulkQueued)));
        }
        return Ok(match handshake::find(frame)? {
            Some(place) => Packet::ForTheDaemon(place),
            None => Packet::Done(Verdict::Pass),
        });
    };
    if frame.gso_size() != 0 {
        return Err(Reason::Offload);
    }
    if decap.is_relayed() && !relay::is_here(frame, &decap)? {
        // XDP cannot ask the kernel for the next hop, and leaves the message to the TC program,
        // which runs after it.
        return Ok(Packet::Done(match frame.skb() {
            Some(skb) => relay::pass_on(skb, &decap)?,
            None => Verdict::Pass,
        }));
    }
    if decap.is_relayed() && !is_data(frame, &decap)? {
        let place = Place { offset: decap.message(), len: decap.message_len() };
        return Ok(Packet::ForTheDaemon(place));
    }
    Ok(Packet::Data(decap))
}

/// Returns true if a relayed message is a data message. The daemon handles all others.
#[inline(always)]
fn is_data(frame: impl Frame, decap: &OuterHeaders) -> Result<bool, Reason> {
    let header = at::<DataHeader>(frame, decap.message())?;
    // SAFETY: `at` has checked the bounds.
    Ok(unsafe { (*header).kind } == u32::from(TYPE_DATA).to_le())
}

/// Hands a probe to the daemon.
#[inline(always)]
fn probe(
    frame: impl Frame,
    decap: &OuterHeaders,
    peer: *mut Peer,
    index: u32,
    inner_len: u32,
) -> Result<Verdict, Reason> {
    if decap.is_relayed() {
        // A relayed probe says nothing about the direct path.
        return Err(Reason::NotHere);
    }
    let text = decap.message() + DATA_HEADER_LEN;
    let packet = at::<ProbePacket>(frame, text)?;
    // SAFETY: `at` has checked the bounds.
    let sane = unsafe {
        (*packet).ip.version_ihl == 0x45
            && (*packet).ip.protocol == PROTOCOL_UDP
            && (*packet).udp.destination_be == PROBE_PORT.to_be()
    };
    if !sane || inner_len < size_of::<ProbePacket>() as u32 {
        return Err(Reason::NotHere);
    }
    // The peers share the ring, so each has an allowance. SAFETY: array map values stay valid while
    // the program runs.
    if !unsafe { maps::take_allowance(&raw mut (*peer).probed_until, PROBE_COST, PROBE_ALLOWANCE) }
    {
        return Err(Reason::ProbeFlood);
    }
    let Some(mut entry) = maps::reserve_probe() else { return Err(Reason::Helper) };
    let place = entry.as_mut_ptr();
    // SAFETY: this program owns the entry until it submits it; `at` has checked the packet's
    // bounds.
    unsafe {
        (*place).peer = index;
        (*place).inner_len = inner_len;
        for word in 0..PROBE_LEN / 4 {
            (*place).payload[word] = (&raw const (*packet).payload[word]).read_volatile();
        }
    }
    entry.submit(0);
    Ok(Verdict::Consumed(Reason::ProbeReceived))
}

/// The part of a probe that the daemon needs, from the IP header on.
#[repr(C)]
struct ProbePacket {
    ip: Ipv4,
    udp: Udp,
    payload: [u32; PROBE_LEN / 4],
}

/// Returns the session of a message and the message's counter.
#[inline(always)]
fn find_session(
    frame: impl Frame,
    decap: &OuterHeaders,
    now: u64,
) -> Result<(*mut Session, u64), Reason> {
    let header = at::<DataHeader>(frame, decap.message())?;
    // SAFETY: `at` has checked the bounds.
    let (kind, receiver, counter) = unsafe {
        (
            (*header).kind,
            u32::from_le((*header).receiver),
            u64::from(u32::from_le((*header).counter_low))
                | u64::from(u32::from_le((*header).counter_high)) << 32,
        )
    };
    if kind != u32::from(TYPE_DATA).to_le() {
        return Err(Reason::Malformed);
    }
    let session = maps::session(receiver & (SESSION_SLOTS - 1)).ok_or(Reason::UnknownIndex)?;
    // SAFETY: array map values stay valid while the program runs.
    unsafe {
        if (*session).state == SESSION_FREE || (*session).local_index != receiver {
            return Err(Reason::UnknownIndex);
        }
        if now >= (*session).expires_ns {
            return Err(Reason::Expired);
        }
    }
    Ok((session, counter))
}

/// Makes a session the sealing one if it was unconfirmed: the first message under it proves that
/// the peer has its keys.
#[inline(always)]
fn confirm(session: *mut Session, peer: *mut Peer) {
    // SAFETY: array map values stay valid while the program runs. Compare-and-swap, because the
    // daemon may have withdrawn the session in the meantime.
    unsafe {
        if (*session).state == SESSION_UNCONFIRMED
            && maps::compare_exchange(&raw mut (*session).state, SESSION_UNCONFIRMED, SESSION_LIVE)
        {
            (*peer).tx_slot = (*session).local_index & (SESSION_SLOTS - 1);
        }
    }
}

/// Returns the length of the inner packet in bytes, without padding.
#[inline(always)]
fn inner_len(frame: impl Frame, decap: &OuterHeaders) -> Result<u32, Reason> {
    let ip = at::<Ipv4>(frame, decap.message() + DATA_HEADER_LEN)?;
    // SAFETY: `at` has checked the bounds.
    unsafe {
        match (*ip).version_ihl >> 4 {
            4 if decap.ciphertext_len() >= IPV4_LEN as u32
                && (*ip).is_sane(decap.ciphertext_len()) =>
            {
                Ok(u32::from(u16::from_be((*ip).total_len_be)))
            }
            6 => Err(Reason::Unsupported),
            _ => Err(Reason::Malformed),
        }
    }
}

#[inline(always)]
fn account(peer: *mut Peer, now: u64, inner_len: u32) {
    // SAFETY: array map values stay valid while the program runs.
    unsafe {
        maps::fetch_add(&raw mut (*peer).rx_packets, 1);
        (*peer).last_rx_ns = now;
        if inner_len != 0 {
            maps::fetch_add(&raw mut (*peer).rx_bytes, u64::from(inner_len));
            (*peer).last_data_rx_ns = now;
        }
    }
}

/// Hands the inner packet to its destination: a container, or the host itself.
#[inline(always)]
fn deliver(
    frame: impl Frame,
    decap: &OuterHeaders,
    route: &Route,
    inner_len: u32,
) -> Result<Verdict, Reason> {
    let text = decap.message() + DATA_HEADER_LEN;
    let ip = at::<Ipv4>(frame, text)?;
    // SAFETY: `at` has checked the bounds.
    let (version_ihl, tos, protocol) = unsafe { ((*ip).version_ihl, (*ip).tos, (*ip).protocol) };
    let (ifindex, is_host) = (route.target, route.kind == ROUTE_HOST);
    let endpoint = maps::endpoint(ifindex).ok_or(Reason::NotHere)?;

    let ecn = ecn_decapsulated(decap.ecn(), tos).ok_or(Reason::Congestion)?;
    let marked = tos & !overnode_ebpf::wire::ECN_MASK | ecn;
    if marked != tos {
        let ip = at::<Ipv4>(frame, text)?;
        let before = u16::from_ne_bytes([version_ihl, tos]);
        let after = u16::from_ne_bytes([version_ihl, marked]);
        // SAFETY: `at` has checked the bounds.
        unsafe {
            (*ip).tos = marked;
            // RFC 1624, equation 3.
            let sum = u64::from(!(*ip).checksum) + u64::from(!before) + u64::from(after);
            (*ip).checksum = !fold(sum);
        }
    }
    frame.strip((text - ETHERNET_LEN) as u32, inner_len, decap.is_v6())?;
    frame.set_ethernet(&endpoint.mac, &endpoint.gateway_mac)?;
    // `bpf_redirect_peer` works only between namespaces.
    let by_host_end = is_host || protocol == PROTOCOL_TCP;
    Ok(Verdict::Redirected(Reason::Opened, frame.hand_over(ifindex, by_host_end)))
}
