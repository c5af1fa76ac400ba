//! Tests of metrics: a node exports to Prometheus what `docs/reference/metrics.md` and the
//! dashboard describe, and opens no port unless asked to.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpListener};

use anyhow::{Context, Result, ensure};
use lab::{Host, Lab, eventually};
use serde_json::Value;

use crate::dashboard;
use crate::support::{
    MILLISECOND, TIMEOUT, TOKEN, all_reach_all, attached, in_lab, launch_as, wait_for_sessions,
};

const ADDRESS: &str = "127.0.0.1:6785";

fn launch_with_metrics(host: &Host, targets: &[&str]) -> Result<String> {
    let arguments = [&["launch", "--id", "1", "--token", TOKEN], targets].concat();
    host.overnode_with(&arguments, &[("OVERNODE_METRICS", ADDRESS)])?.success()
}

fn get(host: &Host, path: &str) -> Result<(u16, String)> {
    host.get(ADDRESS.parse()?, path)
}

/// Parses exported metrics into values by name and labels.
fn samples(text: &str) -> Result<BTreeMap<String, f64>> {
    ensure!(text.ends_with("# EOF\n"), "the text is truncated");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (series, value) =
                line.rsplit_once(' ').with_context(|| format!("no value: {line}"))?;
            Ok((series.to_owned(), value.parse().with_context(|| format!("no number: {line}"))?))
        })
        .collect()
}

type Labels = BTreeSet<String>;

/// Parses a row of the page: the metric, its labels, and their values if the row lists them.
fn row(line: &str) -> (String, (Labels, Labels)) {
    let quoted =
        |text: &str| text.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Labels>();
    let columns: Vec<&str> = line.split('|').collect();
    let column = |at: usize| columns.get(at).copied().unwrap_or_default();
    let (labels, values) = column(2).split_once(':').unwrap_or((column(2), ""));
    (column(1).trim().trim_matches('`').to_owned(), (quoted(labels), quoted(values)))
}

#[test]
fn metrics_match_the_page_and_the_dashboard() -> Result<()> {
    in_lab(Lab::new("metrics").hosts(2), |lab| {
        let [a, b] = lab.hosts() else { unreachable!() };
        launch_with_metrics(a, &lab.targets())?;
        launch_as(lab, b, 2)?;
        wait_for_sessions(lab)?;
        let containers = [attached(a, "one")?, attached(b, "two")?];
        all_reach_all(&containers)?;
        containers[0].ping(containers[1].address(), 20, MILLISECOND)?;
        // The round-trip time appears only after a few probes.
        let text = eventually(TIMEOUT, || {
            let (code, text) = get(a, "/metrics")?;
            ensure!(code == 200 && text.contains("overnode_peer_rtt_seconds{"), "{code}: {text}");
            ensure!(text.contains("overnode_bulk_peer_in_use{"), "no worker metrics: {text}");
            Ok(text)
        })?;
        let values = samples(&text)?;
        let told = dashboard::told(values.keys().map(String::as_str))?;

        let page = std::fs::read_to_string(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../docs/reference/metrics.md"
        ))?;
        let documented = page.lines().filter(|line| line.starts_with("| `overnode_")).map(row);
        let documented: BTreeMap<String, (Labels, Labels)> = documented.collect();
        let names: BTreeSet<&String> = told.keys().collect();
        ensure!(
            names.iter().copied().eq(documented.keys()),
            "either only exported or only documented: {:?}",
            names.symmetric_difference(&documented.keys().collect())
        );
        for (metric, (labels, allowed)) in &documented {
            ensure!(
                told[metric].keys().eq(labels),
                "{metric} has undocumented or missing labels: {:?}",
                told[metric]
            );
            let values: Labels = told[metric].values().flatten().cloned().collect();
            ensure!(
                allowed.is_empty() || values == *allowed,
                "{metric} has undocumented label values: {values:?}"
            );
        }
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../dist/grafana/overnode.json");
        let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(file)?)?;
        dashboard::check(&dashboard, &told).context("the dashboard uses what is not exported")?;

        for (series, wanted) in [
            ("overnode_peer_reachable{peer=\"2\"}", 1.0),
            ("overnode_peer_session{peer=\"2\"}", 1.0),
            ("overnode_peer_path_direct{peer=\"2\"}", 1.0),
            ("overnode_peer_path_relayed{peer=\"2\"}", 0.0),
            ("overnode_endpoints{kind=\"netns\",state=\"attached\"}", 1.0),
            ("overnode_findings{level=\"critical\"}", 0.0),
            ("overnode_ipam_active_addresses", 1.0),
            ("overnode_ipam_ready", 1.0),
            ("overnode_connections{state=\"established\"}", 1.0),
        ] {
            ensure!(
                values.get(series) == Some(&wanted),
                "{series} is {:?}\n{text}",
                values.get(series)
            );
        }
        let sealed = values.get("overnode_packets_total{reason=\"sealed\",dropped=\"false\"}");
        ensure!(sealed.is_some_and(|sealed| *sealed >= 20.0), "{sealed:?} packets were sealed");
        let rtt = values["overnode_peer_rtt_seconds{peer=\"2\"}"];
        ensure!(rtt > 0.0 && rtt < 1.0, "a round-trip time of {rtt} s");
        // Neither addresses nor names of containers are exported.
        for container in &containers {
            ensure!(!text.contains(&container.address().to_string()), "an address is exported");
        }

        let (code, text) = a.request("GET", "/v1/metrics", "")?;
        ensure!(
            code == 200 && samples(&text)?.keys().eq(values.keys()),
            "the socket exports other metrics"
        );
        ensure!(get(a, "/v1/status")?.0 == 404, "the metrics port serves more than metrics");
        let listening = b.netns().run("ss", &["-Hltn"])?;
        ensure!(!listening.contains(":6785"), "node 2 listens without being asked to: {listening}");

        // The metrics show a node that is gone.
        b.kill_daemon()?;
        lab.cut(a, b)?;
        eventually(TIMEOUT, || {
            let values = samples(&get(a, "/metrics")?.1)?;
            let critical = values["overnode_findings{level=\"critical\"}"];
            ensure!(
                values["overnode_peer_reachable{peer=\"2\"}"] == 0.0 && critical >= 1.0,
                "{values:?}"
            );
            Ok(())
        })?;
        let shown = a.overnode(&["status"])?.success()?;
        ensure!(shown.contains("critical  node 2 (host2) is unreachable"), "{shown}");
        Ok(())
    })
}

#[test]
fn a_node_works_even_if_the_metrics_port_is_taken() -> Result<()> {
    in_lab(Lab::new("metrics-taken").hosts(1), |lab| {
        let host = lab.host(1);
        let address: SocketAddr = ADDRESS.parse()?;
        let taken = host.netns().enter(|| Ok(TcpListener::bind(address)?))?;
        launch_with_metrics(host, &[])?;
        attached(host, "c")?;
        eventually(TIMEOUT, || {
            ensure!(
                host.log().contains("metrics cannot be served at 127.0.0.1:6785"),
                "{}",
                host.log()
            );
            Ok(())
        })?;
        drop(taken);
        eventually(TIMEOUT, || {
            ensure!(get(host, "/metrics")?.0 == 200, "the metrics port does not answer");
            Ok(())
        })
    })
}
