//! Tests how the command starts and stops a daemon. A stand-in for the daemon is installed next to
//! the command: a process that only sleeps. A node with canned answers listens on the socket. The
//! tests need root, as the commands do.

mod common;
mod node;

use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use common::{Host, Outcome, install, install_overnode, overnode};
use node::Canned;
use overnode_daemon::api::{ApiError, LaunchOutcome, Launched, Reply, Request, Version, WasReset};

const LAUNCH: [&str; 4] = ["launch", "--id", "1", "host2"];
/// A token like those that `overnode token` makes.
const TOKEN: &str = "q2Vd0mCzJ7rYk1XWb9uTfG4hLs8NeAoP5iDwRx6M";

/// Writes its process ID and its arguments to files, then sleeps.
const SLEEPER: &str = "#!/bin/sh\necho \"$@\" > \"$0.args\"\necho $$ > \"$0.tmp\"\n\
                       mv \"$0.tmp\" \"$0.pid\"\nexec sleep 300\n";

/// A running command, from an executable that has a stand-in for the daemon next to it.
struct Running {
    command: Child,
    bin: PathBuf,
}

impl Running {
    fn start(host: &Host, daemon: &str, arguments: &[&str]) -> Self {
        let bin = host.path().join("bin");
        fs::create_dir(&bin).unwrap();
        install(&bin.join("overnoded"), daemon.as_bytes());
        let mut command = overnode(&install_overnode(&bin), host, arguments);
        command.env("OVERNODE_TOKEN", TOKEN).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { command: command.spawn().unwrap(), bin }
    }

    /// Waits until the stand-in runs, and returns its process ID.
    fn daemon(&self) -> u32 {
        let file = self.bin.join("overnoded.pid");
        eventually("the daemon is started", || file.exists());
        fs::read_to_string(file).unwrap().trim().parse().unwrap()
    }

    fn outcome(self) -> Outcome {
        let output = self.command.wait_with_output().unwrap();
        Outcome {
            code: output.status.code().unwrap(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}: not within 20 s");
        thread::sleep(Duration::from_millis(10));
    }
}

fn runs(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Sends a signal to a process that this test started.
fn kill(pid: u32, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal).unwrap();
}

fn answer(
    pid: u32,
    launch: impl Fn() -> Result<(), ApiError> + Send + 'static,
) -> impl FnMut(Request) -> Result<Reply, ApiError> {
    move |request| match request {
        Request::Version(()) => Ok(Reply::Version(node::version(pid))),
        Request::Launch(wanted) => {
            assert!(wanted.restart, "the daemon was started for it");
            launch().map(|()| {
                Reply::Launch(Launched {
                    outcome: LaunchOutcome::Started,
                    id: wanted.id,
                    nickname: "host1".into(),
                    targets: wanted.hosts,
                    changed: Vec::new(),
                })
            })
        }
        other => panic!("unexpected: {other:?}"),
    }
}

fn serve(
    host: Host,
    mut answer: impl FnMut(Request) -> Result<Reply, ApiError> + Send + 'static,
) -> Canned {
    Canned::at(host, move |mut calls| {
        while let Some((request, reply)) = calls.blocking_recv() {
            let _ = reply.send(answer(request));
        }
    })
}

#[test]
fn launch_starts_a_daemon_and_leaves_it_running() {
    let host = Host::new();
    let running = Running::start(&host, SLEEPER, &LAUNCH);
    let (pid, bin) = (running.daemon(), running.bin.clone());
    let node = serve(host, answer(pid, || Ok(())));
    let outcome = running.outcome();
    assert_eq!(outcome.stdout, "node 1 (host1): launched; targets: host2\n", "{outcome:?}");
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));

    assert!(runs(pid), "the daemon does not outlive the command");
    let session = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session: u32 =
        session.rsplit(") ").next().unwrap().split(' ').nth(3).unwrap().parse().unwrap();
    assert_eq!(session, pid, "signals of the terminal do not reach it");
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert!(!String::from_utf8_lossy(&environment).contains(TOKEN));
    let log = node.host.run_dir().join("overnoded.log");
    assert_eq!(fs::read_link(format!("/proc/{pid}/fd/1")).unwrap(), log);
    assert_eq!(fs::read_link(format!("/proc/{pid}/fd/0")).unwrap(), Path::new("/dev/null"));
    assert_eq!(fs::metadata(&log).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(
        fs::read_to_string(bin.join("overnoded.args")).unwrap(),
        format!(
            "--state-dir {} --run-dir {} --no-color\n",
            node.host.state_dir().display(),
            node.host.run_dir().display()
        )
    );
    kill(pid, nix::sys::signal::SIGKILL);
}

