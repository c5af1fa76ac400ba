//! Tests of attacks on a host's node by a local user who is not root, and by a root process without
//! capabilities.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use lab::{Host, Lab, eventually};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::BindToDevice;
use overnode_daemon::datapath::node_name;

use crate::support::{MILLISECOND, TIMEOUT, TOKEN, attached, counter, in_lab, launch_all};

/// Command that runs another command as an unprivileged user.
const STRANGER: &str = "setpriv --reuid 1000 --regid 1000 --clear-groups";
/// Arguments that make `setpriv` drop all of root's capabilities, for the command and everything
/// that it starts. (CAP_SYS_PTRACE permits access to other processes. Later kernels also accept
/// CAP_PERFMON.)
const NO_RIGHTS: [&str; 2] = ["--bounding-set=-all", "--inh-caps=-all"];

/// Runs a script as root in new mount and PID namespaces. Its bpffs is private, and the script is
/// the first process.
fn apart(host: &Host, script: &str) -> Result<Output> {
    let apart = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script];
    let output = host
        .command("unshare")?
        .args(apart)
        .env("NODE", node_name(&host.state_directory()))
        .env("TOKEN", TOKEN)
        .stdin(Stdio::null())
        .output()?;
    Ok(output)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The maps contain the packets' destinations and keys. The owner of the directory where they are
/// pinned can replace them.
#[test]
fn a_local_user_who_creates_the_pin_directory_first_gets_no_maps() -> Result<()> {
    in_lab(Lab::new("pins").hosts(1), |lab| {
        for theirs in ["overnode", "overnode/$NODE", "overnode/$NODE/maps"] {
            let script = format!(
                "mount -t bpf -o mode=1777 bpf /sys/fs/bpf || exit 9
                 {STRANGER} mkdir -p /sys/fs/bpf/{theirs} || exit 9
                 overnode launch --id 1 --token $TOKEN
                 echo \"launch: $?\"; find /sys/fs/bpf/overnode -type f"
            );
            let output = apart(lab.host(1), &script)?;
            let (said, complaint) = (text(&output.stdout), text(&output.stderr));
            assert_eq!(said, "launch: 1\n", "user 1000 controls root's maps: {complaint}");
            assert!(complaint.contains("/sys/fs/bpf/overnode belongs to user 1000"), "{complaint}");
            assert!(complaint.contains("rm -r /sys/fs/bpf/overnode"), "{complaint}");
        }
        Ok(())
    })
}

/// The owner of a directory may rename all its entries, even those of other owners.
#[test]
fn a_local_user_who_owns_the_bpffs_gets_no_maps() -> Result<()> {
    in_lab(Lab::new("owner").hosts(1), |lab| {
        let script = "mount -t bpf -o mode=0755 bpf /sys/fs/bpf && chown 1000 /sys/fs/bpf || exit 9
             overnode launch --id 1 --token $TOKEN
             echo \"launch: $?\"; test ! -e /sys/fs/bpf/overnode || echo pins";
        let output = apart(lab.host(1), script)?;
        let complaint = text(&output.stderr);
        assert_eq!(text(&output.stdout), "launch: 1\n", "{complaint}");
        assert!(complaint.contains("/sys/fs/bpf belongs to user 1000"), "{complaint}");
        Ok(())
    })
}

