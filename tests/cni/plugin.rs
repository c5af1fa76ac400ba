//! Tests of the plugin, run as runtimes run it.

use std::io::Write as _;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Container, Host, Lab, eventually};
use serde_json::{Value, json};

pub(crate) const TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) struct Call<'a> {
    pub host: &'a Host,
    pub container: &'a str,
    pub netns: String,
    pub ifname: &'a str,
    pub args: &'a str,
}

impl<'a> Call<'a> {
    pub(crate) fn new(host: &'a Host, container: &'a Container) -> Self {
        let netns = container.netns().path().to_string_lossy().into_owned();
        Self { host, container: &container.name, netns, ifname: "eth0", args: "" }
    }

    /// Runs the plugin. Returns whether it succeeded, and its output.
    pub(crate) fn run(&self, command: &str, more: &Value) -> Result<(bool, Value)> {
        // dash has no `exec -a`.
        self.run_as("bash", &["-c", "exec -a overnode-cni overnode"], command, more)
    }

    /// Runs a stock plugin in the same way, which must succeed.
    pub(crate) fn stock(&self, plugin: &str, command: &str, more: &Value) -> Result<Value> {
        let (success, value) =
            self.run_as(&format!("/usr/lib/cni/{plugin}"), &[], command, more)?;
        ensure!(success, "{plugin} {command}: {value}");
        Ok(value)
    }

    fn run_as(
        &self,
        program: &str,
        arguments: &[&str],
        command: &str,
        more: &Value,
    ) -> Result<(bool, Value)> {
        let conf =
            extended(&json!({"cniVersion": "1.1.0", "name": "net", "type": "overnode-cni"}), more)?;
        let mut plugin = self.host.command(program)?;
        plugin
            .args(arguments)
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", self.container)
            .env("CNI_NETNS", &self.netns)
            .env("CNI_IFNAME", self.ifname)
            .env("CNI_ARGS", self.args)
            .env("CNI_PATH", "/usr/lib/cni")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = plugin.spawn()?;
        child.stdin.take().context("no pipe")?.write_all(conf.to_string().as_bytes())?;
        let output = child.wait_with_output()?;
        let value = if output.stdout.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&output.stdout)?
        };
        Ok((output.status.success(), value))
    }

    pub(crate) fn done(&self, command: &str, more: &Value) -> Result<Value> {
        let (success, value) = self.run(command, more)?;
        ensure!(success, "{command}: {value}");
        Ok(value)
    }

    pub(crate) fn refused(&self, command: &str, more: &Value, code: u64) -> Result<()> {
        let (success, value) = self.run(command, more)?;
        ensure!(!success && value["code"] == code, "{command}: {value} instead of {code}");
        Ok(())
    }
}

/// Returns the first object extended by the keys of the second.
pub(crate) fn extended(base: &Value, more: &Value) -> Result<Value> {
    let mut base = base.as_object().context("not a JSON object")?.clone();
    base.extend(more.as_object().context("not a JSON object")?.clone());
    Ok(Value::Object(base))
}

pub(crate) fn launched(name: &str, hosts: usize) -> Result<Lab> {
    launched_with(name, hosts, &[])
}

pub(crate) fn launched_with(name: &str, hosts: usize, options: &[&str]) -> Result<Lab> {
    let lab = Lab::new(name).hosts(hosts).build()?;
    for (id, host) in (1..).zip(lab.hosts()) {
        let id = i32::to_string(&id);
        let words = [
            &["launch", "--id", &id, "--token", "cni test", "--no-docker"],
            options,
            &lab.targets(),
        ]
        .concat();
        host.overnode(&words)?.success()?;
    }
    Ok(lab)
}

pub(crate) fn endpoints(host: &Host) -> Result<Vec<Value>> {
    Ok(host.status()?["endpoints"].as_array().context("no list of endpoints")?.clone())
}

