//! Fuzzes a Docker engine: its requests to the plugin in any order, and its replies.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use overnode_core::attachment::Attachment;
use overnode_core::docker::message::{ID_LIMIT, Request, is_id};
use overnode_core::docker::plan::LEASE_EXPIRY;
use overnode_core::docker::report::unsupported;
use overnode_core::docker::{Docker, Report, Settings, Step};
use overnode_daemon::api::check_name;
use overnode_daemon::docker::engine::refused;
use overnode_types::Network;
use overnode_types::text::is_harmless;

use super::input::{Input, MAX_STEPS};

const PATHS: [&str; 17] = [
    "/Plugin.Activate",
    "/NetworkDriver.GetCapabilities",
    "/NetworkDriver.GwAllocCheck",
    "/NetworkDriver.CreateNetwork",
    "/NetworkDriver.DeleteNetwork",
    "/NetworkDriver.CreateEndpoint",
    "/NetworkDriver.DeleteEndpoint",
    "/NetworkDriver.EndpointOperInfo",
    "/NetworkDriver.Join",
    "/NetworkDriver.Leave",
    "/NetworkDriver.DiscoverNew",
    "/IpamDriver.GetCapabilities",
    "/IpamDriver.GetDefaultAddressSpaces",
    "/IpamDriver.RequestPool",
    "/IpamDriver.ReleasePool",
    "/IpamDriver.RequestAddress",
    "/IpamDriver.ReleaseAddress",
];
/// Step of a conversation in which the engine reports its state. Smaller values select one of
/// [`PATHS`].
const REPORT: u8 = 250;

/// Runs one input. The first byte selects the type of the rest.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input(data);
    match input.byte() {
        0 => conversation(&mut input),
        1 => {
            let path = String::from_utf8_lossy(input.bytes()).into_owned();
            if let Err(refusal) = Request::parse(&path, input.0) {
                words(&refusal.to_string());
            }
        }
        2 => match unsupported(input.0) {
            Ok(why) => words(&why.unwrap_or_default()),
            Err(why) => words(&why),
        },
        3 => {
            words(&refused("the request failed", hyper::StatusCode::CONFLICT, input.0).to_string())
        }
        _ => {}
    }
}

/// Simulates an engine that sends any requests. Checks that stored records survive a restart of the
/// daemon and are safe to display.
fn conversation(input: &mut Input<'_>) {
    let network = Network::default();
    let settings = Settings {
        subnet: network.subnet,
        range: network.range,
        nodes: ([10, 39, 240, 1].into(), [10, 39, 255, 255].into()),
        node: [10, 39, 240, 1].into(),
    };
    let mut now = Instant::now();
    let mut docker = Docker::new(settings, BTreeSet::new(), Vec::new(), now);
    let mut disk: Vec<Attachment> = Vec::new();
    for number in 0..MAX_STEPS {
        let Some(kind) = input.step() else { break };
        let steps = if kind >= REPORT {
            let (containers, networks) = (input.bytes(), input.bytes());
            now += LEASE_EXPIRY / 2;
            match Report::read(containers, networks) {
                Ok(report) => {
                    check_report(&report);
                    docker.report(&report, now)
                }
                Err(why) => {
                    words(&why);
                    continue;
                }
            }
        } else {
            now += Duration::from_secs(1);
            let path = PATHS[usize::from(kind) % PATHS.len()];
            match Request::parse(path, input.bytes())
                .and_then(|request| docker.decide(request, now))
            {
                Ok(step) => vec![step],
                Err(refusal) => {
                    words(&refusal.to_string());
                    continue;
                }
            }
        };
        for step in steps {
            carry_out(&mut docker, step, number, now);
        }
        disk = docker.records().cloned().collect();
        for record in &disk {
            check_record(record);
        }
    }
    let again = Docker::new(settings, BTreeSet::new(), disk.clone(), now);
    assert!(again.records().eq(disk.iter()), "a restart changed the records");
}

/// Carries out a step as a node does if nothing fails.
fn carry_out(docker: &mut Docker, step: Step, number: usize, now: Instant) {
    match step {
        Step::Answer(_) => {}
        Step::Find { fixed, name } => {
            let address = fixed.unwrap_or_else(|| [10, 40, 0, number as u8].into());
            let (record, _) = docker.held(address, fixed.is_some(), name, 0);
            docker.keep(record, now);
        }
        Step::Networks(networks, _) => {
            assert!(networks.iter().all(|id| is_id(id)), "{networks:?}");
            docker.set_networks(networks);
        }
        Step::Keep(record, _) | Step::Plug(record, _) | Step::Unplug(record, _) => {
            docker.keep(*record, now);
        }
        Step::Free(addresses, _) => {
            addresses.into_iter().for_each(|address| docker.forget(address))
        }
    }
}

