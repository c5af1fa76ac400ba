//! The report: tables, ratios, and the minimum performance that the project requires of itself.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table};
use serde_json::{Value, json};

use crate::measure::{Loaded, Round};
use crate::network::Kind;
use crate::programs::Programs;

/// All measurements of a run.
pub(crate) struct Report {
    /// Results of the programs alone, or why they could not be measured.
    pub programs: Result<Programs, String>,
    /// Results of the networks, in the order of the table.
    pub networks: Vec<Outcome>,
    /// Compared pings next to a flow, or why they could not be compared.
    pub beside: Result<Vec<Beside>, String>,
    /// Number of times that each network was to be measured.
    pub rounds: u32,
    /// Duration of the whole run.
    pub took: Duration,
}

/// Results of one network.
pub(crate) struct Outcome {
    /// The network.
    pub kind: Kind,
    /// Its rounds, or why it could not be measured.
    pub result: Result<Vec<Round>, String>,
}

/// Pings next to a flow in several cases, measured one right after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Beside {
    /// Without workers.
    pub without: Loaded,
    /// With workers, and a flow limited to the rate that was reached without them.
    pub paced: Loaded,
    /// With workers and an unlimited flow.
    pub with: Loaded,
    /// Next to a flow over VXLAN, if VXLAN is measured.
    pub vxlan: Option<Loaded>,
}

