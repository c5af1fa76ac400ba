//! Checks licenses, bans and sources of all dependencies against the rules in `deny.toml`.
//!
//! The rules have cargo-deny's format, and cargo-deny can check them, too
//! (`cargo deny check licenses bans sources`). Building it in every fresh clone would mean
//! compiling 211 more packages for three rules. This module therefore implements the rules that are
//! used. License expressions are evaluated by the library that cargo-deny itself uses.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use spdx::{Expression, Licensee, ParseMode};

use crate::workspace::Workspace;

/// The prefix of cargo's registry identifiers.
const REGISTRY: &str = "registry+";
/// The released target. Dependencies for other systems do not count.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The parts of `deny.toml` that are used.
#[derive(Debug, Deserialize)]
struct Rules {
    licenses: Licenses,
    bans: Bans,
}

#[derive(Debug, Deserialize)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Bans {
    deny: Vec<Ban>,
}

#[derive(Debug, Deserialize)]
struct Ban {
    #[serde(rename = "crate")]
    name: String,
    reason: String,
}

/// The parts of `cargo metadata` that are used.
#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Debug, Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Debug, Deserialize)]
struct Node {
    id: String,
}

#[derive(Debug, Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    /// `None` for a package of this workspace.
    source: Option<String>,
    dependencies: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
    req: String,
    path: Option<String>,
    /// `None` for a package of this workspace.
    source: Option<String>,
    /// `None` for cargo's default registry.
    registry: Option<String>,
}

/// Checks all dependencies of the workspace.
///
/// # Errors
/// Returns an error that lists all violations, one per line.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let rules = std::fs::read_to_string(workspace.root.join("deny.toml")).context("deny.toml")?;
    let rules: Rules = toml::from_str(&rules).context("deny.toml")?;
    let mut cargo = workspace.cargo();
    cargo.args(["metadata", "--locked", "--format-version", "1", "--filter-platform", TARGET]);
    let output = cargo.output().context("cargo cannot be started")?;
    let metadata: Metadata = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr)))?;
    let findings = findings(&metadata, &rules)?;
    ensure!(findings.is_empty(), "deny.toml forbids:\n    {}", findings.join("\n    "));
    Ok(())
}

fn findings(metadata: &Metadata, rules: &Rules) -> Result<Vec<String>> {
    let parse =
        |name: &String| Licensee::parse(name).with_context(|| format!("deny.toml: license {name}"));
    let allowed: Vec<Licensee> = rules.licenses.allow.iter().map(parse).collect::<Result<_>>()?;
    let used: BTreeSet<&str> = metadata.resolve.nodes.iter().map(|node| node.id.as_str()).collect();
    let mut findings = Vec::new();
    for package in metadata.packages.iter().filter(|package| used.contains(package.id.as_str())) {
        let what = format!("{} {}", package.name, package.version);
        findings.extend(
            package.dependencies.iter().filter_map(foreign).map(|why| format!("{what}: {why}")),
        );
        if package.source.is_none() {
            findings.extend(wildcards(package));
        } else {
            findings.extend(
                license(package.license.as_deref(), &allowed).map(|why| format!("{what}: {why}")),
            );
        }
        let bans = rules.bans.deny.iter().filter(|ban| ban.name == package.name);
        findings.extend(bans.map(|ban| format!("{what}: {}", ban.reason)));
    }
    Ok(findings)
}

/// Returns where a dependency comes from, unless that is cargo's default registry or this
/// workspace.
fn foreign(dependency: &Dependency) -> Option<String> {
    let Dependency { name, source, registry, .. } = dependency;
    let source = source.as_deref()?;
    let is_foreign = registry.is_some() || !source.starts_with(REGISTRY);
    is_foreign.then(|| format!("{name} comes from {source}"))
}

/// Returns dependencies without a version requirement. The next update could change them without a
/// decision.
fn wildcards(package: &Package) -> impl Iterator<Item = String> {
    let any = package.dependencies.iter().filter(|it| it.req == "*" && it.path.is_none());
    any.map(|it| format!("{}: {} has no version requirement", package.name, it.name))
}

/// Returns why a license is not allowed, or `None` if it is.
fn license(license: Option<&str>, allowed: &[Licensee]) -> Option<String> {
    let Some(text) = license else { return Some("it names no license".to_owned()) };
    match Expression::parse_mode(text, ParseMode::LAX) {
        Ok(expression) if expression.evaluate(|it| allowed.iter().any(|one| one.satisfies(it))) => {
            None
        }
        Ok(_) => Some(format!("its license {text} is not allowed")),
        Err(why) => Some(format!("its license {text:?} is not an SPDX expression: {}", why.reason)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn rules() -> Rules {
        toml::from_str(include_str!("../../deny.toml")).unwrap()
    }

    /// Returns the metadata of a package with one dependency.
    fn graph(
        name: &str,
        license: Option<&str>,
        source: Option<&str>,
        dependency: &Value,
    ) -> Metadata {
        let mut other =
            json!({"name": "other", "req": "^1", "path": null, "source": null, "registry": null});
        other.as_object_mut().unwrap().extend(dependency.as_object().unwrap().clone());
        let package = json!({
            "id": "it",
            "name": name,
            "version": "1.0.0",
            "license": license,
            "source": source,
            "dependencies": [other],
        });
        let metadata = json!({"packages": [package], "resolve": {"nodes": [{"id": "it"}]}});
        serde_json::from_value(metadata).unwrap()
    }

    #[test]
    fn dependencies_are_judged_by_license_and_name() {
        let found = |name: &str, license| {
            findings(&graph(name, license, Some("registry+index"), &json!({})), &rules())
                .unwrap()
                .join("; ")
        };
        for license in
            ["MIT", "MIT/Apache-2.0", "GPL-3.0-only OR MIT", "(MIT OR Zlib) AND Unicode-3.0"]
        {
            assert_eq!(found("good", Some(license)), "");
        }
        for license in ["GPL-3.0-only", "MIT AND LGPL-2.1-only", "AGPL-3.0-or-later", "Proprietary"]
        {
            let why = found("bad", Some(license));
            assert!(why.starts_with("bad 1.0.0: its license") && why.contains(license), "{why}");
        }
        assert_eq!(found("bare", None), "bare 1.0.0: it names no license");
        assert!(found("openssl-sys", Some("MIT")).contains("ring"));
    }

    #[test]
    fn dependencies_come_from_one_registry() {
        let found =
            |dependency| findings(&graph("ours", None, None, &dependency), &rules()).unwrap();
        assert_eq!(found(json!({})), [""; 0]);
        assert_eq!(found(json!({"source": "registry+index"})), [""; 0]);
        let fork = found(json!({"source": "git+https://example.org/fork"}));
        assert_eq!(fork, ["ours 1.0.0: other comes from git+https://example.org/fork"]);
        let mirror = found(json!({"source": "registry+index", "registry": "https://example.org"}));
        assert_eq!(mirror, ["ours 1.0.0: other comes from registry+index"]);
    }

    #[test]
    fn the_workspace_specifies_versions_of_its_dependencies() {
        let found =
            |req| findings(&graph("ours", None, None, &json!({"req": req})), &rules()).unwrap();
        assert_eq!(found("^1"), [""; 0]);
        assert_eq!(found("*"), ["ours: other has no version requirement"]);
    }
}
