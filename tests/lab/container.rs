//! A container, as far as the network is concerned: a namespace that is plugged in.

use std::net::IpAddr;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::netns::{Entry, Netns};
use crate::ping::{PingStats, Pinging};

/// A container of a host. Its namespace goes away when it is dropped, as the container's death
/// would make it.
#[derive(Debug)]
pub struct Container {
    /// The name it was made with.
    pub name: String,
    netns: Netns,
    address: Mutex<Option<IpAddr>>,
}

impl Container {
    pub(crate) fn new(netns: &str, name: &str) -> Result<Self> {
        Ok(Self { name: name.to_owned(), netns: Netns::new(netns)?, address: Mutex::new(None) })
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// How `overnode attach` is told of it: `netns:NAME`.
    pub fn target(&self) -> String {
        format!("netns:{}", self.netns.name())
    }

    /// The address that `attach` gave it.
    ///
    /// # Panics
    /// When it is not attached.
    pub fn address(&self) -> IpAddr {
        self.address
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .unwrap_or_else(|| panic!("{} is not attached", self.name))
    }

    /// Notes the address, for containers that were plugged in without [`crate::Host::attach`].
    pub fn set_address(&self, address: Option<IpAddr>) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = address;
    }

    /// A command inside the container.
    pub fn command(&self, program: &str) -> Command {
        self.netns.command(Entry::Setns, program)
    }

    /// Runs a command inside the container; it must succeed. Returns its standard output.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        self.netns.run(program, arguments)
    }

    /// Sends `count` pings, one each `interval`, and waits for the answers. The payload is the
    /// pattern of [`crate::flow::MARKER`].
    pub fn ping(&self, to: IpAddr, count: u32, interval: Duration) -> Result<PingStats> {
        Pinging::start(&self.netns, to, Some(count), interval)?.finish()
    }

    /// Pings until [`Pinging::stop`].
    pub fn start_pinging(&self, to: IpAddr, interval: Duration) -> Result<Pinging> {
        Pinging::start(&self.netns, to, None, interval)
    }

    /// Fails unless `to` answers one of a few pings within the time limit.
    pub fn reach(&self, to: IpAddr, limit: Duration) -> Result<()> {
        crate::eventually(limit, || {
            let stats = self.ping(to, 1, Duration::from_millis(10))?;
            (stats.received > 0)
                .then_some(())
                .with_context(|| format!("{} gets no answer from {to}", self.name))
        })
    }
}
