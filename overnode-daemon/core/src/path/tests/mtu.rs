use super::super::mtu::{BUSY_CHECK_INTERVAL, CHECK_INTERVAL, FLOOR, PRECISION, RAISE_INTERVAL};
use super::*;

fn size(bytes: &[u8]) -> u32 {
    bytes.len() as u32 + ENCAP_LEN
}

fn sizes_of(world: &World) -> Vec<u32> {
    world.tap.iter().map(|(_, bytes)| size(bytes)).filter(|size| *size > SMALLEST).collect()
}

fn narrow(world: &mut World, carries: u32) {
    world.set(A, B, Link { carries, ..GOOD });
}

fn assert_found(world: &World, carries: u32) {
    let state = world.state(A, B);
    assert!(
        state.mtu <= carries && state.mtu + PRECISION > carries,
        "{state:?} on a path that carries {carries}"
    );
    assert!(state.mtu_confirmed);
}

#[test]
fn the_interface_mtu_is_confirmed_by_one_probe() {
    for largest in [1220, 1440, 8940] {
        let mut world = World::new(1, 2, largest);
        world.run(secs(1));
        let state = world.state(A, B);
        assert_eq!((state.mtu, state.mtu_confirmed), (largest, true));
        assert_eq!(sizes_of(&world), [largest]);
        assert_eq!(world.changes.len(), 2, "the MTU never changes");
        world.tap.clear();
        world.run(CHECK_INTERVAL * 10);
        let checks = sizes_of(&world);
        assert!(checks.len() == 9 || checks.len() == 10, "{checks:?}");
        assert!(checks.iter().all(|size| *size == largest));
    }
}

#[test]
fn a_smaller_path_mtu_is_found_to_within_eight_bytes() {
    let paths = [
        (1440, 1380),
        (1440, 1240),
        (1440, 1201),
        (1440, 900),
        (8940, 1440),
        (8940, 1193),
        (8940, 8000),
    ];
    for (largest, carries) in
        paths.into_iter().chain([(1440, FLOOR), (65000, 1440), (65000, 20000)])
    {
        let mut world = World::new(2, 2, largest);
        narrow(&mut world, carries);
        world.run(secs(1));
        assert!(
            world.state(A, B).mtu <= carries.max(1200),
            "a size that fails is not used for long"
        );
        world.run(secs(12));
        assert_found(&world, carries);
        let back = world.state(B, A);
        assert_eq!(
            (back.mtu, back.mtu_confirmed),
            (largest, true),
            "the other direction is independent"
        );
        assert!(world.changes.iter().all(|(_, _, _, state)| state.alive));
    }
}

#[test]
fn a_path_below_the_floor_is_reported_and_stays_alive() {
    let mut world = World::pair(3);
    narrow(&mut world, 300);
    world.run(secs(120));
    let state = world.state(A, B);
    assert_eq!((state.alive, state.mtu, state.mtu_confirmed), (true, FLOOR, false));
    assert_eq!(state.last_error.map(|(failpoint, _)| failpoint), Some(Fault::TooLarge(FLOOR)));
}

#[test]
fn a_black_hole_is_found_by_the_next_check_and_heals_with_the_next_raise() {
    for (largest, carries) in [(1440, 1240), (8940, 1440), (8940, 1240), (1240, 1220)] {
        let mut world = World::new(4, 2, largest);
        world.run(secs(45));
        narrow(&mut world, carries);
        world.run(CHECK_INTERVAL + secs(1));
        assert!(world.state(A, B).mtu <= carries, "{:?}", world.state(A, B));
        assert_eq!(
            world.state(A, B).last_error.map(|(failpoint, _)| failpoint),
            Some(Fault::TooLarge(largest))
        );
        world.run(secs(9));
        assert_found(&world, carries);
        narrow(&mut world, u32::MAX);
        world.run(secs(60));
        assert_found(&world, carries);
        world.run(RAISE_INTERVAL);
        assert_eq!(world.state(A, B).mtu, largest);
        assert!(world.state(A, B).mtu_confirmed);
    }
}

