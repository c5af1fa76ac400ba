//! Nebula with a certificate authority of its own, both nodes told where the other is.

use std::fs;

use anyhow::{Context, Result};
use lab::rig::space::{self, Process, Space};
use lab::rig::wireguard::ensure_tun;
use tempfile::TempDir;

use super::{PAIRS, Parts, TUNNEL, TUNNEL_MTU, UNDERLAY, network_of};

const PORT: u16 = 4242;

/// A running node and its files.
pub struct Node {
    _process: Process,
    _files: std::rc::Rc<TempDir>,
}

/// Starts one on each host.
///
/// # Errors
/// When Nebula is not installed or refuses.
pub fn start(hosts: &[Space; 2]) -> Result<Parts> {
    ensure_tun()?;
    let files = std::rc::Rc::new(tempfile::tempdir()?);
    let certify = |words: &str| {
        let mut command = std::process::Command::new("nebula-cert");
        space::run(command.current_dir(files.path()).args(words.split_whitespace()))
    };
    certify("ca -name bench").context("Debian's package `nebula` is needed")?;
    let mut nodes = Vec::new();
    for (own, other) in PAIRS {
        let (ip, inside) = (TUNNEL[own], network_of(own));
        certify(&format!(
            "sign -name n{own} -ip {ip}/24 -subnets {inside} -out-crt n{own}.crt -out-key n{own}.key"
        ))?;
        let folder = files.path().display();
        let (peer, underlay, route) = (TUNNEL[other], UNDERLAY[other], network_of(other));
        let text = format!(
            "pki: {{ca: {folder}/ca.crt, cert: {folder}/n{own}.crt, key: {folder}/n{own}.key}}\n\
             static_host_map: {{\"{peer}\": [\"{underlay}:{PORT}\"]}}\n\
             lighthouse: {{am_lighthouse: false, hosts: []}}\n\
             listen: {{host: 0.0.0.0, port: {PORT}}}\n\
             tun: {{dev: nebula{own}, mtu: {TUNNEL_MTU}, unsafe_routes: [{{route: {route}, via: {peer}}}]}}\n\
             logging: {{level: warning, format: text}}\n\
             firewall:\n  outbound: [{{port: any, proto: any, host: any}}]\n  inbound: [{{port: any, proto: any, host: any}}]\n"
        );
        let file = files.path().join(format!("n{own}.yml"));
        fs::write(&file, text)?;
        let mut command = hosts[own].command("nebula")?;
        let process = Process::start(command.arg("-config").arg(&file))?;
        nodes.push(Node { _process: process, _files: files.clone() });
    }
    Ok(Parts { _nebula: nodes, ..Parts::default() })
}
