//! Tests of launch and reset, with and without an engine.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::docker::Engine;
use lab::{Lab, eventually};

use crate::support::{TIMEOUT, endpoints, launch, with_engines};
use crate::{daemon_is_gone, has_network};

#[test]
fn an_engine_that_appears_later_gets_its_network_then() -> Result<()> {
    let lab = Lab::new("docker-late").hosts(1).build()?;
    let mut engine = Engine::prepare(lab.host(1))?;
    launch(&lab, &engine, 1, &[])?;
    ensure!(lab.host(1).status()?["node"]["problems"].as_array().is_none_or(Vec::is_empty));
    engine.start()?;
    eventually(TIMEOUT, || {
        ensure!(has_network(&engine, "overnode")?, "there is no default network yet");
        Ok(())
    })?;
    engine.overnode(&["reset"])?.success()?;
    ensure!(!has_network(&engine, "overnode")?);
    Ok(())
}

/// Such old engines are no longer available, so the test answers in place of one. After an upgrade,
/// the engine gets its network.
#[test]
fn an_engine_that_is_too_old_is_reported() -> Result<()> {
    const OLD: &str = r#"{"Version": "1.13.1", "ApiVersion": "1.26", "MinAPIVersion": "1.12"}"#;
    let lab = Lab::new("docker-old").hosts(1).build()?;
    let mut engine = Engine::prepare(lab.host(1))?;
    let listener = UnixListener::bind(engine.socket())?;
    listener.set_nonblocking(true)?;
    let (upgraded, asked_to_create) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| -> Result<()> {
        scope.spawn(|| {
            while !upgraded.load(Ordering::Relaxed) {
                let Ok((mut stream, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                };
                let mut request = [0; 4096];
                let _ = stream.set_nonblocking(false);
                let read = stream.read(&mut request).unwrap_or_default();
                let request = String::from_utf8_lossy(&request[..read]);
                let body = if request.starts_with("GET /version ") { OLD } else { "[]" };
                if request.starts_with("POST") {
                    asked_to_create.store(true, Ordering::Relaxed);
                }
                let length = body.len();
                let _ = write!(
                    stream,
                    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\
                     Connection: close\r\nContent-Length: {length}\r\n\r\n{body}"
                );
            }
        });
        let told = launch(&lab, &engine, 1, &[]).and_then(|()| {
            eventually(TIMEOUT, || {
                let problems = lab.host(1).status()?["node"]["problems"].to_string();
                ensure!(
                    problems.contains(
                        "Docker 1.13.1 with API 1.26, but the oldest supported one is 20.10"
                    ),
                    "{problems}"
                );
                ensure!(problems.contains("upgrade Docker"), "{problems}");
                Ok(())
            })
        });
        upgraded.store(true, Ordering::Relaxed);
        told
    })?;
    drop(listener);
    ensure!(
        !asked_to_create.load(Ordering::Relaxed),
        "the node asked the old engine for the network"
    );
    std::fs::remove_file(engine.socket())?;
    engine.start()?;
    eventually(TIMEOUT, || {
        ensure!(has_network(&engine, "overnode")?, "there is no default network yet");
        let problems = lab.host(1).status()?["node"]["problems"].clone();
        ensure!(problems.as_array().is_none_or(Vec::is_empty), "{problems}");
        Ok(())
    })
}

/// This happens if the engine took longer to make the network than the node waits for a reply.
/// After that, the network's name is ambiguous.
#[test]
fn an_engine_with_two_copies_of_the_network_keeps_one() -> Result<()> {
    with_engines("docker-twice", 1, |lab, engines| {
        let [engine] = engines else { unreachable!() };
        let engine = &*engine;
        let networks = || -> Result<Vec<String>> {
            let words = ["network", "ls", "--no-trunc", "--quiet", "--filter", "name=^overnode$"];
            Ok(engine.docker(&words)?.success()?.lines().map(str::to_owned).collect())
        };
        let body = r#"{"Name": "overnode", "Driver": "overnode",
            "IPAM": {"Driver": "overnode", "Config": [{"Subnet": "10.32.0.0/12"}]}}"#;
        let first = networks()?;
        engine.run("user", &[])?;
        let (code, answer) = engine.request("POST", "/networks/create", body)?;
        ensure!(code == 201, "{answer}");
        eventually(TIMEOUT, || {
            let left = networks()?;
            ensure!(left == first, "{left:?}");
            Ok(())
        })?;
        engine.run("later", &[])?;
        engine.reach("later", &engine.address("user")?, TIMEOUT)?;
        ensure!(endpoints(lab.host(1))?.len() == 2);
        Ok(())
    })
}

#[test]
fn reset_removes_the_network_and_the_plugin() -> Result<()> {
    with_engines("docker-reset", 1, |lab, engines| {
        let [engine] = engines else { unreachable!() };
        let host = lab.host(1);
        ensure!(has_network(engine, "overnode")?);
        engine.run("busy", &[])?;
        let complaint = engine.overnode(&["reset"])?.complaint()?;
        ensure!(
            complaint.contains("busy") || complaint.contains("a Docker container"),
            "{complaint}"
        );
        ensure!(has_network(engine, "overnode")?, "a refused reset removed the network");
        engine.docker(&["stop", "--time", "0", "busy"])?.success()?;
        engine.overnode(&["reset"])?.success()?;
        daemon_is_gone(host)?;
        ensure!(!has_network(engine, "overnode")?);
        ensure!(!engine.plugin().exists(), "the plugin's socket is still there");

        // With `--force`, also under a running container.
        launch(lab, engine, 1, &[])?;
        engine.docker(&["rm", "busy"])?.success()?;
        engine.run("busy", &[])?;
        engine.overnode(&["reset", "--force"])?.success()?;
        daemon_is_gone(host)?;
        ensure!(!has_network(engine, "overnode")?);
        let remains: Vec<String> = host
            .remains()?
            .into_iter()
            .filter(|it| !it.contains("docker") && !it.contains("veth"))
            .collect();
        ensure!(remains.is_empty(), "{remains:?}");
        engine.docker(&["rm", "--force", "busy"])?.success()?;

        // With `--no-docker`, the node ignores the engine.
        launch(lab, engine, 1, &["--no-docker"])?;
        std::thread::sleep(Duration::from_secs(1));
        ensure!(!has_network(engine, "overnode")?);
        ensure!(!engine.plugin().exists());
        engine.overnode(&["reset"])?.success()?;
        Ok(())
    })
}
