//! `overnode-cni` as container runtimes call it: by hand, and by real podman with the stock plugins around it.

#![expect(clippy::print_stderr, reason = "what nodes logged")]

mod load;
mod plugin;
mod podman;
