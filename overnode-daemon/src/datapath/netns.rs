//! Other network namespaces: named, entered on a thread of their own, left by ending that thread.

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

/// A network namespace as somebody named it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetnsRef {
    /// A file that stands for it, such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    Path(PathBuf),
    /// That of a process.
    Pid(u32),
}

/// A network namespace as the kernel tells it from others, as long as it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NetnsId {
    /// Device number of nsfs.
    pub device: u64,
    /// Inode number; used again for another namespace some time after this one is gone.
    pub inode: u64,
}

impl NetnsRef {
    /// The file that stands for it.
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Path(path) => path.clone(),
            Self::Pid(pid) => PathBuf::from(format!("/proc/{pid}/ns/net")),
        }
    }

    /// Opens it.
    ///
    /// # Errors
    /// There is no such file or process, or it is no network namespace.
    pub(super) fn open(&self) -> Result<(File, NetnsId)> {
        let path = self.path();
        // A pipe by that name would be waited for, for ever.
        let open = || File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let file = open().with_context(|| match self {
            Self::Path(path) => {
                format!("the network namespace {} cannot be opened", path.display())
            }
            Self::Pid(pid) => {
                format!(
                    "the network namespace of process {pid} cannot be opened: does it still run?"
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

    /// False if the name may stand for another namespace later: process numbers are used again.
    pub(super) fn is_lasting(&self) -> bool {
        !self.path().starts_with("/proc")
    }

    /// Its identity now.
    ///
    /// # Errors
    /// As for attaching to it: it does not exist, or is no network namespace.
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
    /// That of the calling thread.
    pub(super) fn current() -> Result<Self> {
        let meta = std::fs::metadata("/proc/thread-self/ns/net")
            .context("/proc/thread-self/ns/net cannot be read")?;
        Ok(Self { device: meta.dev(), inode: meta.ino() })
    }
}

/// A network namespace without a name, which is there as long as this is, or a socket in it.
#[derive(Debug)]
pub struct OwnNetns(File);

impl OwnNetns {
    /// Makes one. In it, ports below 1024 are for everybody: nobody else is there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn new() -> Result<Self> {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).context("a network namespace cannot be made")?;
            // Where /proc is read-only, it takes a capability to open such ports.
            let _ = std::fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
            File::open("/proc/thread-self/ns/net")
                .context("the new network namespace cannot be opened")
        };
        on_thread(make).await.map(Self)
    }

    /// What to name it by, in this process.
    pub fn netns(&self) -> NetnsRef {
        NetnsRef::Path(format!("/proc/self/fd/{}", self.0.as_raw_fd()).into())
    }

    /// Runs `work` on a thread that has entered it.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the error of `work`.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        inside(self.0.try_clone()?, move || async move { work() }).await
    }
}

/// Runs `work` on a new thread that has entered `namespace`, with a tokio runtime of its own:
/// sockets belong to the namespace of the thread that opens them.
///
/// # Errors
/// The namespace cannot be entered, or the error of `work`.
pub(super) async fn inside<T, F, Fut>(namespace: File, work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = Result<T>>,
{
    let enter_and_work = move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET)
            .context("the network namespace cannot be entered")?;
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work())
    };
    on_thread(enter_and_work).await
}

/// Runs `work` on a new thread, whose network namespace is nobody else's business.
async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (answer, answered) = oneshot::channel();
    // Nobody waits any more when the caller was cancelled.
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
    fn a_pipe_in_the_place_of_a_namespace_is_refused_and_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || done.send(NetnsRef::Path(path).id().unwrap_err().to_string()));
        let error = ended.recv_timeout(std::time::Duration::from_secs(10)).unwrap();
        assert!(error.contains("is not a network namespace"), "{error}");
    }
}
