//! Runs a real Docker engine on a host of the lab.
//!
//! The engine has its own data, sockets, control group and mount namespace, in which it finds its
//! plugins.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::cleanup;
use crate::host::Host;
use crate::http;
use crate::netns::Entry;
use crate::process::{Outcome, run_limited};
use crate::{eventually, run};

/// Name of the image that every engine has: busybox.
pub const IMAGE: &str = "tiny";
/// Directory in which an engine looks for plugins, in its mount namespace.
pub const PLUGINS: &str = "/run/docker/plugins";

const CGROUPS: &str = "/sys/fs/cgroup";
const TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout of a command: longer than any may take on a loaded machine.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(180);

/// The Docker engine of a host. Dropping it removes its containers and everything else that it
/// made.
#[derive(Debug)]
pub struct Engine<'a> {
    host: &'a Host,
    folder: PathBuf,
    cgroup: String,
    /// Process that keeps the mount namespace alive.
    holder: Child,
    daemon: Option<Child>,
}

impl<'a> Engine<'a> {
    /// Prepares the host without starting the engine. Commands that run on the host from here on
    /// see the engine's `/run/docker`.
    ///
    /// # Errors
    /// Fails if the mount namespace cannot be created.
    pub fn prepare(host: &'a Host) -> Result<Self> {
        let folder = host.folder().join("docker");
        fs::create_dir_all(&folder)?;
        fs::create_dir_all("/run/docker")?;
        let holder = hold(host)?;
        let engine =
            Self { host, folder, cgroup: host.netns().name().to_owned(), holder, daemon: None };
        host.set_mounts(Some(engine.mounts()?));
        Ok(engine)
    }

    /// Prepares the host, starts the engine and imports the image.
    ///
    /// # Errors
    /// Fails if the engine does not start.
    pub fn launch(host: &'a Host) -> Result<Self> {
        let mut engine = Self::prepare(host)?;
        engine.start()?;
        engine.import()?;
        Ok(engine)
    }

    /// Starts the engine and waits until it answers.
    ///
    /// # Errors
    /// Fails if it does not answer.
    pub fn start(&mut self) -> Result<()> {
        let log =
            File::options().create(true).append(true).open(self.folder.join("dockerd.log"))?;
        let mut command = self.command("dockerd")?;
        command
            .arg("--data-root")
            .arg(self.folder.join("data"))
            .arg("--pidfile")
            .arg(self.folder.join("pid"))
            .arg("--host")
            .arg(self.host_option())
            .args(["--storage-driver", "vfs", "--cgroup-parent"])
            .arg(format!("/{}", self.cgroup))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        self.daemon =
            Some(command.spawn().context("cannot start dockerd: is docker.io installed?")?);
        eventually(TIMEOUT, || {
            if let Some(status) = self.daemon.as_mut().map(Child::try_wait).transpose()?.flatten() {
                bail!("dockerd ended ({status}): {}", self.last_words());
            }
            let (code, _) = http::request(&self.socket(), "GET", "/_ping", "")?;
            ensure!(code == 200, "dockerd answered with status {code}");
            Ok(())
        })
    }

    fn import(&self) -> Result<()> {
        let archive = busybox_archive(&self.folder)?;
        self.docker(&["import", &archive.to_string_lossy(), IMAGE])?.success()?;
        Ok(())
    }

