//! What the specification demands of a plugin, as far as it can be told without a node. The words are the specification's.

use super::*;

const ADD: &[(&str, &str)] = &[
    ("CNI_COMMAND", "ADD"),
    ("CNI_CONTAINERID", "c0ffee"),
    ("CNI_NETNS", "/run/netns/blue"),
    ("CNI_IFNAME", "eth0"),
    // Nobody listens there.
    ("OVERNODE_RUN_DIR", "/nonexistent/overnode"),
    ("OVERNODE_STATE_DIR", "/nonexistent/overnode"),
];

fn with<'a>(base: &[(&'a str, &'a str)], more: &[(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> {
    let all: Vec<(String, String)> =
        more.iter().chain(base).map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    move |name: &str| all.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone())
}

fn conf(version: &str, more: Value) -> Vec<u8> {
    let mut conf = json!({"cniVersion": version, "name": "net", "type": "overnode-cni"});
    conf.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    conf.to_string().into_bytes()
}

fn error(input: &[u8], more: &[(&str, &str)]) -> (u64, String) {
    let (output, code) = run(input, &with(ADD, more));
    assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::FAILURE), "non-zero on failure");
    let output = output.expect("an error result structure");
    assert!(VERSIONS.contains(&output["cniVersion"].as_str().unwrap()), "{output}");
    assert!(!output["details"].as_str().unwrap().is_empty(), "{output}");
    (output["code"].as_u64().unwrap(), output["msg"].as_str().unwrap().to_owned())
}

fn task_of(input: &[u8], more: &[(&str, &str)]) -> Result<Task, CniError> {
    let env = with(ADD, more);
    config::task(config::command(&env)?, &config::config(input)?, &env)
}

fn added_with(input: &[u8], more: &[(&str, &str)]) -> Attachment {
    match task_of(input, more).unwrap() {
        Task::Add(wanted) => wanted,
        other => panic!("{other:?}"),
    }
}

#[test]
fn version_outputs_the_version_specified_on_input_and_all_supported_ones() {
    for asked in ["0.4.0", "1.1.0", "9.9.9"] {
        let input = json!({"cniVersion": asked}).to_string();
        let (output, code) = run(input.as_bytes(), &with(&[], &[("CNI_COMMAND", "VERSION")]));
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::SUCCESS));
        let output = output.unwrap();
        assert_eq!(output["cniVersion"], asked);
        assert_eq!(output["supportedVersions"], json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
    }
    let (output, _) = run(b"", &with(&[], &[("CNI_COMMAND", "VERSION")]));
    assert_eq!(output.unwrap()["cniVersion"], "1.1.0");
}

