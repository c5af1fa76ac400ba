//! A container from the network's point of view: a namespace that can be attached.

use std::net::IpAddr;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::netns::{Entry, Netns};
use crate::ping::{PingStats, Pinging};

/// A container of a host. Dropping it removes its namespace, as the death of a container does.
#[derive(Debug)]
pub struct Container {
    /// Name given at construction.
    pub name: String,
    netns: Netns,
    address: Mutex<Option<IpAddr>>,
}

impl Container {
    pub(crate) fn new(netns: &str, name: &str) -> Result<Self> {
        Ok(Self { name: name.to_owned(), netns: Netns::new(netns)?, address: Mutex::new(None) })
    }

    /// Returns its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Returns the target that `overnode attach` expects: `netns:NAME`.
    pub fn target(&self) -> String {
        format!("netns:{}", self.netns.name())
    }

    /// Returns the address that `attach` gave it.
    ///
    /// # Panics
    /// Panics if it is not attached.
    pub fn address(&self) -> IpAddr {
        self.address
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .unwrap_or_else(|| panic!("{} is not attached", self.name))
    }

    /// Sets the address, for containers that were attached without [`crate::Host::attach`].
    pub fn set_address(&self, address: Option<IpAddr>) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = address;
    }

    /// Returns a command that runs inside the container.
    pub fn command(&self, program: &str) -> Command {
        self.netns.command(Entry::Setns, program)
    }

    /// Runs a command inside the container, which must succeed. Returns its standard output.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        self.netns.run(program, arguments)
    }

    /// Sends `count` pings, one per `interval`, and waits for the answers. The payload repeats
    /// [`crate::flow::MARKER`].
    pub fn ping(&self, to: IpAddr, count: u32, interval: Duration) -> Result<PingStats> {
        Pinging::start(&self.netns, to, Some(count), interval)?.finish()
    }

    /// Pings in the background until [`Pinging::stop`].
    pub fn start_pinging(&self, to: IpAddr, interval: Duration) -> Result<Pinging> {
        Pinging::start(&self.netns, to, None, interval)
    }

    /// Pings `to` until it answers. Fails if it does not answer within the time limit.
    pub fn reach(&self, to: IpAddr, limit: Duration) -> Result<()> {
        crate::eventually(limit, || {
            let stats = self.ping(to, 1, Duration::from_millis(10))?;
            (stats.received > 0)
                .then_some(())
                .with_context(|| format!("{} gets no answer from {to}", self.name))
        })
    }
}
