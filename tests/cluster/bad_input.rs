//! Tests of bad input to every command and to the API: the error is one line that says what to do,
//! the exit code is 1 or 2, and nothing is left half done.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use lab::process::run_limited;
use lab::{Host, Lab};

use crate::cleanliness::ensure_clean;
use crate::support::{TIMEOUT, TOKEN, attached, in_lab, launch, list, targets};

/// Runs the command, which must fail with exactly this code and a line that contains each word, in
/// upper or lower case.
fn refused(host: &Host, words: &[&str], code: i32, expected: &[&str]) -> Result<()> {
    let complaint = host.overnode(words)?.failure(code)?.to_lowercase();
    for word in expected {
        anyhow::ensure!(
            complaint.contains(&word.to_lowercase()),
            "`overnode {}` does not mention {word:?}: {complaint}",
            words.join(" ")
        );
    }
    Ok(())
}

#[test]
fn wrong_usage_is_refused_before_anything_is_done() -> Result<()> {
    in_lab(Lab::new("usage").hosts(1), |lab| {
        let host = lab.host(1);
        let cases: &[(&[&str], &[&str])] = &[
            (&["launch"], &["--id"]),
            (&["launch", "--token", TOKEN], &["--id"]),
            (&["launch", "--id", "0", "--token", TOKEN], &["4095"]),
            (&["launch", "--id", "4096", "--token", TOKEN], &["4095"]),
            (&["launch", "--id", "70000", "--token", TOKEN], &["4095"]),
            (&["launch", "--id", "-1", "--token", TOKEN], &[]),
            (&["launch", "--id", "one", "--token", TOKEN], &["4095"]),
            (&["launch", "--id", "1", "--token", ""], &["token"]),
            (&["launch", "--id", "1"], &["token"]),
            (&["launch", "--id", "1", "--token", TOKEN, "--mtu", "much"], &["mtu"]),
            (&["launch", "--id", "1", "--token", TOKEN, "--range", "10.0.0.0"], &["range"]),
            (&["launch", "--id", "1", "--token", TOKEN, "--no-such-option"], &["--no-such-option"]),
            (&["launch", "--id", "1", "--token", TOKEN, ""], &[]),
            (&["connect"], &["HOST"]),
            (&["forget"], &["HOST"]),
            (&["attach"], &["TARGET"]),
            (&["attach", "netns:x", "--ip", "10.33.0"], &["/"]),
            (&["attach", "netns:x", "--ip", "nonsense"], &["ip"]),
            (&["attach", "pid:abc"], &["pid"]),
            (&["detach"], &["TARGET"]),
            (&["status", "--nonsense"], &["--nonsense"]),
            (&["no-such-command"], &["no-such-command"]),
            (&["prime", "--timeout", "soon"], &["timeout"]),
        ];
        for (words, expected) in cases {
            refused(host, words, 2, expected)?;
        }
        ensure_clean(host)
    })
}

#[test]
fn without_a_node_commands_say_to_launch_one() -> Result<()> {
    in_lab(Lab::new("no-node").hosts(1), |lab| {
        let host = lab.host(1);
        let container = host.container("c")?;
        let target = container.target();
        let cases: &[&[&str]] = &[
            &["connect", "host2"],
            &["forget", "host2"],
            &["status"],
            &["status", "--json"],
            &["inspect"],
            &["prime", "--timeout", "1"],
            &["attach", &target],
            &["detach", &target],
            &["resume"],
        ];
        for words in cases {
            refused(host, words, 1, &["overnode launch"])?;
        }
        ensure_clean(host)
    })
}

#[test]
fn with_a_stopped_node_commands_say_to_resume_it() -> Result<()> {
    in_lab(Lab::new("stopped-node").hosts(1), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        host.kill_daemon()?;
        let cases: &[&[&str]] = &[
            &["connect", "x"],
            &["forget", "host1"],
            &["status"],
            &["inspect"],
            &["attach", "pid:1"],
        ];
        for words in cases {
            refused(host, words, 1, &["overnode resume"])?;
        }
        // The dead daemon's socket is no obstacle.
        host.overnode(&["resume"])?.success()?;
        std::fs::remove_file(host.socket())?;
        host.overnode(&["status"])?.failure(1)?;
        Ok(())
    })
}

