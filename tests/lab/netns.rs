//! Network namespaces and how to enter them.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use crate::cleanup;
use crate::run;

/// How a command enters a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Like `nsenter --net=`: only the network changes. `/sys/class/net` shows the machine's own
    /// interfaces.
    Setns,
    /// By `ip netns exec`: the command also gets its own mount namespace, with a fresh `/sys` and
    /// the namespace's `/etc/hosts`, which has the lab's host names.
    IpNetns,
}

/// A named network namespace, as created by `ip netns add`. Dropping it kills its processes and
/// removes it.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: Arc<OwnedFd>,
}

impl Netns {
    /// Creates a namespace with the loopback interface up.
    pub fn new(name: &str) -> Result<Self> {
        {
            let _one_at_a_time = cleanup::lock()?;
            run("ip", &["netns", "add", name])?;
        }
        let path = path_of(name);
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let netns = Self { name: name.to_owned(), file: Arc::new(file.into()) };
        netns.ip(&["link", "set", "lo", "up"])?;
        // With duplicate address detection, a link-local address is unusable for its first second.
        netns.enter(|| Ok(std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0")?))?;
        Ok(netns)
    }

    /// Returns its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns `/run/netns/NAME`.
    pub fn path(&self) -> PathBuf {
        path_of(&self.name)
    }

    /// Runs `ip` on this namespace. Returns its standard output.
    pub fn ip(&self, arguments: &[&str]) -> Result<String> {
        run("ip", &[&["-n", &self.name], arguments].concat())
    }

    /// Returns the names of its interfaces, sorted and without `lo`.
    pub fn interfaces(&self) -> Result<Vec<String>> {
        let links: serde_json::Value = serde_json::from_str(&self.ip(&["-j", "link", "show"])?)?;
        let links = links.as_array().context("`ip -j link` printed no list")?;
        let mut names: Vec<String> = links
            .iter()
            .filter_map(|link| link["ifname"].as_str())
            .filter(|name| *name != "lo")
            .map(str::to_owned)
            .collect();
        names.sort();
        Ok(names)
    }

    /// Runs `work` on a separate thread inside the namespace. Sockets created there stay in the
    /// namespace wherever they are used afterwards.
    ///
    /// # Panics
    /// Panics if `work` panics.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&*self.file, CloneFlags::CLONE_NEWNET)
                        .with_context(|| format!("cannot enter namespace {}", self.name))?;
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Returns a handle for a thread that enters the namespace and stays inside.
    pub(crate) fn entrance(&self) -> Entrance {
        Entrance(Arc::clone(&self.file))
    }

    /// Returns a command that runs inside the namespace.
    ///
    /// It is killed when the thread that started it ends, so that nothing outlives a test. A
    /// process that must outlive that thread, such as a daemon, detaches itself.
    pub fn command(&self, entry: Entry, program: impl AsRef<OsStr>) -> Command {
        let mut command = match entry {
            Entry::Setns => Command::new(program),
            Entry::IpNetns => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", &self.name]).arg(program);
                command
            }
        };
        let file = Arc::clone(&self.file);
        // SAFETY: only system calls are made between fork and exec.
        unsafe {
            command.pre_exec(move || {
                if entry == Entry::Setns && libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        command
    }

    /// Runs a command inside the namespace, as `nsenter --net` would. It must succeed. Returns its
    /// standard output.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let output = self
            .command(Entry::Setns, program)
            .args(arguments)
            .stdin(std::process::Stdio::null())
            .output()
            .with_context(|| format!("cannot start {program} in {}", self.name))?;
        if !output.status.success() {
            return Err(anyhow!(
                "`{program} {}` failed in {} ({}): {}",
                arguments.join(" "),
                self.name,
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            ));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Returns the processes inside the namespace, without this process.
    pub fn processes(&self) -> Vec<i32> {
        let Ok(inode) = std::fs::metadata(self.path()).map(|meta| meta.ino()) else {
            return Vec::new();
        };
        cleanup::processes_in(inode)
    }
}

/// A handle for entering a namespace.
#[derive(Debug)]
pub(crate) struct Entrance(Arc<OwnedFd>);

impl Entrance {
    /// Moves this thread into the namespace for good.
    pub(crate) fn enter(&self) -> Result<()> {
        setns(&*self.0, CloneFlags::CLONE_NEWNET).context("cannot enter the namespace")
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        cleanup::remove_netns(&self.name);
    }
}

pub(crate) fn path_of(name: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(name)
}
