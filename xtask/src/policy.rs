//! Rules for the text of the repository that no other tool checks: line width, links between
//! pages, and dependencies that nothing uses.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Longest line in code, comments and pages, in columns.
const WIDTH: usize = 100;

/// Packages without I/O, clock and runtime.
const PURE: [&str; 3] = ["overnode-daemon/core", "overnode-daemon/api", "overnode-daemon/types"];
/// Libraries that a pure package may not depend on, by the beginning of their names.
const IMPURE: [&str; 9] =
    ["tokio", "aya", "nix", "libc", "netlink", "rtnetlink", "axum", "hyper", "hickory-resolver"];

/// Findings that are printed; the rest is a number.
const SHOWN: usize = 40;

/// Checks every rule.
///
/// # Errors
/// The findings, each with its file and line.
pub(crate) fn check(root: &Path) -> Result<()> {
    let mut findings = Vec::new();
    for file in files(root)? {
        let Some(kind) = Kind::of(&file) else { continue };
        let text =
            fs::read_to_string(&file).with_context(|| format!("{} is no text", file.display()))?;
        let name = file.strip_prefix(root).unwrap_or(&file).display().to_string();
        for line in too_wide(kind, &text) {
            findings.push(format!("{name}:{line}: wider than {WIDTH} columns"));
        }
        if kind == Kind::Markdown {
            for (line, target) in dead_links(&file, &text) {
                findings.push(format!("{name}:{line}: the link to {target} leads nowhere"));
            }
        }
    }
    for manifest in manifests(root)? {
        let name = manifest.strip_prefix(root).unwrap_or(&manifest).display();
        for dependency in unused_dependencies(&manifest)? {
            findings.push(format!("{name}: nothing uses the dependency {dependency}: remove it"));
        }
    }
    for dependency in unused_in_workspace(root)? {
        findings.push(format!("Cargo.toml: no package depends on {dependency}: remove it"));
    }
    for package in PURE {
        for dependency in dependencies(&root.join(package).join("Cargo.toml"))? {
            if IMPURE.iter().any(|impure| dependency.starts_with(impure)) {
                findings.push(format!(
                    "{package}/Cargo.toml: a package that decides may not depend on {dependency}: \
                     return an effect, and let overnode-daemon/src carry it out"
                ));
            }
        }
    }
    let more = findings.len().saturating_sub(SHOWN);
    findings.truncate(SHOWN);
    let rest = if more > 0 { format!("\nand {more} more") } else { String::new() };
    ensure!(findings.is_empty(), "{}{rest}", findings.join("\n"));
    Ok(())
}

/// Kinds of files that have rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Rust,
    Markdown,
    /// TOML, YAML, shell.
    Other,
}

impl Kind {
    fn of(file: &Path) -> Option<Self> {
        match file.extension()?.to_str()? {
            "rs" => Some(Self::Rust),
            "md" => Some(Self::Markdown),
            "toml" | "yml" | "yaml" | "sh" => Some(Self::Other),
            _ => None,
        }
    }
}

/// Numbers of the lines that are too wide. Tables and code in Markdown may be wider, and so may
/// lines that cannot be broken: a raw string's content, and a single long word.
fn too_wide(kind: Kind, text: &str) -> Vec<usize> {
    let mut found = Vec::new();
    let mut fenced = false;
    let mut raw = None;
    for (index, line) in text.lines().enumerate() {
        let inside_raw = raw.is_some();
        match kind {
            Kind::Markdown => {
                let start = line.trim_start();
                fenced ^= start.starts_with("```");
                if fenced || start.starts_with(['|', '[']) {
                    continue;
                }
            }
            Kind::Rust => raw = raw_string_after(line, raw),
            Kind::Other => {}
        }
        let wide = line.chars().count() > WIDTH;
        let breakable = line.trim_start_matches(['/', '!', ' ', '*', '#', '-', '"']).contains(' ');
        if wide && breakable && !inside_raw && raw.is_none() && !line.contains("r#\"") {
            found.push(index + 1);
        }
    }
    found
}

/// The terminator of the raw string that is open after `line`, given the one open before it.
fn raw_string_after(line: &str, open: Option<String>) -> Option<String> {
    let mut rest = line;
    let mut open = open;
    loop {
        match &open {
            Some(end) => {
                let at = rest.find(end.as_str())?;
                rest = &rest[at + end.len()..];
                open = None;
            }
            None => {
                let at = rest.find("r#\"")?;
                rest = &rest[at + 3..];
                open = Some("\"#".to_owned());
            }
        }
        if let Some(end) = &open
            && !rest.contains(end.as_str())
        {
            return open;
        }
    }
}

/// Links of a page to files that are not there, with their lines.
fn dead_links(page: &Path, text: &str) -> Vec<(usize, String)> {
    let folder = page.parent().unwrap_or(Path::new("."));
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        for part in line.split("](").skip(1) {
            let target = part.split([')', ' ']).next().unwrap_or_default();
            let file = target.split('#').next().unwrap_or_default();
            let elsewhere = file.is_empty() || file.contains("://") || file.starts_with("mailto:");
            if !elsewhere && !folder.join(file).exists() {
                found.push((index + 1, target.to_owned()));
            }
        }
    }
    found
}

