//! Fuzzes the CNI plugin's input: what a container runtime passes in the environment and on
//! standard input.

use overnode_api::{Attached, Target, check_name};
use overnode_cli::cni::config::{self, Command, Task};
use overnode_cli::cni::error::CniError;
use overnode_cli::cni::result;
use overnode_types::text::is_harmless;

use super::input::Input;

const COMMANDS: [&str; 6] = ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"];
const VARIABLES: [&str; 4] = ["CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_ARGS"];

/// Runs one input: the command, the other variables, and the rest as standard input.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input(data);
    let kind = usize::from(input.byte());
    let values = VARIABLES.map(|name| (name, String::from_utf8_lossy(input.bytes()).into_owned()));
    let command = COMMANDS.get(kind).map_or_else(|| values[0].1.clone(), |name| (*name).to_owned());
    let env = |name: &str| match name {
        "CNI_COMMAND" => Some(command.clone()),
        _ => values.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone()),
    };
    if let Err(error) = read(&env, input.0) {
        let document = error.document(config::NEWEST);
        assert_eq!(document["code"], error.code as u16);
        // The error contains the whole value of an unsupported key.
        let most = 2000 + 8 * input.0.len();
        for text in [&error.message, &error.details] {
            assert!(text.len() < most, "{} bytes", text.len());
            assert!(text.chars().all(is_harmless), "{text:?}");
        }
    }
}

fn read(env: &dyn Fn(&str) -> Option<String>, input: &[u8]) -> Result<(), CniError> {
    let command = config::command(env)?;
    let config = config::config(input)?;
    let version = config::version(&config, command)?;
    assert!(config::VERSIONS.contains(&version));
    match config::task(command, &config, env)? {
        Task::Add(wanted) => {
            assert_eq!(command, Command::Add);
            check(&wanted);
            add(version, &config, &wanted)
        }
        Task::Del(wanted) | Task::Check(wanted) => {
            check(&wanted);
            result::previous(&config).map(drop)
        }
        Task::Gc(_) | Task::Status => Ok(()),
    }
}

/// Checks that an attachment is safe for the daemon, for the kernel and for a terminal.
fn check(wanted: &config::Attachment) {
    let Target::Container(id) = &wanted.container else { panic!("{wanted:?}") };
    for name in
        [Some(id), Some(&wanted.endpoint.network), wanted.name.as_ref()].into_iter().flatten()
    {
        check_name(name).unwrap_or_else(|_| panic!("{wanted:?}"));
    }
    for interface in [&wanted.endpoint.ifname, &wanted.endpoint.interface] {
        assert!((1..=15).contains(&interface.len()), "{wanted:?}");
        assert!(!interface.contains(['/', ':', ' ', '\n', '\0']), "{wanted:?}");
    }
    assert!(wanted.address.is_none_or(|address| address.addr().is_ipv4()));
    assert!(wanted.mac.is_none_or(|mac| !mac.is_multicast()));
}

/// Checks that the result contains the earlier plugins' entries and this attachment, and that a
/// runtime can pass it to `CHECK` and `DEL`.
fn add(
    version: &str,
    config: &config::Config,
    wanted: &config::Attachment,
) -> Result<(), CniError> {
    let result = result::added(version, config, wanted, &attached(wanted), None)?;
    check_added(config, wanted, &result);
    Ok(())
}

/// Returns an attachment as the daemon reports it.
fn attached(wanted: &config::Attachment) -> Attached {
    serde_json::from_value(serde_json::json!({
        "address": "10.40.0.9/12",
        "interface": wanted.endpoint.interface,
        "host_interface": "ov0a280009",
        "mtu": 1420,
        "mac": "02:00:00:00:00:01",
    }))
    .expect("a reply of the daemon")
}

fn check_added(config: &config::Config, wanted: &config::Attachment, result: &serde_json::Value) {
    let list = |of: &serde_json::Value, key: &str| of[key].as_array().map_or(0, Vec::len);
    let before = config.prev_result.clone().unwrap_or_default();
    assert_eq!(list(result, "ips"), list(&before, "ips") + 1, "{result}");
    assert_eq!(list(result, "interfaces"), list(&before, "interfaces") + 2, "{result}");
    let object = result.as_object().expect("a result is an object");
    assert!(result::has(object, &wanted.endpoint.interface, "10.40.0.9/12"), "{result}");
    let address = [10, 40, 0, 9].into();
    assert!(result::addresses(result).is_some_and(|found| found.contains(&address)), "{result}");
}

pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let call = |command: &str, values: [&str; 4], config: &str| {
        let kind = COMMANDS.iter().position(|known| *known == command).unwrap_or(COMMANDS.len());
        let values: Vec<u8> =
            values.iter().flat_map(|value| Input::framed(value.as_bytes())).collect();
        [vec![kind as u8], values, config.into()].concat()
    };
    let usual = [
        "0123abcd",
        "eth0",
        "/run/netns/a",
        "IgnoreUnknown=1;K8S_POD_NAME=web;K8S_POD_NAMESPACE=shop",
    ];
    let chained = concat!(
        r#"{"cniVersion":"1.1.0","name":"net","type":"overnode-cni","interface":"ov0","#,
        r#""prevResult":"#,
        r#"{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"/run/netns/a"}],"#,
        r#""ips":[{"address":"10.88.0.2/16","interface":0}]}}"#
    );
    let wished = concat!(
        r#"{"cniVersion":"0.4.0","name":"net","#,
        r#""runtimeConfig":{"ips":["10.32.0.7/12"],"mac":"02:00:00:00:00:07"},"#,
        r#""dns":{"nameservers":["10.0.0.1"],"search":["a.b"]},"runDir":"/run/x"}"#
    );
    let garbage = concat!(
        r#"{"cniVersion":"1.1.0","name":"net","#,
        r#""cni.dev/valid-attachments":[{"containerID":"0123abcd","ifname":"eth0"}]}"#
    );
    let plain = r#"{"cniVersion":"1.0.0","name":"net","type":"overnode-cni"}"#;
    let foreign =
        r#"{"cniVersion":"1.0.0","name":"net","ipam":{"type":"host-local"},"ipMasq":true}"#;
    let address = ["0123abcd", "eth0", "/run/netns/a", "IP=10.32.0.5;MAC=02:00:00:00:00:05"];
    vec![
        ("add", call("ADD", usual, plain)),
        ("add-chained", call("ADD", usual, chained)),
        ("add-with-wishes", call("ADD", usual, wished)),
        ("add-with-address", call("ADD", address, plain)),
        ("add-with-ipam", call("ADD", usual, foreign)),
        ("check", call("CHECK", usual, chained)),
        ("del-without-netns", call("DEL", ["0123abcd", "eth0", "", ""], plain)),
        ("gc", call("GC", ["", "", "", ""], garbage)),
        ("status", call("STATUS", ["", "", "", ""], r#"{"cniVersion":"1.1.0","name":"net"}"#)),
        ("unknown-command", call("DANCE", ["DANCE", "", "", ""], "{}")),
    ]
}