/// One of the cases in [`Beside`], with its name.
type Case = (&'static str, fn(&Beside) -> Option<Loaded>);

const CASES: [Case; 4] = [
    ("overnode off", |beside| Some(beside.without)),
    ("overnode, same rate", |beside| Some(beside.paced)),
    ("overnode", |beside| Some(beside.with)),
    ("vxlan", |beside| beside.vxlan),
];

/// A figure of a round: its key and title, how to get and print it, and whether more is better.
struct Figure {
    key: &'static str,
    title: &'static str,
    of: fn(&Round) -> f64,
    digits: usize,
    more_is_better: bool,
}

const FIGURES: [Figure; 14] = [
    figure("rtt_average_us", "RTT avg µs", |round| round.rtt_average, 1, false),
    figure("rtt_median_us", "median µs", |round| round.rtt_median, 1, false),
    figure("rtt_p99_us", "p99 µs", |round| round.rtt_p99, 1, false),
    figure("packets_per_second", "64 B UDP/s", |round| round.packets, 0, true),
    figure("one_flow_gbps", "TCP ×1 Gbit/s", |round| round.one_flow, 2, true),
    figure("four_flows_gbps", "TCP ×4 Gbit/s", |round| round.four_flows, 2, true),
    figure("sixteen_flows_gbps", "TCP ×16", |round| round.sixteen_flows, 2, true),
    figure("both_ways_gbps", "both ways", |round| round.both_ways, 2, true),
    figure("udp_gso_gbps", "UDP GSO", |round| round.udp_gso, 2, true),
    figure("cpu_seconds_per_gigabyte", "CPU s/GB", |round| round.cpu_per_gigabyte, 2, false),
    figure("loaded_rtt_average_us", "loaded RTT", |round| round.loaded_rtt_average, 0, false),
    figure("loaded_rtt_p99_us", "p99", |round| round.loaded_rtt_p99, 0, false),
    figure("retransmits_per_gigabyte", "resent/GB", |round| round.retransmits, 0, false),
    figure("lost_pings", "lost", |round| round.lost as f64, 0, false),
];

const fn figure(
    key: &'static str,
    title: &'static str,
    of: fn(&Round) -> f64,
    digits: usize,
    more_is_better: bool,
) -> Figure {
    Figure { key, title, of, digits, more_is_better }
}

const RTT_AVERAGE: usize = 0;
const PACKETS: usize = 3;
const ONE_FLOW: usize = 4;
/// The columns of each table. One terminal line has no room for all of them.
const PARTS: [std::ops::Range<usize>; 2] = [0..7, 7..14];

/// A check of one minimum requirement.
struct Check {
    what: String,
    value: f64,
    floor: String,
    passed: bool,
}

impl Report {
    /// Returns whether everything that was asked for was measured.
    pub(crate) fn is_complete(&self) -> bool {
        self.programs.is_ok()
            && self.beside.is_ok()
            && self.networks.iter().all(|outcome| outcome.result.is_ok())
    }

    /// Returns all results, including those of each round.
    pub(crate) fn to_json(&self) -> Value {
        let programs = match &self.programs {
            Err(reason) => json!({ "error": reason }),
            Ok(programs) => json!({
                "verified_instructions": programs.verified,
                "stack_bytes": programs.stack,
                "nanoseconds": programs.costs.iter().map(|cost| json!({
                    "packet_bytes": cost.size,
                    "seal": nanos(cost.seal),
                    "open": nanos(cost.open),
                    "open_xdp": nanos(cost.open_xdp),
                    "ring_in_user_space": nanos(cost.ring),
                })).collect::<Vec<_>>(),
            }),
        };
        let networks: serde_json::Map<_, _> = self
            .networks
            .iter()
            .map(|outcome| {
                let value = match &outcome.result {
                    Err(reason) => json!({ "error": reason }),
                    Ok(rounds) => json!({
                        "median": figures(|figure| json!(median(rounds, figure))),
                        "rounds": rounds.iter().map(|round| {
                            let mut value = figures(|figure| json!((figure.of)(round)));
                            value["lost_pings"] = json!(round.lost);
                            value
                        }).collect::<Vec<_>>(),
                        "overnode_is_better_by":
                             figures(|figure| json!(self.ratio(outcome.kind, figure))),
                    }),
                };
                (outcome.kind.to_string(), value)
            })
            .collect();
        json!({
            "machine": { "kernel": kernel(), "cpu": cpu(), "cores": cores() },
            "rounds": self.rounds,
            "seconds": self.took.as_secs_f64(),
            "programs": programs,
            "networks": networks,
            "beside_a_flow": self.beside.iter().flatten().map(|turn| {
                let case = |&(name, of): &Case| of(turn).map(|loaded| (name.to_owned(), json!({
                    "gbps": loaded.rate,
                    "average_us": loaded.average,
                    "median_us": loaded.median,
                    "p99_us": loaded.p99,
                })));
                Value::Object(CASES.iter().filter_map(case).collect())
            }).collect::<Vec<_>>(),
            "floor": self.checks().iter().map(|check| json!({
                "what": check.what, "value": check.value,
                 "floor": check.floor, "passed": check.passed,
            })).collect::<Vec<_>>(),
        })
    }

    fn value(&self, kind: Kind, figure: &Figure) -> Option<f64> {
        let outcome = self.networks.iter().find(|outcome| outcome.kind == kind)?;
        median(outcome.result.as_ref().ok()?, figure)
    }

    /// Returns how many times better overnode is than this network, less than 1 where it is worse.
    /// `None` if either was not measured, or if the ratio is zero or infinite.
    fn ratio(&self, kind: Kind, figure: &Figure) -> Option<f64> {
        let (own, other) = (self.value(Kind::Overnode, figure)?, self.value(kind, figure)?);
        let ratio = if figure.more_is_better { own / other } else { other / own };
        (ratio.is_finite() && ratio > 0.0).then_some(ratio)
    }

    fn checks(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        if let Ok(programs) = &self.programs {
            for cost in programs.costs.iter().filter(|cost| cost.size == 1400) {
                for (what, time) in [("seal", cost.seal), ("open", cost.open)] {
                    checks.push(at_most(format!("{what} 1400 bytes, ns"), nanos(time), 4200.0));
                }
            }
            for (program, &count) in &programs.verified {
                checks.push(at_most(
                    format!("verified instructions of {program}"),
                    f64::from(count),
                    100_000.0,
                ));
            }
            for (program, &bytes) in &programs.stack {
                checks.push(at_most(format!("stack bytes of {program}"), f64::from(bytes), 449.0));
            }
        }
        let own = |figure: usize| self.value(Kind::Overnode, &FIGURES[figure]);
        if let Some(rtt) = own(RTT_AVERAGE) {
            checks.push(at_most("average RTT, µs".into(), rtt, 10.0));
        }
        let of = |kind, figure: usize| self.value(kind, &FIGURES[figure]);
        if let Some(rate) = of(Kind::OvernodeChacha, ONE_FLOW) {
            checks.push(at_least("one TCP flow with ChaCha20-Poly1305, Gbit/s".into(), rate, 5.0));
        }
        if let Some(rate) = of(Kind::OvernodeAes, ONE_FLOW) {
            checks.push(at_least("one TCP flow with AES-256-GCM, Gbit/s".into(), rate, 8.5));
        }
        if let (Some(own), Some(rival)) =
            (of(Kind::Overnode, ONE_FLOW), of(Kind::Gotatun, ONE_FLOW))
        {
            checks.push(at_least("one TCP flow: ratio to gotatun's".into(), own / rival, 3.0));
        }
        for (what, own, plain) in [
            ("TSO off", Kind::OvernodeAesNotso, Kind::VxlanNotso),
            ("TSO off, GRO", Kind::OvernodeAesNotsoGro, Kind::VxlanNotsoGro),
        ] {
            if let (Some(own), Some(plain)) = (of(own, ONE_FLOW), of(plain, ONE_FLOW)) {
                checks.push(at_least(
                    format!("one TCP flow with AES, {what}: ratio to VXLAN's"),
                    own / plain,
                    0.9,
                ));
            }
        }
        let turns = || self.beside.iter().flatten();
        let p99 = |what: &str, ratios: Vec<f64>| {
            let what = format!("p99 of the RTT next to {what}: ratio to that without workers");
            middle(ratios).map(|ratio| at_most(what, ratio, 1.0))
        };
        let without = |turn: &Beside| turn.without.p99;
        checks.extend(p99("a flow", turns().map(|turn| turn.with.p99 / without(turn)).collect()));
        checks.extend(p99(
            "the same flow",
            turns().map(|turn| turn.paced.p99 / without(turn)).collect(),
        ));
        let best = |kinds: Vec<Kind>, figure: usize| {
            let ratios = kinds.into_iter().filter_map(|kind| self.ratio(kind, &FIGURES[figure]));
            ratios.min_by(f64::total_cmp)
        };
        let rivals = Kind::ALL.into_iter().filter(|kind| kind.is_rival()).collect();
        if let Some(ratio) = best(rivals, RTT_AVERAGE) {
            checks.push(at_least(
                "average RTT: how many times lower than the best rival's".into(),
                ratio,
                8.0,
            ));
        }
        if let Some(packets) = own(PACKETS) {
            checks.push(at_least("64-byte datagrams per second".into(), packets, 250_000.0));
        }
        if let Some(rate) = own(ONE_FLOW) {
            checks.push(at_least("one TCP flow, Gbit/s".into(), rate, 1.0));
        }
        if let Some(ratio) = best(vec![Kind::Boringtun], ONE_FLOW) {
            checks.push(at_least("one TCP flow: ratio to boringtun's".into(), ratio, 1.5));
        }
        checks
    }

    fn program_table(&self) -> Table {
        let mut table =
            table(&["inner packet", "seal ns", "open ns", "open (XDP) ns", "ring, user space ns"]);
        for cost in self.programs.iter().flat_map(|programs| &programs.costs) {
            let times = [cost.seal, cost.open, cost.open_xdp, cost.ring]
                .map(|time| format!("{:.0}", nanos(time)));
            table.add_row([format!("{} bytes", cost.size)].into_iter().chain(times));
        }
        table
    }

    fn network_table(&self, part: &[Figure]) -> Table {
        let titles: Vec<_> =
            ["network"].into_iter().chain(part.iter().map(|figure| figure.title)).collect();
        let mut table = table(&titles);
        for outcome in &self.networks {
            let cells = part.iter().map(|figure| match self.value(outcome.kind, figure) {
                Some(value) => format!("{value:.*}", figure.digits),
                None => "–".into(),
            });
            table.add_row([outcome.kind.to_string()].into_iter().chain(cells));
        }
        table
    }

    fn ratio_table(&self, part: &[Figure]) -> Table {
        let titles: Vec<_> = ["overnode compared to"]
            .into_iter()
            .chain(part.iter().map(|figure| figure.title))
            .collect();
        let mut table = table(&titles);
        for outcome in self.networks.iter().filter(|outcome| !outcome.kind.is_own()) {
            let cells = part.iter().map(|figure| match self.ratio(outcome.kind, figure) {
                Some(ratio) => format!("{ratio:.2}×"),
                None => "–".into(),
            });
            table.add_row([outcome.kind.to_string()].into_iter().chain(cells));
        }
        table
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{}, Linux {}, {} cores\n", cpu(), kernel(), cores())?;
        match &self.programs {
            Err(reason) => writeln!(f, "The programs could not be measured: {reason}\n")?,
            Ok(programs) => {
                writeln!(
                    f,
                    "Programs, one run over one packet (median)\n{}",
                    self.program_table()
                )?;
                let list = |values: &BTreeMap<&str, u32>| {
                    let items: Vec<_> = values
                        .iter()
                        .map(|(program, value)| format!("{program} {value}"))
                        .collect();
                    items.join(", ")
                };
                writeln!(f, "verified instructions: {}", list(&programs.verified))?;
                writeln!(f, "stack bytes, including callbacks: {}\n", list(&programs.stack))?;
            }
        }
        let rounds = if self.rounds == 1 {
            "one round".into()
        } else {
            format!("median of {} rounds", self.rounds)
        };
        writeln!(f, "Container to container across two hosts, {rounds}")?;
        let parts = || PARTS.into_iter().filter_map(|part| FIGURES.get(part));
        for part in parts() {
            writeln!(f, "{}", self.network_table(part))?;
        }
        for Outcome { kind, result } in &self.networks {
            if let Err(reason) = result {
                writeln!(f, "{kind} could not be measured: {reason}")?;
            }
        }
        if self.value(Kind::Overnode, &FIGURES[RTT_AVERAGE]).is_some() && self.networks.len() > 1 {
            writeln!(f, "\nHow many times better overnode is (below 1 is worse)")?;
            for part in parts() {
                writeln!(f, "{}", self.ratio_table(part))?;
            }
        }
        match self.beside.as_deref() {
            Err(reason) => writeln!(f, "Pings next to a flow could not be compared: {reason}")?,
            Ok([]) => {}
            Ok(turns) => {
                writeln!(
                    f,
                    "\nRTT next to one TCP flow, measured in turn (median of {})",
                    turns.len()
                )?;
                writeln!(f, "{}", beside_table(turns))?;
            }
        }
        writeln!(f, "\nMinimum requirements")?;
        for check in self.checks() {
            let mark = if check.passed { "PASS" } else { "FAIL" };
            writeln!(f, "{mark}  {}: {} ({})", check.what, short(check.value), check.floor)?;
        }
        writeln!(f, "\ntook {}", spoken(self.took))
    }
}

fn beside_table(turns: &[Beside]) -> Table {
    const FIGURES: [fn(Loaded) -> f64; 4] = [
        |loaded| loaded.rate,
        |loaded| loaded.average,
        |loaded| loaded.median,
        |loaded| loaded.p99,
    ];
    let mut table = table(&["network", "flow Gbit/s", "RTT avg µs", "median µs", "p99 µs"]);
    for (name, of) in CASES {
        let of_turns = |figure| middle(turns.iter().filter_map(of).map(figure).collect());
        let cells: Option<Vec<_>> =
            FIGURES.into_iter().map(|figure| Some(format!("{:.1}", of_turns(figure)?))).collect();
        if let Some(cells) = cells {
            table.add_row([name.to_owned()].into_iter().chain(cells));
        }
    }
    table
}

fn figures(value: impl Fn(&Figure) -> Value) -> Value {
    FIGURES
        .iter()
        .map(|figure| (figure.key.to_owned(), value(figure)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn median(rounds: &[Round], figure: &Figure) -> Option<f64> {
    middle(rounds.iter().map(figure.of).collect())
}

/// Returns the median, or `None` if there are no values.
fn middle(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 0 => Some(f64::midpoint(values[middle - 1], values[middle])),
        _ => Some(values[middle]),
    }
}

fn at_most(what: String, value: f64, limit: f64) -> Check {
    Check { what, value, floor: format!("at most {limit}"), passed: value <= limit }
}

fn at_least(what: String, value: f64, limit: f64) -> Check {
    Check { what, value, floor: format!("at least {limit}"), passed: value >= limit }
}

fn short(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.3}") }
}

fn nanos(time: Duration) -> f64 {
    time.as_nanos() as f64
}

/// Returns a duration in words.
pub(crate) fn spoken(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..100 => format!("{seconds} seconds"),
        seconds => format!("{:.1} minutes", seconds as f64 / 60.0),
    }
}

/// Returns an empty table with these titles.
pub(crate) fn table(titles: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_HORIZONTAL_ONLY).set_header(titles);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "?".into(), |text| text.trim().to_owned())
}

fn cpu() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("model name"));
    line.map_or_else(
        || "unknown processor".into(),
        |line| line.trim_start_matches([' ', '\t', ':']).to_owned(),
    )
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
