use super::*;

#[test]
fn the_first_answer_makes_a_new_path_alive_within_a_round_trip() {
    let mut world = World::pair(1);
    assert_eq!(world.is_alive(), (false, false));
    world.run(ms(25));
    assert_eq!(world.is_alive(), (true, true));
    let state = world.state(A, B);
    assert!(state.rtt.is_some_and(|rtt| (ms(20)..=ms(22)).contains(&rtt)), "{state:?}");
    assert_eq!((state.rtt, state.loss, state.last_error), (state.rtt_min, 0.0, None));
}

#[test]
fn a_path_that_opens_in_its_first_seconds_is_found_at_once() {
    let mut world = World::pair(2);
    world.set_both(DEAD);
    world.run(ms(4000));
    world.set_both(GOOD);
    assert!(world.until(true, secs(1)) <= ms(140));
    world.run(secs(10));
    assert!(world.state(A, B).loss < 0.05, "probes lost before the path opened do not count");
}

#[test]
fn a_path_that_dies_in_both_directions_is_dead_within_two_seconds() {
    let mut slowest = Duration::ZERO;
    let mut fastest = Duration::MAX;
    for seed in 0..50 {
        let mut world = World::pair(seed);
        world.run(ms(5000 + seed * 13));
        world.set_both(DEAD);
        let time = world.until(false, secs(3));
        slowest = slowest.max(time);
        fastest = fastest.min(time);
        let state = world.state(A, B);
        assert_eq!(state.last_error.map(|(failpoint, _)| failpoint), Some(Fault::Silent));
    }
    assert!(fastest >= ms(1390) && slowest <= ms(2000), "{fastest:?} to {slowest:?}");
}

#[test]
fn a_path_dead_in_one_direction_is_dead_at_both_ends_in_two_seconds() {
    for seed in 0..50 {
        let mut world = World::pair(seed);
        world.run(ms(5000 + seed * 13));
        let (from, to) = if seed % 2 == 0 { (A, B) } else { (B, A) };
        world.set(from, to, DEAD);
        assert!(world.until(false, secs(3)) <= secs(2));
        world.run(secs(70));
        assert_eq!(world.is_alive(), (false, false));
        assert_eq!(world.state(A, B).loss, 1.0);
    }
}

#[test]
fn a_path_that_heals_is_alive_within_a_second_with_a_fresh_loss_rate() {
    for seed in 0..20 {
        let mut world = World::pair(seed);
        world.run(secs(5));
        world.set_both(DEAD);
        world.run(secs(60));
        assert_eq!(world.is_alive(), (false, false));
        world.set_both(GOOD);
        let time = world.until(true, secs(3));
        assert!(time <= secs(1), "{time:?}");
        world.run(secs(10));
        assert!(world.state(A, B).loss < 0.05);
    }
}

#[test]
fn one_or_two_answers_do_not_revive_a_dead_path() {
    let mut world = World::pair(3);
    world.run(secs(5));
    world.set_both(DEAD);
    world.run(secs(20));
    world.changes.clear();
    let mut heard = 0;
    // Fewer than three requests fit into a gap of this length.
    for _ in 0..20 {
        let before = world.state(A, B).last_heard;
        world.set_both(GOOD);
        world.run(ms(130));
        world.set_both(DEAD);
        world.run(secs(3));
        heard += u32::from(world.state(A, B).last_heard != before);
    }
    assert!(heard > 2, "{heard}");
    assert!(world.changes.is_empty(), "{:?}", world.changes);
}

#[test]
fn losing_a_third_of_all_packets_does_not_kill_a_path() {
    for (seed, back) in [(1, 0.0), (2, 0.3), (3, 0.3), (4, 0.3)] {
        let mut world = World::pair(seed);
        world.run(secs(1));
        world.set(A, B, Link { loss: 0.3, ..GOOD });
        world.set(B, A, Link { loss: back, ..GOOD });
        world.run(secs(3000));
        let deaths = world.changes.iter().filter(|(_, _, _, state)| !state.alive).count();
        assert_eq!(deaths, 0, "seed {seed}");
        let (loss, true_loss) = (world.state(A, B).loss, 1.0 - 0.7 * (1.0 - back) as f32);
        assert!((loss - true_loss).abs() < 0.2, "measured a loss of {loss} instead of {true_loss}");
    }
}

#[test]
fn a_path_that_flaps_is_held_down_longer_each_time() {
    let mut world = World::pair(4);
    world.run(secs(5));
    for _ in 0..60 {
        world.set_both(DEAD);
        world.run(secs(5));
        world.set_both(GOOD);
        world.run(secs(5));
    }
    let lives = world.changes.iter().filter(|(_, at, _, state)| *at == A && state.alive).count();
    assert!((4..=7).contains(&lives), "came alive {lives} times in 60 periods");
    let time = world.until(true, secs(31));
    assert!(time < secs(31), "{time:?}");
    // The path has been steady since, so the next death counts as the first one again.
    world.run(secs(70));
    world.set_both(DEAD);
    world.run(secs(5));
    world.set_both(GOOD);
    assert!(world.until(true, secs(3)) <= secs(1));
}

#[test]
fn the_hold_down_time_is_at_most_half_a_minute() {
    let mut world = World::pair(5);
    world.run(secs(5));
    for _ in 0..12 {
        world.set_both(DEAD);
        world.run(secs(5));
        world.set_both(GOOD);
        assert!(world.until(true, secs(32)) <= secs(32));
    }
    world.set_both(DEAD);
    world.run(secs(5));
    world.set_both(GOOD);
    let time = world.until(true, secs(32));
    assert!(time >= secs(30) && time <= secs(32), "{time:?}");
}

#[test]
fn a_stalled_daemon_does_not_take_its_own_silence_for_its_peers() {
    let mut world = World::pair(6);
    world.run(secs(5));
    // Nothing is polled for four seconds. Then the timer fires before the answers are read.
    world.now += secs(4);
    let now = world.now;
    for paths in world.nodes.values_mut() {
        paths.handle_timeout(now);
    }
    world.run(secs(10));
    // The same when some answers were already missing.
    world.set_both(DEAD);
    world.run(ms(1350));
    world.set_both(GOOD);
    world.now += secs(4);
    let now = world.now;
    for paths in world.nodes.values_mut() {
        paths.handle_timeout(now);
    }
    world.run(secs(10));
    assert!(world.changes.iter().all(|(_, _, _, state)| state.alive), "{:?}", world.changes);
}

#[test]
fn a_slow_path_is_alive_and_measured() {
    let mut world = World::pair(7);
    world.set_both(Link { delay: ms(800), jitter: ms(50), ..GOOD });
    world.run(secs(60));
    assert_eq!(world.is_alive(), (true, true));
    assert!(world.changes.iter().all(|(_, _, _, state)| state.alive));
    let state = world.state(A, B);
    assert!(state.rtt.is_some_and(|rtt| (ms(1600)..=ms(1700)).contains(&rtt)), "{state:?}");
    assert_eq!(state.loss, 0.0);
}

#[test]
fn reordered_answers_count() {
    let mut world = World::pair(8);
    world.set_both(Link { delay: ms(20), jitter: ms(400), ..GOOD });
    world.run(secs(30));
    world.set_both(DEAD);
    world.run(secs(10));
    world.set_both(Link { delay: ms(20), jitter: ms(400), ..GOOD });
    assert!(world.until(true, secs(4)) <= secs(3));
    world.run(secs(30));
    assert_eq!(world.state(A, B).loss, 0.0);
}
