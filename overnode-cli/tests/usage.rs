//! Tests the command without a daemon: help, wrong usage, a daemon that is not running, a user who
//! is not root.

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;

use clap::CommandFactory;
use overnode_cli::options::Cli;

use common::{Host, Outcome, install_overnode, overnode};

const KEY: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";

/// The commands that ask the daemon, each with valid arguments.
const ASKING: [&[&str]; 16] = [
    &["connect", "host2"],
    &["forget", "host2"],
    &["attach", "netns:blue"],
    &["detach", "netns:blue"],
    &["expose"],
    &["hide"],
    &["status"],
    &["inspect"],
    &["monitor"],
    &["prime"],
    &["resume"],
    &["dns-add", "web", "10.40.0.1"],
    &["dns-remove", "web"],
    &["dns-lookup", "web"],
    &["peer", "add", KEY, "--allowed-ips", "10.39.250.1/32"],
    &["peer", "list"],
];

fn run(arguments: &[&str]) -> Outcome {
    Host::new().run(arguments)
}

#[test]
fn wrong_usage_exits_with_two_and_one_line() {
    let wrong: &[(&[&str], &str)] = &[
        (&["launhc"], "'launch'"),
        (&["launch", "--token", "t"], "--id <ID>"),
        (&["launch", "--id", "0", "--token", "t"], "from 1 to 4095"),
        (&["launch", "--id", "4096", "--token", "t"], "from 1 to 4095"),
        (&["launch", "--id", "-1", "--token", "t"], "from 1 to 4095"),
        (&["launch", "--id", "one", "--token", "t"], "from 1 to 4095"),
        (&["launch", "--id", "1"], "--token-file"),
        (&["launch", "--id", "1", "--token", ""], "empty"),
        (&["launch", "--id", "1", "--token", " \t"], "empty"),
        (&["launch", "--id", "1", "--token-file", "/nonexistent"], "/nonexistent"),
        (&["launch", "--id", "1", "--token-file", "/dev/null"], "empty"),
        (&["launch", "--id", "1", "--token", "t", "host:6783"], "without a port"),
        (&["launch", "--id", "1", "--token", "t", "--subnet", "10.32.0.0"], "--subnet"),
        (&["launch", "--id", "1", "--token", "t", "--nickname", "two words"], "letters"),
        (&["connect"], "HOST"),
        (&["connect", ""], "host name"),
        (&["forget"], "HOST"),
        (&["attach"], "TARGET"),
        (&["attach", "pid:none"], "pid:NUMBER"),
        (&["attach", "netns:a", "--ip", "10.32.0"], "10.32.0.7/12"),
        (&["monitor", "--for", "0"], "more than 0"),
        (&["prime", "--timeout", "soon"], "500ms, 10s, 2m"),
        (&["completions", "tcsh"], "bash"),
        (&["attach", "netns:a", "--ip", "300.0.0.1/12"], "10.32.0.7/12"),
        (&["launch", "--id", "1", "--token", "t", "--dns-domain", "a..b"], "labels"),
        (&["launch", "--id", "1", "--token", "t", "--dns-domain", "a", "--no-dns"], "--no-dns"),
        (&["dns-add", "web"], "ADDRESS"),
        (&["dns-add", "web", "host2"], "host2"),
        (&["dns-remove"], "NAME"),
        (&["dns-lookup"], "NAME"),
        (&["prime", "--timeout", "-5"], "-5"),
        (&["status", "--everything"], "--everything"),
        (&["monitor", "--reason", "boredom"], "no-route"),
        (&["monitor", "--for", "0"], "--for"),
        (&["expose", "--ip", "10.32.0"], "10.32.0.7/12"),
        (&["hide", "10.32.0.7"], "10.32.0.7"),
        (&["peer", "add", "short", "--allowed-ips", "10.0.0.1/32"], "44 characters"),
        (&["peer", "add", KEY], "--allowed-ips"),
        (
            &[
                "peer",
                "add",
                KEY,
                "--allowed-ips",
                "10.0.0.1/32",
                "--preshared-key-file",
                "/dev/null",
            ],
            "32 bytes",
        ),
        (
            &["peer", "add", KEY, "--allowed-ips", "10.0.0.1/32", "--endpoint", "1.2.3.4"],
            "HOST:PORT",
        ),
    ];
    for (arguments, expected) in wrong {
        let outcome = run(arguments);
        assert_eq!(outcome.code, 2, "{arguments:?}: {outcome:?}");
        assert!(outcome.error_line().contains(expected), "{arguments:?}: {outcome:?}");
        assert_eq!(outcome.stdout, "", "{arguments:?}");
    }
}

#[test]
fn an_empty_token_from_the_environment_is_refused() {
    let host = Host::new();
    let outcome = Outcome::of(host.command(&["launch", "--id", "1"]).env("OVERNODE_TOKEN", ""));
    assert_eq!(outcome.code, 2);
    assert!(outcome.error_line().contains("empty"));
    assert!(host.is_untouched());
}

