//! Network namespaces and the processes in them, gone when dropped.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;

/// First letters of every namespace made here; the maker's process ID follows.
const PREFIX: &str = "ovrig";

/// A named network namespace with its loopback up. Dropping it ends what runs in it and deletes it.
#[derive(Debug)]
pub struct Space {
    name: String,
}

impl Space {
    /// Makes a namespace called `ovrig<process ID>-<label>`.
    ///
    /// # Errors
    /// When `ip` is missing, refuses (not root), or the name is taken.
    pub fn new(label: &str) -> Result<Self> {
        let name = format!("{PREFIX}{}-{label}", std::process::id());
        run(Command::new("ip").args(["netns", "add", &name]))?;
        let space = Self { name };
        space.run("ip link set lo up")?;
        Ok(space)
    }

    /// The name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for this namespace.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// A command that will run in this namespace; the file system stays the caller's. The child dies with the thread
    /// that spawns it.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let namespace = self.open()?;
        let mut command = Command::new(program);
        // SAFETY: between fork and exec only setns and prctl are called, both of which are plain system calls.
        unsafe {
            command.pre_exec(move || {
                setns(&namespace, CloneFlags::CLONE_NEWNET)?;
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                Ok(())
            });
        }
        Ok(command)
    }

    /// Runs a command, given as words separated by spaces, to its end and gives back what it printed.
    ///
    /// # Errors
    /// When it cannot be started or fails; the message holds its words and what it wrote to stderr.
    pub fn run(&self, words: &str) -> Result<String> {
        let mut words = words.split_whitespace();
        let program = words.next().context("an empty command")?;
        run(self.command(program)?.args(words))
    }

    /// Runs a function on a thread of its own inside this namespace.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or what the function returns.
    pub fn enter<T: Send>(&self, function: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let namespace = self.open()?;
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                setns(&namespace, CloneFlags::CLONE_NEWNET).context("cannot enter a namespace")?;
                function()
            });
            inside.join().map_err(|_| anyhow!("a probe panicked in {}", self.name))?
        })
    }

    /// Writes a network setting of this namespace, named as below `/proc/sys/net`.
    ///
    /// # Errors
    /// When there is no such setting.
    pub fn set(&self, setting: &str, value: &str) -> Result<()> {
        self.enter(|| {
            let file = format!("/proc/sys/net/{setting}");
            fs::write(&file, value).with_context(|| format!("cannot set {file}"))
        })
    }

    /// Joins two namespaces by a veth pair with both ends up.
    ///
    /// # Errors
    /// When `ip` refuses.
    pub fn join(&self, mine: &str, other: &Self, theirs: &str, mtu: u32) -> Result<()> {
        let (own, peer) = (self.name(), other.name());
        self.run(&format!(
            "ip link add {mine} mtu {mtu} type veth peer name {theirs} mtu {mtu} netns {peer}"
        ))
        .with_context(|| format!("cannot join {own} to {peer}"))?;
        self.run(&format!("ip link set {mine} up"))?;
        other.run(&format!("ip link set {theirs} up"))?;
        Ok(())
    }

    fn open(&self) -> Result<File> {
        File::open(self.path()).with_context(|| format!("namespace {} is gone", self.name))
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        delete(&self.name);
    }
}

/// Deletes what earlier processes left behind when they were killed. Namespaces of living processes stay.
pub fn sweep() {
    let Ok(entries) = fs::read_dir("/run/netns") else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some((maker, _)) = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')) else {
            continue;
        };
        if maker.parse::<u32>().is_ok_and(|pid| !fs::exists(format!("/proc/{pid}")).unwrap_or(true)) {
            delete(&name);
        }
    }
}

fn delete(name: &str) {
    let inside = Command::new("ip").args(["netns", "pids", name]).output();
    for pid in
        inside.iter().flat_map(|output| std::str::from_utf8(&output.stdout)).flat_map(str::split_whitespace)
    {
        let Ok(pid) = pid.parse() else { continue };
        // One that ended meanwhile is what is wanted.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
    }
    let _ = Command::new("ip").args(["netns", "del", name]).stderr(Stdio::null()).status();
}

/// A process that runs until this is dropped, and what it wrote.
#[derive(Debug)]
pub struct Process {
    words: String,
    child: Child,
    log: File,
}

impl Process {
    /// Starts it with stdout and stderr going to an unnamed file.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let log = tempfile::tempfile().context("cannot make a log file")?;
        let words = words_of(command);
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?)
            .spawn()
            .with_context(|| format!("cannot start `{words}`"))?;
        Ok(Self { words, child, log })
    }

    /// Fails with its last words if it has ended.
    ///
    /// # Errors
    /// When it has ended.
    pub fn check(&mut self) -> Result<()> {
        let Some(status) = self.child.try_wait()? else { return Ok(()) };
        bail!("`{}` ended by itself ({status}): {}", self.words, self.last_words())
    }

    /// The end of what it wrote, at most 2 kB.
    pub fn last_words(&self) -> String {
        let mut text = Vec::new();
        let length = self.log.metadata().map_or(0, |metadata| metadata.len());
        // The child writes through the same file position: read through /proc instead of moving it.
        let Ok(mut copy) = File::open(format!("/proc/self/fd/{}", self.log.as_raw_fd())) else {
            return String::new();
        };
        let _ = copy.seek(SeekFrom::Start(length.saturating_sub(2048)));
        let _ = copy.read_to_end(&mut text);
        String::from_utf8_lossy(&text).trim().to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end and gives back what it printed.
///
/// # Errors
/// When it cannot be started or fails; the message holds its words and what it wrote to stderr.
pub fn run(command: &mut Command) -> Result<String> {
    let words = words_of(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{words}`"))?;
    if !output.status.success() {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        bail!("`{words}` failed ({}): {}{}", output.status, err.trim(), out.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{words}` printed something that is not text"))
}

fn words_of(command: &Command) -> String {
    let words: Vec<_> = [command.get_program()]
        .into_iter()
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect();
    words.join(" ")
}
