//! Helpers that the tests of this folder share.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::docker::Engine;
use lab::{Host, Lab, eventually};
use overnode_core::attachment::host_interface;
use serde_json::Value;

pub(crate) const TIMEOUT: Duration = Duration::from_secs(60);
pub(crate) const TOKEN: &str = "docker test";

/// Runs a test with an engine and a node on each host. Prints their logs if it fails.
pub(crate) fn with_engines(
    name: &str,
    hosts: usize,
    test: impl FnOnce(&Lab, &mut [Engine<'_>]) -> Result<()>,
) -> Result<()> {
    let lab = Lab::new(name).hosts(hosts).build()?;
    let mut engines = lab.hosts().iter().map(Engine::launch).collect::<Result<Vec<_>>>()?;
    let result = launch_all(&lab, &engines).and_then(|()| test(&lab, &mut engines));
    if result.is_err() {
        for (host, engine) in lab.hosts().iter().zip(&engines) {
            eprintln!(
                "--- {}: overnoded\n{}--- dockerd\n{}",
                host.name,
                host.log(),
                engine.last_words()
            );
        }
    }
    result
}

fn launch_all(lab: &Lab, engines: &[Engine<'_>]) -> Result<()> {
    (1..).zip(engines).try_for_each(|(id, engine)| launch(lab, engine, id, &[]))
}

/// Launches the node of an engine's host.
pub(crate) fn launch(lab: &Lab, engine: &Engine<'_>, id: usize, options: &[&str]) -> Result<()> {
    let id = id.to_string();
    let mut words = vec!["launch", "--id", &id, "--token", TOKEN];
    words.extend(options);
    words.extend(lab.targets());
    engine.overnode(&words)?.success()?;
    Ok(())
}

/// Returns the attachments that `status` lists.
pub(crate) fn endpoints(host: &Host) -> Result<Vec<Value>> {
    Ok(host.status()?["endpoints"].as_array().context("no list of endpoints")?.clone())
}

/// Waits until an attachment with this name is listed with its image.
pub(crate) fn endpoint(host: &Host, name: &str) -> Result<Value> {
    eventually(TIMEOUT, || {
        endpoints(host)?
            .into_iter()
            .find(|it| it["name"] == name && it["image"].is_string())
            .with_context(|| format!("{name} is not listed with its image"))
    })
}

/// Waits until no attachment, address or interface of a container is left on the host.
pub(crate) fn nothing_left(host: &Host) -> Result<()> {
    eventually(TIMEOUT, || {
        let left = endpoints(host)?;
        ensure!(left.is_empty(), "{} still lists {left:?}", host.name);
        let status = host.status()?;
        let active = status["ipam"]["owners"]
            .as_array()
            .into_iter()
            .flatten()
            .find_map(|it| it["active"].as_u64());
        ensure!(active == Some(0), "{} still has {active:?} addresses in use", host.name);
        let interfaces = host.netns().interfaces()?;
        // The interface of the name server stays while the node runs.
        let dns = status["dns"]["address"]
            .as_str()
            .and_then(|address| address.parse().ok())
            .map(host_interface);
        let of_ours = |name: &&String| {
            name.starts_with("ov") && !name.starts_with("ovn") && Some(*name) != dns.as_ref()
        };
        let left: Vec<&String> = interfaces.iter().filter(of_ours).collect();
        ensure!(left.is_empty(), "{} still has {left:?}", host.name);
        Ok(())
    })
}
