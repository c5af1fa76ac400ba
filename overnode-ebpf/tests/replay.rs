//! Tests the replay window on the host: WireGuard's published cases, a naive model, and many
//! threads.

use std::cell::UnsafeCell;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use overnode_ebpf::reason::Reason;
use overnode_ebpf::replay::{WINDOW, Window};
use overnode_ebpf::wire::REJECT_AFTER_MESSAGES;
use proptest::prelude::*;

/// A window shared between threads.
struct Shared(UnsafeCell<Window>);

// SAFETY: a window is made for concurrent access, and it is accessed only through its functions.
unsafe impl Sync for Shared {}

impl Shared {
    fn new() -> Self {
        Self(UnsafeCell::new(Window::new()))
    }

    fn check(&self, counter: u64) -> Result<(), Reason> {
        // SAFETY: a live window that is accessed only through its functions.
        unsafe { Window::check(self.0.get(), counter) }
    }

    fn accept(&self, counter: u64) -> Result<(), Reason> {
        // SAFETY: as above.
        unsafe { Window::accept(self.0.get(), counter) }
    }

    /// Calls both `check` and `accept`. They must agree unless another thread interferes.
    #[track_caller]
    fn offer(&self, counter: u64) -> Result<(), Reason> {
        let expected = self.check(counter);
        let result = self.accept(counter);
        assert_eq!(expected, result, "check and accept disagree about {counter}");
        result
    }

    #[track_caller]
    fn takes(&self, counter: u64) {
        assert_eq!(self.offer(counter), Ok(()), "{counter} must be accepted");
    }

    #[track_caller]
    fn refuses(&self, counter: u64, why: Reason) {
        assert_eq!(self.offer(counter), Err(why), "{counter} must be refused");
    }
}

/// The smallest distance from the greatest counter that is refused.
const SPAN: u64 = WINDOW + 1;

/// The single cases of WireGuard's own test (drivers/net/wireguard/selftest/counter.c), in its
/// order.
#[test]
fn single_cases() {
    use Reason::{Exhausted, Replayed, TooOld};
    let window = Shared::new();
    window.takes(0);
    window.takes(1);
    window.refuses(1, Replayed);
    window.takes(9);
    window.takes(8);
    window.takes(7);
    window.refuses(7, Replayed);
    window.takes(SPAN);
    window.takes(SPAN - 1);
    window.refuses(SPAN - 1, Replayed);
    window.takes(SPAN - 2);
    window.takes(2);
    window.refuses(2, Replayed);
    window.takes(SPAN + 16);
    window.refuses(3, TooOld);
    window.refuses(SPAN + 16, Replayed);
    window.takes(SPAN * 4);
    window.takes(SPAN * 4 - (SPAN - 1));
    window.refuses(10, TooOld);
    window.refuses(SPAN * 4 - SPAN, TooOld);
    window.refuses(SPAN * 4 - (SPAN + 1), TooOld);
    window.takes(SPAN * 4 - (SPAN - 2));
    window.refuses(SPAN * 4 + 1 - SPAN, Replayed);
    window.refuses(0, TooOld);
    window.refuses(REJECT_AFTER_MESSAGES, Exhausted);
    window.takes(REJECT_AFTER_MESSAGES - 1);
    window.refuses(REJECT_AFTER_MESSAGES, Exhausted);
    window.refuses(REJECT_AFTER_MESSAGES - 1, Replayed);
    window.takes(REJECT_AFTER_MESSAGES - 2);
    window.refuses(REJECT_AFTER_MESSAGES + 1, Exhausted);
    window.refuses(REJECT_AFTER_MESSAGES + 2, Exhausted);
    window.refuses(u64::MAX, Exhausted);
    window.refuses(REJECT_AFTER_MESSAGES - 2, Replayed);
    window.takes(REJECT_AFTER_MESSAGES - 3);
    window.refuses(0, TooOld);
}

/// The same test's sweeps over whole windows.
#[test]
fn ascending() {
    let window = Shared::new();
    (1..=WINDOW).for_each(|counter| window.takes(counter));
    window.takes(0);
    window.refuses(0, Reason::Replayed);
}

#[test]
fn ascending_past_the_first() {
    let window = Shared::new();
    (2..=WINDOW + 1).for_each(|counter| window.takes(counter));
    window.takes(1);
    window.refuses(0, Reason::TooOld);
}

#[test]
fn descending() {
    let window = Shared::new();
    (0..=WINDOW).rev().for_each(|counter| window.takes(counter));
    (0..=WINDOW).rev().for_each(|counter| window.refuses(counter, Reason::Replayed));
}

#[test]
fn descending_past_the_first() {
    let window = Shared::new();
    (1..=WINDOW + 1).rev().for_each(|counter| window.takes(counter));
    window.refuses(0, Reason::TooOld);
}

#[test]
fn descending_then_one_ahead() {
    let window = Shared::new();
    (1..=WINDOW).rev().for_each(|counter| window.takes(counter));
    window.takes(WINDOW + 1);
    window.refuses(0, Reason::TooOld);
}

#[test]
fn descending_to_the_end_then_one_ahead() {
    let window = Shared::new();
    (1..=WINDOW).rev().for_each(|counter| window.takes(counter));
    window.takes(0);
    window.takes(WINDOW + 1);
}