#[test]
fn attachments_can_be_added_checked_and_deleted() -> Result<()> {
    let lab = launched("cni-life", 2)?;
    let (host, other) = (lab.host(1), lab.host(2));
    let (a, b) = (host.container("a")?, other.container("b")?);
    let none = json!({});
    let call = Call { args: "IgnoreUnknown=1;K8S_POD_NAME=alpha", ..Call::new(host, &a) };
    let there = Call { ifname: "net1", ..Call::new(other, &b) };
    call.done("STATUS", &none)?;

    // The interface has the requested name, and the result describes the actual state.
    let result = call.done("ADD", &none)?;
    ensure!(
        result["interfaces"][1]["name"] == "eth0"
            && result["interfaces"][1]["sandbox"] == call.netns,
        "{result}"
    );
    let address = result["ips"][0]["address"].as_str().context("no address")?.to_owned();
    let link = a.run("ip", &["address", "show", "eth0"])?;
    ensure!(link.contains(&address), "{link} instead of {address}");
    let mac = result["interfaces"][1]["mac"].as_str().context("no mac")?;
    ensure!(link.contains(mac), "{link} instead of {mac}");
    ensure!(result["dns"]["nameservers"][0].is_string(), "{result}");
    let listed = endpoints(host)?;
    ensure!(
        listed[0]["name"] == "alpha" && listed[0]["kind"] == "cni" && listed[0]["target"] == "a",
        "{listed:?}"
    );
    ensure!(
        listed[0]["cni"] == json!({"network": "net", "ifname": "eth0", "interface": "eth0"}),
        "{listed:?}"
    );

    // Other containers reach it.
    let far = there.done(
        "ADD",
        &json!({"runtimeConfig": {"ips": ["10.33.1.2"], "mac": "02:00:00:00:00:09"}}),
    )?;
    ensure!(far["ips"][0]["address"] == "10.33.1.2/12", "{far}");
    ensure!(b.run("ip", &["link", "show", "net1"])?.contains("02:00:00:00:00:09"));
    a.reach("10.33.1.2".parse()?, TIMEOUT)?;

    // `CHECK` accepts the unchanged attachment, and rejects others.
    let previous = json!({"prevResult": result});
    call.done("CHECK", &previous)?;
    call.refused("CHECK", &json!({"prevResult": far}), 100)?;
    Call { container: "unknown", ..Call::new(host, &a) }.refused("CHECK", &previous, 3)?;
    call.refused("ADD", &none, 100)?;
    a.run("ip", &["address", "flush", "dev", "eth0"])?;
    call.refused("CHECK", &previous, 100)?;

    // `DEL` does what it can, and can be repeated.
    call.done("DEL", &previous)?;
    call.done("DEL", &none)?;
    ensure!(endpoints(host)?.is_empty(), "{:?}", endpoints(host)?);
    ensure!(!a.run("ip", &["link"])?.contains("eth0"));
    ensure!(a.run("ip", &["rule"])?.lines().count() == 3, "routing rules are left");

    // An existing interface with the requested name is an error and is not changed.
    a.run("ip", &["link", "add", "eth0", "type", "veth", "peer", "name", "mine"])?;
    call.refused("ADD", &none, 100)?;
    call.done("DEL", &none)?;
    ensure!(a.run("ip", &["link", "show", "eth0"])?.contains("eth0"));
    ensure!(endpoints(host)?.is_empty());

    // The plugin runs after another plugin, which made this interface.
    let chained =
        json!({"prevResult": {"interfaces": [{"name": "eth0", "sandbox": call.netns}], "ips": []}});
    let result = call.done("ADD", &chained)?;
    ensure!(
        result["interfaces"][2]["name"] == "overnode0" && result["interfaces"][0]["name"] == "eth0",
        "{result}"
    );
    call.done("CHECK", &json!({"prevResult": result}))?;
    a.reach("10.33.1.2".parse()?, TIMEOUT)?;
    call.done("DEL", &json!({"prevResult": result}))?;
    Call { netns: "/run/netns/nonexistent".into(), ..Call::new(host, &a) }
        .refused("ADD", &none, 3)?;
    Ok(())
}

