//! A real Docker engine on a host of the lab, with everything of its own: data, sockets, control
//! group, and a mount namespace in which it finds its plugins.

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

/// The image that every engine has: busybox.
pub const IMAGE: &str = "tiny";
/// Where an engine looks for plugins, in its mount namespace.
pub const PLUGINS: &str = "/run/docker/plugins";

const CGROUPS: &str = "/sys/fs/cgroup";
const PATIENCE: Duration = Duration::from_secs(60);
/// Longer than any command may take on a loaded machine.
const COMMAND_PATIENCE: Duration = Duration::from_secs(180);

/// A host's engine. Its containers and everything else of it go away when this is dropped.
#[derive(Debug)]
pub struct Engine<'a> {
    host: &'a Host,
    folder: PathBuf,
    cgroup: String,
    /// Keeps the mount namespace.
    holder: Child,
    daemon: Option<Child>,
}

impl<'a> Engine<'a> {
    /// Prepares the host, without starting the engine: what runs on the host from here on sees the
    /// engine's `/run/docker`.
    ///
    /// # Errors
    /// When a mount namespace cannot be made.
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

    /// Prepares the host, starts the engine and gives it its image.
    ///
    /// # Errors
    /// When it does not start.
    pub fn launch(host: &'a Host) -> Result<Self> {
        let mut engine = Self::prepare(host)?;
        engine.start()?;
        engine.import()?;
        Ok(engine)
    }

    /// Starts the engine and waits until it answers.
    ///
    /// # Errors
    /// When it does not.
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
            Some(command.spawn().context("dockerd cannot be started: is docker.io installed?")?);
        eventually(PATIENCE, || {
            if let Some(status) = self.daemon.as_mut().map(Child::try_wait).transpose()?.flatten() {
                bail!("dockerd ended ({status}): {}", self.last_words());
            }
            let (code, _) = http::request(&self.socket(), "GET", "/_ping", "")?;
            ensure!(code == 200, "dockerd answers with {code}");
            Ok(())
        })
    }

    fn import(&self) -> Result<()> {
        let archive = busybox_archive(&self.folder)?;
        self.docker(&["import", &archive.to_string_lossy(), IMAGE])?.success()?;
        Ok(())
    }

    /// The engine's own socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("docker.sock")
    }

    /// The plugin's socket, if it is there, by a path that leads there from this process's mount
    /// namespace.
    pub fn plugin(&self) -> PathBuf {
        self.seen(&Path::new(PLUGINS).join("overnode.sock"))
    }

    /// How this process sees a path of the engine's mount namespace.
    fn seen(&self, path: &Path) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{}", self.holder.id(), path.display()))
    }

    /// What the node has to be told of this engine.
    pub fn environment(&self) -> [(&'static str, String); 2] {
        [
            ("OVERNODE_DOCKER_PLUGINS", PLUGINS.to_owned()),
            ("OVERNODE_DOCKER_SOCKET", self.socket().to_string_lossy().into_owned()),
        ]
    }

    /// Runs `overnode` on the host with these arguments, told of this engine.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn overnode(&self, arguments: &[&str]) -> Result<Outcome> {
        let environment = self.environment();
        let environment: Vec<(&str, &str)> =
            environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
        self.host.overnode_with(arguments, &environment)
    }

    /// Runs `docker` with these arguments.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn docker(&self, arguments: &[&str]) -> Result<Outcome> {
        // Beside the engine's own one there may be a newer one, which offers what this engine does
        // not have.
        let own = Path::new("/usr/bin/docker");
        self.client(if own.exists() { "/usr/bin/docker" } else { "docker" }, arguments)
    }

    /// Runs another client of the engine, such as `docker-compose`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn client(&self, program: &str, arguments: &[&str]) -> Result<Outcome> {
        let mut command = self.command(program)?;
        command.args(arguments).env("DOCKER_HOST", self.host_option()).current_dir(&self.folder);
        run_limited(command, &self.folder, COMMAND_PATIENCE)
    }

    /// Starts a container that sleeps, with further options. Returns its address in the network
    /// `overnode`.
    ///
    /// # Errors
    /// When `docker run` fails.
    pub fn run(&self, name: &str, options: &[&str]) -> Result<String> {
        let first = ["run", "--detach", "--network", "overnode", "--name", name];
        let arguments = [&first[..], options, &[IMAGE, "/bin/sleep", "100000"]].concat();
        self.docker(&arguments)?.success()?;
        self.address(name)
    }

    /// The address of a container in the network `overnode`.
    ///
    /// # Errors
    /// When there is no such container, or it has none.
    pub fn address(&self, name: &str) -> Result<String> {
        let format = "{{with index .NetworkSettings.Networks \"overnode\"}}{{.IPAddress}}{{end}}";
        let address =
            self.docker(&["inspect", "--format", format, name])?.success()?.trim().to_owned();
        ensure!(!address.is_empty(), "{name} has no address");
        Ok(address)
    }

    /// Runs a command inside a container; it must succeed. Returns its standard output.
    ///
    /// # Errors
    /// When it fails.
    pub fn exec(&self, name: &str, command: &[&str]) -> Result<String> {
        self.docker(&[&["exec", name], command].concat())?.success()
    }

    /// Fails unless an address answers a ping from inside a container within the time limit.
    ///
    /// # Errors
    /// When it does not.
    pub fn reach(&self, name: &str, address: &str, limit: Duration) -> Result<()> {
        eventually(limit, || {
            self.exec(name, &["/bin/ping", "-c", "1", "-W", "1", address]).map(drop)
        })
    }

    /// One request to the engine's own socket. Returns the status code and the body.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn request(&self, method: &str, path: &str, body: &str) -> Result<(u16, String)> {
        http::request(&self.socket(), method, path, body)
    }

    /// One request to the plugin, as the engine sends them. Returns the status code and the body.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn ask_plugin(&self, method: &str, body: &str) -> Result<(u16, String)> {
        http::request(&self.plugin(), "POST", &format!("/{method}"), body)
    }

    /// SIGKILL to the engine. Its containers go on.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self) -> Result<()> {
        let mut daemon = self.daemon.take().context("the engine does not run")?;
        daemon.kill()?;
        daemon.wait()?;
        // Its containerd dies with it, but where nobody reaps orphans, the next engine takes the
        // dead one for alive.
        let _ = fs::remove_file(self.seen(Path::new("/run/docker/containerd/containerd.pid")));
        Ok(())
    }

    /// What the host loses when it loses power: every process, every interface but the underlay's,
    /// `/run`, bpffs. Disks stay, and with them what the engine and the node keep there.
    ///
    /// # Errors
    /// When something cannot be removed.
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

    /// Processes of its containers.
    pub fn processes(&self) -> Vec<i32> {
        processes_of(&self.cgroup)
    }

    /// The end of what the engine logged.
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

    /// A command in the host's namespaces that sees the machine's own `/sys`, with its control
    /// groups.
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