/// Two counters at every distance around the sizes of the window and the ring, the later one first.
#[test]
fn distances() {
    for distance in (0..200).chain(8000..8500) {
        for base in
            [0, 1, 31, 32, 8191, 8192, (1 << 36) + 7, (1 << 37) - 5, 1 << 37, (1 << 37) + 8192]
        {
            let window = Shared::new();
            window.takes(base + distance);
            match distance {
                0 => window.refuses(base, Reason::Replayed),
                1..=WINDOW => window.takes(base),
                _ => window.refuses(base, Reason::TooOld),
            }
        }
    }
}

/// After a leap of 2^37, a word of the ring has the same tag as before. That may cost messages, but
/// never accepts one twice.
#[test]
fn a_leap_past_all_tags_accepts_no_counter_twice() {
    let window = Shared::new();
    (0..64).for_each(|counter| window.takes(counter));
    let far = 1 << 37;
    for counter in far + 16..far + 128 {
        let first = window.offer(counter);
        assert_eq!(first.is_ok(), counter >= far + 64, "{counter}");
        window.refuses(counter, Reason::Replayed);
    }
}

/// A naive model of the window.
#[derive(Default)]
struct Model(BTreeSet<u64>);

impl Model {
    fn offer(&mut self, counter: u64) -> Result<(), Reason> {
        let greatest = self.0.last().copied();
        if counter >= REJECT_AFTER_MESSAGES {
            Err(Reason::Exhausted)
        } else if greatest.is_some_and(|greatest| greatest > WINDOW && counter < greatest - WINDOW)
        {
            Err(Reason::TooOld)
        } else if self.0.insert(counter) {
            Ok(())
        } else {
            Err(Reason::Replayed)
        }
    }
}

/// Steps relative to the greatest counter so far: mostly near it, sometimes at the edges of the
/// window and the ring.
fn steps() -> impl Strategy<Value = Vec<i64>> {
    let window = WINDOW as i64;
    let step = prop_oneof![
        6 => -40i64..40,
        3 => -window - 70..-window + 70,
        1 => -8300i64..8300,
        1 => 8000i64..40_000,
        1 => Just(1),
        1 => (1i64 << 30)..(1i64 << 45),
    ];
    prop::collection::vec(step, 1..400)
}

proptest! {
    #[test]
    fn agrees_with_the_model(start in 0u64..100_000, steps in steps()) {
        let (window, mut model) = (Shared::new(), Model::default());
        let mut greatest = start;
        for step in steps {
            let counter = greatest.saturating_add_signed(step);
            prop_assert_eq!(window.offer(counter), model.offer(counter), "counter {}", counter);
            greatest = greatest.max(counter);
        }
    }
}

/// Threads offer the same counters at the same time, in bursts that cross words and wrap the ring.
/// No counter is accepted twice. Each counter that stays within the window is accepted once.
#[test]
fn many_threads_accept_each_counter_at_most_once() {
    const THREADS: u64 = 8;
    const COUNTERS: u64 = 200_000;
    // Neither a thread's burst nor the lag between threads may exceed the window. Otherwise,
    // messages are lost to age.
    const BURST: u64 = 256;
    let window = Shared::new();
    let accepted: Vec<AtomicU32> = (0..COUNTERS).map(|_| AtomicU32::new(0)).collect();
    let contended = AtomicU64::new(0);
    let barrier = std::sync::Barrier::new(THREADS as usize);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (window, accepted, contended, barrier) = (&window, &accepted, &contended, &barrier);
            scope.spawn(move || {
                for burst in 0..COUNTERS / BURST {
                    barrier.wait();
                    for step in 0..BURST {
                        // Each thread uses a different order. An odd factor visits every counter.
                        let counter =
                            burst * BURST + (step * (2 * thread + 1) + 37 * thread) % BURST;
                        match window.accept(counter) {
                            Ok(()) => {
                                _ = accepted[counter as usize].fetch_add(1, Ordering::Relaxed)
                            }
                            Err(Reason::Replayed) => {}
                            Err(Reason::Helper) => _ = contended.fetch_add(1, Ordering::Relaxed),
                            Err(other) => panic!("{counter}: {other:?}"),
                        }
                    }
                }
            });
        }
    });
    let offered = COUNTERS / BURST * BURST;
    let times = |n| {
        accepted[..offered as usize].iter().filter(|a| a.load(Ordering::Relaxed) == n).count()
            as u64
    };
    assert_eq!(times(0) + times(1), offered, "counters accepted twice");
    assert!(times(0) <= contended.into_inner(), "{} counters accepted by nobody", times(0));
}

/// Threads at different positions of the stream, far enough apart to age each other's counters.
#[test]
fn threads_far_apart_accept_no_counter_twice() {
    const THREADS: u64 = 4;
    const COUNTERS: u64 = 400_000;
    let window = Shared::new();
    let accepted: Vec<AtomicU32> = (0..COUNTERS).map(|_| AtomicU32::new(0)).collect();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (window, accepted) = (&window, &accepted);
            scope.spawn(move || {
                for step in 0..COUNTERS {
                    let counter = (step + thread * 5_000) % COUNTERS;
                    if window.accept(counter).is_ok() {
                        accepted[counter as usize].fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    assert!(
        accepted.iter().all(|times| times.load(Ordering::Relaxed) <= 1),
        "a counter was accepted twice"
    );
    let any = accepted.iter().filter(|times| times.load(Ordering::Relaxed) == 1).count();
    assert!(any > COUNTERS as usize / 10, "only {any} counters were accepted");
}
