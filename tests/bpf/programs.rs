//! The programs under BPF_PROG_TEST_RUN: every path, every reason, TC and XDP, IPv4 and IPv6 underlays. Needs root.

#[path = "programs/containers.rs"]
mod containers;
#[path = "programs/opening.rs"]
mod opening;
#[path = "programs/packet.rs"]
mod packet;
#[path = "programs/sealing.rs"]
mod sealing;
#[path = "programs/world.rs"]
mod world;

/// What the kernel's verifier spends on each program.
#[test]
fn every_program_fits_the_verifier_budget() {
    const BUDGET: u32 = 60_000;
    for debug in [0, 1] {
        let ebpf = world::load(debug);
        let mut names = Vec::new();
        for (name, program) in ebpf.programs() {
            let verified = program
                .info()
                .expect("program information")
                .verified_instruction_count()
                .expect("the kernel (5.16 and later) says so");
            eprintln!("{name} (debug {debug}): {verified} instructions verified");
            assert!(verified <= BUDGET, "{name} takes {verified} verified instructions");
            names.push(name.to_owned());
        }
        names.sort();
        assert_eq!(names, ["aead_check", "from_container", "from_underlay", "from_underlay_xdp", "seal"]);
    }
}