#[test]
fn every_command_has_help_with_an_example() {
    let help = run(&["help"]);
    assert_eq!(help.code, 0);
    let mut commands = Vec::new();
    for command in Cli::command().get_subcommands() {
        let name = command.get_name();
        let inner: Vec<String> =
            command.get_subcommands().map(|it| format!("{name} {}", it.get_name())).collect();
        commands.extend(if inner.is_empty() { vec![name.to_owned()] } else { inner });
    }
    assert!(commands.len() > 20, "{commands:?}");
    for command in commands {
        assert!(help.stdout.contains(command.split(' ').next().unwrap()), "{command}");
        let words: Vec<&str> = command.split(' ').chain(["--help"]).collect();
        let outcome = run(&words);
        assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""), "{command}");
        assert!(
            outcome.stdout.contains(&format!("overnode {command}")),
            "{command}: {}",
            outcome.stdout
        );
        assert!(outcome.stdout.contains("Example"), "{command}: {}", outcome.stdout);
    }
}

#[test]
fn without_a_command_the_help_is_shown() {
    let outcome = run(&[]);
    assert_eq!(outcome.code, 2);
    assert!(outcome.stderr.contains("Usage: overnode"));
}

#[test]
fn a_token_file_is_readable_by_its_owner_only_and_never_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    let arguments = ["token", "--out", file.to_str().unwrap()];
    let outcome = run(&arguments);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (0, ""), "{}", outcome.stderr);
    let token = fs::read_to_string(&file).unwrap();
    assert_eq!(token.trim_end().len(), 40);
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o600);
    let again = run(&arguments);
    assert!(again.error_line().contains("remove it first"));
    assert_eq!(fs::read_to_string(&file).unwrap(), token);
}

#[test]
fn shells_complete_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let outcome = run(&["completions", shell]);
        assert_eq!(outcome.code, 0);
        for word in ["launch", "token-file", "dns-lookup"] {
            assert!(outcome.stdout.contains(word), "{shell} {word}");
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("overnode");
    fs::write(&script, run(&["completions", "bash"]).stdout).unwrap();
    let complete = "source \"$0\"; COMP_WORDS=(overnode dns-l); COMP_CWORD=1; \
                    _overnode overnode dns-l overnode; echo \"${COMPREPLY[@]}\"";
    let output =
        std::process::Command::new("bash").args(["-c", complete]).arg(&script).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "dns-lookup", "{output:?}");
}

#[test]
fn tokens_are_strong_and_differ() {
    let tokens: Vec<String> = (0..50).map(|_| run(&["token"]).stdout).collect();
    for token in &tokens {
        let text = token.strip_suffix('\n').unwrap();
        assert_eq!(text.len(), 40, "240 bits");
        assert!(
            text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        );
        assert!(!text.starts_with('-'));
        assert_eq!(tokens.iter().filter(|other| *other == token).count(), 1);
    }
}

#[test]
fn version_works_without_a_daemon() {
    let outcome = run(&["version"]);
    assert_eq!(outcome.code, 0);
    let own = env!("CARGO_PKG_VERSION");
    assert_eq!(outcome.stdout, format!("overnode   {own}\novernoded  not running\n"));
    assert_eq!(run(&["--version"]).stdout, format!("overnode {own}\n"));
}

#[test]
fn never_launched_and_stopped_nodes_get_different_messages() {
    for arguments in ASKING {
        let host = Host::new();
        let outcome = host.run(arguments);
        assert_eq!(outcome.code, 1, "{arguments:?}: {outcome:?}");
        let line = outcome.error_line();
        assert!(
            line.starts_with("overnode is not running on this host: no node was launched"),
            "{line}"
        );
        assert!(line.contains("`overnode launch"), "{line}");
        assert!(host.is_untouched(), "{arguments:?}");

        if arguments == ["resume"] {
            continue;
        }
        host.pretend_launched();
        let line = host.run(arguments).error_line();
        assert!(line.contains("is stopped; start it with `overnode resume`"), "{line}");
    }
}

#[test]
fn a_socket_without_a_listener_counts_as_not_running() {
    let host = Host::new();
    fs::create_dir_all(host.run_dir()).unwrap();
    drop(std::os::unix::net::UnixListener::bind(host.socket()).unwrap());
    let outcome = host.run(&["status"]);
    assert_eq!(outcome.code, 1);
    assert!(outcome.error_line().contains("not running"));
}

#[test]
fn changes_need_root_and_say_so() {
    let changing: [&[&str]; 9] = [
        &["launch", "--id", "1", "--token", "t"],
        &["connect", "host2"],
        &["forget", "host2"],
        &["attach", "netns:blue"],
        &["detach", "netns:blue"],
        &["reset", "--force"],
        &["resume"],
        &["peer", "add", KEY, "--allowed-ips", "10.39.250.1/32"],
        &["peer", "remove", KEY],
    ];
    // Other users cannot execute files inside root's directories.
    let dir = tempfile::tempdir().unwrap();
    let copy = install_overnode(dir.path());
    for arguments in changing {
        let host = Host::new();
        let mut command = overnode(&copy, &host, arguments);
        if nix::unistd::geteuid().is_root() {
            command.uid(65534).gid(65534);
        }
        let outcome = Outcome::of(&mut command);
        assert_eq!(outcome.code, 1, "{arguments:?}: {outcome:?}");
        let line = outcome.error_line();
        assert!(line.contains(&format!("`overnode {}", arguments[0])), "{line}");
        assert!(line.contains("must be run as root"), "{line}");
        assert!(host.is_untouched(), "{arguments:?}");
    }
}
