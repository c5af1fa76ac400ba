//! What people name as a container: `netns:NAME`, `netns:/path`, `pid:N`, or a Docker or podman container.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use tokio::process::Command;
use tokio::time::timeout;

use super::netns::NetnsRef;

/// An engine that does not answer by then is taken for absent.
const ENGINE_TIMEOUT: Duration = Duration::from_secs(10);

/// A container found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// Its network namespace.
    pub netns: NetnsRef,
    /// What to call it: the same for every way to name it, so that it is found again.
    pub name: String,
}

/// Finds the network namespace that `target` names.
///
/// # Errors
/// It is not one of the forms above; it does not exist; it does not run; no container engine is installed.
pub async fn resolve(target: &str) -> Result<Container> {
    if let Some(name) = target.strip_prefix("netns:") {
        let path = if name.starts_with('/') {
            PathBuf::from(name)
        } else {
            ensure!(
                !name.is_empty() && !name.contains('/') && name != "." && name != "..",
                "{target:?} names no network namespace: `netns:NAME` as in `ip netns`, or `netns:/path`"
            );
            PathBuf::from("/run/netns").join(name)
        };
        let netns = NetnsRef::Path(path);
        netns.id()?;
        return Ok(Container { netns, name: target.to_owned() });
    }
    if let Some(pid) = target.strip_prefix("pid:") {
        let pid: u32 = pid
            .parse()
            .ok()
            .filter(|pid| *pid != 0)
            .with_context(|| format!("{target:?} names no process: `pid:N`"))?;
        let netns = NetnsRef::Pid(pid);
        netns.id()?;
        return Ok(Container { netns, name: target.to_owned() });
    }
    let is_name = target.starts_with(|first: char| first.is_ascii_alphanumeric())
        && target.chars().all(|char| char.is_ascii_alphanumeric() || matches!(char, '_' | '.' | '-'));
    ensure!(
        is_name,
        "{target:?} is no container: name one as `docker ps` does, or use `netns:NAME`, `netns:/path` or `pid:N`"
    );
    let mut is_engine_there = false;
    for engine in ["docker", "podman"] {
        match inspect(engine, target).await? {
            Answer::Found(found) => return found.container(engine, target),
            Answer::Unknown => is_engine_there = true,
            Answer::NoEngine => {}
        }
    }
    if is_engine_there {
        bail!("there is no container {target:?}: `docker ps` and `podman ps` list them");
    }
    bail!(
        "there is no container {target:?}: neither docker nor podman answers here; `netns:NAME`, `netns:/path` or `pid:N` work without"
    );
}

enum Answer {
    Found(Inspected),
    Unknown,
    NoEngine,
}

/// The part of `inspect` that docker and podman have in common.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Inspected {
    name: String,
    state: State,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct State {
    pid: u32,
}

impl Inspected {
    fn container(self, engine: &str, target: &str) -> Result<Container> {
        let pid = self.state.pid;
        ensure!(
            pid != 0,
            "the container {target:?} does not run: start it with `{engine} start {target}` first"
        );
        let netns = NetnsRef::Pid(pid);
        netns.id()?;
        Ok(Container { netns, name: self.name.trim_start_matches('/').to_owned() })
    }
}

async fn inspect(engine: &str, target: &str) -> Result<Answer> {
    let mut command = Command::new(engine);
    command.args(["inspect", "--type", "container", "--", target]).stdin(Stdio::null()).kill_on_drop(true);
    let output = match timeout(ENGINE_TIMEOUT, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Answer::NoEngine),
        Ok(Err(error)) => return Err(error).with_context(|| format!("{engine} cannot be started")),
        Err(_) => return Ok(Answer::NoEngine),
    };
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr).to_lowercase();
        return Ok(if words.contains("no such") { Answer::Unknown } else { Answer::NoEngine });
    }
    read(&output.stdout).with_context(|| format!("the answer of `{engine} inspect {target}` cannot be read"))
}

fn read(json: &[u8]) -> Result<Answer> {
    let found: Vec<Inspected> = serde_json::from_slice(json)?;
    Ok(found.into_iter().next().map_or(Answer::Unknown, Answer::Found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bad_targets_are_refused_with_a_hint() {
        for target in
            ["netns:", "netns:../x", "netns:.", "pid:", "pid:0", "pid:x", "", "-f", "a b", "a/b", "netns:a/b"]
        {
            let error = resolve(target).await.unwrap_err().to_string();
            assert!(error.contains("netns:") || error.contains("pid:"), "{target:?}: {error}");
        }
        let error = resolve("netns:surely-not-there").await.unwrap_err().to_string();
        assert!(error.contains("/run/netns/surely-not-there"), "{error}");
        let error = resolve("netns:/etc/hostname").await.unwrap_err().to_string();
        assert!(error.contains("is not a network namespace"), "{error}");
    }

    #[tokio::test]
    async fn a_process_names_its_namespace() {
        let me = std::process::id();
        let found = resolve(&format!("pid:{me}")).await.unwrap();
        assert_eq!(found.netns, NetnsRef::Pid(me));
        assert_eq!(found.netns.id().unwrap(), super::super::netns::NetnsId::current().unwrap());
    }

    #[test]
    fn both_engines_are_understood() {
        let docker =
            br#"[{"Id":"ab","Name":"/web","State":{"Status":"running","Pid":4242},"NetworkSettings":{}}]"#;
        let podman = br#"[{"Id":"ab","Name":"web","State":{"Status":"exited","Pid":0,"Running":false}}]"#;
        let Answer::Found(found) = read(docker).unwrap() else { panic!("not found") };
        assert_eq!((found.name.as_str(), found.state.pid), ("/web", 4242));
        let Answer::Found(found) = read(podman).unwrap() else { panic!("not found") };
        let error = found.container("podman", "web").unwrap_err().to_string();
        assert!(error.contains("podman start web"), "{error}");
        assert!(matches!(read(b"[]").unwrap(), Answer::Unknown));
        assert!(read(b"{").is_err());
    }
}
