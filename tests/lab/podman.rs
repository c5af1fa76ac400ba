//! Runs podman on a host, with its own storage and with CNI networks from the stock plugins and
//! `overnode-cni`.
//!
//! Containers share the machine's control groups and `/run`. Everything that podman stores is in
//! the host's folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cleanup;
use crate::docker::busybox_archive;
use crate::eventually;
use crate::host::Host;
use crate::netns::Entry;
use crate::process::{Outcome, run_limited};

/// Name of the image that every podman has: busybox.
pub const IMAGE: &str = "localhost/tiny";
/// Directory of Debian's `containernetworking-plugins`.
const PLUGINS: &str = "/usr/lib/cni";
/// Directory in which runc records running containers.
const RUNC: &str = "/run/runc";
/// Timeout of a command: longer than any may take on a loaded machine.
const TIMEOUT: Duration = Duration::from_secs(180);

/// A host's podman. Dropping it removes its containers.
#[derive(Debug)]
pub struct Podman<'a> {
    host: &'a Host,
    folder: PathBuf,
}

impl<'a> Podman<'a> {
    /// Prepares podman on a host: installs the plugin, the image and three networks.
    ///
    /// - `overnode` is a `bridge` for outbound traffic and published ports, with the container
    ///   network chained after it.
    /// - `plain` is the container network alone.
    /// - `other` is a `bridge` alone.
    ///
    /// # Errors
    /// Fails if podman or the stock plugins are not installed.
    pub fn prepare(host: &'a Host) -> Result<Self> {
        let folder = host.folder().join("podman");
        for name in ["plugins", "net.d", "root"] {
            fs::create_dir_all(folder.join(name))?;
        }
        let podman = Self { host, folder };
        podman.write_settings()?;
        let archive = busybox_archive(&podman.folder)?;
        podman.run(&["import", &archive.to_string_lossy(), IMAGE])?.success()?;
        Ok(podman)
    }

