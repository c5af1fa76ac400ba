//! Tests of the plugin's socket without an engine: requests that an engine of any version, or any
//! other program, may send.

use anyhow::{Context, Result, ensure};
use lab::Lab;
use lab::docker::Engine;
use serde_json::{Value, json};

use crate::support::{endpoints, launch, nothing_left};

const NETWORK: &str = "5d3c0f2b7a91";
const SANDBOX: &str = "/var/run/docker/netns/0123456789ab";

struct Plugin<'a>(&'a Engine<'a>);

impl Plugin<'_> {
    fn done(&self, method: &str, body: &Value) -> Result<Value> {
        let (code, answer) = self.0.ask_plugin(method, &body.to_string())?;
        let answer: Value = serde_json::from_str(&answer).context(answer)?;
        ensure!(code == 200 && answer["Err"].is_null(), "{method}: {code} {answer}");
        Ok(answer)
    }

    fn refused(&self, method: &str, body: &str, code: u16, why: &str) -> Result<()> {
        let (found, answer) = self.0.ask_plugin(method, body)?;
        let answer: Value = serde_json::from_str(&answer).context(answer)?;
        let said = answer["Err"].as_str().unwrap_or_default();
        ensure!(
            found == code && said.contains(why),
            "{method}: {found} {answer}, instead of {code} and {why:?}"
        );
        ensure!(answer["Error"] == answer["Err"], "`Error` and `Err` differ: {answer}");
        Ok(())
    }

    fn address(&self) -> Result<String> {
        let given = self.done(
            "IpamDriver.RequestAddress",
            &json!({"PoolID": "overnode", "Address": "", "Options": null}),
        )?;
        Ok(given["Address"].as_str().context("no address")?.to_owned())
    }
}

fn endpoint(id: &str, address: &str) -> Value {
    json!({
        "NetworkID": NETWORK,
        "EndpointID": id,
        "Options": {},
        "Interface": {"Address": address, "AddressIPv6": "", "MacAddress": ""},
    })
}