fn check_record(record: &Attachment) {
    let written = serde_json::to_vec(record).expect("a record can be written");
    let read: Attachment = serde_json::from_slice(&written).expect("a record can be read");
    assert_eq!(&read, record);
    assert!(record.name.as_ref().is_none_or(|name| check_name(name).is_ok()), "{record:?}");
    assert!(
        record.target.len() <= ID_LIMIT && record.target.chars().all(is_harmless),
        "{record:?}"
    );
    assert!(record.netns.is_empty() || record.netns.starts_with('/'), "{record:?}");
    assert!(!record.netns.chars().any(char::is_control), "{record:?}");
    assert!(record.host_interface.len() <= 15, "{record:?}");
    if let Some(engine) = record.engine_endpoint() {
        assert!(is_id(&engine.network) && is_id(&engine.endpoint), "{engine:?}");
        assert!(!engine.mac.is_multicast(), "the interface has a multicast address: {engine:?}");
    }
}

fn check_report(report: &Report) {
    assert!(report.networks.iter().all(|id| is_id(id)), "{report:?}");
    for container in &report.containers {
        assert!(
            container.id.len() == 12 && container.id.bytes().all(|byte| byte.is_ascii_hexdigit())
        );
        assert!(
            container.name.as_ref().is_none_or(|name| check_name(name).is_ok()),
            "{container:?}"
        );
        let image = container.image.as_deref().unwrap_or_default();
        assert!(image.len() <= 256 && image.chars().all(is_harmless), "{container:?}");
        assert!(container.aliases.keys().all(|id| is_id(id)), "{container:?}");
    }
}

/// Checks a text that is displayed in a terminal.
fn words(text: &str) {
    assert!(text.len() < 2000, "{} bytes", text.len());
    assert!(text.chars().all(is_harmless), "{text:?}");
}

pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let path = |wanted: &str| PATHS.iter().position(|path| *path == wanted).expect("a path") as u8;
    let ask = |to: &str, body: &str| [vec![path(to)], Input::framed(body.as_bytes())].concat();
    let network = r#"{"NetworkID":"n1","IPv4Data":[{"Pool":"10.32.0.0/12"}],"IPv6Data":null}"#;
    let endpoint = r#"{"NetworkID":"n1","EndpointID":"e1"}"#;
    let interface =
        r#"{"NetworkID":"n1","EndpointID":"e1","Interface":{"Address":"10.40.0.2/12"}}"#;
    let join = r#"{"NetworkID":"n1","EndpointID":"e1","SandboxKey":"/var/run/docker/netns/1"}"#;
    let containers = concat!(
        r#"[{"Id":"0123456789abcdef","Names":["/web"],"Image":"nginx","#,
        r#""NetworkSettings":{"Networks":{"overnode":{"EndpointID":"e1"},"none":null}}}]"#
    );
    let networks =
        r#"[{"Id":"n1","Name":"overnode","Driver":"overnode","Created":"2026-01-01T00:00:00Z"}]"#;
    let pool = r#"{"Pool":"","SubPool":"","V6":false,"Options":null}"#;
    let address = concat!(
        r#"{"PoolID":"overnode","Address":"","#,
        r#""Options":{"com.docker.network.endpoint.name":"web"}}"#
    );
    let gateway =
        r#"{"PoolID":"overnode","Options":{"RequestAddressType":"com.docker.network.gateway"}}"#;
    let told = [Input::framed(containers.as_bytes()), Input::framed(networks.as_bytes())].concat();
    let life = [
        vec![0],
        ask("/IpamDriver.RequestPool", pool),
        ask("/NetworkDriver.CreateNetwork", network),
        ask("/IpamDriver.RequestAddress", address),
        ask("/NetworkDriver.CreateEndpoint", interface),
        ask("/NetworkDriver.Join", join),
        vec![REPORT],
        told,
    ];
    let end = [
        vec![0],
        ask("/Plugin.Activate", ""),
        ask("/IpamDriver.RequestAddress", gateway),
        ask("/NetworkDriver.EndpointOperInfo", endpoint),
        ask("/NetworkDriver.Leave", endpoint),
        ask("/NetworkDriver.DeleteEndpoint", endpoint),
        ask("/IpamDriver.ReleaseAddress", r#"{"PoolID":"overnode","Address":"10.40.0.2"}"#),
        ask("/NetworkDriver.DeleteNetwork", r#"{"NetworkID":"n1"}"#),
    ];
    let parse =
        |path: &str, body: &str| [vec![1], Input::framed(path.as_bytes()), body.into()].concat();
    vec![
        ("life", life.concat()),
        ("end", end.concat()),
        ("unknown-request", parse("/NetworkDriver.Dance", "{}")),
        ("malformed", parse("/IpamDriver.RequestPool", r#"{"Pool":7}"#)),
        ("version", b"\x02{\"Version\":\"19.3.1\",\"ApiVersion\":\"1.40\"}".to_vec()),
        ("refusal", b"\x03{\"message\":\"network overnode has active endpoints\"}".to_vec()),
    ]
}
