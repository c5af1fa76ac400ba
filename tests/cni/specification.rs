//! Tests of requirements of the CNI specification (1.1) that only a node can show.
//!
//! Each test names its section. Unit tests of the plugin cover what needs no node. Other tests
//! cover `ADD` with an existing interface, repeated `DEL`, `CHECK`, several containers at a time
//! and `GC` of one network (section 2, section 3, Lifecycle & Ordering) in `plugin`, and chains
//! with `bridge` and `portmap` in `podman`.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Container, eventually};
use serde_json::{Value, json};

use crate::plugin::{Call, TIMEOUT, endpoints, extended, launched, launched_with};
use crate::podman::nothing_left;

/// The versions that the stock plugins support as well.
const COMMON: [&str; 4] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0"];

/// Section 2, `ADD` and `CHECK`. Section 3, Adding and Deleting an attachment. Section 5, ADD
/// Success. The stock plugins accept this plugin's results in each version, and each plugin changes
/// only its own part.
#[test]
fn this_plugin_works_with_the_stock_plugins_in_every_version() -> Result<()> {
    let lab = launched("cni-chain", 1)?;
    let host = lab.host(1);
    for (number, version) in COMMON.iter().enumerate() {
        let has_check = !version.starts_with("0.3");
        let folder = |name: &str| lab.folder().join(name).to_string_lossy().into_owned();
        let of = |more: Value| extended(&json!({"cniVersion": version}), &more);
        let with =
            |conf: &Value, previous: &Value| extended(conf, &json!({"prevResult": previous}));
        let tuning = of(json!({"type": "tuning", "mtu": 1300, "dataDir": folder("tuning")}))?;
        let mtu = |container: &Container, name: &str| container.run("ip", &["link", "show", name]);

        // This plugin alone, followed by one that changes its interface.
        let container = host.container(&format!("a{number}"))?;
        let call = Call::new(host, &container);
        let made = call.done("ADD", &of(json!({}))?)?;
        let tuned = call.stock("tuning", "ADD", &with(&tuning, &made)?)?;
        ensure!(
            tuned["cniVersion"] == *version
                && tuned["dns"]["nameservers"] == made["dns"]["nameservers"]
        );
        ensure!(tuned["ips"][0]["address"] == made["ips"][0]["address"], "{tuned} of {made}");
        ensure!(
            tuned["interfaces"][1]["name"] == "eth0" && tuned["ips"][0]["interface"] == 1,
            "{tuned}"
        );
        ensure!(mtu(&container, "eth0")?.contains("mtu 1300"), "the plugin `tuning` had no effect");
        container.run("ip", &["route", "add", "192.0.2.0/24", "dev", "eth0"])?;
        if has_check {
            call.done("CHECK", &of(json!({"prevResult": tuned}))?)?;
        }
        call.stock("tuning", "DEL", &with(&tuning, &tuned)?)?;
        call.done("DEL", &of(json!({"prevResult": tuned}))?)?;

        // This plugin in the middle of a chain.
        let container = host.container(&format!("b{number}"))?;
        let call = Call::new(host, &container);
        let data = folder("host-local");
        let ipam = json!({"type": "host-local", "subnet": "10.88.80.0/24", "dataDir": data});
        let first =
            of(json!({"type": "ptp", "ipam": ipam, "dns": {"nameservers": ["192.0.2.53"]}}))?;
        let ptp = call.stock("ptp", "ADD", &first)?;
        let both = call.done("ADD", &of(json!({"prevResult": ptp}))?)?;
        let list = |result: &Value, key: &str| result[key].as_array().cloned().unwrap_or_default();
        for (key, more) in [("interfaces", 2), ("ips", 1), ("routes", 0)] {
            let (before, after) = (list(&ptp, key), list(&both, key));
            ensure!(
                after.starts_with(&before) && after.len() == before.len() + more,
                "{key}: {both}"
            );
        }
        let last = call.stock("tuning", "ADD", &with(&tuning, &both)?)?;
        ensure!(
            mtu(&container, "eth0")?.contains("mtu 1300")
                && !mtu(&container, "overnode0")?.contains("1300")
        );
        if has_check {
            call.done("CHECK", &of(json!({"prevResult": last}))?)?;
            // `ptp` and `bridge` expect all addresses of a result on their own interface, so their
            // `CHECK` is left out. For this, docs/guide/cni.md recommends `disableCheck`.
            call.stock("tuning", "CHECK", &with(&tuning, &last)?)?;
        }
        call.stock("tuning", "DEL", &with(&tuning, &last)?)?;
        call.done("DEL", &of(json!({"prevResult": last}))?)?;
        let left = container.run("ip", &["link"])?;
        ensure!(
            left.contains("eth0") && !left.contains("overnode0"),
            "DEL must remove only its own interface: {left}"
        );
        call.stock("ptp", "DEL", &with(&first, &last)?)?;
        ensure!(endpoints(host)?.is_empty(), "{version}: {:?}", endpoints(host)?);
    }
    Ok(())
}