/// A program of another user listens in place of the daemon.
#[test]
fn a_local_user_listening_in_place_of_the_daemon_gets_no_token() {
    let host = Host::new();
    // Created by user 1000 before the first launch.
    fs::create_dir(host.run_dir()).unwrap();
    chown(host.run_dir(), Some(1000), Some(1000)).unwrap();
    fs::set_permissions(host.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (bound, ready) = mpsc::channel();
    let (tell, told) = mpsc::channel();
    let socket = host.socket();
    thread::spawn(move || {
        // SAFETY: the system call takes no pointers. It is called by number, because the C library
        // would change all threads. The kernel records the user who calls listen(2).
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, -1, 1000, -1) }, 0);
        let listener = UnixListener::bind(&socket);
        // SAFETY: as above.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, -1, 0, -1) }, 0);
        bound.send(listener.is_ok()).unwrap();
        let (mut stream, _) = listener.unwrap().accept().unwrap();
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        tell.send(bytes).unwrap();
    });
    assert!(ready.recv().unwrap());
    let outcome = host.run(&["launch", "--id", "1", "--token", TOKEN]);
    assert_eq!(outcome.code, 1, "{outcome:?}");
    let line = outcome.error_line();
    assert!(
        line.contains("a program of user 1000 listens on") && line.contains("--run-dir"),
        "{line}"
    );
    let told = told.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(told.is_empty(), "{:?}", String::from_utf8_lossy(&told));
}

#[test]
fn a_refused_launch_leaves_nothing_behind() {
    let host = Host::new();
    let running = Running::start(&host, SLEEPER, &LAUNCH);
    let pid = running.daemon();
    let node = serve(
        host,
        answer(pid, || Err(ApiError::refused("the kernel lacks TC: use 6.1 or later"))),
    );
    let outcome = running.outcome();
    assert_eq!(outcome.code, 1);
    assert_eq!(outcome.error_line(), "overnode: the kernel lacks TC: use 6.1 or later");
    assert!(!runs(pid), "the daemon was stopped");
    assert!(!node.host.run_dir().join("overnoded.log").exists());
    assert!(!node.host.state_dir().exists());
}

#[test]
fn an_interrupted_launch_leaves_nothing_behind() {
    let host = Host::new();
    let running = Running::start(&host, SLEEPER, &LAUNCH);
    let (pid, command) = (running.daemon(), running.command.id());
    let node = serve(
        host,
        answer(pid, move || {
            kill(command, nix::sys::signal::SIGINT);
            thread::sleep(Duration::from_secs(1));
            Ok(())
        }),
    );
    let outcome = running.outcome();
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert!(outcome.error_line().contains("interrupted by SIGINT"));
    assert!(!runs(pid), "the daemon was stopped");
    assert!(!node.host.run_dir().join("overnoded.log").exists());
}

#[test]
fn the_log_of_a_daemon_that_ends_at_once_is_quoted() {
    let host = Host::new();
    fs::create_dir(host.run_dir()).unwrap();
    let log = host.run_dir().join("overnoded.log");
    fs::write(&log, "2025-01-01T00:00:00.000000Z ERROR of an earlier start\n").unwrap();
    let outcome = Running::start(&host, "#!/bin/sh\nexit 3\n", &LAUNCH).outcome();
    assert!(outcome.error_line().contains("it logged nothing"), "{outcome:?}");
    fs::remove_dir_all(host.run_dir()).unwrap();

    let host = Host::new();
    let daemon = "#!/bin/sh\necho starting\n\
                  echo '2026-01-01T00:00:00.000000Z ERROR TCP port 6783 is in use: \
                  stop whatever uses it' >&2\nexit 1\n";
    let outcome = Running::start(&host, daemon, &LAUNCH).outcome();
    assert_eq!(outcome.code, 1);
    let line = outcome.error_line();
    assert!(
        line.contains(
            "did not start: TCP port 6783 is in use: stop whatever uses it (exit status: 1)"
        ),
        "{line}"
    );
    assert!(!host.run_dir().exists() && !host.state_dir().exists());
}

#[test]
fn the_log_of_a_daemon_that_ends_during_a_request_is_quoted() {
    let host = Host::new();
    host.pretend_launched();
    // The stand-in accepts the first request, says why it cannot go on, and ends.
    let daemon = "#!/bin/sh\necho $$ > \"$0.tmp\"\nmv \"$0.tmp\" \"$0.pid\"\n\
                  while [ ! -e \"$0.asked\" ]; do sleep 0.05; done\n\
                  echo '2026-01-01T00:00:00.000000Z ERROR disk full: free some space'\n\
                  sleep 0.3\nexit 1\n";
    let running = Running::start(&host, daemon, &["resume"]);
    running.daemon();
    let (asked, socket) = (running.bin.join("overnoded.asked"), host.socket());
    let _node = Canned::at(host, move |mut calls| {
        drop(calls.blocking_recv());
        fs::write(asked, "").unwrap();
        fs::remove_file(socket).unwrap();
    });
    let outcome = running.outcome();
    assert_eq!(outcome.code, 1);
    let line = outcome.error_line();
    assert!(line.contains("did not start: disk full: free some space (exit status: 1)"), "{line}");
}

