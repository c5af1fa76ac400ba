//! Provides hosts and containers as network namespaces that clean up after themselves.

use std::fs::File;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Instant;

use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use nix::sched::{CloneFlags, setns};
use overnode_core::handshake::SessionKeys;
use overnode_daemon::datapath::{Attachment, Datapath, NetnsRef, OpenOptions, node_name};
use overnode_types::{Network, NodeId, PeerIndex, PublicKey, Secret, SessionIndex};

/// Runs a command, fails the test if the command fails, and returns its standard output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}{words}");
    text
}

pub(crate) fn ip(arguments: &[&str]) {
    run("ip", arguments);
}

pub(crate) fn ip_output(namespace: &Namespace, arguments: &[&str]) -> String {
    run("ip", &[&["-n", namespace.name.as_str()], arguments].concat())
}

pub(crate) fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Runs the test named `name` again in a process of its own, with these variables. Returns false in
/// the calling process and true in the new one. `how` is the tool with which the new process enters
/// the network namespace in `DATAPATH_NETNS`.
pub(crate) fn reexec(name: &str, variables: &[(&str, &str)], how: Option<&str>) -> bool {
    if std::env::var_os("DATAPATH_CHILD").is_some() {
        return true;
    }
    let netns =
        variables.iter().find(|(name, _)| *name == "DATAPATH_NETNS").map(|(_, value)| *value);
    let program = std::env::current_exe().unwrap();
    let mut command = match (how, netns) {
        (None, _) => Command::new(program),
        (Some("ip netns exec"), Some(netns)) => {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", netns]).arg(program);
            command
        }
        (Some("nsenter"), Some(netns)) => {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net=/run/netns/{netns}")).arg(program);
            command
        }
        (Some(_), _) => panic!("unknown tool"),
    };
    let output = command
        .args([name, "--exact", "--nocapture"])
        .envs(variables.iter().copied())
        .env("DATAPATH_CHILD", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{words}");
    false
}

/// A network namespace that is deleted on drop.
pub(crate) struct Namespace {
    pub name: String,
}

impl Namespace {
    pub(crate) fn new(kind: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "datapath-{}-{}{kind}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        ip(&["netns", "add", &name]);
        let namespace = Self { name };
        ip(&["-n", &namespace.name, "link", "set", "lo", "up"]);
        namespace
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Runs a program inside the namespace with `nsenter --net`, and returns its output.
    pub(crate) fn exec(&self, program: &str, arguments: &[&str]) -> String {
        run(
            "nsenter",
            &[&[&format!("--net=/run/netns/{}", self.name), program], arguments].concat(),
        )
    }

    /// Like [`Self::exec`], but returns whether the program succeeded.
    pub(crate) fn exec_status(&self, program: &str, arguments: &[&str]) -> bool {
        self.command(program, arguments).output().unwrap().status.success()
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.name)).arg(program).args(arguments);
        command
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ =
            Command::new("ip").args(["netns", "del", &self.name]).stderr(Stdio::null()).status();
    }
}

/// A host with its network namespace and state directory. It is torn down on drop.
pub(crate) struct Host {
    pub namespace: Namespace,
    pub interface: Option<String>,
    pub xdp: bool,
    state: StateDir,
    is_borrowed: bool,
    node_address: IpAddr,
    is_opened: AtomicBool,
}

enum StateDir {
    Owned(tempfile::TempDir),
    Other(PathBuf),
}

impl Host {
    fn new(kind: &str, node_address: &str) -> Self {
        Self {
            namespace: Namespace::new(kind),
            interface: None,
            xdp: false,
            state: StateDir::Owned(tempfile::tempdir().unwrap()),
            is_borrowed: false,
            node_address: addr(node_address),
            is_opened: AtomicBool::new(false),
        }
    }

    /// Returns the state directory and the namespace, for [`reexec`].
    pub(crate) fn environment(&self) -> (String, String) {
        (self.state_dir().to_str().unwrap().to_owned(), self.namespace.name.clone())
    }

    /// Returns the parent's host in a process started by [`reexec`].
    pub(crate) fn from_environment() -> Self {
        Self {
            namespace: Namespace { name: std::env::var("DATAPATH_NETNS").unwrap() },
            interface: None,
            xdp: false,
            state: StateDir::Other(std::env::var_os("DATAPATH_STATE").unwrap().into()),
            is_borrowed: true,
            node_address: addr("10.39.240.1"),
            is_opened: AtomicBool::new(false),
        }
    }

    pub(crate) fn state_dir(&self) -> &Path {
        match &self.state {
            StateDir::Owned(directory) => directory.path(),
            StateDir::Other(path) => path,
        }
    }