/// Section 2, `ADD` and Parameters: the name of a chained interface may be taken as well. `CHECK`
/// rejects an attachment that does not work.
#[test]
fn taken_interface_names_and_disabled_interfaces_are_reported() -> Result<()> {
    let lab = launched("cni-taken", 1)?;
    let (host, none) = (lab.host(1), json!({}));
    let container = host.container("a")?;
    let call = Call::new(host, &container);
    container.run("ip", &["link", "add", "overnode0", "type", "veth", "peer", "name", "mine"])?;
    let chained = json!({"prevResult": {"interfaces": [{"name": "eth0", "sandbox": call.netns}]}});
    call.refused("ADD", &chained, 100)?;
    call.done("DEL", &chained)?;
    ensure!(
        container.run("ip", &["link", "show", "overnode0"])?.contains("mine"),
        "DEL removed an interface that is not its own"
    );
    ensure!(endpoints(host)?.is_empty(), "{:?}", endpoints(host)?);

    let made = json!({"prevResult": call.done("ADD", &none)?});
    call.done("CHECK", &made)?;
    container.run("ip", &["link", "set", "eth0", "down"])?;
    call.refused("CHECK", &made, 100)?;
    container.run("ip", &["link", "set", "eth0", "up"])?;
    call.done("CHECK", &made)?;
    call.done("DEL", &made)?;
    Ok(())
}

/// Section 2, `DEL`: deletes attachments that a reboot ended, before the daemon runs and
/// afterwards, with and without the namespace's path and the result. It never deletes another
/// container's attachment that has that path now.
#[test]
fn attachments_can_be_deleted_after_a_reboot() -> Result<()> {
    let lab = launched("cni-reboot", 1)?;
    let (host, none) = (lab.host(1), json!({}));
    let names = ["early", "late", "bare"];
    let containers =
        names.map(|name| host.container(name)).into_iter().collect::<Result<Vec<_>>>()?;
    let paths: Vec<String> = containers.iter().map(|it| Call::new(host, it).netns).collect();
    let mut results = Vec::new();
    for container in &containers {
        results.push(json!({"prevResult": Call::new(host, container).done("ADD", &none)?}));
    }
    host.lose_power()?;
    drop(containers);
    let call = |at: usize| Call {
        host,
        container: names[at],
        netns: paths[at].clone(),
        ifname: "eth0",
        args: "",
    };
    for _ in 0..2 {
        call(0).done("DEL", &results[0])?;
        call(0).done("DEL", &none)?;
    }
    host.overnode(&["resume"])?.success()?;
    call(1).done("DEL", &results[1])?;
    nothing_left(host)?;
    for (at, result) in results.iter().enumerate() {
        for _ in 0..2 {
            call(at).done("DEL", result)?;
            Call { netns: String::new(), ..call(at) }.done("DEL", &none)?;
        }
    }

    // Another container gets the same path.
    let other = host.container("early")?;
    let others = Call { container: "other", ..Call::new(host, &other) };
    ensure!(others.netns == paths[0]);
    let made = json!({"prevResult": others.done("ADD", &none)?});
    ensure!(
        made["prevResult"]["ips"] != results[0]["prevResult"]["ips"],
        "a released address was given out at once"
    );
    call(0).done("DEL", &results[0])?;
    others.done("CHECK", &made)?;
    host.kill_daemon()?;
    call(0).done("DEL", &results[0])?;
    ensure!(
        other.run("ip", &["link"])?.contains("eth0"),
        "another container's interface was deleted"
    );
    host.overnode(&["resume"])?.success()?;
    others.done("CHECK", &made)?;
    others.done("DEL", &made)?;
    nothing_left(host)
}

