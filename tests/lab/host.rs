//! A host: a network namespace with its own state directory, in which real daemons run.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use ipnet::IpNet;
use serde_json::Value;

use crate::capture::Capture;
use crate::container::Container;
use crate::http;
use crate::netns::{Entry, Netns};
use crate::process::{Outcome, run_limited};
use crate::underlay::{INTERFACE, Underlay};
use crate::{Site, binaries, cleanup, eventually};

/// Name of the state directory inside a host's folder.
pub(crate) const STATE: &str = "state";
const RUN: &str = "run";
/// Longer than any command may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A host of a lab.
#[derive(Debug)]
pub struct Host {
    /// `host1`, `host2`, ...
    pub name: String,
    /// 1, 2, ...
    pub number: usize,
    /// Its underlay addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    target: String,
    netns: Netns,
    entry: Entry,
    folder: PathBuf,
    prefix: String,
    /// The mount namespace of its container engine, if it has one.
    mounts: Mutex<Option<Arc<OwnedFd>>>,
}

impl Host {
    pub(crate) fn new(
        site: &Site,
        underlay: &Underlay,
        number: usize,
        entry: Entry,
    ) -> Result<Self> {
        let name = format!("host{number}");
        let netns = Netns::new(&site.netns_name(&format!("h{number}")))?;
        let addresses = underlay.connect(number, &netns)?;
        let folder = site.folder.join(&name);
        std::fs::create_dir_all(&folder)?;
        let target = match entry {
            Entry::IpNetns => name.clone(),
            Entry::Setns => addresses[0].to_string(),
        };
        Ok(Self {
            name,
            number,
            addresses,
            target,
            netns,
            entry,
            folder,
            prefix: site.prefix.clone(),
            mounts: Mutex::default(),
        })
    }

    /// What `ip netns exec` binds over `/etc/hosts`. Written in place, so that running processes
    /// see it.
    pub(crate) fn write_hosts_file(&self, names: &str) -> Result<()> {
        let folder = Path::new("/etc/netns").join(self.netns.name());
        std::fs::create_dir_all(&folder)?;
        let text = format!("127.0.0.1 localhost\n::1 localhost\n{names}");
        std::fs::write(folder.join("hosts"), text).context("the host's /etc/hosts")
    }

