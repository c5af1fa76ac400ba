//! Launch and reset, with and without an engine.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::docker::Engine;
use lab::{Lab, eventually};

use crate::support::{PATIENCE, launch, with_engines};
use crate::{daemon_is_gone, has_network};

#[test]
fn an_engine_that_appears_later_gets_its_network_then() -> Result<()> {
    let lab = Lab::new("docker-late").hosts(1).build()?;
    let mut engine = Engine::prepare(lab.host(1))?;
    launch(&lab, &engine, 1, &[])?;
    ensure!(lab.host(1).status()?["node"]["problems"].as_array().is_none_or(Vec::is_empty));
    engine.start()?;
    eventually(PATIENCE, || {
        ensure!(has_network(&engine, "overnode")?, "there is no default network yet");
        Ok(())
    })?;
    engine.overnode(&["reset"])?.success()?;
    ensure!(!has_network(&engine, "overnode")?);
    Ok(())
}

#[test]
fn reset_takes_the_network_and_the_plugin_away() -> Result<()> {
    with_engines("docker-reset", 1, |lab, engines| {
        let [engine] = engines else { unreachable!() };
        let host = lab.host(1);
        ensure!(has_network(engine, "overnode")?);
        engine.run("busy", &[])?;
        let complaint = engine.overnode(&["reset"])?.complaint()?;
        ensure!(complaint.contains("busy") || complaint.contains("a Docker container"), "{complaint}");
        ensure!(has_network(engine, "overnode")?, "a refused reset removed the network");
        engine.docker(&["stop", "--time", "0", "busy"])?.success()?;
        engine.overnode(&["reset"])?.success()?;
        daemon_is_gone(host)?;
        ensure!(!has_network(engine, "overnode")?);
        ensure!(!engine.plugin().exists(), "the plugin's socket is still there");

        // With force, also under a running container.
        launch(lab, engine, 1, &[])?;
        engine.docker(&["rm", "busy"])?.success()?;
        engine.run("busy", &[])?;
        engine.overnode(&["reset", "--force"])?.success()?;
        daemon_is_gone(host)?;
        ensure!(!has_network(engine, "overnode")?);
        let remains: Vec<String> =
            host.remains()?.into_iter().filter(|it| !it.contains("docker") && !it.contains("veth")).collect();
        ensure!(remains.is_empty(), "{remains:?}");
        engine.docker(&["rm", "--force", "busy"])?.success()?;

        // Left alone.
        launch(lab, engine, 1, &["--no-docker"])?;
        std::thread::sleep(Duration::from_secs(1));
        ensure!(!has_network(engine, "overnode")?);
        ensure!(!engine.plugin().exists());
        engine.overnode(&["reset"])?.success()?;
        Ok(())
    })
}
