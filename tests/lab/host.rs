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
/// Timeout of a command: longer than any may take on a loaded machine.
const TIMEOUT: Duration = Duration::from_secs(60);

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
    /// The mount namespace of its container engine, if any.
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

    /// Writes the file that `ip netns exec` binds over `/etc/hosts`. It is written in place, so
    /// that running processes see the change.
    pub(crate) fn write_hosts_file(&self, names: &str) -> Result<()> {
        let folder = Path::new("/etc/netns").join(self.netns.name());
        std::fs::create_dir_all(&folder)?;
        let text = format!("127.0.0.1 localhost\n::1 localhost\n{names}");
        std::fs::write(folder.join("hosts"), text).context("cannot write the host's /etc/hosts")
    }

    /// Writes the file that `ip netns exec` binds over `/etc/resolv.conf` of processes started from
    /// then on. It is written in place, so that these processes see later changes.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub fn write_resolv_conf(&self, text: &str) -> Result<()> {
        let folder = Path::new("/etc/netns").join(self.netns.name());
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("resolv.conf"), text)
            .context("cannot write the host's /etc/resolv.conf")
    }

    /// Returns its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Returns its folder, which holds everything on its disk.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Sets the mount namespace of commands on this host from here on. `None` means the machine's
    /// own.
    pub(crate) fn set_mounts(&self, mounts: Option<Arc<OwnedFd>>) {
        *self.mounts.lock().unwrap_or_else(PoisonError::into_inner) = mounts;
    }

    /// Returns its first underlay address.
    pub fn address(&self) -> IpAddr {
        self.addresses[0]
    }

    /// Returns the name of its underlay interface.
    pub fn interface(&self) -> &'static str {
        INTERFACE
    }

    /// Returns what other hosts know it by: its name where names resolve, otherwise its address.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// Returns the `--state-dir` of its node.
    pub fn state_directory(&self) -> PathBuf {
        self.folder.join(STATE)
    }

    /// Returns the `--run-dir` of its node.
    pub fn run_directory(&self) -> PathBuf {
        self.folder.join(RUN)
    }

    /// Returns the path of its daemon's unix socket.
    pub fn socket(&self) -> PathBuf {
        self.run_directory().join("overnode.sock")
    }

    /// Returns a command on this host, with the node's directories and the built programs in its
    /// environment.
    pub fn command(&self, program: &str) -> Result<Command> {
        let binaries = binaries::folder()?;
        let mut command = self.netns.command(self.entry, program);
        let name = self.name.clone();
        // SAFETY: only system calls are made between fork and exec.
        unsafe {
            command.pre_exec(move || {
                // A host has its own host name.
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

    /// Runs `overnode` with these arguments, as a user logged in to the host would. The timeout is
    /// one minute.
    pub fn overnode(&self, arguments: &[&str]) -> Result<Outcome> {
        self.overnode_with(arguments, &[])
    }

    /// Like [`Self::overnode`], with more environment variables. Processes that it starts inherit
    /// them.
    pub fn overnode_with(
        &self,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Outcome> {
        let mut command = self.command("overnode")?;
        command.args(arguments).envs(environment.iter().copied());
        run_limited(command, &self.folder, TIMEOUT)
    }

    /// Runs `overnode status --json` and parses its output.
    pub fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.overnode(&["status", "--json"])?.success()?)?)
    }

    /// Runs `overnode inspect` and parses its output.
    pub fn inspect(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.overnode(&["inspect"])?.success()?)?)
    }

    /// Sends a request to the daemon's socket. Returns the status code and the body.
    pub fn request(&self, method: &str, path: &str, body: &str) -> Result<(u16, String)> {
        http::request(&self.socket(), method, path, body)
    }

    /// Sends a `GET` request over TCP from the host itself. Returns the status code and the body.
    ///
    /// # Errors
    /// Fails if nothing listens there or the answer is not HTTP.
    pub fn get(&self, address: SocketAddr, path: &str) -> Result<(u16, String)> {
        http::get(&self.netns, address, path)
    }

    /// Returns the daemon's process ID. The daemon is the process named `overnoded` that was given
    /// this host's state directory.
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

    /// Kills the daemon with SIGKILL. Returns once it is gone.
    ///
    /// # Errors
    /// Fails if no daemon is running, or if it does not end.
    pub fn kill_daemon(&self) -> Result<()> {
        let pid =
            self.daemon_pid().with_context(|| format!("no daemon is running on {}", self.name))?;
        cleanup::kill_all(&[pid]);
        ensure!(!cleanup::is_alive(pid), "the daemon {pid} survived SIGKILL");
        Ok(())
    }

    /// Removes what a power failure removes, except processes: interfaces other than the
    /// underlay's, firewall rules, the node's part of `/run`, and bpffs.
    ///
    /// # Errors
    /// Fails if something cannot be removed.
    pub(crate) fn forget_all_but_disks(&self) -> Result<()> {
        let _ = std::fs::remove_dir_all(self.run_directory());
        for name in self.netns().interfaces()? {
            // The other end of a veth pair may be gone already.
            if name != self.interface() {
                let _ = self.netns().ip(&["link", "del", &name]);
            }
        }
        self.netns().run("nft", &["flush", "ruleset"])?;
        let _ = std::fs::remove_dir_all(cleanup::pins_of(&self.state_directory())?);
        Ok(())
    }

    /// Simulates a power failure: everything that is not on disk is gone. Callers drop their own
    /// containers.
    ///
    /// # Errors
    /// Fails if something remains.
    pub fn lose_power(&self) -> Result<()> {
        cleanup::kill_all(&self.netns().processes());
        self.forget_all_but_disks()
    }

    /// Returns the daemon's log, if it was started without systemd.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.run_directory().join("overnoded.log")).unwrap_or_default()
    }

    /// Returns the names of everything that the node has pinned, relative to its own folder. Empty
    /// if nothing is pinned.
    pub fn pins(&self) -> Result<Vec<String>> {
        // If `reset` removed the state directory, create it briefly, because its resolved path
        // names the folder of the pins.
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

    /// Removes one of the node's pins, named as in [`Self::pins`]. The result is what an older
    /// version leaves that does not know the pin.
    ///
    /// # Errors
    /// Fails if the pin does not exist.
    pub fn unpin(&self, name: &str) -> Result<()> {
        let path = cleanup::pins_of(&self.state_directory())?.join(name);
        std::fs::remove_file(&path).with_context(|| path.display().to_string())
    }

    /// Returns everything on this host that a node may leave behind: interfaces other than the
    /// underlay's, programs on the underlay's interface, pins, files and processes. Empty on a host
    /// that never had a node.
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
                // Logs outlive the node, for administrators who look for a cause.
                if !name.to_string_lossy().ends_with(".log") {
                    remains.push(format!("file {}", directory.join(name).display()));
                }
            }
        }
        remains.extend(self.daemon_pid().map(|pid| format!("process {pid}")));
        Ok(remains)
    }

    /// Returns the names of the programs attached to the underlay's interface (tcx, clsact, XDP).
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

    /// Creates a container: a network namespace that the node does not know yet.
    pub fn container(&self, name: &str) -> Result<Container> {
        Container::new(&format!("{}h{}{name}", self.prefix, self.number), name)
    }

    /// Runs `overnode attach netns:CONTAINER` with further arguments. Returns the address that it
    /// printed.
    pub fn attach(&self, container: &Container, arguments: &[&str]) -> Result<IpNet> {
        let target = container.target();
        let words = [&["attach", &target], arguments].concat();
        let printed = self.overnode(&words)?.success()?;
        let address: IpNet =
            printed.strip_suffix('\n').unwrap_or(&printed).parse().with_context(|| {
                format!("`overnode attach` printed {printed:?} instead of an address")
            })?;
        container.set_address(Some(address.addr()));
        Ok(address)
    }

    /// Runs `overnode detach netns:CONTAINER`.
    pub fn detach(&self, container: &Container) -> Result<()> {
        self.overnode(&["detach", &container.target()])?.success()?;
        container.set_address(None);
        Ok(())
    }

    /// Captures what its underlay interface sends and receives. Returns once the capture is
    /// listening.
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

/// Returns the names of the tcx programs on the underlay's interface in this thread's namespace.
fn tcx_programs(at: TcAttachType) -> Result<Vec<String>> {
    match SchedClassifier::query_tcx(INTERFACE, at) {
        Ok((_, programs)) => Ok(programs
            .iter()
            .map(|program| program.name_as_str().unwrap_or("unnamed").to_owned())
            .collect()),
        // Linux before 6.6 has no tcx.
        Err(ProgramError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::EINVAL) =>
        {
            Ok(Vec::new())
        }
        Err(error) => Err(error).context("cannot list the tcx programs"),
    }
}
