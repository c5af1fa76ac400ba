//! Tests of the object: its cost for the verifier, its stack depth and its log.

use std::collections::BTreeMap;

use aya::maps::RingBuf;
use overnode_ebpf::reason::Reason;

use crate::packet::{from_container, ipv4};
use crate::world::{self, NEIGHBOUR, REMOTE, Underlay, World};

/// Checks the number of instructions that the kernel's verifier processes for each program.
#[test]
fn every_program_fits_the_verifier_budget() {
    // A tenth of the kernel's limit. The first MAC of handshakes takes a third of it, because its
    // rounds are unrolled and verified once for each state that a call arrives with.
    const BUDGET: u32 = 100_000;
    for debug in [0, 1] {
        let ebpf = world::load(debug, world::ALL);
        let mut names = Vec::new();
        for (name, program) in ebpf.programs() {
            let verified = program
                .info()
                .expect("program information")
                .verified_instruction_count()
                .expect("Linux 5.16 or later");
            eprintln!("{name} (debug {debug}): {verified} instructions verified");
            assert!(verified <= BUDGET, "{name} takes {verified} verified instructions");
            names.push(name.to_owned());
        }
        names.sort();
        assert_eq!(
            names,
            [
                "aead_check",
                "from_bulk",
                "from_container",
                "from_underlay",
                "from_underlay_xdp",
                "resolver_connect",
                "resolver_getpeername",
                "resolver_recvmsg",
                "resolver_sendmsg",
                "seal",
                "to_container"
            ]
        );
    }
}

/// Kernels before 6.2 round every frame up to 32 bytes and limit the sum over a call chain to 512
/// bytes. Chains here are two frames long: a program, and one function that it calls directly or
/// through `bpf_loop`.
#[test]
fn two_frames_fit_the_stack_of_old_kernels() {
    const BUDGET: u64 = 450;
    let frames = stack_frames(overnode_daemon::PROGRAMS);
    let entries = [
        "from_bulk",
        "from_container",
        "seal",
        "from_underlay",
        "from_underlay_xdp",
        "to_container",
        "resolver_connect",
        "resolver_sendmsg",
        "resolver_recvmsg",
        "resolver_getpeername",
        "aead_check",
    ];
    let deepest = |entry: bool| {
        frames
            .iter()
            .filter(|(name, _)| entries.contains(&name.as_str()) == entry)
            .max_by_key(|(_, frame)| **frame)
            .expect("functions")
    };
    let (entry, callee) = (deepest(true), deepest(false));
    eprintln!("{entry:?} calls {callee:?}");
    assert!(*entry.1 > 0 && *callee.1 > 0, "no stack frames found: {frames:?}");
    let sum = entry.1.next_multiple_of(32) + callee.1.next_multiple_of(32);
    assert!(sum < BUDGET, "{entry:?} and {callee:?} take {sum} bytes");
}

/// Kernels before 6.10 reject a function that ends with a call, as a function that may panic does.
#[test]
fn no_function_may_panic() {
    let panicking: Vec<_> = stack_frames(overnode_daemon::PROGRAMS)
        .into_keys()
        .filter(|name| name.contains("panic"))
        .collect();
    assert!(panicking.is_empty(), "{panicking:?}");
}

/// Returns the stack depth in bytes of each function in a BPF object.
fn stack_frames(elf: &[u8]) -> BTreeMap<String, u64> {
    const FRAME_POINTER: u8 = 10;
    const STT_FUNC: u8 = 2;
    let u16_at = |at: usize| usize::from(u16::from_le_bytes([elf[at], elf[at + 1]]));
    let u32_at =
        |at: usize| u32::from_le_bytes(elf[at..at + 4].try_into().expect("four bytes")) as usize;
    let u64_at =
        |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().expect("eight bytes")) as usize;
    // ELF64 section headers. The symbol table's header leads to the names of the functions.
    let headers = u64_at(0x28);
    let section = |index: usize| headers + index * u16_at(0x3a);
    let offset = |index: usize| u64_at(section(index) + 0x18);
    let symbols =
        (0..u16_at(0x3c)).find(|index| u32_at(section(*index) + 4) == 2).expect("a symbol table");
    let names = offset(u32_at(section(symbols) + 0x28));
    let mut frames = BTreeMap::new();
    for symbol in (0..u64_at(section(symbols) + 0x20) / 24).map(|n| offset(symbols) + n * 24) {
        if elf[symbol + 4] & 0xf != STT_FUNC {
            continue;
        }
        let name = names + u32_at(symbol);
        let name =
            String::from_utf8_lossy(elf[name..].split(|byte| *byte == 0).next().expect("a name"));
        let code = offset(u16_at(symbol + 6)) + u64_at(symbol + 8);
        let mut deepest = 0;
        // Registers that hold a copy of the frame pointer, until something is added to them.
        let mut copies = [false; 16];
        for instruction in elf[code..code + u64_at(symbol + 16)].chunks_exact(8) {
            let (class, code) = (instruction[0] & 7, instruction[0]);
            let (destination, source) = (instruction[1] & 0xf, instruction[1] >> 4);
            let displacement = i64::from(i16::from_le_bytes([instruction[2], instruction[3]]));
            let immediate =
                i64::from(i32::from_le_bytes(instruction[4..8].try_into().expect("four bytes")));
            let reached = match (class, code) {
                // Loads, then stores.
                (1, _) if source == FRAME_POINTER => displacement,
                (2 | 3, _) if destination == FRAME_POINTER => displacement,
                // 64-bit addition of a constant.
                (_, 0x07) if copies[usize::from(destination)] => immediate,
                _ => 0,
            };
            copies[usize::from(destination)] = code == 0xbf && source == FRAME_POINTER;
            deepest = deepest.max(reached.min(0).unsigned_abs());
        }
        frames.insert(name.into_owned(), deepest);
    }
    frames
}

/// With debugging on, each drop adds a line to aya-log's ring buffer. Without it, no drop does.
#[test]
fn drops_are_logged_when_asked_for() {
    for debug in [0, 1] {
        let mut world = World::with_debug(Underlay::V4, debug);
        world.expect_drop(
            "from_container",
            &from_container(&ipv4(NEIGHBOUR, REMOTE, 100)),
            Reason::Spoofed,
        );
        let mut lines =
            RingBuf::try_from(world.ebpf.map_mut("AYA_LOGS").expect("AYA_LOGS")).expect("a ring");
        let line = lines.next().map(|line| String::from_utf8_lossy(&line).into_owned());
        match debug {
            0 => assert_eq!(line, None),
            _ => {
                let line = line.expect("a line");
                assert!(line.contains("from_container") && line.contains(" bytes"), "{line:?}");
            }
        }
        assert!(lines.next().is_none());
    }
}
