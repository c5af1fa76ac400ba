//! `overnode-cni` as container runtimes call it: by hand, and by real podman with the stock plugins
//! around it.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "figures, and what nodes logged")]

mod load;
mod plugin;
mod podman;
mod specification;