#[test]
fn impossible_requests_are_refused_and_leave_nothing() -> Result<()> {
    let lab = Lab::new("docker-protocol").hosts(1).build()?;
    let engine = Engine::prepare(lab.host(1))?;
    launch(&lab, &engine, 1, &[])?;
    let plugin = Plugin(&engine);
    let host = lab.host(1);

    let manifest = plugin.done("Plugin.Activate", &json!({}))?;
    ensure!(manifest["Implements"] == json!(["NetworkDriver", "IpamDriver"]), "{manifest}");
    ensure!(plugin.done("NetworkDriver.GetCapabilities", &json!({}))?["Scope"] == "local");
    ensure!(
        plugin.done("NetworkDriver.GwAllocCheck", &json!({"Options": null}))?["SkipIPv4"] == true
    );

    // Malformed requests.
    plugin.refused("NetworkDriver.Nonsense", "{}", 404, "does not support")?;
    for body in [
        "",
        "{",
        "[]",
        "null",
        "\"\"",
        "{\"NetworkID\":7}",
        "{\"NetworkID\":\"\"}",
        "{\"NetworkID\":\"../x\"}",
    ] {
        plugin.refused("NetworkDriver.CreateNetwork", body, 400, "")?;
        plugin.refused("NetworkDriver.Join", body, 400, "")?;
    }
    let large = format!("{{\"NetworkID\":\"{}\"}}", "a".repeat(300_000));
    plugin.refused("NetworkDriver.CreateNetwork", &large, 413, "could not be read")?;
    let deep = "[".repeat(100_000);
    plugin.refused("IpamDriver.RequestPool", &deep, 400, "JSON")?;

    // Impossible networks.
    let pool = |pool: &str| {
        json!([
            {"AddressSpace": "overnode", "Pool": pool, "Gateway": null, "AuxAddresses": null}
        ])
    };
    let network = |id: &str, v4: Value, v6: Value| {
        json!({
            "NetworkID": id,
            "IPv4Data": v4,
            "IPv6Data": v6,
            "Options": null,
        })
    };
    let create = |v4, v6| network(NETWORK, v4, v6).to_string();
    plugin.refused(
        "NetworkDriver.CreateNetwork",
        &create(pool("172.18.0.0/16"), json!(null)),
        200,
        "--ipam-driver",
    )?;
    plugin.refused(
        "NetworkDriver.CreateNetwork",
        &create(json!(null), json!(null)),
        200,
        "--ipam-driver",
    )?;
    plugin.refused(
        "NetworkDriver.CreateNetwork",
        &create(pool("10.32.0.0/12"), pool("fd00::/64")),
        200,
        "IPv4",
    )?;
    let ask = |pool: &str, part: &str, v6: bool| {
        json!({"AddressSpace": "overnode", "Pool": pool, "SubPool": part, "V6": v6}).to_string()
    };
    plugin.refused("IpamDriver.RequestPool", &ask("10.0.0.0/8", "", false), 200, "subnet")?;
    plugin.refused("IpamDriver.RequestPool", &ask("", "10.40.0.0/24", false), 200, "--ip-range")?;
    plugin.refused("IpamDriver.RequestPool", &ask("", "", true), 200, "IPv4")?;

    // Unknown networks, pools, addresses and endpoints.
    let first = plugin.address()?;
    plugin.refused(
        "NetworkDriver.CreateEndpoint",
        &endpoint("e1", &first).to_string(),
        200,
        "does not know the network",
    )?;
    let known = network(NETWORK, pool("10.32.0.0/12"), json!(null));
    plugin.done("NetworkDriver.CreateNetwork", &known)?;
    plugin.done("NetworkDriver.CreateNetwork", &known)?;
    plugin.refused(
        "IpamDriver.RequestAddress",
        &json!({"PoolID": "other"}).to_string(),
        200,
        "--ipam-driver",
    )?;
    plugin.refused(
        "IpamDriver.RequestAddress",
        &json!({"PoolID": "overnode", "Address": "x"}).to_string(),
        400,
        "not an IP address",
    )?;
    for (address, why) in [
        ("10.40.0.5", "range"),
        ("192.0.2.1", "outside"),
        ("10.39.240.1", "nodes"),
        ("fd00::1", "outside"),
    ] {
        let request = json!({"PoolID": "overnode", "Address": address});
        plugin.refused("IpamDriver.RequestAddress", &request.to_string(), 200, why)?;
    }
    for id in ["NetworkDriver.Join", "NetworkDriver.EndpointOperInfo"] {
        let request = json!({"NetworkID": NETWORK, "EndpointID": "e9", "SandboxKey": SANDBOX});
        plugin.refused(id, &request.to_string(), 200, "no endpoint")?;
    }

    // Endpoints with an address of another host, with a wrong prefix, with invalid MAC addresses,
    // and with an address or an ID that is already used.
    plugin.refused(
        "NetworkDriver.CreateEndpoint",
        &endpoint("e1", "10.42.0.1/12").to_string(),
        200,
        "did not allocate",
    )?;
    plugin.refused(
        "NetworkDriver.CreateEndpoint",
        &endpoint("e1", &first.replace("/12", "/24")).to_string(),
        200,
        "did not allocate",
    )?;
    plugin.refused(
        "NetworkDriver.CreateEndpoint",
        &endpoint("e1", "nonsense").to_string(),
        400,
        "not an IP address",
    )?;
    for mac in ["01:00:5e:00:00:01", "00:00:00:00:00:00", "02:11:22:33:44", "zz:11:22:33:44:55"] {
        let mut request = endpoint("e1", &first);
        request["Interface"]["MacAddress"] = mac.into();
        plugin.refused("NetworkDriver.CreateEndpoint", &request.to_string(), 200, "MAC address")?;
    }
    let made = plugin.done("NetworkDriver.CreateEndpoint", &endpoint("e1", &first))?;
    ensure!(
        made == plugin.done("NetworkDriver.CreateEndpoint", &endpoint("e1", &first))?,
        "{made}"
    );
    ensure!(
        made["Interface"]["MacAddress"].is_string() && made["Interface"]["Address"].is_null(),
        "{made}"
    );
    plugin.refused(
        "NetworkDriver.CreateEndpoint",
        &endpoint("e2", &first).to_string(),
        200,
        "another endpoint",
    )?;
    let second = plugin.address()?;
    plugin.refused(
        "NetworkDriver.CreateEndpoint",
        &endpoint("e1", &second).to_string(),
        200,
        "already",
    )?;

    // The engine may repeat a join because it missed the reply. A second overnode endpoint in the
    // same container is refused.
    let join = |id: &str| {
        json!({
            "NetworkID": NETWORK,
            "EndpointID": id,
            "SandboxKey": SANDBOX,
            "Options": null,
        })
    };
    let joined = plugin.done("NetworkDriver.Join", &join("e1"))?;
    ensure!(joined["InterfaceName"]["DstPrefix"] == "overnode", "{joined}");
    ensure!(joined == plugin.done("NetworkDriver.Join", &join("e1"))?);
    let source = joined["InterfaceName"]["SrcName"].as_str().context("no interface")?;
    ensure!(host.netns().interfaces()?.iter().any(|name| name == source));
    plugin.done("NetworkDriver.CreateEndpoint", &endpoint("e2", &second))?;
    plugin.refused("NetworkDriver.Join", &join("e2").to_string(), 200, "one network")?;
    for sandbox in ["", "relative", "/a\nb"] {
        let mut request = join("e2");
        request["SandboxKey"] = sandbox.into();
        plugin.refused("NetworkDriver.Join", &request.to_string(), 400, "SandboxKey")?;
    }

    // A restarted daemon still knows the endpoints.
    host.kill_daemon()?;
    engine.overnode(&["resume"])?.success()?;
    ensure!(endpoints(host)?.len() == 2);
    plugin.refused(
        "NetworkDriver.CreateEndpoint",
        &endpoint("e3", &first).to_string(),
        200,
        "another endpoint",
    )?;

    // All of it is removed, twice.
    for _ in 0..2 {
        for id in ["e1", "e2"] {
            let request = json!({"NetworkID": NETWORK, "EndpointID": id});
            plugin.done("NetworkDriver.Leave", &request)?;
            plugin.done("NetworkDriver.DeleteEndpoint", &request)?;
        }
        for address in [&first, &second] {
            let address = address.trim_end_matches("/12");
            plugin.done(
                "IpamDriver.ReleaseAddress",
                &json!({"PoolID": "overnode", "Address": address}),
            )?;
        }
        plugin.done("NetworkDriver.DeleteNetwork", &json!({"NetworkID": NETWORK}))?;
        plugin.done("IpamDriver.ReleasePool", &json!({"PoolID": "overnode"}))?;
    }
    nothing_left(host)
}