/// Forwards a request to a node, but refuses to detach one container. No real error affects only
/// one of several containers.
fn relay(mut client: UnixStream, socket: &Path, refused: &str) -> io::Result<()> {
    let mut request = Vec::new();
    let (head, length) = loop {
        let mut more = [0; 4096];
        let read = client.read(&mut more)?;
        request.extend(&more[..read]);
        let text = String::from_utf8_lossy(&request).into_owned();
        if let Some(head) = text.find("\r\n\r\n") {
            let length = text.to_ascii_lowercase();
            let length =
                length.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
            break (head, length.unwrap_or(0));
        }
        if read == 0 {
            return Ok(());
        }
    };
    while request.len() < head + 4 + length {
        let mut more = [0; 4096];
        let read = client.read(&mut more)?;
        request.extend(&more[..read]);
    }
    let text = String::from_utf8_lossy(&request);
    if text.starts_with("POST /v1/detach") && text.contains(refused) {
        let body = json!({"error": "its interface cannot be deleted: try again", "kind": "failed"})
            .to_string();
        let head = "HTTP/1.1 500 Internal Server Error\r\n\
                    Content-Type: application/json\r\nConnection: close";
        return write!(client, "{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    }
    let mut node = UnixStream::connect(socket)?;
    node.write_all(&request[..head])?;
    node.write_all(b"\r\nConnection: close")?;
    node.write_all(&request[head..])?;
    io::copy(&mut node, &mut client)?;
    client.shutdown(Shutdown::Both)
}

/// Section 2, `GC`: an attachment that cannot be removed does not stop the others from being
/// removed, and is reported. Otherwise there is no output. Attachments are identified by container
/// and interface (section 3).
#[test]
fn garbage_collection_continues_after_an_error() -> Result<()> {
    let lab = launched("cni-gc-error", 1)?;
    let (host, none) = (lab.host(1), json!({}));
    let names = ["stale1", "stale2", "stale3", "keep"];
    let containers =
        names.map(|name| host.container(name)).into_iter().collect::<Result<Vec<_>>>()?;
    for container in &containers {
        Call::new(host, container).done("ADD", &none)?;
    }
    let call = Call::new(host, &containers[3]);
    let folder = lab.folder().join("relay");
    std::fs::create_dir(&folder)?;
    let listener = UnixListener::bind(folder.join("overnode.sock"))?;
    listener.set_nonblocking(true)?;
    let (socket, done) = (host.socket(), AtomicBool::new(false));
    let valid = [("keep", "eth0"), ("stale1", "eth1"), ("stale4", "eth0")]
        .map(|(id, ifname)| json!({"containerID": id, "ifname": ifname}));
    let valid = json!({"cni.dev/valid-attachments": valid});
    let (success, said) = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((client, _)) => {
                        let _ = client.set_nonblocking(false);
                        if let Err(why) = relay(client, &socket, "stale2") {
                            eprintln!("cannot forward a request: {why}");
                        }
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(10)),
                }
            }
        });
        let outcome = call.run("GC", &extended(&valid, &json!({"runDir": folder}))?);
        done.store(true, Ordering::Relaxed);
        outcome
    })?;
    ensure!(!success && said["code"] == 100, "{said}");
    let details = said["details"].as_str().context("no details")?;
    ensure!(details.contains("stale2") && details.contains("cannot be deleted"), "{said}");
    ensure!(!details.contains("stale1") && !details.contains("stale3"), "{said}");
    let left = || -> Result<Vec<String>> {
        Ok(endpoints(host)?
            .iter()
            .filter_map(|it| it["target"].as_str().map(str::to_owned))
            .collect())
    };
    let mut stayed = left()?;
    stayed.sort_unstable();
    ensure!(stayed == ["keep", "stale2"], "{stayed:?}");
    ensure!(call.done("GC", &valid)? == Value::Null && left()? == ["keep"], "{:?}", left()?);
    ensure!(call.done("GC", &valid)? == Value::Null && left()? == ["keep"], "{:?}", left()?);
    call.done("DEL", &none)?;
    nothing_left(host)
}

