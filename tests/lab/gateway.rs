//! Connects a container behind a forwarding host, like a network behind a VPN's interface.

use std::net::Ipv4Addr;

use anyhow::Result;

use crate::container::Container;
use crate::host::Host;

/// Connects a container to its host by a veth pair and makes the host forward. The container gets
/// `address` and a default route to `gateway`, the host's end. The caller provides routes beyond
/// the host.
///
/// # Errors
/// Fails if `ip` refuses.
pub fn plug(
    host: &Host,
    container: &Container,
    address: Ipv4Addr,
    gateway: Ipv4Addr,
    mtu: u32,
) -> Result<()> {
    let (netns, inside) = (host.netns(), container.netns());
    netns.enter(|| {
        // Forward everything. The far end must decide which sources are allowed.
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
    // Neither end needs to own the subnet of the addresses, because each end has a route to the
    // other one only.
    let (address_text, gateway_text) = (address.to_string(), gateway.to_string());
    netns.ip(&["address", "add", &gateway_text, "peer", &address_text, "dev", end])?;
    inside.ip(&["address", "add", &address_text, "peer", &gateway_text, "dev", "eth0"])?;
    inside.ip(&["route", "add", "default", "via", &gateway_text])?;
    container.set_address(Some(address.into()));
    Ok(())
}
