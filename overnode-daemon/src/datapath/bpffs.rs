//! Locates and manages the node's pinned objects: `<bpffs>/overnode/<node>/`. Each state directory
//! has its own directory there, so that nodes in different network namespaces of one machine, which
//! share one bpffs, stay apart.
//!
//! ```text
//! maps/NAME                          maps, by name
//! links/COOKIE/IFINDEX-PROGRAM       tcx and XDP links
//! links/COOKIE/IFINDEX-PROGRAM-clsact   empty directory: a clsact filter is attached there
//! links/COOKIE/IFINDEX-qdisc         empty directory: this node added the clsact qdisc there
//! sockets/PROGRAM                    links of the programs for sockets
//! ```
//! COOKIE identifies the network namespace (`SO_NETNS_COOKIE`, Linux 5.14), because an interface
//! index is only meaningful within one namespace.
//!
//! A bpffs that was mounted without a mode is writable by every user (01777). Every directory here
//! must therefore belong to root and be private, even one that existed already. Otherwise its owner
//! could make the programs use other maps.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use data_encoding::HEXLOWER;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use nix::sys::statvfs::FsFlags;
use overnode_ebpf::map::MapLayout;

use overnode_trust::{self as trust, Untrusted};
use overnode_types::InterfaceIndex;

const MOUNT_POINT: &str = "/sys/fs/bpf";
/// Mount options that systemd uses. Without a mode the mount would be 01777.
const MOUNT_OPTIONS: &str = "mode=0700";
const DIRECTORY_MODE: u32 = 0o700;
/// Attempts to create the directories before giving up. A directory may vanish meanwhile, because
/// the last node of this machine removes `overnode/` when it is reset.
const CREATE_TRIES: usize = 8;
/// Mount namespaces to try before giving up.
const MAX_TRIES: usize = 4;
const SUFFIX_CLSACT: &str = "-clsact";
const SUFFIX_QDISC: &str = "-qdisc";

/// Returns the name of a node's pinned objects: 12 hex digits of the SHA-256 of its canonical state
/// directory.
pub fn node_name(state_dir: &Path) -> String {
    let path = canonical(state_dir);
    let digest = ring::digest::digest(&ring::digest::SHA256, path.as_os_str().as_encoded_bytes());
    HEXLOWER.encode(digest.as_ref().get(..6).unwrap_or_default())
}

/// Canonicalizes the part of the path that exists, so that a state directory has the same name
/// before and after its removal.
fn canonical(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut missing = Vec::new();
    let mut existing = absolute.as_path();
    loop {
        if let Ok(found) = existing.canonicalize() {
            return missing.iter().rev().fold(found, |path, name| path.join(name));
        }
        match existing.components().next_back() {
            Some(Component::Normal(name)) => missing.push(name.to_owned()),
            Some(_) | None => return absolute,
        }
        let Some(parent) = existing.parent() else { return absolute };
        existing = parent;
    }
}

/// One node's directory in the bpffs.
#[derive(Debug)]
pub(super) struct Pins {
    /// Keeps a bpffs of another mount namespace reachable through `/proc/self/fd`.
    _bpffs: Option<OwnedFd>,
    /// `<bpffs>/overnode`
    all: PathBuf,
    /// `<bpffs>/overnode/<node>`
    root: PathBuf,
    cookie: u64,
}

/// An entry in `links/COOKIE/`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Pin {
    /// A pinned link (tcx or XDP).
    Link { ifindex: InterfaceIndex, program: String },
    /// A marker for a clsact filter.
    Filter { ifindex: InterfaceIndex, program: String },
    /// A marker for a clsact qdisc that this node added.
    Qdisc { ifindex: InterfaceIndex },
}

impl Pin {
    pub(super) const fn ifindex(&self) -> InterfaceIndex {
        match self {
            Self::Link { ifindex, .. } | Self::Filter { ifindex, .. } | Self::Qdisc { ifindex } => {
                *ifindex
            }
        }
    }

    /// Returns the entry's file name. It contains no dot, because bpffs refuses names with dots.
    fn file_name(&self) -> String {
        match self {
            Self::Link { ifindex, program } => format!("{ifindex}-{program}"),
            Self::Filter { ifindex, program } => format!("{ifindex}-{program}{SUFFIX_CLSACT}"),
            Self::Qdisc { ifindex } => format!("{ifindex}{SUFFIX_QDISC}"),
        }
    }