#[test]
fn impossible_attachments_are_refused_and_change_nothing() -> Result<()> {
    in_lab(Lab::new("attachments").hosts(1), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        let (held, free) = (attached(host, "held")?, host.container("free")?);
        let before = (host.netns().interfaces()?, host.status()?["endpoints"].clone());
        let taken = format!("{}/12", held.address());
        let (held_target, target) = (held.target(), free.target());
        let cases: &[(&[&str], &[&str])] = &[
            (&["attach", "netns:no-such-namespace"], &["no-such-namespace"]),
            (&["attach", "netns:/no/such/path"], &["/no/such/path"]),
            (&["attach", "netns:/etc/hostname"], &["/etc/hostname"]),
            (&["attach", "pid:4194303"], &["4194303"]),
            (&["attach", "no-such-container"], &["no-such-container"]),
            (&["attach", &held_target], &["already"]),
            (&["attach", &target, "--ip", &taken], &[]),
            (&["attach", &target, "--ip", "10.40.0.99/12"], &["10.39.239.255"]),
            (&["attach", &target, "--ip", "10.39.240.1/12"], &["10.39.239.255"]),
            (&["attach", &target, "--ip", "192.168.1.1/12"], &["10.32.0.0/12"]),
            (&["attach", &target, "--ip", "10.33.0.1/24"], &["/12"]),
            (&["attach", &target, "--ip", "fd00::1/64"], &["10.32.0.0/12"]),
            (&["detach", &target], &[]),
            (&["detach", "netns:no-such-namespace"], &["no-such-namespace"]),
        ];
        for (words, expected) in cases {
            let complaint = host.overnode(words)?.complaint()?;
            for word in *expected {
                assert!(complaint.contains(word), "{words:?}: {complaint}");
            }
        }
        // The host's own namespace is not a container.
        let own = format!("netns:{}", host.netns().name());
        host.overnode(&["attach", &own])?.complaint()?;
        assert_eq!((host.netns().interfaces()?, host.status()?["endpoints"].clone()), before);
        assert_eq!(free.netns().interfaces()?, Vec::<String>::new());
        host.attach(&free, &["--ip", "10.33.0.1/12"])?;
        let third = host.container("third")?;
        let complaint =
            host.overnode(&["attach", &third.target(), "--ip", "10.33.0.1/12"])?.failure(1)?;
        assert!(complaint.contains("10.33.0.1"), "{complaint}");
        Ok(())
    })
}

#[test]
fn an_unusable_state_directory_is_named() -> Result<()> {
    in_lab(Lab::new("state").hosts(1), |lab| {
        let host = lab.host(1);
        let state = host.state_directory();
        let path = state.to_string_lossy().into_owned();
        std::fs::write(&state, "a file where a directory should be")?;
        refused(host, &["launch", "--id", "1", "--token", TOKEN], 1, &[&path])?;
        assert_eq!(host.daemon_pid(), None);
        std::fs::remove_file(&state)?;

        launch(lab, host)?;
        host.overnode(&["reset"])?.success()?;
        std::fs::create_dir_all(&state)?;
        let database = state.join("overnode.redb");
        std::fs::write(&database, vec![0x5a; 8192])?;
        refused(host, &["launch", "--id", "1", "--token", TOKEN], 1, &["overnode.redb"])?;
        assert_eq!(
            std::fs::read(&database)?,
            vec![0x5a; 8192],
            "launch changed an unreadable database"
        );
        assert_eq!(host.daemon_pid(), None);
        assert_eq!(host.netns().interfaces()?, ["eth0"]);

        refused(host, &["reset"], 1, &["overnode.redb", "--force"])?;
        host.overnode(&["reset", "--force"])?.success()?;
        ensure_clean(host)?;
        launch(lab, host).map(drop)
    })
}

#[test]
fn commands_without_root_say_that_root_is_required() -> Result<()> {
    in_lab(Lab::new("nobody").hosts(1), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        // Other users cannot read the build directory, so the program is copied.
        let program = lab.folder().join("overnode");
        std::fs::copy(lab::binaries::folder()?.join("overnode"), &program)?;
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755))?;
        std::fs::set_permissions(lab.folder(), PermissionsExt::from_mode(0o755))?;
        let cases: &[&[&str]] = &[
            &["launch", "--id", "1", "--token", TOKEN],
            &["connect", "x"],
            &["forget", "host1"],
            &["attach", "pid:1"],
            &["detach", "pid:1"],
            &["reset"],
            &["resume"],
        ];
        for words in cases {
            let mut command = host.command("setpriv")?;
            command
                .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
                .arg(&program)
                .args(*words);
            let complaint = run_limited(command, lab.folder(), TIMEOUT)?.failure(1)?;
            assert!(complaint.contains("root"), "{words:?}: {complaint}");
        }
        assert_eq!(host.status()?["node"]["id"], 1);
        Ok(())
    })
}

