//! Implements the commands, with one module per command or pair of opposite commands.

mod attach;
mod completions;
mod dns;
mod inspect;
mod launch;
mod monitor;
mod peer;
mod prime;
mod reclaim;
mod reset;
mod resume;
mod settings;
mod status;
mod targets;
pub(crate) mod token;
mod version;

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use zeroize::Zeroizing;

use crate::failure::Failure;
use crate::options::{Command, Context};

/// Size limit of a secret read from a file, in bytes.
const SECRET_LIMIT: u64 = 8192;

/// Runs a command and returns the text for standard output.
///
/// # Errors
/// Fails if the command cannot be carried out.
pub(crate) async fn run(context: &Context, command: Command) -> Result<String, Failure> {
    match command {
        Command::Launch(wanted) => launch::run(context, wanted).await,
        Command::Set(wanted) => settings::set(context, wanted).await,
        Command::Get(wanted) => settings::get(context, &wanted).await,
        Command::Connect(wanted) => targets::connect(context, wanted).await,
        Command::Forget(wanted) => targets::forget(context, wanted).await,
        Command::Attach(wanted) => attach::attach(context, wanted).await,
        Command::Detach(wanted) => attach::detach(context, wanted).await,
        Command::Expose(wanted) => attach::expose(context, wanted).await,
        Command::Hide(_) => attach::hide(context).await,
        Command::Status(wanted) => status::run(context, &wanted).await,
        Command::Inspect => inspect::run(context).await,
        Command::Monitor(wanted) => monitor::run(context, &wanted).await,
        Command::Prime(wanted) => prime::run(context, &wanted).await,
        Command::Reset(wanted) => reset::run(context, &wanted).await,
        Command::Reclaim(wanted) => reclaim::run(context, &wanted).await,
        Command::DnsAdd(wanted) => dns::add(context, wanted).await,
        Command::DnsRemove(wanted) => dns::remove(context, wanted).await,
        Command::DnsLookup(wanted) => dns::lookup(context, wanted).await,
        Command::Resume => resume::run(context).await,
        Command::Peer(wanted) => peer::run(context, wanted).await,
        Command::Token(wanted) => token::run(&wanted),
        Command::Completions(wanted) => Ok(completions::run(&wanted)),
        Command::Version => version::run(context).await,
    }
}

/// Fails unless the user is root. For commands that change something.
fn require_root(command: &str) -> Result<(), Failure> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(Failure::failed(format_args!(
        "`overnode {command}` must be run as root: it changes this host's network; run it with \
         sudo"
    )))
}

/// Reads the first line of a file, or of standard input if the file is `-`.
fn read_secret(option: &str, file: &Path) -> Result<Zeroizing<String>, Failure> {
    let mut text = Zeroizing::new(String::new());
    let read = if file == Path::new("-") {
        io::stdin().lock().take(SECRET_LIMIT).read_to_string(&mut text)
    } else {
        File::open(file).and_then(|file| file.take(SECRET_LIMIT).read_to_string(&mut text))
    };
    read.map_err(|error| Failure::usage(format_args!("{option} {}: {error}", file.display())))?;
    Ok(Zeroizing::new(text.lines().next().unwrap_or_default().trim_end_matches('\r').to_owned()))
}

/// Prints a warning to a user whose command succeeded, about what to do differently next time.
fn warn(message: impl fmt::Display) {
    // A failed write cannot be reported anywhere else.
    let _ = writeln!(io::stderr(), "overnode: warning: {message}");
}

/// Joins items with commas. Returns `none` if there are none.
fn listed<T: ToString>(items: &[T]) -> String {
    if items.is_empty() {
        return "none".to_owned();
    }
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}
