//! Holds `docs/reference/commands.md` against the command line.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use clap::CommandFactory as _;

use crate::options::Cli;

/// Set to write the page instead of comparing it.
const WRITE: &str = "OVERNODE_WRITE_DOCS";

/// Width of the help texts in columns.
const WIDTH: usize = 98;

/// Heading of the options that every command has.
const GLOBAL: &str = "Global options:";

#[test]
fn the_reference_page_is_what_help_prints() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference/commands.md");
    let page = page();
    if std::env::var_os(WRITE).is_some() {
        fs::write(&path, &page).expect("the page can be written");
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(found == page, "the page is out of date: run this test with {WRITE}=1");
}

fn page() -> String {
    let mut command = Cli::command().term_width(WIDTH).disable_help_subcommand(true);
    command.build();
    let mut page = String::from(
        "# Commands\n\nWhat `overnode COMMAND --help` prints. Options that every command has are \
         under\n[overnode](#overnode). This page is generated: a test compares it with the \
         program.\n",
    );
    let mut sections = Vec::new();
    collect(&command, "overnode", &mut sections);
    for (index, (name, help)) in sections.into_iter().enumerate() {
        let help = if index == 0 { help } else { without_global_options(&help) };
        let _ = write!(page, "\n## {name}\n\n```\n{}\n```\n", help.trim_end());
    }
    page
}

fn collect(command: &clap::Command, name: &str, sections: &mut Vec<(String, String)>) {
    let help = command.clone().render_long_help().to_string();
    let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
    sections.push((name.to_owned(), lines.join("\n")));
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        collect(below, &format!("{name} {}", below.get_name()), sections);
    }
}

/// Removes the section of the options that every command has.
fn without_global_options(help: &str) -> String {
    let Some(start) = help.find(&format!("\n{GLOBAL}\n")) else { return help.to_owned() };
    let rest = &help[start + 1 + GLOBAL.len()..];
    // The next section begins at the first line that is not indented.
    let end = rest
        .match_indices('\n')
        .map(|(at, _)| at + 1)
        .find(|at| rest[*at..].starts_with(|c: char| !c.is_whitespace()))
        .unwrap_or(rest.len());
    format!("{}\n{}", &help[..start], &rest[end..])
}
