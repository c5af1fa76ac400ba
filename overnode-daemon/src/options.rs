//! The daemon's own command line.

use std::path::PathBuf;

use clap::Parser;

/// Where the state lies, unless told otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/overnode";

/// Where the socket lies, unless told otherwise.
pub const DEFAULT_RUN_DIR: &str = "/run/overnode";

/// The daemon of an overnode node. `overnode launch` starts it: there is seldom a reason to do so by hand.
#[derive(Clone, Debug, PartialEq, Eq, Parser)]
#[command(name = "overnoded", version)]
pub struct Options {
    /// Where the node's identity, keys and addresses are kept
    #[arg(long, env = "OVERNODE_STATE_DIR", value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    pub state_dir: PathBuf,

    /// Where the socket is made
    #[arg(long, env = "OVERNODE_RUN_DIR", value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    pub run_dir: PathBuf,

    /// Log more, also from the eBPF programs
    #[arg(long, env = "OVERNODE_DEBUG", value_parser = clap::builder::FalseyValueParser::new())]
    pub debug: bool,

    /// Log without colours; so does NO_COLOR in the environment
    #[arg(long)]
    pub no_color: bool,
}

impl Options {
    /// Whether the log may have colours.
    pub fn color(&self) -> bool {
        // https://no-color.org: any value but an empty one.
        !self.no_color && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_have_defaults() {
        let options = Options::parse_from(["overnoded"]);
        assert_eq!(options.state_dir, PathBuf::from(DEFAULT_STATE_DIR));
        assert_eq!(options.run_dir, PathBuf::from(DEFAULT_RUN_DIR));
    }
}
