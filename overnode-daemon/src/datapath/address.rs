//! Converts addresses to and from their form in maps.

use std::net::{IpAddr, Ipv6Addr};

use overnode_ebpf::map::Address;

/// Converts an address to its form in BPF maps.
pub fn to_map(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(v4) => Address::from_v4(v4.octets()),
        IpAddr::V6(v6) => Address(v6.octets()),
    }
}

/// Converts an address from its form in BPF maps. IPv4-mapped addresses become IPv4.
pub fn from_map(address: Address) -> IpAddr {
    match address.to_v4() {
        Some(v4) => IpAddr::V4(v4.into()),
        None => IpAddr::V6(Ipv6Addr::from(address.0)),
    }
}