#[test]
fn a_black_hole_on_a_busy_path_is_found_sooner() {
    let mut world = World::pair(13);
    world.run(secs(45));
    let now = world.now;
    world.nodes.get_mut(&A).unwrap().set_busy(B, true, now);
    world.run(secs(20));
    narrow(&mut world, 1240);
    world.run(BUSY_CHECK_INTERVAL + secs(1));
    assert!(world.state(A, B).mtu <= 1240, "{:?}", world.state(A, B));
    world.run(secs(9));
    assert_found(&world, 1240);
    // The same when they begin to exchange packets after the black hole has opened.
    let mut world = World::pair(14);
    world.run(secs(32));
    narrow(&mut world, 1240);
    let now = world.now;
    world.nodes.get_mut(&A).unwrap().set_busy(B, true, now);
    world.run(BUSY_CHECK_INTERVAL + secs(1));
    assert!(world.state(A, B).mtu <= 1240, "{:?}", world.state(A, B));
    // There are few probes, and the long interval applies again afterwards.
    let now = world.now;
    world.nodes.get_mut(&A).unwrap().set_busy(B, false, now);
    world.run(secs(60));
    world.tap.clear();
    world.run(CHECK_INTERVAL * 4);
    let checks = sizes_of(&world);
    assert!(checks.len() <= 8, "two nodes in four intervals: {checks:?}");
}

#[test]
fn a_suspicion_finds_a_black_hole_in_a_second() {
    let mut world = World::pair(5);
    world.run(secs(45));
    narrow(&mut world, 1240);
    let now = world.now;
    world.nodes.get_mut(&A).unwrap().handle_suspicion(B, now);
    world.run(secs(1));
    assert!(world.state(A, B).mtu <= 1240);
}

#[test]
fn a_failed_raise_disturbs_nothing() {
    let mut world = World::pair(6);
    narrow(&mut world, 1300);
    world.run(secs(20));
    assert_found(&world, 1300);
    world.changes.clear();
    world.run(RAISE_INTERVAL * 3);
    assert_eq!(world.changes.len(), 0, "{:?}", world.changes);
    assert_found(&world, 1300);
}

#[test]
fn a_path_mtu_that_rises_partway_is_used() {
    let mut world = World::new(7, 2, 8940);
    narrow(&mut world, 1240);
    world.run(secs(20));
    narrow(&mut world, 4000);
    world.run(RAISE_INTERVAL + secs(20));
    assert_found(&world, 4000);
}

#[test]
fn a_healed_path_may_carry_less_or_more_than_before() {
    let mut world = World::pair(8);
    narrow(&mut world, 1300);
    world.run(secs(20));
    for carries in [1240, u32::MAX, 1400] {
        world.set_both(DEAD);
        world.run(secs(70));
        world.set_both(GOOD);
        narrow(&mut world, carries);
        world.run(secs(40));
        if carries == u32::MAX {
            assert_eq!(world.state(A, B).mtu, 1440);
        } else {
            assert_found(&world, carries);
        }
    }
}

#[test]
fn loss_is_not_taken_for_a_black_hole() {
    for seed in 0..10 {
        let mut world = World::pair(seed);
        world.run(secs(1));
        world.set_both(Link { loss: 0.2, ..GOOD });
        for (one, other) in [(A, B), (B, A)] {
            let now = world.now;
            world.nodes.get_mut(&one).unwrap().set_busy(other, seed % 2 == 0, now);
        }
        world.run(secs(1200));
        let changes = world.changes.iter().filter(|(_, _, _, state)| state.mtu != 1440).count();
        assert_eq!(changes, 0, "seed {seed}: {:?}", world.changes);
    }
}

#[test]
fn a_node_reports_what_all_of_its_live_paths_carry() {
    let mut world = World::new(15, 3, 1440);
    let c = node(3);
    for (from, to) in [(A, c), (c, A)] {
        world.set(from, to, DEAD);
    }
    world.run(secs(5));
    assert_eq!((world.state(A, B).carries, world.state(c, B).carries), (Some(1440), Some(1440)));
    world.set(B, c, Link { carries: 1300, ..GOOD });
    world.run(CHECK_INTERVAL + secs(10));
    let found = world.state(B, c).mtu;
    assert!((1293..=1300).contains(&found), "{found}");
    assert_eq!(world.state(A, B).carries, Some(found));
    assert_eq!(world.state(A, c).carries, None, "nothing was ever heard from it");
    // Dead paths do not count.
    for (from, to) in [(B, c), (c, B)] {
        world.set(from, to, DEAD);
    }
    world.run(secs(5));
    assert_eq!(world.state(A, B).carries, Some(1440));
}

