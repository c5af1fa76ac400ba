//! Fuzzes the input of `overnode monitor`: records of dropped packets, which anyone can send, and
//! the events made from them.

use overnode_daemon::api::{DroppedPacket, EventKind, MonitorEvent};
use overnode_daemon::monitor::decode::{Seen, record};
use overnode_ebpf::map::{
    DROPPED_LEN, PROGRAM_FROM_BULK, PROGRAM_FROM_CONTAINER, PROGRAM_FROM_UNDERLAY,
    PROGRAM_FROM_UNDERLAY_XDP, PROGRAM_SEAL, PROGRAM_TO_CONTAINER, VLAN_PRESENT,
};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::Relay;
use overnode_types::text::is_harmless;

use super::input::Input;

const PROGRAMS: [u32; 6] = [
    PROGRAM_FROM_CONTAINER,
    PROGRAM_SEAL,
    PROGRAM_FROM_UNDERLAY,
    PROGRAM_FROM_UNDERLAY_XDP,
    PROGRAM_FROM_BULK,
    PROGRAM_TO_CONTAINER,
];
/// Length in bytes of a record's header.
const HEADER: usize = 32;
/// Upper limit in bytes for the JSON of one packet's headers.
const LONGEST: usize = 1500;

/// Runs one input. The first byte selects the type of the rest.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input(data);
    match input.byte() {
        0 => check(input.0),
        1 => {
            let (reason, program) = (usize::from(input.byte()), usize::from(input.byte()));
            let (vlan, more) = (input.short(), u32::from(input.byte()));
            let program = PROGRAMS[program % PROGRAMS.len()];
            let reason = Reason::ALL[reason % Reason::ALL.len()];
            let vlan = if vlan == 0 { 0 } else { VLAN_PRESENT | u32::from(vlan) };
            let packet = &input.0[..input.0.len().min(DROPPED_LEN)];
            check(&made(reason as u32, program, vlan, packet, more));
        }
        2 => event(input.0),
        _ => {}
    }
}

fn made(reason: u32, program: u32, vlan: u32, packet: &[u8], more: u32) -> Vec<u8> {
    let len = packet.len() as u32;
    let words = [reason, program, 3, len + more, len, vlan];
    let mut bytes = 5_u64.to_ne_bytes().to_vec();
    bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
    bytes.extend(packet);
    // The ring buffer's records all have the same length.
    bytes.resize(HEADER + DROPPED_LEN, 0xaa);
    bytes
}

/// Checks that a record yields only headers, only harmless text, and nothing beyond the captured
/// bytes.
fn check(bytes: &[u8]) {
    let Some(seen) = record(bytes) else { return };
    let captured = bytes[24..28].try_into().map(u32::from_ne_bytes).expect("four bytes") as usize;
    assert!(captured <= DROPPED_LEN && HEADER + captured <= bytes.len());
    let mut other = bytes.to_vec();
    other[HEADER + captured..].iter_mut().for_each(|byte| *byte ^= 0xff);
    assert_eq!(record(&other).as_ref(), Some(&seen), "bytes beyond the captured ones were read");

    let packet = packet(&seen);
    let event = MonitorEvent { unix_milliseconds: 1, what: EventKind::Drop(Box::new(packet)) };
    let line = serde_json::to_string(&event).expect("an event can be written");
    assert!(
        line.len() < LONGEST && line.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' '),
        "{line}"
    );
    assert_eq!(serde_json::from_str::<MonitorEvent>(&line).expect("an event can be read"), event);
}

fn packet(seen: &Seen) -> DroppedPacket {
    DroppedPacket {
        reason: seen.reason.as_str().to_owned(),
        program: seen.program,
        interface: None,
        bytes: seen.len,
        container: None,
        peer: None,
        names: Default::default(),
        headers: seen.headers.clone(),
    }
}

/// Checks that an event that can be read is written in a form that reads back as the same event.
fn event(bytes: &[u8]) {
    let Ok(event) = serde_json::from_slice::<MonitorEvent>(bytes) else { return };
    if event.what == EventKind::Unknown {
        return;
    }
    let line = serde_json::to_string(&event).expect("a parsed event can be written");
    assert!(!line.contains('\n'), "an event contains a line break");
    let again = serde_json::from_str::<MonitorEvent>(&line);
    assert_eq!(again.unwrap_or_else(|error| panic!("{line}: {error}")), event);
    for reason in overnode_daemon::monitor::drop_reasons() {
        assert!(reason.chars().all(is_harmless));
    }
}

pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let ethernet = |kind: [u8; 2], rest: &[u8]| [&[2; 12], &kind[..], rest].concat();
    let mut udp = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 40, 0, 1, 10, 42, 0, 1];
    udp.extend([0x1a, 0x80, 0x1a, 0x80, 0, 8, 0, 0]);
    let relayed = [
        &udp[..],
        &Relay { hops: 3, destination: 1, source: 2, previous: 3 }.to_bytes(),
        &[4, 0, 0, 0],
        &[7; 12],
        &udp,
    ]
    .concat();
    let sealed = [&udp[..], &[4, 0, 0, 0], &[7; 12], &udp].concat();
    let six = [&[0x60, 0, 0, 0, 0, 8, 17, 64], &[0xfd; 32][..], &udp[20..]].concat();
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend([2; 20]);
    let seed = |reason: Reason, program: u8, vlan: u16, packet: &[u8]| {
        let number = Reason::ALL.iter().position(|known| *known == reason).expect("a reason") as u8;
        [&[1, number, program], &vlan.to_le_bytes()[..], &[9], packet].concat()
    };
    let tagged = [&[0, 5, 8, 0], &udp[..]].concat();
    let whole = made(Reason::Spoofed as u32, PROGRAM_SEAL, 0, &ethernet([8, 0], &udp), 0);
    vec![
        ("spoofed", seed(Reason::Spoofed, 0, 0, &ethernet([8, 0], &udp))),
        ("spoofed-arp", seed(Reason::Spoofed, 0, 0, &ethernet([8, 6], &arp))),
        ("tagged", seed(Reason::Spoofed, 0, 0, &ethernet([0x81, 0], &tagged))),
        ("six", seed(Reason::Spoofed, 0, 7, &ethernet([0x86, 0xdd], &six))),
        ("no-session", seed(Reason::NoSession, 1, 0, &ethernet([8, 0], &udp))),
        ("opened", seed(Reason::ForeignSource, 2, 0, &ethernet([8, 0], &sealed))),
        ("relayed", seed(Reason::NotHere, 3, 0, &ethernet([8, 0], &relayed))),
        ("bulk", seed(Reason::NotHere, 4, 0, &ethernet([8, 0], &udp))),
        ("record", [vec![0], whole].concat()),
        (
            "event",
            b"\x02{\"unix_milliseconds\":1,\"event\":\"connected\",\"peer\":{\"id\":2},\
              \"remote\":\"192.0.2.1:1\"}"
                .to_vec(),
        ),
        (
            "problem",
            b"\x02{\"unix_milliseconds\":1,\"event\":\"problem\",\"problem\":\"x\"}".to_vec(),
        ),
    ]
}
