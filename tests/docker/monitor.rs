//! Tests that `overnode monitor` calls containers by the engine's names.

use anyhow::{Result, ensure};
use lab::monitor::Watcher;
use serde_json::{Value, json};

use crate::support::{TIMEOUT, endpoint, nothing_left, with_engines};

#[test]
fn the_monitor_shows_the_engines_container_names() -> Result<()> {
    with_engines("docker-monitor", 1, |lab, engines| {
        let [engine] = engines else { unreachable!() };
        let host = lab.host(1);
        let events = Watcher::start(lab, host, &["--json"], TIMEOUT)?;
        let text = Watcher::start(lab, host, &["--drops"], TIMEOUT)?;
        let here = engine.run("here", &[])?;
        let beside = engine.run("beside", &[])?;
        // At the time of attachment, the engine has not yet told the container's name.
        let of = |address: &str, event: &Value| event["address"] == address;
        events.wait_for(|it| it["event"] == "attached" && of(&here, it))?;
        let named = events.wait_for(|it| it["event"] == "named" && of(&here, it))?;
        let listed = endpoint(host, "here")?;
        ensure!(
            named["name"] == "here" && named["target"] == listed["target"],
            "{named}, but {listed}"
        );
        endpoint(host, "beside")?;
        engine.reach("here", &beside, TIMEOUT)?;

        // A packet to an address without an owner.
        let ping = |words: &[&str]| {
            let command = [&["exec", "here", "/bin/ping", "-c", "1", "-W", "1"], words].concat();
            engine.docker(&command).map(drop)
        };
        ping(&["10.46.0.1"])?;
        let lost = events.drop_of("no-route")?;
        ensure!(
            lost["container"]
                == json!({"address": here, "target": listed["target"], "name": "here"})
        );
        ensure!(lost["names"] == json!({here.as_str(): "here"}), "{lost}");
        let line = text.wait_for_line(|line| line.contains("no-route"))?;
        ensure!(line.contains("from here") && !line.contains("(here)"), "{line}");

        // A packet to another container of this host, from an address that the container does not
        // own.
        let pid = engine.docker(&["inspect", "--format", "{{.State.Pid}}", "here"])?.success()?;
        let inside =
            ["-t", pid.trim(), "-n", "ip", "address", "add", "10.42.0.77/32", "dev", "overnode0"];
        engine.client("nsenter", &inside)?.success()?;
        ping(&["-I", "10.42.0.77", &beside])?;
        let spoofed = events.drop_of("spoofed")?;
        ensure!(spoofed["container"]["name"] == "here", "{spoofed}");
        ensure!(spoofed["names"] == json!({beside.as_str(): "beside"}), "{spoofed}");
        let line = text.wait_for_line(|line| line.contains("spoofed"))?;
        ensure!(
            line.contains(&format!("{beside} (beside)")) && line.contains("from here"),
            "{line}"
        );

        engine.docker(&["rm", "--force", "here"])?.success()?;
        let detached = events.wait_for(|it| it["event"] == "detached" && of(&here, it))?;
        ensure!(detached["name"] == "here", "{detached}");
        engine.docker(&["rm", "--force", "beside"])?.success()?;
        nothing_left(host)
    })
}