#[test]
fn garbage_collection_affects_only_one_network() -> Result<()> {
    let lab = launched("cni-gc", 1)?;
    let host = lab.host(1);
    let containers = ["keep", "stale", "other", "hand"]
        .map(|name| host.container(name))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let [keep, stale, other, hand] = &containers[..] else { unreachable!() };
    let elsewhere = json!({"name": "elsewhere"});
    // All three at the same time.
    std::thread::scope(|scope| -> Result<()> {
        let keep = scope.spawn(|| Call::new(host, keep).done("ADD", &json!({})));
        let stale = scope.spawn(|| Call::new(host, stale).done("ADD", &json!({})));
        let other = scope.spawn(|| Call::new(host, other).done("ADD", &elsewhere));
        for added in [keep, stale, other] {
            added.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(())
    })?;
    host.attach(hand, &[])?;
    let addresses: std::collections::BTreeSet<String> =
        endpoints(host)?.iter().map(|it| it["address"].to_string()).collect();
    ensure!(addresses.len() == 4, "{addresses:?}");
    let call = Call::new(host, keep);
    call.refused("GC", &json!({}), 7)?;
    let valid = json!({"cni.dev/valid-attachments": [{"containerID": "keep", "ifname": "eth0"}]});
    ensure!(call.done("GC", &valid)? == Value::Null, "GC must print nothing on success");
    let names: Vec<String> = endpoints(host)?.iter().map(|it| it["target"].to_string()).collect();
    ensure!(names.len() == 3 && !names.contains(&"\"stale\"".to_owned()), "{names:?}");
    call.done("GC", &json!({"cni.dev/valid-attachments": null}))?;
    ensure!(endpoints(host)?.len() == 2);
    call.done("GC", &json!({"name": "elsewhere", "cni.dev/valid-attachments": []}))?;
    ensure!(endpoints(host)?.len() == 1, "GC must not remove what was attached by hand");
    Ok(())
}

#[test]
fn a_container_deleted_while_no_daemon_runs_is_not_attached_again() -> Result<()> {
    let lab = launched("cni-down", 1)?;
    let host = lab.host(1);
    let (a, b) = (host.container("a")?, host.container("b")?);
    let none = json!({});
    let call = Call::new(host, &a);
    let gone = Call { container: "b", netns: Call::new(host, &b).netns, ..Call::new(host, &a) };
    call.done("ADD", &none)?;
    gone.done("ADD", &none)?;
    host.kill_daemon()?;
    call.refused("STATUS", &none, 51)?;
    let c = host.container("c")?;
    Call::new(host, &c).refused("ADD", &none, 11)?;
    call.done("DEL", &none)?;
    call.done("DEL", &none)?;
    ensure!(!a.run("ip", &["link"])?.contains("eth0"), "the interface is still there");
    drop(b);
    gone.done("DEL", &none)?;
    host.overnode(&["resume"])?.success()?;
    eventually(TIMEOUT, || {
        let left = endpoints(host)?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })?;
    ensure!(!a.run("ip", &["link"])?.contains("eth0"), "the container was attached again");
    call.done("ADD", &none)?;
    call.done("DEL", &none)?;
    Ok(())
}

/// A small file system for a host's state. It is unmounted when this is dropped.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(host: &Host) -> Result<Self> {
        let path = host.state_directory();
        std::fs::create_dir_all(&path)?;
        nix::mount::mount(
            Some("tmpfs"),
            &path,
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            Some("size=8m,mode=0700"),
        )?;
        Ok(Self(path))
    }

    /// Writes until the file system is full.
    fn fill(&self) -> Result<()> {
        let mut file = std::fs::File::create(self.0.join("filler"))?;
        let page = [1; 4096];
        loop {
            match file.write(&page) {
                Ok(1..) => {}
                Ok(0) => return Ok(()),
                Err(why) if why.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
                Err(why) => return Err(why.into()),
            }
        }
    }

    fn make_room(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.0.join("filler"))?)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// On a full disk, existing attachments keep working, and new ones fail with a clear error and
/// leave nothing behind. Once there is room again, everything works.
#[test]
fn a_full_disk_is_reported_and_nothing_is_lost() -> Result<()> {
    const MANY: usize = 60;
    let lab = Lab::new("cni-full").hosts(1).build()?;
    let host = lab.host(1);
    let disk = SmallDisk::mount(host)?;
    let words =
        [vec!["launch", "--id", "1", "--token", "cni test", "--no-docker"], lab.targets()].concat();
    host.overnode(&words)?.success()?;
    let none = json!({});
    let (a, b) = (host.container("a")?, host.container("b")?);
    let (first, second) = (Call::new(host, &a), Call::new(host, &b));
    let previous = json!({"prevResult": first.done("ADD", &none)?});
    let far =
        second.done("ADD", &none)?["ips"][0]["address"].as_str().context("no address")?.to_owned();
    let far = far.split('/').next().context("no address")?.parse()?;
    let before = endpoints(host)?;
    disk.fill()?;
    // The database first uses free space inside its file, so attachments succeed until one fails.
    let mut added = Vec::new();
    let mut refusal = None;
    for number in 0..MANY {
        let container = host.container(&format!("c{number}"))?;
        let (success, value) = Call::new(host, &container).run("ADD", &none)?;
        if !success {
            let left = container.run("ip", &["link"])?;
            ensure!(!left.contains("eth0"), "an interface is left: {left}");
            refusal = Some((value, container));
            break;
        }
        added.push(container);
    }
    let (said, container) = refusal.context("no ADD was refused")?;
    ensure!(said.to_string().contains("disk is not full"), "{said}");
    let listed = endpoints(host)?;
    ensure!(listed.len() == before.len() + added.len(), "{} listed: {listed:?}", listed.len());
    ensure!(
        listed.starts_with(&before) || before.iter().all(|it| listed.contains(it)),
        "{listed:?}"
    );
    first.done("CHECK", &previous)?;
    a.reach(far, TIMEOUT)?;

    disk.make_room()?;
    let call = Call::new(host, &container);
    eventually(TIMEOUT, || call.done("ADD", &none))?;
    // Everything was stored.
    host.kill_daemon()?;
    host.overnode(&["resume"])?.success()?;
    ensure!(endpoints(host)?.len() == before.len() + added.len() + 1, "{:?}", endpoints(host)?);
    a.reach(far, TIMEOUT)?;
    for container in added.iter().chain([&a, &b, &container]) {
        Call::new(host, container).done("DEL", &none)?;
    }
    ensure!(endpoints(host)?.is_empty(), "{:?}", endpoints(host)?);
    host.overnode(&["reset", "--force"])?.success()?;
    Ok(())
}
