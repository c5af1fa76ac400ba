//! Derives a node's health from its [`Status`] alone: what is wrong, how severe it is, and what to
//! do about it.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::status::{
    ConnectionState, Direction, EndpointState, LastError, Path, PeerStatus, SessionState, Status,
    TargetState,
};
use overnode_types::NodeId;

/// Probe loss per mille above which a direct path gets a finding.
const LOSSY: u16 = 20;
/// Seconds that a handshake may take before its absence is a finding.
const HANDSHAKE: u64 = 10;
/// Number of nodes that a finding names before it only counts the rest.
const NAMED: usize = 5;

/// The health of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// The highest level among the findings; `ok` if there are none.
    pub level: Level,
    /// The findings, most severe first.
    pub findings: Vec<Finding>,
}

/// The severity of a finding.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Nothing is wrong.
    #[default]
    Ok,
    /// Everything works, but not as well or as safely as it should.
    Warning,
    /// Something does not work.
    Critical,
}

/// One problem of the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How severe it is.
    pub level: Level,
    /// What is wrong and why, in one line.
    pub what: String,
    /// What to do. Empty if `what` says so already.
    pub advice: String,
}

impl Health {
    /// Computes the health from a status.
    pub fn of(status: &Status) -> Self {
        let mut findings = Vec::new();
        let critical = |what: &String| Finding::new(Level::Critical, what, "");
        let all = [&status.node.underlay_problems, &status.node.problems, &status.ipam.problems];
        findings.extend(all.into_iter().flatten().map(critical));
        findings.extend(
            status.ipam.notices.iter().map(|notice| Finding::new(Level::Warning, notice, "")),
        );
        unreachable(status, &mut findings);
        for peer in status.peers.iter().filter(|peer| !peer.myself && peer.reachable != Some(false))
        {
            findings.extend(of_data(status, peer));
        }
        addresses(status, &mut findings);
        targets(status, &mut findings);
        if let Some(error) = &status.node.bulk.error {
            let advice = "fix it, or launch with `--bulk off` to do without: only bulk flows are \
                          slower then";
            findings.push(Finding::new(Level::Warning, error, advice));
        }
        refused(status, &mut findings);
        for endpoint in status.endpoints.iter().filter(|it| it.state == EndpointState::Gone) {
            let name = endpoint.name.clone().unwrap_or_else(|| endpoint.target.to_string());
            findings.push(Finding::new(
                Level::Warning,
                format_args!("{name} ({}) has lost its interface", endpoint.address),
                format_args!(
                    "it comes back within a minute if its network namespace still exists; \
                     otherwise restart it, or run `overnode detach {}`",
                    endpoint.target
                ),
            ));
        }
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.level));
        Self { level: findings.first().map_or(Level::Ok, |worst| worst.level), findings }
    }
}

impl Finding {
    fn new(level: Level, what: impl ToString, advice: impl ToString) -> Self {
        Self { level, what: what.to_string(), advice: advice.to_string() }
    }
}

/// Returns advice about packets that do not arrive. Problems of this host's own interfaces come
/// first.
fn unless_here<'a>(status: &Status, advice: &'a str) -> &'a str {
    if status.node.underlay_problems.is_empty() {
        advice
    } else {
        "first fix the problems of this host's own interfaces"
    }
}

fn unreachable(status: &Status, findings: &mut Vec<Finding>) {
    let lost: Vec<&PeerStatus> = status
        .peers
        .iter()
        .filter(|peer| peer.reachable == Some(false) && !peer.reclaimed)
        .collect();
    let (what, advice) = match lost[..] {
        [] => return,
        [one] => {
            let since =
                one.since_seconds.map(|s| format!(" (for {})", duration(s))).unwrap_or_default();
            let advice = format!(
                "check that its host and its node are running, and that TCP and UDP ports 6783 and \
                 6784 are open; if it is gone for good: {}",
                reclaim(status, one.id)
            );
            (format!("{} is unreachable{since}", named(one.id, &one.nickname)), advice)
        }
        _ => {
            let mut names = String::new();
            for peer in lost.iter().take(NAMED) {
                let _ = write!(names, "{}{}", if names.is_empty() { "" } else { ", " }, peer.id);
            }
            let more = lost.len().saturating_sub(NAMED);
            let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
            let advice = "if this host is the one that is cut off, check its own network first: \
                          `overnode status --connections`";
            (format!("{} nodes are unreachable: {names}{rest}", lost.len()), advice.to_owned())
        }
    };
    findings.push(Finding::new(Level::Critical, what, unless_here(status, &advice)));
}

