//! Two hosts, each with a Docker engine of its own: what people do with `docker` works across them.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::Lab;
use lab::docker::Engine;

const PATIENCE: Duration = Duration::from_secs(30);

fn launch(lab: &Lab, engine: &Engine<'_>, number: usize) -> Result<()> {
    let id = number.to_string();
    let mut words = vec!["launch", "--id", &id, "--token", "docker test"];
    words.extend(lab.targets());
    engine.overnode(&words)?.success()?;
    Ok(())
}

#[test]
fn containers_of_two_engines_talk() -> Result<()> {
    let lab = Lab::new("docker").hosts(2).build()?;
    let one = Engine::launch(lab.host(1))?;
    let two = Engine::launch(lab.host(2))?;
    launch(&lab, &one, 1)?;
    launch(&lab, &two, 2)?;
    println!("{}", one.docker(&["network", "ls"])?.success()?);
    let a = one.run("one", &[])?;
    let b = two.run("two", &[])?;
    println!("{a} {b}");
    let reached = one.reach("one", &b, PATIENCE);
    println!("{}", one.exec("one", &["ip", "a"])?);
    println!("{}", one.exec("one", &["ip", "r"])?);
    println!("{}", one.overnode(&["status", "--endpoints"])?.success()?);
    println!("{}", lab.host(1).log());
    reached?;
    ensure!(a != b);
    Ok(())
}