    fn write_settings(&self) -> Result<()> {
        let plugin = self.plugin();
        if !plugin.exists() {
            std::os::unix::fs::symlink(crate::binaries::folder()?.join("overnode"), &plugin)?;
        }
        let network = |name: &str, plugins: &str| -> Result<()> {
            let text = format!(
                r#"{{"cniVersion": "0.4.0", "name": "{name}", "disableCheck": true, "plugins": [{plugins}]}}"#
            );
            Ok(fs::write(self.folder.join("net.d").join(format!("{name}.conflist")), text)?)
        };
        let number = self.host.number;
        let folder = self.folder.join("host-local");
        let bridge = |name: &str, first: usize| {
            format!(
                r#"{{"type": "bridge", "bridge": "cni-{name}", "isGateway": true, "ipMasq": true, "hairpinMode": true,
                "ipam": {{"type": "host-local", "dataDir": "{}", "routes": [{{"dst": "0.0.0.0/0"}}],
                "ranges": [[{{"subnet": "10.{}.0.0/24"}}]]}}}}"#,
                folder.display(),
                first + number
            )
        };
        network(
            "overnode",
            &format!(
                r#"{}, {{"type": "portmap", "capabilities": {{"portMappings": true}}}},
                {{"type": "overnode-cni", "interface": "overnode0"}}"#,
                bridge("overnode", 80)
            ),
        )?;
        network(
            "other",
            &format!(
                r#"{}, {{"type": "portmap", "capabilities": {{"portMappings": true}}}}"#,
                bridge("other", 90)
            ),
        )?;
        network(
            "plain",
            r#"{"type": "overnode-cni", "capabilities": {"ips": true, "mac": true}}"#,
        )?;
        let settings = format!(
            "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n\
             runtime = \"runc\"\nlock_type = \"file\"\n\
             [containers]\ncgroups = \"enabled\"\n\
             default_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
             log_driver = \"k8s-file\"\n\
             [network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = [\"{}\", \"{PLUGINS}\"]\n\
             network_config_dir = \"{}\"\n",
            self.folder.join("plugins").display(),
            self.folder.join("net.d").display()
        );
        fs::write(self.folder.join("containers.conf"), settings).context("containers.conf")
    }

    /// Returns the path at which runtimes find the plugin.
    pub fn plugin(&self) -> PathBuf {
        self.folder.join("plugins/overnode-cni")
    }

    /// Runs `podman` with these arguments.
    ///
    /// # Errors
    /// Fails if it cannot be started or runs too long.
    pub fn run(&self, arguments: &[&str]) -> Result<Outcome> {
        // `Setns` keeps the machine's own `/sys`, which has the control groups.
        let mut command = self.host.netns().command(Entry::Setns, "podman");
        let folder = |name: &str| self.folder.join(name);
        command
            .args(["--storage-driver", "vfs"])
            .arg("--root")
            .arg(folder("root"))
            .arg("--runroot")
            .arg(folder("run"))
            .arg("--tmpdir")
            .arg(folder("tmp"))
            .args(arguments)
            .env("CONTAINERS_CONF", folder("containers.conf"))
            .env("OVERNODE_STATE_DIR", self.host.state_directory())
            .env("OVERNODE_RUN_DIR", self.host.run_directory())
            .current_dir(&self.folder);
        run_limited(command, &self.folder, TIMEOUT)
    }

    /// Starts a container that sleeps, with further options. Returns its address in the container
    /// network.
    ///
    /// # Errors
    /// Fails if `podman run` fails.
    pub fn sleep(&self, name: &str, network: &str, options: &[&str]) -> Result<String> {
        let first = ["run", "--detach", "--network", network, "--name", name];
        let words = [&first[..], options, &[IMAGE, "/bin/sleep", "100000"]].concat();
        self.run(&words)?.success()?;
        self.address(name)
    }

    /// Returns the address of a container in the container network.
    ///
    /// # Errors
    /// Fails if the container has no address.
    pub fn address(&self, name: &str) -> Result<String> {
        let endpoints =
            self.host.status()?["endpoints"].as_array().context("no list of endpoints")?.clone();
        let found = endpoints.iter().find(|it| it["name"] == name);
        let address =
            found.and_then(|it| it["address"].as_str()).and_then(|it| it.split('/').next());
        Ok(address.with_context(|| format!("{name} is not among {endpoints:?}"))?.to_owned())
    }

    /// Runs a command inside a container, which must succeed. Returns its standard output.
    ///
    /// # Errors
    /// Fails if the command fails.
    pub fn exec(&self, name: &str, command: &[&str]) -> Result<String> {
        self.run(&[&["exec", name], command].concat())?.success()
    }

    /// Pings an address or a name from inside a container until it answers.
    ///
    /// # Errors
    /// Fails if it does not answer within the time limit.
    pub fn reach(&self, name: &str, to: &str, limit: Duration) -> Result<()> {
        eventually(limit, || self.exec(name, &["/bin/ping", "-c", "1", "-W", "1", to]).map(drop))
    }

    /// Simulates a power failure of the host, as far as it concerns podman and the node: removes
    /// processes, interfaces except the underlay's, their files in `/run`, and bpffs.
    ///
    /// # Errors
    /// Fails if something cannot be removed.
    pub fn lose_power(&self) -> Result<()> {
        self.stop_everything();
        self.host.forget_all_but_disks()
    }

    /// Removes everything except what is on disk. Containers have their own namespaces, so their
    /// processes are found as children of their monitors.
    fn stop_everything(&self) {
        let root = self.folder.to_string_lossy().into_owned();
        let mentions = |pid: &i32| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(&root))
        };
        let monitors: Vec<i32> = cleanup::pids().filter(mentions).collect();
        let is_child = |pid: &i32| parent(*pid).is_some_and(|parent| monitors.contains(&parent));
        let children: Vec<i32> = cleanup::pids().filter(is_child).collect();
        let (namespaces, containers) = (self.namespaces(), self.containers());
        cleanup::kill_all(&monitors);
        cleanup::kill_all(&children);
        cleanup::kill_all(&self.host.netns().processes());
        for path in namespaces {
            let _ = nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH);
            let _ = fs::remove_file(&path);
        }
        for container in containers {
            let _ = fs::remove_dir_all(Path::new(RUNC).join(container));
        }
        // The bridge's addresses are stored in a directory that a reboot empties, as the
        // documentation recommends.
        let _ = fs::remove_dir_all(self.folder.join("host-local"));
        for name in ["run", "tmp"] {
            unmount_below(&self.folder.join(name));
            let _ = fs::remove_dir_all(self.folder.join(name));
        }
        unmount_below(&self.folder.join("root"));
    }

    /// Returns the full IDs of its containers.
    fn containers(&self) -> Vec<String> {
        let listed = self.run(&["ps", "--all", "--quiet", "--no-trunc"]).and_then(Outcome::success);
        listed.map(|listed| listed.lines().map(str::to_owned).collect()).unwrap_or_default()
    }

    /// Returns the network namespaces of its containers, as far as podman knows them.
    fn namespaces(&self) -> Vec<PathBuf> {
        let path = |id: &str| {
            let words = ["inspect", "--format", "{{.NetworkSettings.SandboxKey}}", id];
            let path = PathBuf::from(self.run(&words).ok()?.success().ok()?.trim());
            path.starts_with("/run/netns").then_some(path)
        };
        self.containers().iter().filter_map(|id| path(id)).collect()
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        let _ = self.run(&["rm", "--all", "--force", "--time", "0"]);
        self.stop_everything();
    }
}

fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn unmount_below(folder: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(1)).collect();
    for point in points.into_iter().rev().filter(|point| Path::new(point).starts_with(folder)) {
        let _ = nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH);
    }
}