#[test]
fn mounts_and_directories_for_pins_are_accessible_only_to_root() -> Result<()> {
    in_lab(Lab::new("private").hosts(1), |lab| {
        let modes = "find /sys/fs/bpf/overnode -type d -exec stat -c '%a %u' {} + | sort -u";
        let script = format!(
            "while mountpoint -q /sys/fs/bpf; do umount /sys/fs/bpf || exit 9; done
             umask 0; overnode launch --id 1 --token $TOKEN || exit 8
             stat -c '%a' /sys/fs/bpf; {modes}
             stat -c '%a' $OVERNODE_STATE_DIR $OVERNODE_RUN_DIR/*.sock $OVERNODE_RUN_DIR/*.log \
             | sort -u
             overnode reset --force || exit 7; test ! -e /sys/fs/bpf/overnode || echo left"
        );
        let output = apart(lab.host(1), &script)?;
        let printed = text(&output.stdout);
        let seen: Vec<&str> = printed.lines().filter(|line| !line.starts_with("node 1")).collect();
        // The kernel adds the sticky bit to the mount point.
        assert_eq!(seen, ["1700", "700 0", "600", "700"], "{printed}{}", text(&output.stderr));
        Ok(())
    })
}

/// `reset` removes pins as root, but does not follow symbolic links.
#[test]
fn a_local_user_cannot_make_reset_remove_roots_files() -> Result<()> {
    in_lab(Lab::new("links").hosts(1), |lab| {
        let host = lab.host(1);
        let precious = lab.folder().join("precious");
        fs::create_dir(&precious)?;
        fs::write(precious.join("file"), "owned by root")?;
        let script = format!(
            "mount -t bpf -o mode=1777 bpf /sys/fs/bpf || exit 9
             {STRANGER} sh -c 'mkdir /sys/fs/bpf/overnode && ln -s {} /sys/fs/bpf/overnode/'$NODE \
             || exit 8
             overnode reset --force",
            precious.display()
        );
        let output = apart(host, &script)?;
        assert!(precious.join("file").exists(), "reset removed a file of root");
        ensure!(output.status.success(), "{}", text(&output.stderr));
        Ok(())
    })
}

/// Reads the start of a process's file under `/proc` through `program`, a `setpriv` command.
fn read_as(program: &[&str], pid: i32, file: &str) -> Result<Output> {
    let (setpriv, arguments) = program.split_first().context("no program")?;
    let path = format!("/proc/{pid}/{file}");
    Ok(Command::new(setpriv).args(arguments).args(["head", "-c", "65536", &path]).output()?)
}

/// Checks that the environment and the memory of a process with keys are unreadable, and that it
/// writes no core file.
fn keeps_its_secrets(pid: i32) -> Result<()> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let core =
        limits.lines().find(|line| line.starts_with("Max core file size")).context("no limit")?;
    let words: Vec<&str> = core.split_whitespace().collect();
    assert_eq!(words[4..6], ["0", "0"], "{core}");
    let stranger: Vec<&str> = STRANGER.split(' ').collect();
    for reader in [stranger, [&["setpriv"], &NO_RIGHTS[..]].concat()] {
        for file in ["environ", "mem", "maps"] {
            let output = read_as(&reader, pid, file)?;
            let refusal = text(&output.stderr);
            assert!(
                output.stdout.is_empty() && refusal.contains("Permission denied"),
                "{reader:?} can read {file} of process {pid}: {refusal}"
            );
        }
    }
    Ok(())
}

/// Root's programs without the capability to access other processes may still access those that
/// have no more capabilities than they have, unless the target forbids it. So the daemon runs
/// without any capability here, and its core file limit is raised before it starts.
#[test]
fn nobody_can_read_the_daemons_memory_and_it_leaves_no_core_file() -> Result<()> {
    in_lab(Lab::new("memory").hosts(1), |lab| {
        let host = lab.host(1);
        let directory = lab.folder().join("crash");
        fs::create_dir(&directory)?;
        let mut command = host.command("setpriv")?;
        command.args(NO_RIGHTS).arg("overnoded").current_dir(&directory);
        command.env("OVERNODE_TOKEN", TOKEN).stdin(Stdio::null()).stderr(Stdio::null());
        // SAFETY: only system calls are made between fork and exec.
        unsafe {
            command.pre_exec(|| {
                let all =
                    libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
                libc::setrlimit(libc::RLIMIT_CORE, &raw const all);
                Ok(())
            });
        }
        let mut daemon = command.spawn()?;
        eventually(TIMEOUT, || {
            ensure!(host.request("GET", "/v1/version", "")?.0 == 200, "the daemon does not answer");
            Ok(())
        })?;
        let pid = daemon.id() as i32;
        let outcome = keeps_its_secrets(pid);
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGABRT)?;
        let status = daemon.wait()?;
        outcome?;
        assert_eq!(status.signal(), Some(libc::SIGABRT));
        assert!(!status.core_dumped(), "the kernel wrote a core file");
        assert_eq!(fs::read_dir(&directory)?.count(), 0);
        Ok(())
    })
}

#[test]
fn nobody_can_read_the_memory_of_a_nodes_processes() -> Result<()> {
    in_lab(Lab::new("processes").hosts(2), |lab| {
        launch_all(lab)?;
        for host in lab.hosts() {
            let mut checked = 0;
            for pid in host.netns().processes() {
                let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                if ["overnoded", "overnode-bulk"].contains(&name.trim_end()) {
                    keeps_its_secrets(pid)?;
                    checked += 1;
                }
            }
            assert_eq!(checked, 2, "expected a daemon and its workers");
        }
        Ok(())
    })
}

/// Tries every option for a directory with one that a local user owns.
#[test]
fn a_local_user_cannot_supply_a_nodes_directories() -> Result<()> {
    in_lab(Lab::new("lent").hosts(1), |lab| {
        let host = lab.host(1);
        let theirs = lab.folder().join("theirs");
        fs::create_dir(&theirs)?;
        chown(&theirs, Some(1000), Some(1000))?;
        fs::set_permissions(&theirs, fs::Permissions::from_mode(0o755))?;
        let launch = |option: &str, directory: &Path| {
            let directory = directory.to_string_lossy();
            let words = ["launch", "--id", "1", "--token", TOKEN, option, directory.as_ref()];
            host.overnode(&words)?.failure(1)
        };
        for option in ["--state-dir", "--run-dir"] {
            for directory in [theirs.clone(), theirs.join("new")] {
                let complaint = launch(option, &directory)?;
                assert!(complaint.contains("theirs belongs to user 1000"), "{complaint}");
                assert!(complaint.contains(option), "{complaint}");
                assert_eq!(fs::read_dir(&theirs)?.count(), 0, "{option}");
            }
        }
        assert_eq!(host.remains()?, [""; 0]);
        Ok(())
    })
}

/// The host end of a container's veth is an interface of the host. A process without any right can
/// bind a socket to it and send to broadcast and multicast addresses.
#[test]
fn a_process_of_the_host_cannot_send_into_a_container() -> Result<()> {
    const PORT: u16 = 9999;
    in_lab(Lab::new("inject").hosts(1), |lab| {
        launch_all(lab)?;
        let host = lab.host(1);
        let container = attached(host, "c")?;
        let status = host.status()?;
        let interface = status["endpoints"][0]["interface"].as_str().context("no interface")?;
        let interface = interface.to_owned();
        let listener = container.netns().enter(|| {
            let socket = UdpSocket::bind(("0.0.0.0", PORT))?;
            socket.join_multicast_v4(&Ipv4Addr::new(224, 0, 0, 251), &Ipv4Addr::UNSPECIFIED).ok();
            socket.set_read_timeout(Some(500 * MILLISECOND))?;
            Ok(socket)
        })?;
        let before = counter(host, "from-host")?;
        let container_address = container.address();
        host.netns().enter(|| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.set_broadcast(true)?;
            setsockopt(&socket, BindToDevice, &interface.clone().into())?;
            let targets = ["255.255.255.255", "224.0.0.1", "224.0.0.251"];
            for target in
                targets.map(str::to_owned).into_iter().chain([container_address.to_string()])
            {
                // The kernel may refuse some of them.
                let _ = socket.send_to(b"from the host", (target.as_str(), PORT));
            }
            Ok(())
        })?;
        let mut buffer = [0; 64];
        let received = listener.recv_from(&mut buffer);
        ensure!(received.is_err(), "the container received {received:?}");
        ensure!(counter(host, "from-host")? >= before + 2, "the packets were not counted");
        Ok(())
    })
}