/// Has a command run in this mount namespace.
pub(crate) fn enter(command: &mut Command, mounts: Arc<OwnedFd>) {
    // SAFETY: between fork and exec only a system call is made.
    unsafe {
        command.pre_exec(move || match libc::setns(mounts.as_raw_fd(), libc::CLONE_NEWNS) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
}

/// A process that keeps a mount namespace with a `/run/docker` of its own. What is mounted there is
/// seen by namespaces made out of this one, as on a host where systemd gives services theirs.
fn hold(host: &Host) -> Result<Child> {
    let script = "mount -t tmpfs tmpfs /run/docker && mount --make-shared /run/docker && echo ready && exec sleep infinity";
    let mut command = host.netns().command(Entry::Setns, "unshare");
    command.args(["--mount", "--propagation", "slave", "sh", "-c", script]);
    let mut holder = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("a mount namespace cannot be made")?;
    let mut word = [0; 6];
    holder
        .stdout
        .take()
        .context("no pipe")?
        .read_exact(&mut word)
        .context("/run/docker cannot be mounted in a namespace of its own")?;
    Ok(holder)
}

/// Kills what is in the control groups of this name, and removes them.
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

/// The names of control groups that engines of labs have made.
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

/// Version 2 has one tree, version 1 one for each controller.
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

/// What containers of tests run: an archive of a root folder with busybox.
pub(crate) fn busybox_archive(folder: &Path) -> Result<PathBuf> {
    let root = folder.join("image");
    fs::create_dir_all(root.join("bin"))?;
    let busybox =
        ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    fs::copy(
        busybox.context("there is no busybox: install busybox-static")?,
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