    pub(crate) fn remove_state_dir(&mut self) {
        let path = self.state_dir().to_owned();
        std::fs::remove_dir_all(&path).unwrap();
        self.state = StateDir::Other(path);
    }

    pub(crate) fn node(&self) -> String {
        node_name(self.state_dir())
    }

    /// Opens the data plane on a thread inside the namespace, runs `work`, and closes it. One call
    /// is one lifetime of a daemon.
    pub(crate) fn run<T: Send>(&self, work: impl AsyncFnOnce(&mut Datapath) -> T + Send) -> T {
        self.inside(async || {
            let mut datapath = self.open().await.unwrap();
            work(&mut datapath).await
        })
    }

    /// Does the same in the current namespace of this process.
    pub(crate) fn run_here<T>(&self, work: impl AsyncFnOnce(&mut Datapath) -> T) -> T {
        runtime().block_on(async {
            let mut datapath = self.open().await.unwrap();
            work(&mut datapath).await
        })
    }

    pub(crate) fn try_open(&self) -> anyhow::Result<()> {
        self.inside(async || self.open().await.map(drop))
    }

    pub(crate) fn tear_down(&self) {
        let errors = self.inside(async || Datapath::tear_down(self.state_dir()).await);
        assert!(errors.is_empty(), "{errors:?}");
    }