#[test]
fn a_dead_path_says_nothing_about_its_mtu() {
    let mut world = World::pair(9);
    world.run(secs(29));
    world.set_both(DEAD);
    world.run(secs(120));
    assert_eq!(world.state(A, B).mtu, 1440);
    assert!(world.changes.iter().all(|(_, _, _, state)| state.mtu == 1440));
}

#[test]
fn a_changed_interface_mtu_is_followed() {
    let mut world = World::pair(10);
    world.run(secs(5));
    for (largest, carries, mtu) in
        [(1240, u32::MAX, 1240), (8940, u32::MAX, 8940), (1440, 1440, 1440)]
    {
        narrow(&mut world, carries);
        let now = world.now;
        world.nodes.get_mut(&A).unwrap().set_peer(B, largest, now);
        assert!(world.state(A, B).mtu <= largest);
        world.run(secs(1));
        assert_eq!((world.state(A, B).mtu, world.state(A, B).mtu_confirmed), (mtu, true));
    }
}

#[test]
fn a_probe_that_the_kernel_refuses_fails_at_once() {
    let mut world = World::pair(11);
    narrow(&mut world, 1300);
    for _ in 0..100 {
        world.run(ms(100));
        let now = world.now;
        let tap = std::mem::take(&mut world.tap);
        for (_, bytes) in tap {
            if size(&bytes) > 1300 {
                world.nodes.get_mut(&A).unwrap().handle_unsent(B, size(&bytes), now);
            }
        }
    }
    assert_found(&world, 1300);
    let now = world.now;
    world.nodes.get_mut(&A).unwrap().handle_unsent(B, SMALLEST, now);
    assert_eq!(world.state(A, B).last_error, Some((Fault::Unsent, now)));
}

/// Lets the test receive A's requests. Returns the large and the small probe that A sends at `now`.
fn asked(paths: &mut Paths, now: Instant) -> (Option<Probe>, Option<Probe>) {
    paths.handle_timeout(now);
    let (mut large, mut small) = (None, None);
    while let Some(action) = paths.poll_action() {
        if let Action::Send { bytes, .. } = action {
            let probe = Probe::decode(&bytes, size(&bytes)).unwrap();
            if probe.size > SMALLEST { large = Some(probe) } else { small = Some(probe) }
        }
    }
    (large, small)
}

fn answer(paths: &mut Paths, request: Probe, seen: u32, now: Instant) {
    let answer = Probe { kind: probe::Kind::Answer, size: SMALLEST, seen, ..request };
    paths.handle_probe(B, &answer.encode(), SMALLEST, now);
}

#[test]
fn a_lost_answer_is_replaced_by_a_later_one_but_not_by_an_earlier_one() {
    let mut now = Instant::now();
    let mut paths = Paths::new(StdRng::seed_from_u64(12));
    paths.set_peer(B, 1440, now);
    let (_, small) = asked(&mut paths, now);
    answer(&mut paths, small.unwrap(), 0, now);
    let (large, small) = asked(&mut paths, now);
    assert_eq!(large.map(|probe| probe.size), Some(1440));
    answer(&mut paths, small.unwrap(), 1432, now);
    assert!(!paths.state(B).unwrap().mtu_confirmed, "the size seen is smaller than the size sent");

    now += ms(100);
    let (_, small) = asked(&mut paths, now);
    answer(&mut paths, small.unwrap(), 1440, now);
    assert!(paths.state(B).unwrap().mtu_confirmed);

    // The black hole opens at once. Sizes that the other side saw before prove nothing.
    now += ms(100);
    paths.handle_suspicion(B, now);
    for _ in 0..40 {
        let (_, small) = asked(&mut paths, now);
        if let Some(small) = small {
            answer(&mut paths, small, 1440, now);
        }
        now += ms(20);
    }
    assert!(paths.state(B).unwrap().mtu < 1440);
}
