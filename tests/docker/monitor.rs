//! `overnode monitor` calls containers what the engine calls them.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use anyhow::{Context, Result, ensure};
use lab::{Host, Lab, eventually};
use serde_json::{Value, json};

use crate::support::{PATIENCE, endpoint, nothing_left, with_engines};

/// A monitor that runs until this is dropped.
struct Monitor {
    child: Child,
    output: PathBuf,
}

impl Monitor {
    /// Returns when it watches.
    fn start(lab: &Lab, host: &Host, name: &str, options: &[&str]) -> Result<Self> {
        let output = lab.folder().join(name);
        let mut command = host.command("overnode")?;
        command.arg("monitor").args(options).stdin(Stdio::null()).stdout(File::create(&output)?);
        let monitor = Self { child: command.spawn()?, output };
        monitor.line(|line| line.contains("watching"))?;
        Ok(monitor)
    }

    /// The first complete line that is as wanted.
    fn line(&self, is_it: impl Fn(&str) -> bool) -> Result<String> {
        eventually(PATIENCE, || {
            let text = std::fs::read_to_string(&self.output)?;
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            whole
                .lines()
                .find(|line| is_it(line))
                .map(str::to_owned)
                .with_context(|| format!("not in {text}"))
        })
    }

    fn event(&self, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
        let line = self.line(|line| serde_json::from_str(line).is_ok_and(|event| is_it(&event)))?;
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn containers_are_called_what_the_engine_calls_them() -> Result<()> {
    with_engines("docker-monitor", 1, |lab, engines| {
        let [engine] = engines else { unreachable!() };
        let host = lab.host(1);
        let events = Monitor::start(lab, host, "events", &["--json"])?;
        let text = Monitor::start(lab, host, "text", &["--drops"])?;
        let here = engine.run("here", &[])?;
        let beside = engine.run("beside", &[])?;
        // When it is plugged in the engine has not told yet who it is.
        let of = |address: &str, event: &Value| event["address"] == address;
        events.event(|it| it["event"] == "attached" && of(&here, it))?;
        let named = events.event(|it| it["event"] == "named" && of(&here, it))?;
        let listed = endpoint(host, "here")?;
        ensure!(named["name"] == "here" && named["target"] == listed["target"], "{named}, but {listed}");
        endpoint(host, "beside")?;
        engine.reach("here", &beside, PATIENCE)?;

        // To nowhere.
        let ping = |words: &[&str]| {
            let command = [&["exec", "here", "/bin/ping", "-c", "1", "-W", "1"], words].concat();
            engine.docker(&command).map(drop)
        };
        ping(&["10.46.0.1"])?;
        let lost = events.event(|it| it["event"] == "drop" && it["reason"] == "no-route")?;
        ensure!(lost["container"] == json!({"address": here, "target": listed["target"], "name": "here"}));
        ensure!(lost["names"] == json!({here.as_str(): "here"}), "{lost}");
        let line = text.line(|line| line.contains("no-route"))?;
        ensure!(line.contains("from here") && !line.contains("(here)"), "{line}");

        // To another container of this host, from an address that is nobody's.
        let pid = engine.docker(&["inspect", "--format", "{{.State.Pid}}", "here"])?.success()?;
        let inside = ["-t", pid.trim(), "-n", "ip", "address", "add", "10.42.0.77/32", "dev", "overnode0"];
        engine.client("nsenter", &inside)?.success()?;
        ping(&["-I", "10.42.0.77", &beside])?;
        let spoofed = events.event(|it| it["event"] == "drop" && it["reason"] == "spoofed")?;
        ensure!(spoofed["container"]["name"] == "here", "{spoofed}");
        ensure!(spoofed["names"] == json!({beside.as_str(): "beside"}), "{spoofed}");
        let line = text.line(|line| line.contains("spoofed"))?;
        ensure!(line.contains(&format!("{beside} (beside)")) && line.contains("from here"), "{line}");

        engine.docker(&["rm", "--force", "here"])?.success()?;
        let detached = events.event(|it| it["event"] == "detached" && of(&here, it))?;
        ensure!(detached["name"] == "here", "{detached}");
        engine.docker(&["rm", "--force", "beside"])?.success()?;
        nothing_left(host)
    })
}
