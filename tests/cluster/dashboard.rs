//! Checks the dashboard's expressions against the metrics that a node exports. Understands as much
//! of PromQL as is needed to see which series an expression selects.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Labels that Prometheus adds to each series.
const ADDED: [&str; 2] = ["instance", "job"];
const GROUPING: [&str; 4] = ["by", "without", "on", "ignoring"];
const WORDS: [&str; 12] = [
    "sum", "count", "max", "min", "avg", "rate", "increase", "vector", "or", "and", "unless",
    "bool",
];

/// The values of each label of each exported metric.
pub(crate) type Told = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

/// Parses series as they are in the exported text, without their values.
pub(crate) fn told<'a>(all: impl Iterator<Item = &'a str>) -> Result<Told> {
    let mut told = Told::new();
    for text in all {
        let mut tokens = Tokens(text);
        let metric = tokens.word().context("no name")?;
        let labels = told.entry(metric.to_owned()).or_default();
        for (label, _, value) in tokens.matchers().with_context(|| text.to_owned())? {
            labels.entry(label).or_default().insert(value);
        }
    }
    Ok(told)
}

/// Fails if the dashboard uses a series or label that is not exported.
pub(crate) fn check(dashboard: &Value, told: &Told) -> Result<()> {
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let mut checked = 0;
    for target in panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten())
    {
        let expression = target["expr"].as_str().context("no expression")?;
        let legend = target["legendFormat"].as_str().unwrap_or_default();
        check_one(expression, legend, told).with_context(|| expression.to_owned())?;
        checked += 1;
    }
    ensure!(checked >= panels.len(), "a panel has no expression");
    let variables = dashboard["templating"]["list"].as_array().into_iter().flatten();
    for query in variables.filter(|it| it["type"] == "query").filter_map(|it| it["query"].as_str())
    {
        let inside = query.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')'));
        let (metric, label) = inside
            .and_then(|it| it.split_once(", "))
            .context("not a label_values query with a label")?;
        check_one(&format!("sum by ({label}) ({metric})"), "", told)?;
    }
    Ok(())
}

fn check_one(expression: &str, legend: &str, told: &Told) -> Result<()> {
    let mut tokens = Tokens(expression);
    let mut known: BTreeSet<String> = ADDED.map(str::to_owned).into();
    let mut grouped = BTreeSet::new();
    let mut depth = 0_i32;
    while let Some(next) = tokens.peek() {
        if next.is_ascii_alphabetic() {
            let word = tokens.word().context("no word")?;
            if GROUPING.contains(&word) {
                grouped.extend(tokens.names()?);
            } else if let Some(labels) = told.get(word) {
                for (label, operator, value) in tokens.matchers()? {
                    let values = labels.get(&label);
                    ensure!(
                        values.is_some() || ADDED.contains(&&*label),
                        "{word} has no label {label}"
                    );
                    let is_one =
                        operator != "=" || values.is_none_or(|values| values.contains(&value));
                    ensure!(is_one, "no {word} has {label}={value:?}");
                }
                known.extend(labels.keys().cloned());
            } else {
                ensure!(WORDS.contains(&word), "{word} is not exported");
            }
        } else if next == '[' {
            let end = tokens.0.find(']').context("unmatched [")?;
            tokens.0 = &tokens.0[end + 1..];
        } else {
            depth += i32::from(next == '(') - i32::from(next == ')');
            ensure!(depth >= 0 && "()+-*/=<>!.0123456789".contains(next), "unexpected {next}");
            tokens.skip(1);
        }
    }
    ensure!(depth == 0, "unmatched (");
    let unknown: Vec<_> = grouped.difference(&known).collect();
    ensure!(unknown.is_empty(), "no metric here has the labels {unknown:?}");
    let shown = if grouped.is_empty() { &known } else { &grouped };
    for part in legend.split("{{").skip(1) {
        let label = part.split("}}").next().unwrap_or_default();
        ensure!(shown.contains(label), "the legend uses {label:?}, which the result does not have");
    }
    Ok(())
}

struct Tokens<'a>(&'a str);

impl<'a> Tokens<'a> {
    fn peek(&mut self) -> Option<char> {
        self.0 = self.0.trim_start();
        self.0.chars().next()
    }

    fn skip(&mut self, bytes: usize) {
        self.0 = &self.0[bytes..];
    }

    fn take(&mut self, wanted: char) -> bool {
        let is_it = self.peek() == Some(wanted);
        if is_it {
            self.skip(wanted.len_utf8());
        }
        is_it
    }

    fn word(&mut self) -> Option<&'a str> {
        self.peek();
        let end =
            self.0.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(self.0.len());
        let (word, rest) = self.0.split_at(end);
        self.0 = rest;
        (!word.is_empty()).then_some(word)
    }

    /// Parses a list such as `(a, b)`.
    fn names(&mut self) -> Result<Vec<String>> {
        ensure!(self.take('('), "no list");
        let mut names = Vec::new();
        while !self.take(')') {
            names.push(self.word().context("no label")?.to_owned());
            self.take(',');
        }
        Ok(names)
    }

    /// Parses matchers such as `{a="x",b=~"y"}`, or nothing.
    fn matchers(&mut self) -> Result<Vec<(String, &'a str, String)>> {
        let mut matchers = Vec::new();
        if !self.take('{') {
            return Ok(matchers);
        }
        while !self.take('}') {
            let label = self.word().context("no label")?.to_owned();
            let operator = ["=~", "!~", "!=", "="].into_iter().find(|it| self.0.starts_with(it));
            let operator = operator.context("no operator")?;
            self.skip(operator.len());
            ensure!(self.take('"'), "no value");
            let Some(end) = self.0.find('"') else { bail!("unterminated value") };
            matchers.push((label, operator, self.0[..end].to_owned()));
            self.skip(end + 1);
            self.take(',');
        }
        Ok(matchers)
    }
}

#[test]
fn wrong_dashboard_expressions_are_found() -> Result<()> {
    let series = [
        "overnode_x_total{peer=\"2\",kind=\"a\"}",
        "overnode_x_total{peer=\"3\",kind=\"b\"}",
        "overnode_y",
    ];
    let told = told(series.into_iter())?;
    for (good, legend) in [
        (
            "sum by (peer) \
             (rate(overnode_x_total{instance=~\"$i\",kind=\"a\"}[$__rate_interval])) * 8",
            "{{peer}}",
        ),
        ("overnode_x_total", "{{instance}} {{peer}} {{kind}}"),
        ("count(overnode_y + overnode_y == 0) or vector(0)", "pairs"),
    ] {
        check_one(good, legend, &told).with_context(|| good.to_owned())?;
    }
    for (bad, legend) in [
        ("overnode_z", ""),
        ("rat(overnode_y)", ""),
        ("node_load1", ""),
        ("sum(overnode_y", ""),
        ("overnode_x_total{kind=\"c\"}", ""),
        ("overnode_y{peer=~\"2\"}", ""),
        ("sum by (peer) (overnode_y)", ""),
        ("overnode_y", "{{peer}}"),
        ("sum by (instance) (overnode_x_total)", "{{peer}}"),
        ("overnode_x_total{kind=a}", ""),
    ] {
        ensure!(check_one(bad, legend, &told).is_err(), "{bad} is accepted");
    }
    Ok(())
}
