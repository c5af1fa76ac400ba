//! `overnoded`: runs one node. The code is in the library.

use std::process::ExitCode;

use clap::Parser;
use nix::sys::stat::{Mode, umask};
use overnode_daemon::options::{Offline, Options};
use overnode_daemon::{bulk, datapath, node};
use overnode_trust as trust;

fn main() -> ExitCode {
    // Do this in the daemon and in the worker process, before there is anything in memory or on
    // disk that is worth stealing.
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
    if let Err(error) = trust::protect_memory() {
        tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
        tracing::error!("this process's memory cannot be protected from others: {error}");
        return ExitCode::FAILURE;
    }
    if let [_, first, settings] = &std::env::args().collect::<Vec<_>>()[..]
        && first == bulk::process::ARGUMENT
    {
        return run_workers(settings);
    }
    let options = Options::parse();
    let filter =
        if options.debug { "info,overnode_daemon=debug,overnode_ebpf=debug" } else { "info" };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(options.debug)
        .init();
    let runtime =
        match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                tracing::error!("the asynchronous runtime did not start: {error}");
                return ExitCode::FAILURE;
            }
        };
    let running = async {
        match &options.command {
            None => node::run(options).await,
            Some(Offline::Reset { force }) => {
                node::reset_offline(&options.state_dir, &options.run_dir, *force).await
            }
            Some(Offline::DeleteInterface { address }) => datapath::cut(*address).await.map(drop),
        }
    };
    match runtime.block_on(running) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_workers(settings: &str) -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .init();
    match bulk::process::run(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("the bulk workers stopped: {error:#}");
            ExitCode::FAILURE
        }
    }
}