/// Returns the command that reclaims the addresses of a lost node, and where to run it.
fn reclaim(status: &Status, gone: NodeId) -> String {
    let place = if status.node.id.has_initial_quarter() { "" } else { " on one of nodes 1 to 4" };
    format!("`overnode reclaim {gone}`{place}")
}

/// Returns the finding about data packets to a reachable node, if there is one.
fn of_data(status: &Status, peer: &PeerStatus) -> Option<Finding> {
    let advice =
        unless_here(status, "check that UDP 6784 passes between the two hosts, in both directions");
    let name = named(peer.id, &peer.nickname);
    let waited = peer.since_seconds.is_none_or(|since| since >= HANDSHAKE);
    let Some(data) = &peer.data else {
        return waited.then(|| {
            Finding::new(
                Level::Critical,
                format_args!(
                    "packets do not reach {name}: this host's eBPF programs do not know it"
                ),
                "check the daemon's log for that node",
            )
        });
    };
    if data.session != SessionState::Established {
        // A new node needs a moment for its handshake.
        return waited.then(|| {
            let why = because(data.last_error.as_ref());
            Finding::new(
                Level::Critical,
                format_args!("packets do not reach {name}: there are no session keys{why}"),
                advice,
            )
        });
    }
    let route = data.route.as_ref()?;
    match route.path {
        None if waited => Some(Finding::new(
            Level::Critical,
            format_args!(
                "packets do not reach {name}, neither directly nor through another node{}",
                because(route.last_error.as_ref())
            ),
            advice,
        )),
        Some(Path::Via(relay)) => Some(Finding::new(
            Level::Warning,
            format_args!(
                "packets to {name} go through node {relay}{}",
                because(route.last_error.as_ref())
            ),
            advice,
        )),
        Some(Path::Direct) => route.loss_per_mille.filter(|loss| *loss > LOSSY).map(|loss| {
            Finding::new(
                Level::Warning,
                format_args!("{}.{} % of the probes to {name} are lost", loss / 10, loss % 10),
                "look for an overloaded or failing link between the two hosts",
            )
        }),
        None => None,
    }
}

fn addresses(status: &Status, findings: &mut Vec<Finding>) {
    if !status.ipam.ready {
        let why = status.ipam.waiting_for.as_deref().unwrap_or("it holds no address space yet");
        findings.push(Finding::new(
            Level::Critical,
            format_args!("containers cannot get an address here: {why}"),
            "connect this node to one of nodes 1 to 4, which lend addresses: \
             `overnode connect HOST`",
        ));
    }
    for reclaim in &status.ipam.reclaims {
        let missing =
            reclaim.missing.iter().map(|id| format!("node {id}")).collect::<Vec<_>>().join(", ");
        findings.push(Finding::new(
            Level::Warning,
            format_args!(
                "the addresses of node {} are not reclaimed yet: {missing} must agree first",
                reclaim.id
            ),
            "start those nodes, or reclaim those that are gone for good, too",
        ));
    }
}

fn targets(status: &Status, findings: &mut Vec<Finding>) {
    for target in &status.targets {
        let level = match target.state {
            TargetState::Failed => Level::Critical,
            TargetState::Connecting | TargetState::Retrying => Level::Warning,
            TargetState::Established | TargetState::Myself => continue,
        };
        // A target whose node is unreachable is reported by `unreachable` already.
        let is_lost = |id: NodeId| {
            status.peers.iter().any(|peer| peer.id == id && peer.reachable == Some(false))
        };
        if target.peer.is_some_and(is_lost) {
            continue;
        }
        // A dial attempt in progress does not hide the error of the previous attempt.
        let what = match &target.last_error {
            Some(error) => {
                format!("the target {} is not connected: {}", target.host, error.message)
            }
            None => format!("the target {} has not answered yet", target.host),
        };
        let advice = format!("run `overnode forget {}` to stop trying it", target.host);
        findings.push(Finding::new(level, what, advice));
    }
}

