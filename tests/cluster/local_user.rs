//! What a user of a host who is not root, or a program of root's that has given up most of its
//! rights, tries against the node there.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use lab::{Host, Lab, eventually};
use overnode_daemon::datapath::node_name;

use crate::support::{PATIENCE, TOKEN, in_lab, launch_all};

/// What `setpriv` is told to become somebody else.
const STRANGER: &str = "setpriv --reuid 1000 --regid 1000 --clear-groups";
/// What it is told to give up every right of root's but its name, for itself and all that it
/// starts. (CAP_SYS_PTRACE is for looking into other processes; later kernels take CAP_PERFMON,
/// too.)
const NO_RIGHTS: [&str; 2] = ["--bounding-set=-all", "--inh-caps=-all"];

/// Runs a script as root in mounts and processes of its own: its bpffs is nobody else's, and its
/// first process is that script.
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

/// The maps say where packets go and with which key; who owns the directory that they are pinned in
/// can put others in their place.
#[test]
fn a_local_user_who_makes_the_directory_of_pins_first_gets_no_maps() -> Result<()> {
    in_lab(Lab::new("pins").hosts(1), |lab| {
        for theirs in ["overnode", "overnode/$NODE", "overnode/$NODE/maps"] {
            let script = format!(
                "mount -t bpf -o mode=1777 bpf /sys/fs/bpf && {STRANGER} mkdir -p /sys/fs/bpf/{theirs} || exit 9
                 overnode launch --id 1 --token $TOKEN
                 echo \"launch: $?\"; find /sys/fs/bpf/overnode -type f"
            );
            let output = apart(lab.host(1), &script)?;
            let (said, complaint) = (text(&output.stdout), text(&output.stderr));
            assert_eq!(
                said, "launch: 1\n",
                "root's maps are in the hands of user 1000: {complaint}"
            );
            assert!(complaint.contains("/sys/fs/bpf/overnode belongs to user 1000"), "{complaint}");
            assert!(complaint.contains("rm -r /sys/fs/bpf/overnode"), "{complaint}");
        }
        Ok(())
    })
}

/// The owner of a directory may rename what lies in it, whoever that belongs to.
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
fn what_a_node_mounts_and_makes_for_its_pins_is_for_root_alone() -> Result<()> {
    in_lab(Lab::new("private").hosts(1), |lab| {
        let modes = "find /sys/fs/bpf/overnode -type d -exec stat -c '%a %u' {} + | sort -u";
        let script = format!(
            "while mountpoint -q /sys/fs/bpf; do umount /sys/fs/bpf || exit 9; done
             umask 0; overnode launch --id 1 --token $TOKEN || exit 8
             stat -c '%a' /sys/fs/bpf; {modes}
             stat -c '%a' $OVERNODE_STATE_DIR $OVERNODE_RUN_DIR/*.sock $OVERNODE_RUN_DIR/*.log | sort -u
             overnode reset --force || exit 7; test ! -e /sys/fs/bpf/overnode || echo left"
        );
        let output = apart(lab.host(1), &script)?;
        let printed = text(&output.stdout);
        let seen: Vec<&str> = printed.lines().filter(|line| !line.starts_with("node 1")).collect();
        // The kernel adds the sticky bit to what is mounted.
        assert_eq!(seen, ["1700", "700 0", "600", "700"], "{printed}{}", text(&output.stderr));
        Ok(())
    })
}

/// `reset` removes what is pinned, as root: not what a link leads to.
#[test]
fn a_local_user_cannot_have_reset_remove_roots_files() -> Result<()> {
    in_lab(Lab::new("links").hosts(1), |lab| {
        let host = lab.host(1);
        let precious = lab.folder().join("precious");
        fs::create_dir(&precious)?;
        fs::write(precious.join("file"), "of root's")?;
        let script = format!(
            "mount -t bpf -o mode=1777 bpf /sys/fs/bpf || exit 9
             {STRANGER} sh -c 'mkdir /sys/fs/bpf/overnode && ln -s {} /sys/fs/bpf/overnode/'$NODE || exit 8
             overnode reset --force",
            precious.display()
        );
        let output = apart(host, &script)?;
        assert!(precious.join("file").exists(), "reset has removed a file of root's");
        ensure!(output.status.success(), "{}", text(&output.stderr));
        Ok(())
    })
}

/// `cat` of a file of a process, as somebody.
fn read_as(program: &[&str], pid: i32, file: &str) -> Result<Output> {
    let (setpriv, arguments) = program.split_first().context("no program")?;
    let path = format!("/proc/{pid}/{file}");
    Ok(Command::new(setpriv).args(arguments).args(["head", "-c", "65536", &path]).output()?)
}

/// Neither its environment nor its memory nor a core file, of a process that has the keys.
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
                "{file} of process {pid} is read by {reader:?}: {refusal}"
            );
        }
    }
    Ok(())
}

/// Programs of root's that have no right to look into other processes may still look into those
/// that have no more rights than they have, unless these forbid it. So the daemon is started
/// without any right here, and whoever starts it wants core files.
#[test]
fn nobody_reads_the_memory_of_the_daemon_nor_what_it_leaves_in_a_crash() -> Result<()> {
    in_lab(Lab::new("memory").hosts(1), |lab| {
        let host = lab.host(1);
        let directory = lab.folder().join("crash");
        fs::create_dir(&directory)?;
        let mut command = host.command("setpriv")?;
        command.args(NO_RIGHTS).arg("overnoded").current_dir(&directory);
        command.env("OVERNODE_TOKEN", TOKEN).stdin(Stdio::null()).stderr(Stdio::null());
        // SAFETY: between fork and exec only system calls are made.
        unsafe {
            command.pre_exec(|| {
                let all =
                    libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
                libc::setrlimit(libc::RLIMIT_CORE, &raw const all);
                Ok(())
            });
        }
        let mut daemon = command.spawn()?;
        eventually(PATIENCE, || {
            ensure!(host.request("GET", "/v1/version", "")?.0 == 200, "the daemon does not answer");
            Ok(())
        })?;
        let pid = daemon.id() as i32;
        let outcome = keeps_its_secrets(pid);
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGABRT)?;
        let status = daemon.wait()?;
        outcome?;
        assert_eq!(status.signal(), Some(libc::SIGABRT));
        assert!(!status.core_dumped(), "the kernel has written the daemon's memory to a file");
        assert_eq!(fs::read_dir(&directory)?.count(), 0);
        Ok(())
    })
}

#[test]
fn nobody_reads_the_memory_of_the_processes_of_a_node() -> Result<()> {
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
            assert_eq!(checked, 2, "a daemon and its workers");
        }
        Ok(())
    })
}

/// Directories that a local user owns, of every kind that a node is told.
#[test]
fn a_local_user_cannot_lend_a_node_directories() -> Result<()> {
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
