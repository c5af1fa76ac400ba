//! From the underlay: open what a peer sent, and deliver it. TC and XDP run the same code.

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
use super::frame::{DataHeader, Frame, Ipv4, PROTOCOL_TCP, PROTOCOL_UDP, Udp, at};
use super::handshake::Place;
use super::outer::{self, Outer};
use super::{Sent, checks, cipher, handshake, inbox, maps, relay};

/// `None`: not a data message for this host.
pub fn run(frame: impl Frame) -> Result<Option<Sent>, Reason> {
    let Some(outer) = outer::parse(frame)? else {
        if inbox::put(frame).transpose()?.is_some() {
            return Ok(Some(Sent { counted: Some(Reason::BulkQueued), verdict: frame.consumed() }));
        }
        let Some(Place { offset, len }) = handshake::find(frame)? else { return Ok(None) };
        return handshake::admit(frame, offset, len).map(|()| None);
    };
    if frame.gso_size() != 0 {
        return Err(Reason::Offload);
    }
    if outer.is_relayed() && !relay::is_here(frame, &outer)? {
        // The programs for TC come after those for XDP, which cannot ask the kernel for the next
        // hop.
        return frame.skb().map(|skb| relay::pass_on(skb, &outer)).transpose();
    }
    if outer.is_relayed() && !is_data(frame, &outer)? {
        return handshake::admit(frame, outer.message(), outer.message_len()).map(|()| None);
    }
    frame.linearize_all()?;
    let now = maps::now();
    let (session, counter) = find_session(frame, &outer, now)?;
    // SAFETY: values of an array map are valid for the whole program, here and below.
    let index = unsafe { (*session).peer };
    let peer = maps::peer(index).ok_or(Reason::UnknownIndex)?;
    let text = (outer.message() + DATA_HEADER_LEN) as u32;
    // SAFETY: as above.
    unsafe {
        Window::check(&raw const (*session).window, counter)?;
        cipher::open(frame, &raw const (*session).rx_key, counter, text, outer.text_len())?;
        Window::accept(&raw mut (*session).window, counter)?;
    }
    confirm(session, peer);
    if !outer.is_relayed() {
        // Answers go to where the last authenticated message came from (whitepaper section 6.5).
        outer.update(frame, peer)?;
    }
    if outer.text_len() == 0 {
        account(peer, now, 0);
        return Err(Reason::KeepaliveReceived);
    }
    let inner_len = inner_len(frame, &outer)?;
    let ip = at::<Ipv4>(frame, outer.message() + DATA_HEADER_LEN)?;
    // SAFETY: `at` has checked the bounds.
    let (source, destination) = unsafe { ((*ip).source, (*ip).destination) };
    let arriving = checks::arriving(index, source, destination);
    // Probes are no traffic of containers; what is refused is, as it keeps the path as busy.
    account(peer, now, if matches!(arriving, Ok(None)) { 0 } else { inner_len });
    match arriving? {
        Some(route) => deliver(frame, &outer, route, inner_len).map(Some),
        None => Err(probe(frame, &outer, peer, index, inner_len)?),
    }
}

/// True if a relayed message is a data message. Others are the daemon's.
#[inline(always)]
fn is_data(frame: impl Frame, outer: &Outer) -> Result<bool, Reason> {
    let header = at::<DataHeader>(frame, outer.message())?;
    // SAFETY: `at` has checked the bounds.
    Ok(unsafe { (*header).kind } == u32::from(TYPE_DATA).to_le())
}

/// Hands a probe to the daemon.
#[inline(always)]
fn probe(
    frame: impl Frame,
    outer: &Outer,
    peer: *mut Peer,
    index: u32,
    inner_len: u32,
) -> Result<Reason, Reason> {
    if outer.is_relayed() {
        // It says nothing about the straight path.
        return Err(Reason::NotHere);
    }
    let text = outer.message() + DATA_HEADER_LEN;
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
    // The ring is for the probes of all peers. SAFETY: values of an array map are valid for the
    // whole program.
    if !unsafe { maps::take_allowance(&raw mut (*peer).probed_until, PROBE_COST, PROBE_ALLOWANCE) }
    {
        return Err(Reason::ProbeFlood);
    }
    let Some(mut entry) = maps::reserve_probe() else { return Err(Reason::Helper) };
    let place = entry.as_mut_ptr();
    // SAFETY: the entry is this program's until it is submitted; `at` has checked the packet's
    // bounds.
    unsafe {
        (*place).peer = index;
        (*place).inner_len = inner_len;
        for word in 0..PROBE_LEN / 4 {
            (*place).payload[word] = (&raw const (*packet).payload[word]).read_volatile();
        }
    }
    entry.submit(0);
    Ok(Reason::ProbeReceived)
}

