//! Nebula with its own certificate authority and static addresses for both nodes.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::background::Background;
use lab::wireguard::ensure_tun;
use lab::{Entry, Lab};

use super::{PAIRS, TUNNEL, TUNNEL_MTU, UNDERLAY, network_of};

const PORT: u16 = 4242;

/// The running nodes.
pub(crate) struct Nodes {
    _processes: Vec<Background>,
}

/// Starts one node on each host. The containers' networks are what Nebula calls unsafe routes:
/// subnets behind a node that its certificate vouches for.
///
/// # Errors
/// When Nebula is not installed or does not start.
pub(crate) fn start(lab: &Lab) -> Result<Nodes> {
    ensure_tun()?;
    let folder = lab.folder();
    let certify = |words: &str| -> Result<()> {
        let mut command = Command::new("nebula-cert");
        let output = command.current_dir(folder).args(words.split(' ')).output();
        let output =
            output.context("cannot start `nebula-cert`: install Debian's package `nebula`")?;
        ensure!(
            output.status.success(),
            "nebula-cert: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    };
    certify("ca -name bench")?;
    let mut processes = Vec::new();
    for (own, other) in PAIRS {
        let (ip, inside) = (TUNNEL[own], network_of(own));
        let files = format!("-out-crt node{own}.crt -out-key node{own}.key");
        certify(&format!("sign -name node{own} -ip {ip}/24 -subnets {inside} {files}"))?;
        let (at, peer, underlay, route) =
            (folder.display(), TUNNEL[other], UNDERLAY[other], network_of(other));
        let text = format!(
            "pki: {{ca: {at}/ca.crt, cert: {at}/node{own}.crt, key: {at}/node{own}.key}}\n\
             static_host_map: {{\"{peer}\": [\"{underlay}:{PORT}\"]}}\n\
             lighthouse: {{am_lighthouse: false, hosts: []}}\n\
             listen: {{host: 0.0.0.0, port: {PORT}}}\n\
             tun: {{dev: nebula0, mtu: {TUNNEL_MTU}, \
              unsafe_routes: [{{route: {route}, via: {peer}}}]}}\n\
             logging: {{level: warning, format: text}}\n\
             firewall: {{outbound: [{{port: any, proto: any, host: any}}], \
              inbound: [{{port: any, proto: any, host: any}}]}}\n"
        );
        let file = folder.join(format!("node{own}.yml"));
        fs::write(&file, text)?;
        let mut command = lab.hosts()[own].netns().command(Entry::Setns, "nebula");
        command.arg("-config").arg(&file);
        processes.push(Background::start(command)?);
    }
    Ok(Nodes { _processes: processes })
}
