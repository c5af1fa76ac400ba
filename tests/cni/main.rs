//! Tests of `overnode-cni` as container runtimes run it: by hand, and by real podman together with
//! the stock plugins.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "measurements and the logs of the nodes"
)]

mod load;
mod plugin;
mod podman;
mod specification;