#[test]
fn incompatible_versions_are_code_1() {
    for version in ["0.1.0", "0.2.0", "1.2.0", "2.0.0", "", "1.1"] {
        assert_eq!(error(&conf(version, json!({})), &[]).0, 1, "{version}");
    }
    assert_eq!(error(br#"{"name": "net"}"#, &[]).0, 1, "no version is 0.1.0");
    for (command, version) in [("CHECK", "0.3.1"), ("GC", "1.0.0"), ("STATUS", "1.0.0")] {
        assert_eq!(error(&conf(version, json!({})), &[("CNI_COMMAND", command)]).0, 1, "{command}");
    }
}

#[test]
fn errors_are_in_the_version_asked_for() {
    for version in VERSIONS {
        let (output, _) = run(&conf(version, json!({})), &with(ADD, &[("CNI_IFNAME", "")]));
        assert_eq!(output.unwrap()["cniVersion"], version);
    }
}

#[test]
fn the_error_message_must_contain_the_names_of_invalid_variables() {
    let input = conf("1.1.0", json!({}));
    let long = "x".repeat(129);
    for (name, bad) in [
        ("CNI_COMMAND", vec!["", "add", "DELETE"]),
        ("CNI_CONTAINERID", vec!["", "-a", ".a", "a/b", "a b", "ü", &long]),
        ("CNI_NETNS", vec!["", "relative"]),
        ("CNI_IFNAME", vec!["", ".", "..", "a/b", "a:b", "a b", "sixteencharacter", "a\nb"]),
        ("CNI_ARGS", vec!["x", "A=B", "IgnoreUnknown=0;A=B", "IP=x", "IP=fd00::1", "MAC=01:00:00:00:00:00"]),
    ] {
        for value in bad {
            let (code, message) = error(&input, &[(name, value)]);
            assert_eq!(code, 4, "{name}={value}");
            assert!(message.contains(name), "{message}");
        }
    }
    let (_, message) = error(&input, &[("CNI_CONTAINERID", ""), ("CNI_IFNAME", "")]);
    assert!(message.contains("CNI_CONTAINERID") && message.contains("CNI_IFNAME"), "{message}");
    for name in ["0", "web_1.x-y"] {
        assert_eq!(added_with(&input, &[("CNI_CONTAINERID", name)]).container.to_string(), name);
    }
}

#[test]
fn the_error_message_must_contain_the_key_and_value_of_the_unsupported_field() {
    let (code, message) = error(&conf("1.1.0", json!({"ipam": {"type": "host-local"}})), &[]);
    assert_eq!(code, 2);
    assert!(message.contains("ipam") && message.contains("host-local"), "{message}");
    let (code, message) = error(&conf("1.1.0", json!({"ipMasq": true})), &[]);
    assert_eq!(code, 2);
    assert!(message.contains("ipMasq") && message.contains("true"), "{message}");
    // What cannot be added may have been, before the file was changed.
    let bad = conf("1.1.0", json!({"ipam": {"type": "host-local"}}));
    assert!(task_of(&bad, &[("CNI_COMMAND", "DEL")]).is_ok());
    assert!(task_of(&conf("1.1.0", json!({"ipam": {}, "ipMasq": false})), &[]).is_ok());
}

#[test]
fn what_is_no_configuration_is_code_6() {
    let huge = conf("1.1.0", json!({"x": "x".repeat(INPUT_LIMIT)}));
    let deep = "[".repeat(100_000);
    for bad in [&b""[..], b"{", b"[]", b"null", b"\xff\xfe", b"{\"cniVersion\": 1}", &huge, deep.as_bytes()] {
        assert_eq!(error(bad, &[]).0, 6);
    }
    assert_eq!(
        error(&conf("1.1.0", json!({"cni.dev/valid-attachments": [1]})), &[("CNI_COMMAND", "GC")]).0,
        6
    );
    let (code, _) = error(&conf("1.1.0", json!({"prevResult": 7, "interface": "o0"})), &[]);
    assert_eq!(code, 6);
}

#[test]
fn what_makes_no_sense_is_code_7() {
    for bad in [
        json!({"name": ""}),
        json!({"name": "-a"}),
        json!({"name": "a/b"}),
        json!({"name": "../x"}),
        json!({"interface": "a/b"}),
        json!({"interface": "eth0", "prevResult": {}}),
        json!({"runtimeConfig": {"ips": ["10.32.0.1", "10.32.0.2"]}}),
        json!({"runtimeConfig": {"ips": ["fd00::1/64"]}}),
        json!({"runtimeConfig": {"mac": "x"}}),
        json!({"runtimeConfig": {"mac": "ff:ff:ff:ff:ff:ff"}}),
    ] {
        assert_eq!(error(&conf("1.1.0", bad.clone()), &[]).0, 7, "{bad}");
    }
    let (code, message) = error(&conf("1.1.0", json!({})), &[("CNI_COMMAND", "CHECK")]);
    assert!(code == 7 && message.contains("prevResult"), "CHECK must consult the prevResult: {message}");
    let (code, message) = error(&conf("1.1.0", json!({})), &[("CNI_COMMAND", "GC")]);
    assert!(code == 7 && message.contains("cni.dev/valid-attachments"), "{message}");
}

#[test]
fn arguments_and_capabilities_are_understood() {
    let args =
        "IgnoreUnknown=1;X=Y;IP=10.32.0.7;MAC=02:00:00:00:00:07;K8S_POD_NAME=web;K8S_POD_NAMESPACE=shop";
    let wanted = added_with(&conf("1.0.0", json!({})), &[("CNI_ARGS", args)]);
    assert_eq!(wanted.address, Some("10.32.0.7/32".parse().unwrap()));
    assert_eq!(wanted.mac, Some([2, 0, 0, 0, 0, 7]));
    assert_eq!(wanted.name.as_deref(), Some("web.shop"));
    assert_eq!((wanted.endpoint.ifname.as_str(), wanted.endpoint.interface.as_str()), ("eth0", "eth0"));

    let capabilities = json!({"runtimeConfig": {"ips": ["10.32.0.8/12"], "mac": "02:00:00:00:00:08"}});
    let wanted = added_with(&conf("1.0.0", capabilities), &[("CNI_ARGS", "K8S_POD_NAME=web")]);
    assert_eq!(wanted.address, Some("10.32.0.8/12".parse().unwrap()));
    assert_eq!(wanted.mac, Some([2, 0, 0, 0, 0, 8]));
    assert_eq!(wanted.name.as_deref(), Some("web"));

    // Chained, what everybody was told is for the first one.
    let wanted = added_with(&conf("1.0.0", json!({"prevResult": {}})), &[("CNI_ARGS", args)]);
    assert_eq!((wanted.address, wanted.mac), (None, None));
    assert_eq!(wanted.endpoint.interface, "overnode0");
    let wanted = added_with(&conf("1.0.0", json!({})), &[("CNI_ARGS", "K8S_POD_NAME=a b")]);
    assert_eq!(wanted.name, None, "a name that cannot be one is no reason to refuse a container");
}

fn attached() -> Attached {
    Attached {
        address: "10.40.0.1/12".parse().unwrap(),
        interface: "eth0".into(),
        host_interface: "ov0a280001".into(),
        mtu: 1420,
        mac: Some("02:00:00:00:00:01".into()),
    }
}

#[test]
fn results_are_in_the_version_supplied_on_input() {
    for version in VERSIONS {
        let input = conf(version, json!({}));
        let (config, wanted) = (config::config(&input).unwrap(), added_with(&input, &[]));
        let result = result::added(version, &config, &wanted, &attached(), None).unwrap();
        assert_eq!(result["cniVersion"], version);
        assert_eq!(result["interfaces"][0]["name"], "ov0a280001");
        assert_eq!(result["interfaces"][0].get("sandbox"), None, "empty if on the host");
        assert_eq!(result["interfaces"][1]["name"], "eth0");
        assert_eq!(result["interfaces"][1]["sandbox"], "/run/netns/blue", "the value passed via CNI_NETNS");
        assert_eq!(result["interfaces"][1]["mac"], "02:00:00:00:00:01");
        assert_eq!(result["ips"][0]["address"], "10.40.0.1/12");
        assert_eq!(result["ips"][0]["interface"], 1);
        assert_eq!(result["ips"][0].get("version").is_some(), version.starts_with("0."));
        assert_eq!(result["interfaces"][1].get("mtu").is_some(), version == "1.1.0");
    }
}

#[test]
fn a_plugin_provided_a_prev_result_must_output_it_with_its_modifications() {
    let previous = json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": "/run/netns/blue"}],
        "ips": [{"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 1}],
        "routes": [{"dst": "0.0.0.0/0"}],
        "x": {"y": [1]}
    });
    let input = conf("1.0.0", json!({"prevResult": previous, "interface": "overnode0"}));
    let (config, wanted) = (config::config(&input).unwrap(), added_with(&input, &[]));
    let attached = Attached { interface: "overnode0".into(), ..attached() };
    let result = result::added("1.0.0", &config, &wanted, &attached, None).unwrap();
    assert_eq!(result["interfaces"].as_array().unwrap()[..2], previous["interfaces"].as_array().unwrap()[..]);
    assert_eq!(result["interfaces"][3]["name"], "overnode0");
    assert_eq!(result["ips"][0], previous["ips"][0]);
    assert_eq!(result["ips"][1]["interface"], 3);
    assert_eq!((&result["routes"], &result["x"]), (&previous["routes"], &previous["x"]));
    assert!(result::has(result.as_object().unwrap(), "overnode0", "10.40.0.1/12"));
    assert!(!result::has(result.as_object().unwrap(), "eth0", "10.40.0.1/12"));
    assert!(!result::has(result.as_object().unwrap(), "overnode0", "10.40.0.2/12"));
}

#[test]
fn dns_of_the_configuration_goes_before_the_nodes() {
    let input = conf("1.0.0", json!({"dns": {"nameservers": ["192.0.2.1"]}}));
    let (config, wanted) = (config::config(&input).unwrap(), added_with(&input, &[]));
    let result = result::added("1.0.0", &config, &wanted, &attached(), None).unwrap();
    assert_eq!(result["dns"], json!({"nameservers": ["192.0.2.1"]}));
}

#[test]
fn without_a_daemon() {
    let input = conf("1.1.0", json!({"cni.dev/valid-attachments": null, "prevResult": {}}));
    assert_eq!(error(&conf("1.1.0", json!({})), &[]).0, 11, "ADD: try again later");
    assert_eq!(error(&input, &[("CNI_COMMAND", "CHECK")]).0, 11);
    assert_eq!(
        error(&conf("1.1.0", json!({"cni.dev/valid-attachments": []})), &[("CNI_COMMAND", "GC")]).0,
        11
    );
    assert_eq!(error(&input, &[("CNI_COMMAND", "STATUS")]).0, 50, "cannot service ADD requests");
    // Best effort: of a container that is gone nothing is left to delete, however often that is asked.
    for netns in ["", "/nonexistent/netns", "/etc/passwd"] {
        let (output, code) = run(&input, &with(ADD, &[("CNI_COMMAND", "DEL"), ("CNI_NETNS", netns)]));
        assert_eq!((output, format!("{code:?}")), (None, format!("{:?}", ExitCode::SUCCESS)), "{netns}");
    }
}

#[test]
fn the_plugin_is_told_by_its_name() {
    for name in ["overnode-cni", "/opt/cni/bin/overnode-cni"] {
        assert!(is_meant(Some(OsStr::new(name))));
    }
    for name in ["overnode", "/overnode-cni/overnode", ""] {
        assert!(!is_meant(Some(OsStr::new(name))));
    }
    assert!(!is_meant(None));
}
