//! The program `overnode`, which is also the CNI plugin under the name `overnode-cni`.

use std::process::ExitCode;

fn main() -> ExitCode {
    overnode_cli::main()
}