/// Section 2, `STATUS`: reports that nothing can be added without free addresses. `ADD` says that
/// it may work later and leaves nothing behind. It does not require a previous `STATUS`.
#[test]
fn exhausted_addresses_are_reported() -> Result<()> {
    let lab = launched_with("cni-exhausted", 1, &["--range", "10.40.0.0/28"])?;
    let (host, none) = (lab.host(1), json!({}));
    let mut added: Vec<Container> = Vec::new();
    let refused = loop {
        let container = host.container(&format!("c{}", added.len()))?;
        let (success, said) = Call::new(host, &container).run("ADD", &none)?;
        if !success {
            ensure!(said["code"] == 11, "{said}");
            ensure!(!container.run("ip", &["link"])?.contains("eth0"), "an interface is left");
            break container;
        }
        added.push(container);
        ensure!(added.len() <= 16, "more addresses were given out than the range has");
    };
    ensure!(!added.is_empty());
    let call = Call::new(host, &refused);
    call.refused("STATUS", &none, 50)?;
    call.done("DEL", &none)?;
    Call::new(host, &added[0]).done("DEL", &none)?;
    call.done("STATUS", &none)?;
    call.done("ADD", &none)?;
    ensure!(endpoints(host)?.len() == added.len());
    Ok(())
}

/// Section 2, `VERSION`, `STATUS` and `GC`: they work with only their own variables. Section 5,
/// Error, code 5: unreadable input.
#[test]
fn commands_need_few_variables_and_report_missing_input() -> Result<()> {
    let lab = launched("cni-few", 1)?;
    let host = lab.host(1);
    let run = |command: &str, script: &str| -> Result<(bool, Value)> {
        let mut plugin = host.command("bash")?;
        plugin.args(["-c", script]).env("CNI_COMMAND", command).env("CNI_PATH", "/usr/lib/cni");
        let output =
            plugin.stdout(Stdio::piped()).stdin(Stdio::null()).spawn()?.wait_with_output()?;
        let said = if output.stdout.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&output.stdout)?
        };
        Ok((output.status.success(), said))
    };
    let with = |conf: Value| format!("exec -a overnode-cni overnode <<< '{conf}'");
    let conf = json!({
        "cniVersion": "1.1.0",
        "name": "net",
        "type": "overnode-cni",
        "cni.dev/valid-attachments": [],
    });
    for command in ["STATUS", "GC"] {
        ensure!(run(command, &with(conf.clone()))? == (true, Value::Null), "{command}");
    }
    let (success, said) = run("VERSION", &with(json!({"cniVersion": "0.4.0"})))?;
    ensure!(success && said["cniVersion"] == "0.4.0", "{said}");
    let (success, said) = run("VERSION", "exec -a overnode-cni overnode")?;
    ensure!(
        success && said["supportedVersions"].as_array().is_some_and(|it| it.len() == 5),
        "{said}"
    );
    // A folder as the input cannot be read.
    for command in ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"] {
        let (success, said) = run(command, "exec -a overnode-cni overnode < /")?;
        ensure!(
            !success && said["code"] == 5 && said["cniVersion"] == "1.1.0",
            "{command}: {said}"
        );
    }
    eventually(TIMEOUT, || nothing_left(host))
}
