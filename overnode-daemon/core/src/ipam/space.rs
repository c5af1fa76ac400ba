//! Arithmetic on address blocks.

use std::net::IpAddr;

use ipnet::IpNet;

use super::layout::bounds;

/// Returns true if the two blocks have an address in common.
pub(super) fn overlap(one: IpNet, other: IpNet) -> bool {
    one.contains(&other) || other.contains(&one)
}

/// Returns the number of addresses in a block.
pub fn size(block: IpNet) -> u128 {
    let (first, last) = bounds(block);
    (last - first).saturating_add(1)
}

/// Returns the block that consists of one address.
pub(super) fn single(address: IpAddr) -> IpNet {
    address.into()
}

/// Returns the parts of `whole` that are not in `taken`, as the fewest blocks in ascending order.
/// `taken` may be in any order and overlap.
pub(super) fn free(whole: IpNet, taken: impl Iterator<Item = IpNet>) -> Vec<IpNet> {
    let (first, last) = bounds(whole);
    let mut taken: Vec<_> = taken.map(bounds).filter(|(a, b)| *b >= first && *a <= last).collect();
    taken.sort_unstable();
    let mut blocks = Vec::new();
    let mut next = first;
    for (a, b) in taken {
        if a > next {
            split(whole, next, a - 1, &mut blocks);
        }
        next = next.max(b.saturating_add(1));
    }
    if next <= last {
        split(whole, next, last, &mut blocks);
    }
    blocks
}

/// Chooses blocks of about `count` addresses in total, at least one if any is free and at most
/// `most`. Prefers the smallest block that is large enough, cut to size, and else the largest.
pub(super) fn choose(free: &[IpNet], count: u128, most: usize) -> Vec<IpNet> {
    let mut free = free.to_vec();
    let mut chosen = Vec::new();
    let mut left = count;
    while left > 0 && chosen.len() < most && !free.is_empty() {
        let wanted = left.checked_next_power_of_two().unwrap_or(u128::MAX);
        let fitting = (0..free.len()).filter(|index| size(free[*index]) >= wanted);
        let best = fitting.min_by_key(|index| size(free[*index]));
        let largest = || (0..free.len()).rev().max_by_key(|index| size(free[*index]));
        let Some(index) = best.or_else(largest) else { break };
        let block = free.remove(index);
        let block = if size(block) > wanted { cut(block, wanted) } else { block };
        left = left.saturating_sub(size(block));
        chosen.push(block);
    }
    chosen.sort_unstable();
    chosen
}

/// Returns the first `size` addresses of `block`. `size` is a power of two.
fn cut(block: IpNet, size: u128) -> IpNet {
    let prefix = block.max_prefix_len() - size.trailing_zeros() as u8;
    IpNet::new(block.network(), prefix).unwrap_or(block)
}

fn split(like: IpNet, first: u128, last: u128, blocks: &mut Vec<IpNet>) {
    let family = like.addr();
    let most = like.max_prefix_len();
    let mut next = first;
    loop {
        let room = (last - next).saturating_add(1);
        let aligned = if next == 0 { 127 } else { next.trailing_zeros() };
        let bits = aligned.min(room.ilog2()).min(u32::from(most));
        if let Ok(block) = IpNet::new(from_number(family, next), most - bits as u8) {
            blocks.push(block);
        }
        match next.checked_add(1 << bits) {
            Some(after) if after <= last => next = after,
            Some(_) | None => return,
        }
    }
}

/// Returns the first address of `block` after `from` that is neither in `taken` nor rejected by
/// `is_usable`. The search wraps around at the end of the block.
pub(super) fn next_free(
    block: IpNet,
    from: Option<IpAddr>,
    taken: &std::collections::BTreeMap<IpAddr, String>,
    is_usable: impl Fn(IpAddr) -> bool,
) -> Option<IpAddr> {
    let (first, last) = bounds(block);
    let like = block.addr();
    let start = match from.map(to_number) {
        Some(from) if (first..last).contains(&from) => from + 1,
        Some(_) | None => first,
    };
    let search = |first: u128, last: u128| {
        if first > last {
            return None;
        }
        let mut candidate = first;
        let (low, high) = (from_number(like, first), from_number(like, last));
        let mut taken = taken.range(low..=high).map(|(address, _)| to_number(*address)).peekable();
        while candidate <= last {
            if taken.peek() == Some(&candidate) {
                taken.next();
            } else if is_usable(from_number(like, candidate)) {
                return Some(from_number(like, candidate));
            }
            candidate += 1;
        }
        None
    };
    search(start, last).or_else(|| if start == first { None } else { search(first, start - 1) })
}

pub(super) fn to_number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// Converts a number to an address of the same family as `like`.
pub(super) fn from_number(like: IpAddr, number: u128) -> IpAddr {
    match like {
        IpAddr::V4(_) => IpAddr::V4(u32::try_from(number).unwrap_or(u32::MAX).into()),
        IpAddr::V6(_) => IpAddr::V6(number.into()),
    }
}
