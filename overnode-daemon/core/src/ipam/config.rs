//! Startup configuration of address allocation.

use std::time::Duration;

use crate::control::READ_LIMIT;
use overnode_types::{Network, NodeId};

/// Startup configuration of a node's address allocation.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The cluster's subnet and range.
    pub network: Network,
    /// The ID of this node.
    pub id: NodeId,
    /// Start counter of this node. Greater than at every earlier start, including starts before a
    /// reset.
    pub incarnation: u64,
    /// Timeouts and retry intervals.
    pub timing: Timing,
}

/// Timeouts and retry intervals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Delay before an unanswered message is sent again. It doubles with each attempt.
    pub retry: Duration,
    /// Longest delay between two attempts.
    pub retry_cap: Duration,
    /// A lender that does not answer a request for addresses within this time is skipped for twice
    /// as long, or for 15 times as long while this node has space and no request waits.
    pub lender: Duration,
    /// A request for an address fails after this time.
    pub request: Duration,
    /// A borrowed block is handed back after it was unused for this long.
    pub hand_back: Duration,
    /// Quiet period before a birth owner or a claimant acts on what it knows: membership must not
    /// have changed for this long.
    pub settle: Duration,
    /// Leaving fails after this time.
    pub leave: Duration,
    /// A node that was unreachable for this long has noticed it as well. Only then does another
    /// node agree that it is declared gone.
    pub grace: Duration,
    /// A reachable node that has not answered a claim for a static address within this time does
    /// not count.
    pub claim: Duration,
    /// A node that was reachable for this long without interruption knows what the others had
    /// announced before.
    pub propagation: Duration,
    /// How long a past event that leaves no visible state is reported.
    pub past_problem: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            retry: Duration::from_millis(500),
            retry_cap: Duration::from_secs(15),
            lender: Duration::from_secs(2),
            request: Duration::from_secs(15),
            hand_back: Duration::from_secs(300),
            settle: Duration::from_secs(1),
            leave: Duration::from_secs(5),
            grace: READ_LIMIT + Duration::from_secs(5),
            claim: Duration::from_secs(1),
            propagation: Duration::from_secs(60),
            past_problem: Duration::from_secs(600),
        }
    }
}