/// Dependencies of a package whose crate name is in none of its sources.
fn unused_dependencies(manifest: &Path) -> Result<Vec<String>> {
    let folder = manifest.parent().unwrap_or(Path::new("."));
    let mut sources = String::new();
    for file in files(folder)? {
        if Kind::of(&file) == Some(Kind::Rust) && belongs_to(&file, folder) {
            sources.push_str(&fs::read_to_string(&file)?);
        }
    }
    let mut named = dependencies(manifest)?;
    named.retain(|name| !names_crate(&sources, &name.replace('-', "_")));
    Ok(named.into_iter().collect())
}

/// Dependencies that the workspace declares and none of its packages has.
fn unused_in_workspace(root: &Path) -> Result<BTreeSet<String>> {
    let text = fs::read_to_string(root.join("Cargo.toml"))?;
    let document: toml::Table = toml::from_str(&text)?;
    let declared = document.get("workspace").and_then(|it| it.get("dependencies"));
    let declared = declared.and_then(toml::Value::as_table).context("no dependencies")?;
    let mut unused: BTreeSet<String> = declared.keys().cloned().collect();
    for manifest in manifests(root)? {
        for used in dependencies(&manifest)? {
            unused.remove(&used);
        }
    }
    Ok(unused)
}

/// Whether a file belongs to the package in `folder`. The fuzzer is a workspace of its own inside
/// the tests, and its bodies belong to both.
fn belongs_to(file: &Path, folder: &Path) -> bool {
    for above in file.ancestors().skip(1) {
        let Ok(manifest) = fs::read_to_string(above.join("Cargo.toml")) else { continue };
        if above == folder || !manifest.contains("\n[workspace]\n") {
            return above == folder;
        }
    }
    false
}

/// Names of a package's dependencies of all kinds.
fn dependencies(manifest: &Path) -> Result<BTreeSet<String>> {
    let text = fs::read_to_string(manifest)?;
    let document: toml::Table =
        toml::from_str(&text).with_context(|| format!("{} is no TOML", manifest.display()))?;
    let mut named = BTreeSet::new();
    for (section, value) in &document {
        collect_dependencies(section, value, &mut named);
    }
    Ok(named)
}

/// Adds the names in `[dependencies]`, `[dev-dependencies]`, `[build-dependencies]` and the same
/// below `[target.…]`.
fn collect_dependencies(section: &str, value: &toml::Value, named: &mut BTreeSet<String>) {
    let Some(table) = value.as_table() else { return };
    if matches!(section, "dependencies" | "dev-dependencies" | "build-dependencies") {
        named.extend(table.keys().cloned());
    } else if section == "target" {
        for (below, value) in table.values().filter_map(toml::Value::as_table).flatten() {
            collect_dependencies(below, value, named);
        }
    }
}

/// Whether `name` occurs in `sources` as a word before `::`, or in a `use` or `extern crate`.
fn names_crate(sources: &str, name: &str) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    sources.match_indices(name).any(|(at, _)| {
        let before = &sources[..at];
        let after = &sources[at + name.len()..];
        let whole = !before.ends_with(word) && !after.starts_with(word);
        let path = after.starts_with("::");
        let imported = before.ends_with("use ") || before.ends_with("extern crate ");
        whole && (path || imported)
    })
}

/// The workspace's manifests.
fn manifests(root: &Path) -> Result<Vec<PathBuf>> {
    let mut all = files(root)?;
    all.retain(|file| file.file_name().is_some_and(|name| name == "Cargo.toml"));
    Ok(all)
}

/// All files below `folder`, sorted, without what is built or hidden (but `.github`).
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries =
        fs::read_dir(folder).with_context(|| format!("{} cannot be read", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name == "target" || (name.starts_with('.') && name != ".github") {
            continue;
        }
        if entry.file_type()?.is_dir() {
            found.extend(files(&entry.path())?);
        } else {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_repository_follows_the_rules() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize();
        check(&root.expect("the workspace")).unwrap_or_else(|error| panic!("{error}"));
    }

    #[test]
    fn wide_lines_are_found_unless_they_cannot_be_broken() {
        let wide = format!("// {} end", "x".repeat(WIDTH));
        assert_eq!(too_wide(Kind::Rust, &format!("fn a() {{}}\n{wide}\n")), [2]);
        assert_eq!(too_wide(Kind::Rust, &format!("let a = r#\"\n{wide}\n\"#;\n{wide}")), [4]);
        assert!(too_wide(Kind::Rust, &"x".repeat(WIDTH + 1)).is_empty());
        assert_eq!(too_wide(Kind::Markdown, &format!("| {wide} |\n```\n{wide}\n```\n{wide}")), [5]);
    }

    #[test]
    fn a_dependency_counts_as_used_by_a_path_or_an_import() {
        assert!(names_crate("let a = ring::digest::digest();", "ring"));
        assert!(names_crate("use ring;", "ring"));
        assert!(!names_crate("let string = 1; // ring", "ring"));
        assert!(!names_crate("let a = string::from();", "ring"));
    }

    #[test]
    fn links_to_pages_that_are_not_there_are_found() {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/page.md");
        let text = "[a](../README.md) [b](https://example.com)\n[c](nothing.md#x) [d](#here)";
        assert_eq!(dead_links(&page, text), [(2, "nothing.md#x".to_owned())]);
    }
}