#[test]
fn forget_names_the_unknown_host() -> Result<()> {
    in_lab(Lab::new("forget-unknown").hosts(1), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        refused(host, &["forget", "stranger"], 1, &["stranger"])?;
        assert_eq!(targets(host)?, ["host1"]);
        Ok(())
    })
}

#[test]
fn the_api_refuses_malformed_requests_and_keeps_running() -> Result<()> {
    in_lab(Lab::new("api").hosts(1), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        let pid = host.daemon_pid();
        let long = "x".repeat(20_000_000);
        let huge = format!("{{\"hosts\": [\"{long}\"]}}");
        let cases: &[(&str, &str, &str, &[u16])] = &[
            ("GET", "/", "", &[404]),
            ("GET", "/v1/nonsense", "", &[404]),
            ("GET", "/v1/connect", "", &[405]),
            ("DELETE", "/v1/status", "", &[405]),
            ("POST", "/v1/connect", "", &[400, 422]),
            ("POST", "/v1/connect", "{", &[400]),
            ("POST", "/v1/connect", "[]", &[400, 422]),
            ("POST", "/v1/connect", "{\"hosts\": []}", &[400]),
            ("POST", "/v1/connect", "{\"hosts\": [\"a\"], \"nonsense\": 1}", &[400, 422]),
            ("POST", "/v1/connect", "{\"hosts\": [\"a b\"]}", &[400, 422]),
            ("POST", "/v1/forget", "{\"hosts\": [\"stranger\"]}", &[404, 409]),
            ("POST", "/v1/launch", "{\"id\": 0, \"token\": \"x\"}", &[400, 422]),
            ("POST", "/v1/launch", "{\"id\": 1, \"token\": \"\"}", &[400, 422]),
            ("POST", "/v1/launch", "{\"id\": 2, \"token\": \"x\"}", &[409]),
            ("POST", "/v1/attach", "{\"target\": \"netns:nope\"}", &[404, 409]),
            ("POST", "/v1/detach", "{\"target\": \"netns:nope\"}", &[404]),
            (
                "POST",
                "/v1/external-peers",
                "{\"public_key\": \"short\", \"allowed_ips\": []}",
                &[400, 422],
            ),
        ];
        for (method, path, body, codes) in cases {
            let (code, answer) = host
                .request(method, path, body)
                .with_context(|| format!("{method} {path} {body}"))?;
            assert!(codes.contains(&code), "{method} {path} {body}: {code} {answer}");
            let answer: serde_json::Value = serde_json::from_str(&answer)
                .with_context(|| format!("{method} {path} {body}: {answer:?} is not JSON"))?;
            let error = answer["error"].as_str().context("the answer has no error")?;
            assert!(!error.is_empty() && !error.contains('\n'), "{error:?}");
        }
        // The daemon may close the connection before it has read everything.
        if let Ok((code, _)) = host.request("POST", "/v1/connect", &huge) {
            assert!((400..500).contains(&code), "{code}");
        }
        for garbage in [
            &b"\0\0\0\0"[..],
            b"GET",
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /v1/connect HTTP/1.1\r\n\r\n",
        ] {
            let mut stream = UnixStream::connect(host.socket())?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            let _ = stream.write_all(garbage);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        }
        assert_eq!(host.daemon_pid(), pid);
        assert_eq!(targets(host)?, ["host1"]);
        assert_eq!(list(&host.status()?, "endpoints")?.len(), 0);
        Ok(())
    })
}

#[test]
fn only_root_can_access_the_socket_and_the_state() -> Result<()> {
    in_lab(Lab::new("modes").hosts(1), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        let mode = |path: std::path::PathBuf| -> Result<u32> {
            Ok(std::fs::metadata(path)?.permissions().mode() & 0o777)
        };
        assert_eq!(mode(host.socket())?, 0o600);
        assert_eq!(mode(host.state_directory())?, 0o700);
        assert_eq!(mode(host.state_directory().join("overnode.redb"))?, 0o600);
        Ok(())
    })
}