    /// Returns the path of the engine's own socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("docker.sock")
    }

    /// Returns the path of the plugin's socket as seen from this process's mount namespace. The
    /// socket need not exist.
    pub fn plugin(&self) -> PathBuf {
        self.seen(&Path::new(PLUGINS).join("overnode.sock"))
    }

    /// Translates a path of the engine's mount namespace into one of this process's.
    fn seen(&self, path: &Path) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{}", self.holder.id(), path.display()))
    }

    /// Returns the environment variables that tell the node about this engine.
    pub fn environment(&self) -> [(&'static str, String); 2] {
        [
            ("OVERNODE_DOCKER_PLUGINS", PLUGINS.to_owned()),
            ("OVERNODE_DOCKER_SOCKET", self.socket().to_string_lossy().into_owned()),
        ]
    }

    /// Runs `overnode` on the host with these arguments and with [`Self::environment`].
    ///
    /// # Errors
    /// Fails if it cannot be started or runs too long.
    pub fn overnode(&self, arguments: &[&str]) -> Result<Outcome> {
        let environment = self.environment();
        let environment: Vec<(&str, &str)> =
            environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
        self.host.overnode_with(arguments, &environment)
    }

    /// Runs `docker` with these arguments.
    ///
    /// # Errors
    /// Fails if it cannot be started or runs too long.
    pub fn docker(&self, arguments: &[&str]) -> Result<Outcome> {
        // A newer client may be installed too. It may use features that this engine does not have.
        let own = Path::new("/usr/bin/docker");
        self.client(if own.exists() { "/usr/bin/docker" } else { "docker" }, arguments)
    }

    /// Runs another client of the engine, such as `docker-compose`.
    ///
    /// # Errors
    /// Fails if it cannot be started or runs too long.
    pub fn client(&self, program: &str, arguments: &[&str]) -> Result<Outcome> {
        let mut command = self.command(program)?;
        command.args(arguments).env("DOCKER_HOST", self.host_option()).current_dir(&self.folder);
        run_limited(command, &self.folder, COMMAND_TIMEOUT)
    }

    /// Starts a container that sleeps, with further options. Returns its address in the network
    /// `overnode`.
    ///
    /// # Errors
    /// Fails if `docker run` fails.
    pub fn run(&self, name: &str, options: &[&str]) -> Result<String> {
        let first = ["run", "--detach", "--network", "overnode", "--name", name];
        let arguments = [&first[..], options, &[IMAGE, "/bin/sleep", "100000"]].concat();
        self.docker(&arguments)?.success()?;
        self.address(name)
    }

    /// Returns the address of a container in the network `overnode`.
    ///
    /// # Errors
    /// Fails if there is no such container, or if it has no address.
    pub fn address(&self, name: &str) -> Result<String> {
        let format = "{{with index .NetworkSettings.Networks \"overnode\"}}{{.IPAddress}}{{end}}";
        let address =
            self.docker(&["inspect", "--format", format, name])?.success()?.trim().to_owned();
        ensure!(!address.is_empty(), "{name} has no address");
        Ok(address)
    }

    /// Runs a command inside a container, which must succeed. Returns its standard output.
    ///
    /// # Errors
    /// Fails if the command fails.
    pub fn exec(&self, name: &str, command: &[&str]) -> Result<String> {
        self.docker(&[&["exec", name], command].concat())?.success()
    }

    /// Pings an address from inside a container until it answers.
    ///
    /// # Errors
    /// Fails if it does not answer within the time limit.
    pub fn reach(&self, name: &str, address: &str, limit: Duration) -> Result<()> {
        eventually(limit, || {
            self.exec(name, &["/bin/ping", "-c", "1", "-W", "1", address]).map(drop)
        })
    }

    /// Sends a request to the engine's own socket. Returns the status code and the body.
    ///
    /// # Errors
    /// Fails if the engine does not answer.
    pub fn request(&self, method: &str, path: &str, body: &str) -> Result<(u16, String)> {
        http::request(&self.socket(), method, path, body)
    }

    /// Sends a request to the plugin, as the engine does. Returns the status code and the body.
    ///
    /// # Errors
    /// Fails if the plugin does not answer.
    pub fn ask_plugin(&self, method: &str, body: &str) -> Result<(u16, String)> {
        http::request(&self.plugin(), "POST", &format!("/{method}"), body)
    }

    /// Kills the engine with SIGKILL. Its containers keep running.
    ///
    /// # Errors
    /// Fails if the engine is not running.
    pub fn kill(&mut self) -> Result<()> {
        let mut daemon = self.daemon.take().context("the engine is not running")?;
        daemon.kill()?;
        daemon.wait()?;
        // The engine's containerd dies with it. Where nothing reaps orphans, the next engine would
        // mistake the dead one for a live one.
        let _ = fs::remove_file(self.seen(Path::new("/run/docker/containerd/containerd.pid")));
        Ok(())
    }

    /// Simulates a power failure of the host: removes every process, every interface except the
    /// underlay's, `/run` and bpffs. Disks stay, and with them the data of the engine and the node.
    ///
    /// # Errors
    /// Fails if something cannot be removed.
    pub fn lose_power(&mut self) -> Result<()> {
        self.stop_everything();
        for file in ["pid", "docker.sock"] {
            let _ = fs::remove_file(self.folder.join(file));
        }
        self.host.forget_all_but_disks()?;
        self.holder = hold(self.host)?;
        self.host.set_mounts(Some(self.mounts()?));
        Ok(())
    }

    /// Returns the processes of its containers.
    pub fn processes(&self) -> Vec<i32> {
        processes_of(&self.cgroup)
    }

    /// Returns the end of the engine's log.
    pub fn last_words(&self) -> String {
        let log = fs::read_to_string(self.folder.join("dockerd.log")).unwrap_or_default();
        let is_of_use =
            |line: &&str| !line.contains("module=grpc") && !line.contains("io.containerd.");
        let lines: Vec<&str> = log.lines().filter(is_of_use).collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    fn host_option(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    fn mounts(&self) -> Result<Arc<OwnedFd>> {
        let path = format!("/proc/{}/ns/mnt", self.holder.id());
        Ok(Arc::new(File::open(&path).with_context(|| path)?.into()))
    }

    /// Returns a command in the host's namespaces that sees the machine's own `/sys`, with its
    /// control groups.
    fn command(&self, program: &str) -> Result<Command> {
        let mut command = self.host.netns().command(Entry::Setns, program);
        enter(&mut command, self.mounts()?);
        Ok(command)
    }

    fn stop_everything(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        cleanup::kill_all(&self.host.netns().processes());
        remove_cgroup(&self.cgroup);
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

impl Drop for Engine<'_> {
    fn drop(&mut self) {
        self.stop_everything();
        self.host.set_mounts(None);
    }
}

/// Makes a command run in this mount namespace.
pub(crate) fn enter(command: &mut Command, mounts: Arc<OwnedFd>) {
    // SAFETY: only a system call is made between fork and exec.
    unsafe {
        command.pre_exec(move || match libc::setns(mounts.as_raw_fd(), libc::CLONE_NEWNS) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
}

/// Starts a process that keeps a mount namespace with its own `/run/docker`. Namespaces derived
/// from this one see what is mounted there, as on a host where systemd gives services their own
/// namespaces.
fn hold(host: &Host) -> Result<Child> {
    let script = "mount -t tmpfs tmpfs /run/docker && mount --make-shared /run/docker && \
                  echo ready && exec sleep infinity";
    let mut command = host.netns().command(Entry::Setns, "unshare");
    command.args(["--mount", "--propagation", "slave", "sh", "-c", script]);
    let mut holder = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot create a mount namespace")?;
    let mut word = [0; 6];
    holder
        .stdout
        .take()
        .context("no pipe")?
        .read_exact(&mut word)
        .context("cannot mount /run/docker in its own namespace")?;
    Ok(holder)
}

/// Kills the processes in the control groups of this name, and removes the groups.
pub(crate) fn remove_cgroup(name: &str) {
    for _ in 0..50 {
        cleanup::kill_all(&processes_of(name));
        let left: Vec<PathBuf> =
            groups(name).into_iter().filter(|group| !remove_tree(group)).collect();
        if left.is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Returns the names of all top-level control groups, including those of labs' engines.
pub(crate) fn cgroups() -> impl Iterator<Item = String> {
    hierarchies().into_iter().flat_map(names_in)
}

fn processes_of(name: &str) -> Vec<i32> {
    let mut found = Vec::new();
    let mut folders = groups(name);
    while let Some(folder) = folders.pop() {
        let listed = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        found.extend(listed.lines().filter_map(|pid| pid.parse::<i32>().ok()));
        folders.extend(subfolders(&folder));
    }
    found.sort_unstable();
    found.dedup();
    found
}

fn remove_tree(folder: &Path) -> bool {
    for inner in subfolders(folder) {
        remove_tree(&inner);
    }
    fs::remove_dir(folder).is_ok()
}

fn groups(name: &str) -> Vec<PathBuf> {
    hierarchies().into_iter().map(|root| root.join(name)).filter(|path| path.is_dir()).collect()
}

/// Returns the roots of the control group trees. Version 2 has one tree, version 1 has one per
/// controller.
fn hierarchies() -> Vec<PathBuf> {
    let root = PathBuf::from(CGROUPS);
    if root.join("cgroup.procs").exists() { vec![root] } else { subfolders(&root) }
}

fn subfolders(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir() && !path.is_symlink()).collect()
}

fn names_in(folder: PathBuf) -> Vec<String> {
    subfolders(&folder)
        .iter()
        .filter_map(|path| path.file_name()?.to_str().map(str::to_owned))
        .collect()
}

/// Creates the image of the tests' containers: an archive of a root directory with busybox.
pub(crate) fn busybox_archive(folder: &Path) -> Result<PathBuf> {
    let root = folder.join("image");
    fs::create_dir_all(root.join("bin"))?;
    let busybox =
        ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    fs::copy(
        busybox.context("busybox is missing: install busybox-static")?,
        root.join("bin/busybox"),
    )?;
    for applet in ["cat", "ip", "nc", "nslookup", "ping", "sh", "sleep", "wget"] {
        let link = root.join("bin").join(applet);
        if !link.exists() {
            std::os::unix::fs::symlink("busybox", link)?;
        }
    }
    let archive = folder.join("image.tar");
    run("tar", &["-C", &root.to_string_lossy(), "-cf", &archive.to_string_lossy(), "."])?;
    Ok(archive)
}