/// Reports inbound connections that were refused: a wrong token, another network, or an ID that is
/// taken.
fn refused(status: &Status, findings: &mut Vec<Finding>) {
    let calls = status
        .connections
        .iter()
        .filter(|it| it.direction == Direction::Inbound && it.state == ConnectionState::Failed);
    for call in calls {
        if let Some(error) = &call.last_error {
            findings.push(Finding::new(
                Level::Warning,
                format_args!("the connection from {} was refused: {}", call.remote, error.message),
                "",
            ));
        }
    }
}

fn because(error: Option<&LastError>) -> String {
    error.map(|error| format!(": {}", error.message)).unwrap_or_default()
}

fn named(id: NodeId, nickname: &str) -> String {
    if nickname.is_empty() { format!("node {id}") } else { format!("node {id} ({nickname})") }
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// Returns the health of a node with one neighbor, where all is well until `change` spoils it.
    fn health(change: impl FnOnce(&mut Value)) -> Health {
        let mut status = json!({
            "node": {
                "id": 1, "nickname": "host1", "state": "running", "version": "1",
                "uptime_seconds": 60, "network": overnode_types::Network::default(),
                "public_key": overnode_types::PublicKey([1; 32]),
            },
            "targets": [{"host": "host2", "state": "established", "peer": 2}],
            "peers": [
                {"id": 1, "nickname": "host1", "myself": true, "reachable": true},
                {
                    "id": 2, "nickname": "host2", "myself": false, "reachable": true,
                    "since_seconds": 60,
                    "data": {
                        "session": "established", "rx_bytes": 0, "tx_bytes": 0,
                        "route": {
                            "path": "direct", "since_seconds": 60, "direct_works": true,
                            "loss_per_mille": 1,
                        },
                    },
                },
            ],
            "connections": [{
                "direction": "inbound", "remote": "192.0.2.2:6783", "state": "established",
                "peer": 2,
            }],
            "endpoints": [{
                "target": "netns:a", "address": "10.40.0.1/12", "static": false,
                "interface": "ov0a280001", "state": "attached",
            }],
            "ipam": {"ready": true, "owners": []},
            "counters": [],
        });
        change(&mut status);
        Health::of(&serde_json::from_value(status).unwrap())
    }

    fn only(health: &Health) -> &Finding {
        assert_eq!(health.findings.len(), 1, "{health:?}");
        assert_eq!(health.level, health.findings[0].level);
        &health.findings[0]
    }

    #[test]
    fn nothing_is_wrong() {
        assert_eq!(health(|_| {}), Health::default());
    }

    #[test]
    fn each_problem_is_one_finding_with_advice() {
        type Case = (fn(&mut Value), Level, &'static str, &'static str);
        let cases: [Case; 16] = [
            (
                |it| it["node"]["problems"] = json!(["port taken"]),
                Level::Critical,
                "port taken",
                "",
            ),
            (|it| it["ipam"]["problems"] = json!(["clash"]), Level::Critical, "clash", ""),
            (|it| it["ipam"]["notices"] = json!(["taken back"]), Level::Warning, "taken back", ""),
            (
                |it| it["node"]["underlay_problems"] = json!(["no program"]),
                Level::Critical,
                "no program",
                "",
            ),
            (
                |it| it["peers"][1]["data"] = Value::Null,
                Level::Critical,
                "this host's eBPF programs do not know it",
                "log",
            ),
            (
                |it| it["targets"][0] = json!({"host": "h", "state": "connecting"}),
                Level::Warning,
                "the target h has not answered yet",
                "overnode forget h",
            ),
            (
                |it| it["peers"][1]["reachable"] = false.into(),
                Level::Critical,
                "node 2 (host2) is unreachable (for 60 s)",
                "overnode reclaim 2`",
            ),
            (
                |it| {
                    it["node"]["id"] = 7.into();
                    it["peers"][1]["reachable"] = false.into();
                },
                Level::Critical,
                "node 2 (host2) is unreachable (for 60 s)",
                "overnode reclaim 2` on one of nodes 1 to 4",
            ),
            (
                |it| it["peers"][1]["data"]["session"] = "expired".into(),
                Level::Critical,
                "there are no session keys",
                "UDP 6784",
            ),
            (
                |it| it["peers"][1]["data"]["route"]["path"] = Value::Null,
                Level::Critical,
                "neither directly nor",
                "UDP 6784",
            ),
            (
                |it| it["peers"][1]["data"]["route"]["path"] = json!({"via": 3}),
                Level::Warning,
                "go through node 3",
                "UDP 6784",
            ),
            (
                |it| it["peers"][1]["data"]["route"]["loss_per_mille"] = 35.into(),
                Level::Warning,
                "3.5 % of the probes to node 2 (host2) are lost",
                "link",
            ),
            (
                |it| it["ipam"]["ready"] = false.into(),
                Level::Critical,
                "cannot get an address",
                "overnode connect",
            ),
            (
                |it| it["ipam"]["reclaims"] = json!([{"id": 4, "missing": [3]}]),
                Level::Warning,
                "node 4 are not reclaimed yet: node 3 must agree first",
                "start those",
            ),
            (
                |it| it["endpoints"][0]["state"] = "gone".into(),
                Level::Warning,
                "netns:a (10.40.0.1/12)",
                "overnode detach netns:a",
            ),
            (
                |it| {
                    let error = json!({"message": "the token differs"});
                    it["targets"][0] = json!({"host": "h", "state": "failed", "last_error": error});
                },
                Level::Critical,
                "the target h is not connected: the token differs",
                "overnode forget h",
            ),
        ];
        for (change, level, what, advice) in cases {
            let health = health(change);
            let finding = only(&health);
            assert_eq!(finding.level, level, "{finding:?}");
            assert!(finding.what.contains(what) && finding.advice.contains(advice), "{finding:?}");
        }
    }

    #[test]
    fn a_remote_with_a_wrong_token_is_named() {
        let call = json!({
            "direction": "inbound", "remote": "192.0.2.9:40000", "state": "failed",
            "last_error": {"message": "another token"},
        });
        let health = health(|it| it["connections"].as_array_mut().unwrap().push(call));
        assert_eq!(
            only(&health).what,
            "the connection from 192.0.2.9:40000 was refused: another token"
        );
    }

    #[test]
    fn a_target_whose_node_is_unreachable_is_reported_once() {
        let health = health(|it| {
            it["peers"][1]["reachable"] = false.into();
            it["targets"][0] = json!({
                "host": "host2", "state": "retrying", "peer": 2,
                "last_error": {"message": "no answer"},
            });
        });
        only(&health);
    }

    /// The status may be taken in the middle of a dial attempt.
    #[test]
    fn a_dial_attempt_does_not_hide_the_previous_error() {
        let tried = |state: &str| {
            let state = state.to_owned();
            health(move |it| {
                let error = json!({"message": "no answer"});
                it["targets"][0] = json!({"host": "h", "state": state, "last_error": error});
            })
        };
        assert_eq!(tried("connecting"), tried("retrying"));
        assert_eq!(only(&tried("connecting")).what, "the target h is not connected: no answer");
    }

    #[test]
    fn a_local_problem_is_not_blamed_on_other_nodes() {
        for change in [
            (|it| it["peers"][1]["data"]["session"] = "expired".into()) as fn(&mut Value),
            |it| it["peers"][1]["data"]["route"]["path"] = Value::Null,
            |it| it["peers"][1]["reachable"] = false.into(),
        ] {
            let health = health(|it| {
                it["node"]["underlay_problems"] = json!(["no program on eth0"]);
                change(it);
            });
            let [here, there] = &health.findings[..] else { panic!("{health:?}") };
            assert_eq!(here.what, "no program on eth0");
            assert!(
                there.what.contains("node 2") && there.advice.contains("this host's own"),
                "{there:?}"
            );
        }
    }

    #[test]
    fn a_new_node_has_time_for_its_handshake() {
        let health = health(|it| {
            it["peers"][1]["since_seconds"] = 2.into();
            it["peers"][1]["data"]["session"] = "handshake".into();
        });
        assert_eq!(health, Health::default());
    }

    #[test]
    fn many_unreachable_nodes_are_one_finding_and_the_worst_is_first() {
        let health = health(|it| {
            it["endpoints"][0]["state"] = "gone".into();
            for id in 3..30 {
                let away = json!({"id": id, "nickname": "", "myself": false, "reachable": false});
                it["peers"].as_array_mut().unwrap().push(away);
            }
        });
        let levels: Vec<Level> = health.findings.iter().map(|finding| finding.level).collect();
        assert_eq!(levels, [Level::Critical, Level::Warning]);
        assert_eq!(health.findings[0].what, "27 nodes are unreachable: 3, 4, 5, 6, 7 and 22 more");
    }
}