    /// What `ip netns exec` binds over `/etc/resolv.conf` of what is started from then on. Written
    /// in place, so that what runs then sees later changes.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_resolv_conf(&self, text: &str) -> Result<()> {
        let folder = Path::new("/etc/netns").join(self.netns.name());
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("resolv.conf"), text).context("the host's /etc/resolv.conf")
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Its folder: everything on its disk.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The mount namespace that commands on this host run in from here on; none for the machine's
    /// own.
    pub(crate) fn set_mounts(&self, mounts: Option<Arc<OwnedFd>>) {
        *self.mounts.lock().unwrap_or_else(PoisonError::into_inner) = mounts;
    }

    /// Its first underlay address.
    pub fn address(&self) -> IpAddr {
        self.addresses[0]
    }

    /// Its underlay interface.
    pub fn interface(&self) -> &'static str {
        INTERFACE
    }

    /// What other hosts know it by: its name where names resolve, else its address.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// `--state-dir` of its node.
    pub fn state_directory(&self) -> PathBuf {
        self.folder.join(STATE)
    }

    /// `--run-dir` of its node.
    pub fn run_directory(&self) -> PathBuf {
        self.folder.join(RUN)
    }

    /// The unix socket of its daemon.
    pub fn socket(&self) -> PathBuf {
        self.run_directory().join("overnode.sock")
    }

    /// A command on this host, with the node's directories and the built programs in its
    /// environment.
    pub fn command(&self, program: &str) -> Result<Command> {
        let binaries = binaries::folder()?;
        let mut command = self.netns.command(self.entry, program);
        let name = self.name.clone();
        // SAFETY: between fork and exec only system calls are made.
        unsafe {
            command.pre_exec(move || {
                // As a host of its own, it has a name of its own.
                if libc::unshare(libc::CLONE_NEWUTS) != 0
                    || libc::sethostname(name.as_ptr().cast(), name.len()) != 0
                {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        if let Some(mounts) = &*self.mounts.lock().unwrap_or_else(PoisonError::into_inner) {
            crate::docker::enter(&mut command, Arc::clone(mounts));
        }
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env("PATH", format!("{}:{path}", binaries.display()))
            .env("OVERNODE_STATE_DIR", self.state_directory())
            .env("OVERNODE_RUN_DIR", self.run_directory())
            .env("NO_COLOR", "1");
        Ok(command)
    }

    /// Runs `overnode` with these arguments, as somebody logged in to the host would. It gets a
    /// minute.
    pub fn overnode(&self, arguments: &[&str]) -> Result<Outcome> {
        self.overnode_with(arguments, &[])
    }

    /// As [`Self::overnode`], with more environment variables; what it starts inherits them.
    pub fn overnode_with(
        &self,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Outcome> {
        let mut command = self.command("overnode")?;
        command.args(arguments).envs(environment.iter().copied());
        run_limited(command, &self.folder, PATIENCE)
    }

    /// `overnode status --json`.
    pub fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.overnode(&["status", "--json"])?.success()?)?)
    }

    /// `overnode inspect`.
    pub fn inspect(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.overnode(&["inspect"])?.success()?)?)
    }

    /// One request to the daemon's socket. Returns the status code and the body.
    pub fn request(&self, method: &str, path: &str, body: &str) -> Result<(u16, String)> {
        http::request(&self.socket(), method, path, body)
    }

    /// `GET` over TCP, asked on the host itself. Returns the status code and the body.
    ///
    /// # Errors
    /// When nobody listens there, or the answer is none.
    pub fn get(&self, address: SocketAddr, path: &str) -> Result<(u16, String)> {
        http::get(&self.netns, address, path)
    }

    /// The daemon's process: the one called `overnoded` that was given this host's state directory.
    pub fn daemon_pid(&self) -> Option<i32> {
        let state = self.state_directory();
        let state = state.as_os_str().as_encoded_bytes();
        let mentions = |file: String| {
            std::fs::read(file).is_ok_and(|text| {
                text.split(|byte| *byte == 0).any(|word| {
                    word == state
                        || word.strip_suffix(state).is_some_and(|rest| rest.ends_with(b"="))
                })
            })
        };
        cleanup::pids().find(|pid| {
            std::fs::read(format!("/proc/{pid}/comm")).is_ok_and(|name| name == b"overnoded\n")
                && cleanup::is_alive(*pid)
                && (mentions(format!("/proc/{pid}/cmdline"))
                    || mentions(format!("/proc/{pid}/environ")))
        })
    }

    /// SIGKILL to the daemon; returns when it is gone.
    ///
    /// # Errors
    /// When none runs, or it does not go.
    pub fn kill_daemon(&self) -> Result<()> {
        let pid = self.daemon_pid().with_context(|| format!("no daemon runs on {}", self.name))?;
        cleanup::kill_all(&[pid]);
        ensure!(!cleanup::is_alive(pid), "the daemon {pid} survived SIGKILL");
        Ok(())
    }

    /// What is gone when the power fails, processes apart: interfaces but the underlay's, firewall
    /// rules, the node's part of `/run`, bpffs.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub(crate) fn forget_all_but_disks(&self) -> Result<()> {
        let _ = std::fs::remove_dir_all(self.run_directory());
        for name in self.netns().interfaces()? {
            // The other end of a pair is gone already.
            if name != self.interface() {
                let _ = self.netns().ip(&["link", "del", &name]);
            }
        }
        self.netns().run("nft", &["flush", "ruleset"])?;
        let _ = std::fs::remove_dir_all(cleanup::pins_of(&self.state_directory())?);
        Ok(())
    }

    /// The power fails: everything but what is on disk is gone. Containers are their owners' to
    /// drop.
    ///
    /// # Errors
    /// When something stays.
    pub fn lose_power(&self) -> Result<()> {
        cleanup::kill_all(&self.netns().processes());
        self.forget_all_but_disks()
    }

    /// What the daemon has logged, if it was started without systemd.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.run_directory().join("overnoded.log")).unwrap_or_default()
    }

    /// Names of everything that the node has pinned, relative to its own folder; empty when there
    /// is none.
    pub fn pins(&self) -> Result<Vec<String>> {
        // Of a state directory that `reset` removed, the path is known all the same.
        std::fs::create_dir_all(&self.folder)?;
        let missing = !self.state_directory().exists();
        if missing {
            std::fs::create_dir(self.state_directory())?;
        }
        let pins = cleanup::pins_of(&self.state_directory());
        if missing {
            std::fs::remove_dir(self.state_directory())?;
        }
        let pins = pins?;
        let mut found = Vec::new();
        let mut folders = vec![pins.clone()];
        while let Some(folder) = folders.pop() {
            let Ok(entries) = std::fs::read_dir(&folder) else { continue };
            for entry in entries {
                let path = entry?.path();
                if path.is_dir() {
                    folders.push(path.clone());
                }
                found.push(path.strip_prefix(&pins)?.to_string_lossy().into_owned());
            }
        }
        if found.is_empty() && pins.exists() {
            found.push(".".into());
        }
        found.sort();
        Ok(found)
    }

    /// Removes one of the node's pins, named as [`Self::pins`] names it: as a version that did not
    /// know it would have left things.
    ///
    /// # Errors
    /// When it is not there.
    pub fn unpin(&self, name: &str) -> Result<()> {
        let path = cleanup::pins_of(&self.state_directory())?.join(name);
        std::fs::remove_file(&path).with_context(|| path.display().to_string())
    }

    /// Everything on this host that a node may leave behind: interfaces other than the underlay's,
    /// eBPF programs on the underlay's interface, routes, pins, files and processes. Empty on a
    /// host where no node ever was.
    pub fn remains(&self) -> Result<Vec<String>> {
        let mut remains: Vec<String> = self
            .netns
            .interfaces()?
            .into_iter()
            .filter(|name| name != INTERFACE)
            .map(|name| format!("interface {name}"))
            .collect();
        remains.extend(self.pins()?.into_iter().map(|name| format!("pin {name}")));
        remains.extend(self.programs()?.into_iter().map(|name| format!("program {name}")));
        for directory in [self.state_directory(), self.run_directory()] {
            for entry in std::fs::read_dir(&directory).into_iter().flatten() {
                let name = entry?.file_name();
                // Logs are for people who ask why: they outlive the node.
                if !name.to_string_lossy().ends_with(".log") {
                    remains.push(format!("file {}", directory.join(name).display()));
                }
            }
        }
        remains.extend(self.daemon_pid().map(|pid| format!("process {pid}")));
        Ok(remains)
    }

    /// Programs attached to the underlay's interface (tcx, clsact, XDP), by name.
    fn programs(&self) -> Result<Vec<String>> {
        let mut programs = Vec::new();
        let qdiscs = self.netns.run("tc", &["qdisc", "show", "dev", INTERFACE])?;
        if qdiscs.contains("clsact") {
            programs.push("clsact".to_owned());
        }
        let link = self.netns.ip(&["-d", "link", "show", INTERFACE])?;
        if link.contains("prog/xdp") {
            programs.push("xdp".to_owned());
        }
        programs.extend(self.netns.enter(|| {
            let [ingress, egress] = [TcAttachType::Ingress, TcAttachType::Egress].map(tcx_programs);
            Ok([ingress?, egress?].concat())
        })?);
        Ok(programs)
    }

    /// Makes a container: a network namespace that the node does not know yet.
    pub fn container(&self, name: &str) -> Result<Container> {
        Container::new(&format!("{}h{}{name}", self.prefix, self.number), name)
    }

    /// `overnode attach netns:CONTAINER`, with more arguments if wanted. Returns the address it
    /// printed.
    pub fn attach(&self, container: &Container, arguments: &[&str]) -> Result<IpNet> {
        let target = container.target();
        let words = [&["attach", &target], arguments].concat();
        let printed = self.overnode(&words)?.success()?;
        let address: IpNet =
            printed.strip_suffix('\n').unwrap_or(&printed).parse().with_context(|| {
                format!("`overnode attach` printed {printed:?}, which is no address")
            })?;
        container.set_address(Some(address.addr()));
        Ok(address)
    }

    /// `overnode detach netns:CONTAINER`.
    pub fn detach(&self, container: &Container) -> Result<()> {
        self.overnode(&["detach", &container.target()])?.success()?;
        container.set_address(None);
        Ok(())
    }

    /// Captures what its underlay interface sends and receives. Returns when it is listening.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(&self.netns, &self.folder, &["-i", INTERFACE])
    }

    /// Waits until the daemon answers `overnode status`.
    pub fn wait_ready(&self) -> Result<()> {
        eventually(Duration::from_secs(20), || match self.overnode(&["status"])?.success() {
            Ok(_) => Ok(()),
            Err(error) => bail!("{} does not answer: {error:#}", self.name),
        })
    }
}

/// Names of the tcx programs on the underlay's interface of this thread's namespace.
fn tcx_programs(at: TcAttachType) -> Result<Vec<String>> {
    match SchedClassifier::query_tcx(INTERFACE, at) {
        Ok((_, programs)) => Ok(programs
            .iter()
            .map(|program| program.name_as_str().unwrap_or("without a name").to_owned())
            .collect()),
        // Before Linux 6.6 there is no tcx, and nothing to ask for.
        Err(ProgramError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::EINVAL) =>
        {
            Ok(Vec::new())
        }
        Err(error) => Err(error).context("the tcx programs cannot be listed"),
    }
}
