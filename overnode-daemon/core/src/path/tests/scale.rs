use super::*;

/// Runs one idle node with this number of peers, each of which answers at once. Returns the packets
/// and bytes that the node sends per second.
fn idle(peers: u16, busy: u16) -> (f64, f64) {
    let mut now = Instant::now();
    let mut paths = Paths::new(StdRng::seed_from_u64(9));
    for id in 1..=peers {
        paths.set_peer(node(id), 1440, now);
        paths.set_busy(node(id), id <= busy, now);
    }
    let mut sent = (0u64, 0u64);
    let mut run = |until: Instant, paths: &mut Paths, sent: &mut (u64, u64)| {
        while let Some(next) = paths.poll_timeout().filter(|next| *next <= until) {
            now = next;
            paths.handle_timeout(now);
            while let Some(action) = paths.poll_action() {
                if let Action::Send { to, bytes } = action {
                    let size = bytes.len() as u32 + ENCAP_LEN;
                    sent.0 += 1;
                    sent.1 += u64::from(size);
                    let request = Probe::decode(&bytes, size).unwrap();
                    let answer = Probe { kind: probe::Kind::Answer, size: SMALLEST, ..request };
                    paths.handle_probe(to, &answer.encode(), SMALLEST, now);
                }
            }
        }
        now = until;
    };
    let start = Instant::now() + secs(10);
    run(start, &mut paths, &mut sent);
    assert!(paths.states().all(|(_, state)| state.alive && state.mtu_confirmed));
    sent = (0, 0);
    run(start + secs(60), &mut paths, &mut sent);
    (sent.0 as f64 / 60.0, sent.1 as f64 / 60.0)
}

#[test]
fn idle_cost_is_small_and_linear() {
    let (packets, bytes) = idle(64, 0);
    assert!((120.0..140.0).contains(&packets), "64 peers: {packets}/s, {bytes} B/s");
    let (packets, bytes) = idle(300, 0);
    assert!(packets < 175.0 && bytes < 30_000.0, "300 peers: {packets}/s, {bytes} B/s");
    let (packets, bytes) = idle(300, 300);
    assert!(packets < 720.0 && bytes < 130_000.0, "300 busy peers: {packets}/s, {bytes} B/s");
    let (packets, _) = idle(1000, 10);
    assert!(packets < 600.0, "1000 peers: {packets}/s");
}

#[test]
fn among_many_paths_a_dead_busy_one_is_noticed_sooner_than_an_idle_one() {
    for (is_busy, limit) in [(true, secs(2)), (false, secs(4))] {
        let mut world = World::pair(3);
        let start = world.start;
        for paths in world.nodes.values_mut() {
            for id in 10..100 {
                paths.set_peer(node(id), 1440, start);
            }
        }
        world.run(secs(30));
        let now = world.now;
        for (at, of) in [(A, B), (B, A)] {
            world.nodes.get_mut(&at).unwrap().set_busy(of, is_busy, now);
        }
        world.run(secs(5));
        world.set_both(DEAD);
        let time = world.until(false, secs(6));
        assert!(time <= limit, "busy: {is_busy}, {time:?}");
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| {
        let mut world = World::new(seed, 5, 1440);
        world.set(A, B, Link { loss: 0.3, ..GOOD });
        world.run(secs(120));
        world.tap
    };
    assert!(run(1) == run(1));
    assert!(run(1) != run(2));
}
