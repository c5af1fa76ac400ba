//! A container behind a host that forwards, as one reaches a network through a VPN's interface.

use std::net::Ipv4Addr;

use anyhow::Result;

use crate::container::Container;
use crate::host::Host;

/// Joins a container to its host by a veth pair and makes the host forward. The container has
/// `address` with `gateway`, the host's end, as its way to everything else. What lies beyond is the
/// caller's.
///
/// # Errors
/// When `ip` refuses.
pub fn plug(
    host: &Host,
    container: &Container,
    address: Ipv4Addr,
    gateway: Ipv4Addr,
    mtu: u32,
) -> Result<()> {
    let (netns, inside) = (host.netns(), container.netns());
    netns.enter(|| {
        // Whatever comes is forwarded: it is for the far end to judge who may send what.
        for (setting, value) in
            [("ip_forward", "1"), ("conf/all/rp_filter", "0"), ("conf/default/rp_filter", "0")]
        {
            std::fs::write(format!("/proc/sys/net/ipv4/{setting}"), value)?;
        }
        Ok(())
    })?;
    let (mtu, end) = (mtu.to_string(), "box0");
    netns.ip(&[
        "link",
        "add",
        end,
        "mtu",
        &mtu,
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "mtu",
        &mtu,
        "netns",
        inside.name(),
    ])?;
    netns.ip(&["link", "set", end, "up"])?;
    inside.ip(&["link", "set", "eth0", "up"])?;
    // Neither end needs to own the subnet that the addresses are from: each is told of the other
    // alone.
    let (address_text, gateway_text) = (address.to_string(), gateway.to_string());
    netns.ip(&["address", "add", &gateway_text, "peer", &address_text, "dev", end])?;
    inside.ip(&["address", "add", &address_text, "peer", &gateway_text, "dev", "eth0"])?;
    inside.ip(&["route", "add", "default", "via", &gateway_text])?;
    container.set_address(Some(address.into()));
    Ok(())
}