    fn parse(name: &str) -> Option<Self> {
        let (ifindex, rest) = name.split_once('-')?;
        let ifindex = InterfaceIndex::from_kernel(ifindex.parse().ok()?)?;
        if rest == &SUFFIX_QDISC[1..] {
            return Some(Self::Qdisc { ifindex });
        }
        Some(match rest.strip_suffix(SUFFIX_CLSACT) {
            Some(program) => Self::Filter { ifindex, program: program.to_owned() },
            None => Self::Link { ifindex, program: rest.to_owned() },
        })
    }
}

impl Pins {
    /// Finds the bpffs, mounting it if it is missing, and computes the paths of the node's
    /// directory. Creates nothing in the bpffs.
    ///
    /// Must run in the network namespace that the node works in.
    ///
    /// # Errors
    /// Fails if no bpffs can be reached or mounted, or if the kernel is older than 5.14.
    pub(super) fn find(node: &str) -> Result<Self> {
        let (base, bpffs) = base()?;
        let all = base.join("overnode");
        Ok(Self { root: all.join(node), all, cookie: netns_cookie()?, _bpffs: bpffs })
    }

    /// Creates the directories, private and owned by root. Existing directories are adopted if no
    /// other user could have changed them.
    ///
    /// # Errors
    /// Fails if a directory belongs to another user or is writable by others, or if it cannot be
    /// created.
    pub(super) fn create(&self) -> Result<()> {
        let mut tries = 1..CREATE_TRIES;
        loop {
            match self.make_directories() {
                Err(Untrusted::Io { why, .. })
                    if why.kind() == io::ErrorKind::NotFound && tries.next().is_some() => {}
                outcome => return outcome.context("programs and maps cannot be pinned"),
            }
        }
    }

    fn make_directories(&self) -> Result<(), Untrusted> {
        self.check_bpffs()?;
        let (maps, links) = (self.maps(), self.links());
        let (all_links, sockets) = (self.root.join("links"), self.root.join("sockets"));
        for directory in [&self.all, &self.root, &maps, &all_links, &links, &sockets] {
            make_private(directory)?;
        }
        Ok(())
    }

    /// Returns true if the existing directories belong to nodes of this machine, or if there are
    /// none.
    pub(super) fn are_ours(&self) -> bool {
        let is_ours = |directory: &Path| match open_own(directory) {
            Ok(_) => true,
            Err(Untrusted::Io { why, .. }) => why.kind() == io::ErrorKind::NotFound,
            Err(Untrusted::Owner { .. } | Untrusted::Mode { .. }) => false,
        };
        self.check_bpffs().is_ok() && is_ours(&self.all) && is_ours(&self.root)
    }

    /// Checks that no other user can rename `overnode/`.
    fn check_bpffs(&self) -> Result<(), Untrusted> {
        let base = self.all.parent().unwrap_or(&self.all);
        let found =
            fs::metadata(base).map_err(|why| Untrusted::Io { path: base.to_owned(), why })?;
        trust::check_entries(base, &found)
    }

    fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    fn links(&self) -> PathBuf {
        self.root.join("links").join(self.cookie.to_string())
    }

    /// Returns the pin of the link of a program for sockets.
    pub(super) fn socket_link(&self, program: &str) -> PathBuf {
        self.root.join("sockets").join(program)
    }

    /// Removes the link of a program for sockets, if there is one.
    pub(super) fn remove_socket_link(&self, program: &str) -> io::Result<()> {
        remove(&self.socket_link(program))
    }

    /// Returns the pin of a map. From version 2 of its layout on, the version is part of the name.
    pub(super) fn map(&self, layout: &MapLayout) -> PathBuf {
        match layout.version {
            1 => self.map_named(layout.name),
            version => self.map_named(&format!("{}.{version}", layout.name)),
        }
    }

