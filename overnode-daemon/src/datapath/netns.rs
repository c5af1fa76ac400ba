//! Identifies other network namespaces and runs work inside them. A thread enters a namespace, does
//! its work there, and ends.

use std::fmt;
use std::fs::File;
use std::future::Future;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

/// A network namespace as the user named it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetnsRef {
    /// A file that refers to it, such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    Path(PathBuf),
    /// The network namespace of a process.
    Pid(u32),
}

/// Identity of a network namespace in the kernel, unique among existing namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NetnsId {
    /// Device number of nsfs.
    pub device: u64,
    /// Inode number. The kernel reuses it after the namespace is gone.
    pub inode: u64,
}

impl NetnsRef {
    /// Returns the path of the file that refers to it.
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Path(path) => path.clone(),
            Self::Pid(pid) => PathBuf::from(format!("/proc/{pid}/ns/net")),
        }
    }

    /// Opens the namespace.
    ///
    /// # Errors
    /// Fails if the file or process does not exist, or if the file is not a network namespace.
    pub(super) fn open(&self) -> Result<(File, NetnsId)> {
        let path = self.path();
        // `O_NONBLOCK`, because opening a named pipe would block forever.
        let open = || File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let file = open().with_context(|| match self {
            Self::Path(path) => {
                format!("the network namespace {} cannot be opened", path.display())
            }
            Self::Pid(pid) => {
                format!(
                    "the network namespace of process {pid} cannot be opened: check that the \
                     process still runs"
                )
            }
        })?;
        let is_namespace = fstatfs(&file).is_ok_and(|found| found.filesystem_type() == NSFS_MAGIC);
        ensure!(
            is_namespace,
            "{} is not a network namespace: name one, as in `netns:NAME` or `pid:N`",
            path.display()
        );
        let meta = file.metadata()?;
        Ok((file, NetnsId { device: meta.dev(), inode: meta.ino() }))
    }

    /// Returns false if the name may refer to another namespace later, since process IDs are
    /// reused.
    pub(super) fn is_lasting(&self) -> bool {
        !self.path().starts_with("/proc")
    }

    /// Runs `work` on a thread that has entered the namespace.
    ///
    /// # Errors
    /// Fails if the namespace cannot be entered, or with the error of `work`.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (namespace, _) = self.open()?;
        run_in(namespace, work).await
    }

    /// Returns its current identity.
    ///
    /// # Errors
    /// Fails if it does not exist or is not a network namespace.
    pub fn id(&self) -> Result<NetnsId> {
        self.open().map(|(_, id)| id)
    }
}

impl fmt::Display for NetnsRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Pid(pid) => write!(f, "pid:{pid}"),
        }
    }
}

impl NetnsId {
    /// Returns the identity of the calling thread's namespace.
    pub(super) fn current() -> Result<Self> {
        let meta = std::fs::metadata("/proc/thread-self/ns/net")
            .context("/proc/thread-self/ns/net cannot be read")?;
        Ok(Self { device: meta.dev(), inode: meta.ino() })
    }
}

/// A network namespace without a name. It exists while this value or a socket inside it does.
#[derive(Debug)]
pub struct OwnNetns(File);

impl OwnNetns {
    /// Creates a network namespace. Any user may bind ports below 1024 in it, because nothing else
    /// runs there.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub async fn new() -> Result<Self> {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).context("a network namespace cannot be created")?;
            // Where /proc is read-only, binding such ports takes a capability.
            let _ = std::fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
            File::open("/proc/thread-self/ns/net")
                .context("the new network namespace cannot be opened")
        };
        on_thread(make).await.map(Self)
    }

    /// Returns a name for it that is valid within this process.
    pub fn netns(&self) -> NetnsRef {
        NetnsRef::Path(format!("/proc/self/fd/{}", self.0.as_raw_fd()).into())
    }

    /// Runs `work` on a thread that has entered the namespace.
    ///
    /// # Errors
    /// Fails if the namespace cannot be entered, or with the error of `work`.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        run_in(self.0.try_clone()?, work).await
    }
}

/// Runs `work` on a new thread that has entered `namespace`, in a tokio runtime of its own. Sockets
/// belong to the namespace of the thread that opens them.
///
/// # Errors
/// Fails if the namespace cannot be entered, or with the error of `work`.
pub(super) async fn inside<T, F, Fut>(namespace: File, work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = Result<T>>,
{
    let run = move || {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work())
    };
    run_in(namespace, run).await
}

/// Runs `work` on a new thread that has entered `namespace`.
async fn run_in<T: Send + 'static>(
    namespace: File,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let enter_and_work = move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET)
            .context("the network namespace cannot be entered")?;
        work()
    };
    on_thread(enter_and_work).await
}

/// Runs `work` on a new thread, so that its change of network namespace affects no other code.
async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (answer, answered) = oneshot::channel();
    // If the caller was canceled, nothing receives the answer.
    let run = move || _ = answer.send(work());
    std::thread::Builder::new()
        .name("netns".into())
        .spawn(run)
        .context("a thread cannot be started")?;
    answered.await.context("the thread in the network namespace panicked")?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_instead_of_a_namespace_is_refused_without_blocking() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || done.send(NetnsRef::Path(path).id().unwrap_err().to_string()));
        let error = ended.recv_timeout(std::time::Duration::from_secs(10)).unwrap();
        assert!(error.contains("is not a network namespace"), "{error}");
    }
}
