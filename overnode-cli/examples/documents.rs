//! Writes the man pages and shell completions of the commands into a directory: `documents DIR`.
//!
//! Both are generated from the definition of the command line, so they always agree with `--help`.
//! `cargo xtask dist` runs this program. It is not shipped.

#![allow(clippy::print_stderr, reason = "this is a program for a terminal")]

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;
use overnode_cli::options::Cli;
use overnode_daemon::options::Options;

/// The FILES section of a man page: what the command reads and writes.
const FILES: &str = "\
.TP
\\fI/etc/default/overnode\\fR
Environment variables of the daemon, explained by the comments in the file.
.TP
\\fI/var/lib/overnode\\fR
The node's identity, keys and addresses. Another directory can be set with
\\fB\\-\\-state\\-dir\\fR.
.TP
\\fI/run/overnode/overnode.sock\\fR
The daemon's socket (HTTP with JSON). Another directory can be set with \\fB\\-\\-run\\-dir\\fR.
.TP
\\fI/sys/fs/bpf/overnode\\fR
The node's eBPF programs and maps. They forward traffic even while the daemon is not running.
";

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1) else {
        eprintln!("usage: documents DIR");
        return ExitCode::from(2);
    };
    match write(Path::new(&folder)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", Path::new(&folder).display());
            ExitCode::FAILURE
        }
    }
}

fn write(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let mut command = Cli::command();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command, "overnode", folder)?;
    }
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    pages(folder, &command)?;
    let mut daemon = Options::command();
    daemon.build();
    page(folder, &daemon, "8", "overnode(1), systemctl(1)")
}

/// Writes the page of a command and of its subcommands.
fn pages(folder: &Path, command: &clap::Command) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or(command.get_name());
    let also = if name == "overnode" { "overnoded(8)" } else { "overnode(1), overnoded(8)" };
    page(folder, command, "1", also)?;
    command
        .get_subcommands()
        .filter(|sub| !sub.is_hide_set())
        .try_for_each(|sub| pages(folder, sub))
}

fn page(folder: &Path, command: &clap::Command, section: &str, also: &str) -> io::Result<()> {
    let is_main = !command.get_display_name().unwrap_or_default().contains('-');
    let man = Man::new(command.clone())
        .section(section)
        .source(concat!("overnode ", env!("CARGO_PKG_VERSION")))
        .manual("overnode");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    if command.get_arguments().any(|argument| !argument.is_hide_set()) {
        man.render_options_section(&mut page)?;
    }
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    if let Some(text) = command.get_after_help() {
        page.write_all(after_help(&text.to_string()).as_bytes())?;
    }
    if is_main {
        write!(page, ".SH FILES\n{FILES}")?;
    }
    writeln!(page, ".SH \"SEE ALSO\"\n{also}")?;
    fs::write(folder.join(man.get_filename()), page)
}

/// Converts the text after the options to roff. `Examples:` and `Exit status:` become sections.
/// Indented lines stay as they are.
fn after_help(text: &str) -> String {
    let mut page = String::new();
    let mut section = "";
    for paragraph in text.split("\n\n") {
        let (title, rest) = match paragraph.split_once(':') {
            Some(("Example" | "Examples", rest)) => ("EXAMPLES", rest),
            Some(("Exit status", rest)) => ("EXIT STATUS", rest),
            _ => (if section.is_empty() { "NOTES" } else { section }, paragraph),
        };
        page += &if title != section { format!(".SH \"{title}\"\n") } else { ".PP\n".to_owned() };
        section = title;
        let mut verbatim = false;
        for line in rest.trim_matches('\n').lines() {
            if line.starts_with("  ") != verbatim {
                verbatim = !verbatim;
                page += if verbatim { ".RS 4\n.nf\n" } else { ".fi\n.RE\n" };
            }
            let _ =
                writeln!(page, "{}", escape(line.strip_prefix("  ").unwrap_or(line).trim_end()));
        }
        if verbatim {
            page += ".fi\n.RE\n";
        }
    }
    page
}

/// Escapes a line for roff: it is text whatever its first character is, and its hyphens can be
/// copied.
fn escape(line: &str) -> String {
    let text = line.replace('\\', "\\(rs").replace('-', "\\-");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}