#[test]
fn the_slower_of_two_concurrent_launches_uses_the_other_daemon() {
    let host = Host::new();
    let running = Running::start(&host, SLEEPER, &LAUNCH);
    let pid = running.daemon();
    let node = serve(host, |request| match request {
        Request::Version(()) => Ok(Reply::Version(node::version(std::process::id()))),
        Request::Launch(wanted) => {
            assert!(!wanted.restart, "another launch started the daemon");
            Ok(Reply::Launch(Launched {
                outcome: LaunchOutcome::AlreadyRunning,
                id: wanted.id,
                nickname: "host1".into(),
                targets: wanted.hosts,
                changed: Vec::new(),
            }))
        }
        other => panic!("unexpected: {other:?}"),
    });
    let outcome = running.outcome();
    assert_eq!(outcome.stdout, "node 1 (host1): already running; targets: host2\n", "{outcome:?}");
    assert!(!runs(pid), "its own daemon was stopped");
    assert!(node.host.socket().exists(), "the other one's socket was left alone");
}

#[test]
fn a_run_directory_that_cannot_be_created_is_named() {
    let host = Host::new();
    fs::write(host.path().join("run"), "a file").unwrap();
    let outcome = Running::start(&host, SLEEPER, &LAUNCH).outcome();
    assert_eq!(outcome.code, 1);
    let line = outcome.error_line();
    assert!(line.contains("/run") && line.contains("--run-dir"), "{line}");
    assert_eq!(fs::read_to_string(host.path().join("run")).unwrap(), "a file");
}

#[test]
fn resume_starts_the_launched_node() {
    let host = Host::new();
    host.pretend_launched();
    let running = Running::start(&host, SLEEPER, &["resume"]);
    let pid = running.daemon();
    let _node = serve(host, move |_| Ok(Reply::Version(node::version(pid))));
    let outcome = running.outcome();
    assert_eq!(outcome.stdout, "node 1: resumed\n", "{outcome:?}");
    assert!(runs(pid));
    kill(pid, nix::sys::signal::SIGKILL);
}

#[test]
fn resume_without_a_launched_node_leaves_no_daemon() {
    let host = Host::new();
    host.pretend_launched();
    let running = Running::start(&host, SLEEPER, &["resume"]);
    let pid = running.daemon();
    let _node =
        serve(host, move |_| Ok(Reply::Version(Version { id: None, ..node::version(pid) })));
    let outcome = running.outcome();
    assert_eq!(outcome.code, 1);
    assert!(outcome.error_line().contains("no node was launched here"), "{outcome:?}");
    assert!(!runs(pid));
}

#[test]
fn reset_waits_until_the_daemon_is_gone() {
    let host = Host::new();
    let mut daemon = Command::new("sleep").arg("300").spawn().unwrap();
    let pid = daemon.id();
    let node = Canned::at(host, move |mut calls| {
        while let Some((request, reply)) = calls.blocking_recv() {
            let (answer, last) = match request {
                Request::Version(()) => (Reply::Version(node::version(pid)), false),
                Request::Reset(reset) => {
                    assert!(reset.force);
                    (
                        Reply::Reset(WasReset {
                            id: Some(1.try_into().unwrap()),
                            left: Vec::new(),
                        }),
                        true,
                    )
                }
                other => panic!("unexpected: {other:?}"),
            };
            let _ = reply.send(Ok(answer));
            if last {
                thread::sleep(Duration::from_millis(500));
                break;
            }
        }
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    });
    fs::write(node.host.run_dir().join("overnoded.log"), "").unwrap();
    let begun = Instant::now();
    let outcome = node.host.run(&["reset", "--force"]);
    assert!(
        begun.elapsed() >= Duration::from_millis(500),
        "it returned before the daemon was gone"
    );
    assert!(outcome.stdout.starts_with("node 1: reset;"), "{outcome:?}");
    assert!(!node.host.run_dir().join("overnoded.log").exists());
}

#[test]
fn reset_reports_what_it_could_not_remove() {
    let mut daemon = Command::new("true").spawn().unwrap();
    daemon.wait().unwrap();
    let pid = daemon.id();
    let node = Canned::start(move |request| match request {
        Request::Version(()) => Ok(Reply::Version(node::version(pid))),
        Request::Reset(_) => Ok(Reply::Reset(WasReset {
            id: Some(1.try_into().unwrap()),
            left: vec!["interface ov1a2b3c4d: busy".into()],
        })),
        other => panic!("unexpected: {other:?}"),
    });
    let socket = node.host.socket();
    let unbind = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        fs::remove_file(socket).unwrap();
    });
    let outcome = node.host.run(&["reset"]);
    unbind.join().unwrap();
    assert_eq!(outcome.code, 1);
    assert!(outcome.error_line().contains("interface ov1a2b3c4d: busy"), "{outcome:?}");
}