/// The part of a probe's packet that the daemon gets.
#[repr(C)]
struct ProbePacket {
    ip: Ipv4,
    udp: Udp,
    payload: [u32; PROBE_LEN / 4],
}

/// The session that a message belongs to, and the message's counter.
#[inline(always)]
fn find_session(frame: impl Frame, outer: &Outer, now: u64) -> Result<(*mut Session, u64), Reason> {
    let header = at::<DataHeader>(frame, outer.message())?;
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
    // SAFETY: values of an array map are valid for the whole program.
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

/// The first message under a session proves that the peer has its keys: from now on it seals.
#[inline(always)]
fn confirm(session: *mut Session, peer: *mut Peer) {
    // SAFETY: values of array maps are valid for the whole program. Only a session that still waits
    // is confirmed: the daemon may have withdrawn it meanwhile.
    unsafe {
        if (*session).state == SESSION_UNCONFIRMED
            && maps::compare_exchange(&raw mut (*session).state, SESSION_UNCONFIRMED, SESSION_LIVE)
        {
            (*peer).tx_slot = (*session).local_index & (SESSION_SLOTS - 1);
        }
    }
}

/// Length of the inner packet, padding excluded.
#[inline(always)]
fn inner_len(frame: impl Frame, outer: &Outer) -> Result<u32, Reason> {
    let ip = at::<Ipv4>(frame, outer.message() + DATA_HEADER_LEN)?;
    // SAFETY: `at` has checked the bounds.
    unsafe {
        match (*ip).version_ihl >> 4 {
            4 if outer.text_len() >= IPV4_LEN as u32 && (*ip).is_sane(outer.text_len()) => {
                Ok(u32::from(u16::from_be((*ip).total_len_be)))
            }
            6 => Err(Reason::Unsupported),
            _ => Err(Reason::Malformed),
        }
    }
}

#[inline(always)]
fn account(peer: *mut Peer, now: u64, inner_len: u32) {
    // SAFETY: values of an array map are valid for the whole program.
    unsafe {
        maps::fetch_add(&raw mut (*peer).rx_packets, 1);
        (*peer).last_rx_ns = now;
        if inner_len != 0 {
            maps::fetch_add(&raw mut (*peer).rx_bytes, u64::from(inner_len));
            (*peer).last_data_rx_ns = now;
        }
    }
}

/// Hands the inner packet to the container that it is for.
#[inline(always)]
fn deliver(
    frame: impl Frame,
    outer: &Outer,
    route: &Route,
    inner_len: u32,
) -> Result<Sent, Reason> {
    let text = outer.message() + DATA_HEADER_LEN;
    let ip = at::<Ipv4>(frame, text)?;
    // SAFETY: `at` has checked the bounds.
    let (version_ihl, tos, protocol) = unsafe { ((*ip).version_ihl, (*ip).tos, (*ip).protocol) };
    let (ifindex, is_host) = (route.target, route.kind == ROUTE_HOST);
    let endpoint = maps::endpoint(ifindex).ok_or(Reason::NotHere)?;

    let ecn = ecn_decapsulated(outer.ecn(), tos).ok_or(Reason::Congestion)?;
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
    frame.strip((text - ETHERNET_LEN) as u32, inner_len, outer.is_v6())?;
    frame.set_ethernet(&endpoint.mac, &endpoint.gateway_mac)?;
    // `bpf_redirect_peer` leads into other namespaces only.
    let by_host_end = is_host || protocol == PROTOCOL_TCP;
    Ok(Sent { counted: Some(Reason::Opened), verdict: frame.hand_over(ifindex, by_host_end) })
}