    /// Asserts that nothing of the node is left in its namespace or in the bpffs.
    pub(crate) fn is_clean(&self) {
        let links = ip_output(&self.namespace, &["-d", "link"]);
        assert!(!links.contains(": ov") && !links.contains("overnode:"), "{links}");
        assert!(!links.contains("prog/xdp"), "{links}");
        let qdiscs = run("tc", &["-n", &self.namespace.name, "qdisc", "show"]);
        assert!(!qdiscs.contains("clsact"), "{qdiscs}");
        let pins = Path::new("/sys/fs/bpf/overnode").join(self.node());
        assert!(!pins.exists(), "{} was not removed", pins.display());
        let attached =
            |interface, at| self.inside(async || SchedClassifier::query_tcx(interface, at));
        let ends =
            ["eth0", "lo"].map(|it| [(it, TcAttachType::Ingress), (it, TcAttachType::Egress)]);
        for (interface, at) in ends.into_iter().flatten() {
            match attached(interface, at) {
                Ok((_, programs)) => assert!(programs.is_empty(), "{programs:?}"),
                // Linux before 6.6 has no tcx, so there is nothing to query.
                Err(ProgramError::SyscallError(error)) => {
                    assert_eq!(error.io_error.raw_os_error(), Some(libc::EINVAL), "{error}");
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Returns the node ID, which is the last byte of the node address.
    fn node_id(&self) -> NodeId {
        let IpAddr::V4(address) = self.node_address else {
            panic!("{} is not IPv4", self.node_address)
        };
        NodeId::new(address.octets()[3].into()).unwrap()
    }

    async fn open(&self) -> anyhow::Result<Datapath> {
        self.is_opened.store(true, Ordering::Relaxed);
        Datapath::open(OpenOptions {
            state_dir: self.state_dir(),
            network: Network::default(),
            node_id: self.node_id(),
            node_address: self.node_address,
            public_key: PublicKey([1; 32]),
            interface: self.interface.clone(),
            mtu: None,
            debug: false,
            xdp: self.xdp,
        })
        .await
    }

    fn inside<T: Send>(&self, work: impl AsyncFnOnce() -> T) -> T {
        let namespace = File::open(self.namespace.path()).unwrap();
        // The runtime and everything it polls stay on the new thread. This thread waits for it.
        let work = AssertSend(work);
        thread::scope(|scope| {
            let worker = scope.spawn(move || {
                let work = work;
                setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
                runtime().block_on((work.0)())
            });
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.is_borrowed {
            // The namespace belongs to the parent.
            self.namespace.name = "datapath-none".into();
        } else if self.is_opened.load(Ordering::Relaxed) {
            let errors = self.inside(async || Datapath::tear_down(self.state_dir()).await);
            if !errors.is_empty() && !thread::panicking() {
                panic!("{errors:?}");
            }
        }
    }
}

struct AssertSend<T>(T);
// SAFETY: the thread that created the value waits in `thread::scope` until the other thread has
// consumed it.
unsafe impl<T> Send for AssertSend<T> {}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Two hosts connected by a veth cable, with one container each.
pub(crate) struct Pair {
    pub a: Host,
    pub b: Host,
    pub container_a: Namespace,
    pub container_b: Namespace,
    is_ipv6: bool,
    made: Instant,
}

impl Pair {
    pub(crate) fn new(is_ipv6: bool) -> Self {
        let pair = Self {
            a: Host::new("a", "10.39.240.1"),
            b: Host::new("b", "10.39.240.2"),
            container_a: Namespace::new("ca"),
            container_b: Namespace::new("cb"),
            is_ipv6,
            made: Instant::now(),
        };
        let (a, b) = (&pair.a.namespace.name, &pair.b.namespace.name);
        ip(&["-n", a, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", b]);
        for (host, last) in [(a, "1"), (b, "2")] {
            ip(&["-n", host, "addr", "add", &format!("192.0.2.{last}/24"), "dev", "eth0"]);
            ip(&[
                "-n",
                host,
                "addr",
                "add",
                &format!("2001:db8::{last}/64"),
                "dev",
                "eth0",
                "nodad",
            ]);
            // Native XDP on a veth requires NAPI at the other end. GRO turns it on.
            run(
                "nsenter",
                &[&format!("--net=/run/netns/{host}"), "ethtool", "-K", "eth0", "gro", "on"],
            );
            ip(&["-n", host, "link", "set", "eth0", "up"]);
        }
        pair
    }

    /// Attaches the containers and installs one session, whose initiator is `a`.
    pub(crate) fn connect(&self) {
        self.connect_host(&self.a, 1, 2, &self.container_a, true);
        self.connect_host(&self.b, 2, 1, &self.container_b, false);
    }

    fn connect_host(&self, host: &Host, me: u8, other: u8, container: &Namespace, initiator: bool) {
        let prefix = if self.is_ipv6 { "[2001:db8::" } else { "192.0.2." };
        let suffix = if self.is_ipv6 { "]" } else { "" };
        let endpoint = format!("{prefix}{other}{suffix}:6784").parse().unwrap();
        let net = |node: u8| format!("10.{}.0.0/15", 38 + 2 * node).parse().unwrap();
        let peer = PeerIndex(other.into());
        host.run(async |datapath| {
            datapath.set_own_routes(&[net(me)]).unwrap();
            datapath.set_peer(peer, &PublicKey([other; 32]), Some(endpoint)).await.unwrap();
            datapath.set_routes(peer, &[net(other)]).unwrap();
            datapath.install_session(peer, &self.keys(initiator, 1)).unwrap();
            let address = addr(&format!("10.{}.0.1", 38 + 2 * me));
            let ordinary = Attachment::inside(NetnsRef::Path(container.path()), address);
            let attachment = Attachment { host_interface: format!("ov0000000{me}"), ..ordinary };
            datapath.attach(&attachment).await.unwrap();
        });
    }

    /// Returns one end's keys for the session in `slot`.
    pub(crate) fn keys(&self, initiator: bool, slot: u32) -> SessionKeys {
        let key = |end: u8| Secret([end + slot as u8; 32]);
        let index = |end: u32| SessionIndex::new(end << 28 | slot);
        let ((local, remote), (tx, rx)) =
            if initiator { ((1, 2), (100, 200)) } else { ((2, 1), (200, 100)) };
        SessionKeys {
            local_index: index(local),
            remote_index: index(remote),
            tx_key: key(tx),
            rx_key: key(rx),
            initiator,
            created: self.made,
        }
    }

    pub(crate) fn ping_across(&self, count: u32, interval: &str) {
        self.background_ping(count, interval).lost_nothing();
    }

    pub(crate) fn background_ping(&self, count: u32, interval: &str) -> Ping<'_> {
        let count = count.to_string();
        let warm_up = ["-q", "-c", "1", "-W", "2", "10.42.0.1"];
        assert!(self.container_a.exec_status("ping", &warm_up), "not even one packet gets through");
        let arguments = ["-q", "-c", &count, "-i", interval, "-W", "2", "10.42.0.1"];
        let child =
            self.container_a.command("ping", &arguments).stdout(Stdio::piped()).spawn().unwrap();
        Ping { child, pair: self }
    }
}

pub(crate) struct Ping<'a> {
    child: Child,
    pair: &'a Pair,
}

impl Ping<'_> {
    pub(crate) fn lost_nothing(self) {
        let output = self.child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let numbers: Vec<u32> = text
            .lines()
            .find(|line| line.contains("packets transmitted"))
            .unwrap_or_else(|| panic!("{text}"))
            .split(|char: char| !char.is_ascii_digit())
            .filter_map(|number| number.parse().ok())
            .collect();
        assert!(numbers[0] > 0, "{text}");
        if numbers[0] != numbers[1] {
            let counters = [&self.pair.a, &self.pair.b].map(|host| {
                let mut counters = host.run(async |datapath| datapath.counters().unwrap());
                counters.retain(|_, count| *count != 0);
                counters
            });
            panic!("packets were lost: {text}{counters:?}");
        }
    }
}
