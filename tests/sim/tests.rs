//! Simulates attacks on the address allocation, as many as there is time for on each change. Also
//! checks that the attacks find allocations that are broken on purpose.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "failing seeds are for people")]

mod chaos;
mod check;
mod host;
mod liar;
#[expect(dead_code, reason = "the program uses more of it")]
mod run;
mod statics;
mod world;

use world::{Sabotage, Settings};

fn assert_fine(seed: u64, nodes: u16) {
    let (_, outcome) = run::one(Settings { seed, nodes, sabotage: Sabotage::None, verbose: false });
    assert_eq!(outcome, Ok(()), "replay with `cargo xtask sim --nodes {nodes} --seed {seed}`");
}

#[test]
fn one_thousand_lives_of_nine_nodes() {
    let outcome = run::all(0..1000, 9, Sabotage::None, 1, false);
    assert!(
        outcome.failures.is_empty(),
        "replay with `cargo xtask sim --seed SEED`: {:?}",
        outcome.failures
    );
    assert_eq!((outcome.seeds, outcome.counts.duplicates, outcome.unconverged), (1000, 0, 0));
    let counts = outcome.counts;
    for (count, what) in [
        (counts.partitions, "partitions"),
        (counts.crashes, "crashes"),
        (counts.resets, "resets"),
        (counts.reclaims, "reclaims"),
        (counts.granted, "granted addresses"),
        (counts.lies, "lies"),
    ] {
        assert!(count > 1000, "the attack is weak: {count} {what}");
    }
    let buried_alive = counts.buried_alive;
    assert!(
        buried_alive > 20,
        "the attack is weak: {buried_alive} nodes were taken back that live"
    );
}

fn assert_found(sabotage: Sabotage) {
    let outcome = run::all(0..500, 9, sabotage, 1, false);
    assert!(!outcome.failures.is_empty(), "{sabotage:?} was not found in {} lives", outcome.seeds);
    let duplicates = outcome.counts.duplicates;
    println!(
        "{sabotage:?}: found after {} lives, {duplicates} duplicates: {:?}",
        outcome.seeds, outcome.failures
    );
}

#[test]
fn a_disk_that_forgets_the_last_write_is_found() {
    assert_found(Sabotage::ForgetfulDisk);
}

#[test]
fn a_node_that_answers_before_it_writes_is_found() {
    assert_found(Sabotage::AnswersFirst);
}

#[test]
fn a_lender_that_does_not_keep_what_it_lends_is_found() {
    assert_found(Sabotage::LosesLoans);
}

#[test]
fn nodes_that_vouch_for_a_lender_that_was_taken_back_are_found() {
    assert_found(Sabotage::VouchesForAll);
}

/// A quarter was handed on, and then the message that had transferred it arrived a second time.
#[test]
fn regression_a_late_copy_of_a_transfer() {
    assert_fine(250, 9);
}

#[test]
fn regression_a_quarter_got_anew_under_a_lower_serial() {
    assert_fine(1795, 9);
}

#[test]
fn regression_the_dead_were_taken_for_lenders() {
    assert_fine(1988, 9);
}

/// One node reclaimed the space of a quarter's dead lender, and another node reclaimed that of the
/// quarter's dead original owner.
#[test]
fn regression_two_nodes_take_back_one_quarter_from_two_dead() {
    assert_fine(5256, 9);
}

/// A node left while it was reclaiming the space of a node whose quarter it lent. It handed the
/// quarter to a node that had already agreed to the reclaim.
#[test]
fn regression_a_quarter_handed_on_by_a_node_that_takes_it_back() {
    assert_fine(56341, 9);
}

/// A request arrived after the borrower had given it up, and the blocks lent for it belonged to no
/// node.
#[test]
fn regression_a_late_request_is_answered() {
    assert_fine(16924, 9);
    assert_fine(19002, 9);
}

/// A node promised to take nothing from another node, heard that the promise was over, and still
/// took nothing from that node.
#[test]
fn regression_a_promise_that_is_over_holds_nobody_back() {
    for seed in [23733, 66955, 97846] {
        assert_fine(seed, 9);
    }
}

/// A node agreed that another one reclaims what had been handed to a dead node, and then took it
/// itself: its own original quarter.
#[test]
fn regression_a_quarter_that_its_birth_owner_has_consented_to_lose() {
    assert_fine(4950, 9);
}

/// A lender was cut off alive and reclaimed, others borrowed from its quarter, and it came back and
/// lent the same blocks. Its title had a higher serial than that of the node that reclaimed it, and
/// no node told it. Earlier simulations never reclaimed a node that lived.
#[test]
fn regression_a_lender_that_was_taken_back_alive() {
    for seed in [4, 7, 24, 40, 61, 126, 155] {
        assert_fine(seed, 9);
    }
}

/// A node agreed to a reclaim, already knew that another node had completed it, and waited forever
/// for the result.
#[test]
fn regression_a_promise_about_a_node_that_is_known_to_be_gone() {
    assert_fine(107, 9);
    assert_fine(195, 9);
}

/// Borrowers had heard of a later title, held by a node that is gone.
#[test]
fn regression_a_title_of_the_dead_exceeds_that_of_the_lender() {
    assert_fine(902, 9);
}

/// Two nodes were reclaimed while they were cut off. They met and kept lending because each vouched
/// for the other. One handed a quarter to the other.
#[test]
fn regression_two_that_were_taken_back_vouch_for_each_other() {
    assert_fine(16286, 9);
}

/// A node that was launched after a lender was reclaimed, and that met this lender first, vouched
/// for its claims.
#[test]
fn regression_a_new_node_vouches_for_a_lender_that_was_taken_back() {
    assert_fine(30686, 9);
}

/// Containers waited although a second quarter had free addresses.
#[test]
fn regression_containers_wait_while_there_are_free_addresses() {
    assert_fine(2832, 9);
}

/// A reclaimed node that does not know about it yet keeps its title but does not lend with it.
#[test]
fn regression_titles_of_nodes_that_do_not_know_that_they_were_taken_back() {
    for seed in [10000, 11896, 14184] {
        assert_fine(seed, 9);
    }
}
