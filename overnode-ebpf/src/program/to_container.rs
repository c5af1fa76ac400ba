//! Guards the way into a container: the host end of its veth is an interface of the host, and any
//! process of the host can send to it.

use overnode_ebpf::reason::Reason;

use super::Verdict;
use super::frame::{DELIVERED, Skb};

/// Passes packets that programs have delivered, and drops all others.
pub fn run(skb: Skb) -> Result<Verdict, Reason> {
    // SAFETY: the kernel passes a valid context to the program.
    unsafe {
        if (*skb).mark != DELIVERED {
            return Err(Reason::FromHost);
        }
        (*skb).mark = 0;
    }
    Ok(Verdict::Pass)
}