    pub(super) fn map_named(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// Returns the names of the pins of all maps, of whatever version.
    pub(super) fn map_names(&self) -> Vec<String> {
        let name = |path: &PathBuf| Some(path.file_name()?.to_str()?.to_owned());
        names(&self.maps()).iter().filter_map(name).collect()
    }

    pub(super) fn path(&self, pin: &Pin) -> PathBuf {
        self.links().join(pin.file_name())
    }

    pub(super) fn mark(&self, pin: &Pin) -> Result<()> {
        match fs::create_dir(self.path(pin)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(error).context("a marker cannot be created in the bpffs")
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    pub(super) fn is_there(&self, pin: &Pin) -> bool {
        self.path(pin).exists()
    }

    /// Removes a pin or a marker. Removing one that does not exist succeeds.
    pub(super) fn remove(&self, pin: &Pin) -> io::Result<()> {
        remove(&self.path(pin))
    }

    /// Returns the pins of this network namespace, sorted.
    pub(super) fn list(&self) -> Vec<Pin> {
        let mut pins: Vec<Pin> = names(&self.links())
            .iter()
            .filter_map(|path| Pin::parse(path.file_name()?.to_str()?))
            .collect();
        pins.sort();
        pins
    }

    /// Detaches everything that this node attached in network namespaces that it no longer runs in.
    pub(super) fn remove_other_namespaces(&self) -> io::Result<()> {
        let mine = self.links();
        for directory in names(&self.root.join("links")).iter().filter(|path| **path != mine) {
            remove_all(directory)?;
        }
        Ok(())
    }

    pub(super) fn remove_maps(&self) -> io::Result<()> {
        names(&self.maps()).iter().try_for_each(|path| remove(path))
    }

    /// Removes the node's directory and its contents. Removes `overnode/` as well if it is then
    /// empty.
    pub(super) fn remove_everything(&self) -> io::Result<()> {
        remove_all(&self.root)?;
        match fs::remove_dir(&self.all) {
            Ok(()) => Ok(()),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

fn names(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// Removes a file, link or empty directory. Symbolic links are removed, not followed.
fn remove(path: &Path) -> io::Result<()> {
    let removed = if is_directory(path) { fs::remove_dir(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn remove_all(path: &Path) -> io::Result<()> {
    if is_directory(path) {
        names(path).iter().try_for_each(|inner| remove_all(inner))?;
    }
    remove(path)
}

fn is_directory(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_dir())
}

/// Creates a directory, or adopts an existing one that no other user could have changed. Its parent
/// must have been checked already.
fn make_private(path: &Path) -> Result<(), Untrusted> {
    let failed = |why| Untrusted::Io { path: path.to_owned(), why };
    match DirBuilder::new().mode(DIRECTORY_MODE).create(path) {
        Ok(()) => return Ok(()),
        Err(why) if why.kind() == io::ErrorKind::AlreadyExists => {}
        Err(why) => return Err(failed(why)),
    }
    let directory = open_own(path)?;
    let mode = directory.metadata().map_err(failed)?.mode();
    if mode & 0o7777 != DIRECTORY_MODE {
        directory.set_permissions(Permissions::from_mode(DIRECTORY_MODE)).map_err(failed)?;
    }
    Ok(())
}

/// Opens a directory that belongs to this process's user. The check runs on the open descriptor,
/// and symbolic links are not followed.
fn open_own(path: &Path) -> Result<File, Untrusted> {
    let failed = |why| Untrusted::Io { path: path.to_owned(), why };
    let flags = libc::O_NOFOLLOW | libc::O_DIRECTORY;
    let directory = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
    trust::check_own(path, &directory.metadata().map_err(failed)?)?;
    Ok(directory)
}

/// Returns the cookie of the network namespace (`SO_NETNS_COOKIE`). It is unique since boot, unlike
/// the inode number of a namespace.
pub(super) fn netns_cookie() -> Result<u64> {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")
        .or_else(|_| std::net::UdpSocket::bind("[::1]:0"))
        .or_else(|_| std::net::UdpSocket::bind("0.0.0.0:0"))
        .context("a UDP socket cannot be opened")?;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: both pointers are to locals of the given sizes.
    let code = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if code != 0 {
        let why = io::Error::last_os_error();
        bail!(
            "the kernel cannot identify network namespaces ({why}): SO_NETNS_COOKIE needs Linux \
             5.14, overnode needs Linux 6.1"
        );
    }
    Ok(cookie)
}

/// Returns the bpffs of the machine's first mount namespace, which outlives this process.
/// `ip netns exec` and sandboxes run a process in a mount namespace of its own, and a bpffs mounted
/// there disappears with it.
///
/// The first namespace is that of PID 1. If it cannot be entered, the namespace of the next process
/// is tried, in the order of process IDs.
fn base() -> Result<(PathBuf, Option<OwnedFd>)> {
    let here = Path::new(MOUNT_POINT);
    let own = fs::metadata("/proc/self/ns/mnt").context("/proc must be mounted")?.ino();
    if is_the_first(here) {
        return Ok((here.to_owned(), None));
    }
    let mut first_error = None;
    for (inode, namespace) in mount_namespaces().take(MAX_TRIES) {
        let opened = if inode == own {
            mount_if_missing().map(|()| (here.to_owned(), None))
        } else {
            open_inside(namespace).map(|directory| {
                (PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())), Some(directory))
            })
        };
        match opened {
            Ok(found) => return Ok(found),
            Err(error) => _ = first_error.get_or_insert(error),
        }
    }
    let error = first_error.unwrap_or_else(|| anyhow!("no mount namespace can be opened"));
    Err(error.context("no bpffs can be reached: run as root"))
}

/// Returns the mount namespaces of all processes in the order of process IDs, without duplicates.
fn mount_namespaces() -> impl Iterator<Item = (u64, File)> {
    let mut pids: Vec<u32> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    let mut seen = BTreeSet::new();
    pids.into_iter().filter_map(move |pid| {
        let namespace = File::open(format!("/proc/{pid}/ns/mnt")).ok()?;
        let inode = namespace.metadata().ok()?.ino();
        seen.insert(inode).then_some((inode, namespace))
    })
}

fn open_inside(namespace: File) -> Result<OwnedFd> {
    let opened = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_FS)
            .context("the file system attributes of a thread cannot be unshared")?;
        setns(namespace, CloneFlags::CLONE_NEWNS)
            .context("the first mount namespace cannot be entered")?;
        mount_if_missing()?;
        Ok(File::open(MOUNT_POINT)
            .with_context(|| format!("{MOUNT_POINT} cannot be opened"))?
            .into())
    });
    opened.join().unwrap_or_else(|_| bail!("the thread that looks for the bpffs panicked"))
}

fn mount_if_missing() -> Result<()> {
    if is_bpffs(Path::new(MOUNT_POINT)) {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), MOUNT_POINT, Some("bpf"), flags, Some(MOUNT_OPTIONS)).with_context(|| {
        format!(
            "no bpffs is mounted at {MOUNT_POINT} and mounting one failed: run \
             `mount -t bpf -o {MOUNT_OPTIONS} bpf {MOUNT_POINT}` as root"
        )
    })
}

/// Returns true if the bpffs at `here` is the one that PID 1 has mounted, seen through another
/// mount namespace. A systemd unit may have its own mount namespace and lack the right to enter
/// others.
fn is_the_first(here: &Path) -> bool {
    let Ok(found) = fs::metadata(here) else { return false };
    let Ok(mounts) = fs::read_to_string("/proc/1/mountinfo") else { return false };
    let device = format!("{}:{}", libc::major(found.dev()), libc::minor(found.dev()));
    is_bpffs(here) && last_mount(&mounts, MOUNT_POINT) == Some(device.as_str())
}

/// Returns the device that is mounted at `place`, in the format of proc(5). If there are several
/// mounts, the last one counts.
fn last_mount<'a>(mountinfo: &'a str, place: &str) -> Option<&'a str> {
    let mut mounts = mountinfo.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(2);
        let (device, _root, at) = (words.next()?, words.next()?, words.next()?);
        (at == place).then_some(device)
    });
    mounts.next_back()
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| {
        found.filesystem_type() == BPF_FS_MAGIC && !found.flags().contains(FsFlags::ST_RDONLY)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_mount_at_a_path_wins() {
        let list = "30 24 0:29 / /sys/fs/bpf rw - bpf bpf rw\n\
                    31 24 0:30 / /sys/fs/bpf/x rw - bpf bpf rw\n\
                    32 30 0:31 / /sys/fs/bpf rw - bpf bpf rw\n33\n";
        assert_eq!(last_mount(list, MOUNT_POINT), Some("0:31"));
        assert_eq!(last_mount(list, "/none"), None);
    }

    #[test]
    fn the_node_name_survives_the_removal_of_its_state_directory() {
        let parent = tempfile::tempdir().unwrap();
        let state = parent.path().join("a/b");
        let before = node_name(&state);
        fs::create_dir_all(&state).unwrap();
        assert_eq!(node_name(&state), before);
        std::os::unix::fs::symlink(&state, parent.path().join("link")).unwrap();
        assert_eq!(node_name(&parent.path().join("link")), before);
        assert_ne!(node_name(parent.path()), before);
        assert_eq!(before.len(), 12);
    }

    #[test]
    fn pins_round_trip_through_their_file_names() {
        for pin in [
            Pin::Link { ifindex: InterfaceIndex::new(7), program: "from_underlay".into() },
            Pin::Filter { ifindex: InterfaceIndex::new(7), program: "seal".into() },
            Pin::Qdisc { ifindex: InterfaceIndex::new(4_000_000_000) },
        ] {
            assert_eq!(Pin::parse(&pin.file_name()), Some(pin.clone()));
            assert!(!pin.file_name().contains('.'), "bpffs refuses names with dots");
        }
        assert_eq!(Pin::parse("x-seal"), None);
        assert_eq!(Pin::parse("7"), None);
    }
}
