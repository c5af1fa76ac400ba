//! Tests the requirements of the specification (1.1) that can be checked without a node. Those that
//! need a node are tested in tests/cni. Each test names the section. Section 4 does not apply,
//! because the plugin delegates to no others.

use overnode_types::MacAddr;

use super::*;

const ADD: &[(&str, &str)] = &[
    ("CNI_COMMAND", "ADD"),
    ("CNI_CONTAINERID", "c0ffee"),
    ("CNI_NETNS", "/run/netns/blue"),
    ("CNI_IFNAME", "eth0"),
    // Nothing listens there.
    ("OVERNODE_RUN_DIR", "/nonexistent/overnode"),
    ("OVERNODE_STATE_DIR", "/nonexistent/overnode"),
];

fn with(base: &[(&str, &str)], more: &[(&str, &str)]) -> impl Fn(&str) -> Option<String> + use<> {
    let all: Vec<(String, String)> = more
        .iter()
        .chain(base)
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect();
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

/// Section 2, `VERSION`; section 5, VERSION Success.
#[test]
fn version_lists_the_supported_versions_in_the_requested_version() {
    for asked in ["0.4.0", "1.1.0", "9.9.9"] {
        let input = json!({"cniVersion": asked}).to_string();
        let (output, code) = run(input.as_bytes(), &with(&[], &[("CNI_COMMAND", "VERSION")]));
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::SUCCESS));
        let output = output.unwrap();
        assert_eq!(output["cniVersion"], asked);
        assert_eq!(
            output["supportedVersions"],
            json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
        );
    }
    let (output, _) = run(b"", &with(&[], &[("CNI_COMMAND", "VERSION")]));
    assert_eq!(output.unwrap()["cniVersion"], "1.1.0");
}

/// Section 1, Version considerations; section 5, Error. `CHECK` exists since 0.4.0, `GC` and
/// `STATUS` since 1.1.0.
#[test]
fn incompatible_versions_are_code_1() {
    for version in ["0.1.0", "0.2.0", "1.2.0", "2.0.0", "", "1.1"] {
        assert_eq!(error(&conf(version, json!({})), &[]).0, 1, "{version}");
    }
    assert_eq!(error(br#"{"name": "net"}"#, &[]).0, 1, "a missing version means 0.1.0");
    for (at, version) in VERSIONS.iter().enumerate() {
        for (command, since) in [("ADD", 0), ("DEL", 0), ("CHECK", 2), ("GC", 4), ("STATUS", 4)] {
            let valid =
                json!({"prevResult": {}, "interface": "o0", "cni.dev/valid-attachments": []});
            let (output, _) = run(&conf(version, valid), &with(ADD, &[("CNI_COMMAND", command)]));
            let code = output.map_or(0, |output| output["code"].as_u64().unwrap());
            assert_eq!(code == 1, at < since, "{command} of {version}: {code}");
        }
    }
}

/// Section 5, Error.
#[test]
fn errors_have_the_requested_version() {
    for version in VERSIONS {
        let (output, _) = run(&conf(version, json!({})), &with(ADD, &[("CNI_IFNAME", "")]));
        assert_eq!(output.unwrap()["cniVersion"], version);
    }
}

/// Section 2, Parameters; section 5, Error, code 4.
#[test]
fn all_invalid_variables_are_named() {
    let input = conf("1.1.0", json!({}));
    let long = "x".repeat(129);
    for (name, bad) in [
        ("CNI_COMMAND", vec!["", "add", "DELETE"]),
        ("CNI_CONTAINERID", vec!["", "-a", ".a", "a/b", "a b", "ü", &long]),
        ("CNI_NETNS", vec!["", "relative"]),
        ("CNI_IFNAME", vec!["", ".", "..", "a/b", "a:b", "a b", "sixteencharacter", "a\nb"]),
        (
            "CNI_ARGS",
            vec!["x", "A=B", "IgnoreUnknown=0;A=B", "IP=x", "IP=fd00::1", "MAC=01:00:00:00:00:00"],
        ),
    ] {
        for value in bad {
            let (code, message) = error(&input, &[(name, value)]);
            assert_eq!(code, 4, "{name}={value}");
            assert!(message.contains(name), "{message}");
        }
    }
    let (_, message) = error(&input, &[("CNI_CONTAINERID", ""), ("CNI_IFNAME", "")]);
    assert!(message.contains("CNI_CONTAINERID") && message.contains("CNI_IFNAME"), "{message}");
    let all = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"];
    let (code, message) = error(
        &input,
        &all.map(|name| (name, "/ /")).map(|(name, bad)| match name {
            "CNI_NETNS" => (name, "relative"),
            _ => (name, bad),
        }),
    );
    assert!(code == 4 && all.iter().all(|name| message.contains(name)), "{message}");
    for name in ["0", "web_1.x-y"] {
        assert_eq!(added_with(&input, &[("CNI_CONTAINERID", name)]).container.to_string(), name);
    }
}

/// Section 1, well-known keys; section 5, Error, code 2.
#[test]
fn an_unsupported_key_is_reported_with_its_whole_value() {
    let ranges: Vec<Value> =
        (0..100).map(|n| json!([{"subnet": format!("10.{n}.0.0/16")}])).collect();
    let long = json!({"type": "host-local", "ranges": ranges});
    let (code, message) = error(&conf("1.1.0", json!({"ipam": long})), &[]);
    assert!(
        code == 2 && message.contains("ipam") && message.contains(&long.to_string()),
        "{message}"
    );
    let (code, message) = error(&conf("1.1.0", json!({"ipam": {"type": "host-local"}})), &[]);
    assert_eq!(code, 2);
    assert!(message.contains("ipam") && message.contains("host-local"), "{message}");
    let (code, message) = error(&conf("1.1.0", json!({"ipMasq": true})), &[]);
    assert_eq!(code, 2);
    assert!(message.contains("ipMasq") && message.contains("true"), "{message}");
    // The attachment may have been added before the file was changed.
    let bad = conf("1.1.0", json!({"ipam": {"type": "host-local"}}));
    assert!(task_of(&bad, &[("CNI_COMMAND", "DEL")]).is_ok());
    assert!(task_of(&conf("1.1.0", json!({"ipam": {}, "ipMasq": false})), &[]).is_ok());
}

/// Section 1, Plugin configuration objects; section 3, Deriving request configuration.
#[test]
fn keys_meant_for_others_are_ignored() {
    let others = json!({
        "cniVersions": ["0.4.0", "1.1.0"], "type": "overnode-cni",
        "args": {"labels": [{"key": "a"}]},
        "disableGC": true, "keyA": [1], "cni.dev/x": null, "prevResult": null,
        "runtimeConfig": {"portMappings": [{"hostPort": 80}], "dns": {}}, "cni.dev/attachments": [],
        "cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0", "later": 1}],
        "capabilities": {"ips": true}
    });
    for command in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
        let with_others =
            task_of(&conf("1.1.0", others.clone()), &[("CNI_COMMAND", command)]).unwrap();
        let plain = json!({"cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}]});
        assert_eq!(
            with_others,
            task_of(&conf("1.1.0", plain), &[("CNI_COMMAND", command)]).unwrap()
        );
    }
}

/// Section 2, `GC`, `STATUS` and `VERSION`: they have no parameters of an attachment.
#[test]
fn commands_without_an_attachment_need_no_variables_of_one() {
    for command in ["GC", "STATUS", "VERSION"] {
        let env =
            with(&[("CNI_COMMAND", command), ("OVERNODE_RUN_DIR", "/nonexistent/overnode")], &[]);
        let (output, _) = run(&conf("1.1.0", json!({"cni.dev/valid-attachments": []})), &env);
        let code = output.unwrap()["code"].as_u64();
        let unreachable = [("GC", 11), ("STATUS", 51)].into_iter().find(|it| it.0 == command);
        assert_eq!(code, unreachable.map(|it| it.1), "{command} gets as far as the node");
    }
}

/// Section 5, Error, code 6.
#[test]
fn input_that_is_not_a_configuration_is_code_6() {
    let huge = conf("1.1.0", json!({"x": "x".repeat(INPUT_LIMIT)}));
    let deep = "[".repeat(100_000);
    for bad in [
        &b""[..],
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"{\"cniVersion\": 1}",
        &huge,
        deep.as_bytes(),
    ] {
        assert_eq!(error(bad, &[]).0, 6);
    }
    assert_eq!(
        error(&conf("1.1.0", json!({"cni.dev/valid-attachments": [1]})), &[("CNI_COMMAND", "GC")])
            .0,
        6
    );
    // Refused before anything is created.
    for previous in [json!(7), json!([]), json!({"interfaces": {}}), json!({"ips": "10.1.0.1/16"})]
    {
        let bad = conf("1.1.0", json!({"prevResult": previous, "interface": "o0"}));
        assert_eq!(error(&bad, &[]).0, 6, "{previous}");
        assert_eq!(error(&bad, &[("CNI_COMMAND", "CHECK")]).0, 6, "{previous}");
        // But nothing prevents `DEL`.
        let (output, _) = run(&bad, &with(ADD, &[("CNI_COMMAND", "DEL")]));
        assert_eq!(output, None, "{previous}");
    }
}

/// Section 1, Configuration format; section 5, Error, code 7.
#[test]
fn invalid_values_are_code_7() {
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
        json!({"dns": 5}),
        json!({"dns": []}),
        json!({"dns": {"nameservers": "192.0.2.1"}}),
        json!({"dns": {"nameservers": ["ns.example"]}}),
        json!({"dns": {"search": [1]}}),
    ] {
        assert_eq!(error(&conf("1.1.0", bad.clone()), &[]).0, 7, "{bad}");
    }
    let (code, message) = error(&conf("1.1.0", json!({})), &[("CNI_COMMAND", "CHECK")]);
    assert!(
        code == 7 && message.contains("prevResult"),
        "CHECK must consult the prevResult: {message}"
    );
    let (code, message) = error(&conf("1.1.0", json!({})), &[("CNI_COMMAND", "GC")]);
    assert!(code == 7 && message.contains("cni.dev/valid-attachments"), "{message}");
}

/// Section 2, Parameters; section 3, Deriving `runtimeConfig`.
#[test]
fn arguments_and_capabilities_are_applied() {
    let args = "IgnoreUnknown=1;X=Y;IP=10.32.0.7;MAC=02:00:00:00:00:07;K8S_POD_NAME=web;\
                 K8S_POD_NAMESPACE=shop";
    let wanted = added_with(&conf("1.0.0", json!({})), &[("CNI_ARGS", args)]);
    assert_eq!(wanted.address, Some("10.32.0.7/32".parse().unwrap()));
    assert_eq!(wanted.mac, Some(MacAddr::new([2, 0, 0, 0, 0, 7])));
    assert_eq!(wanted.name.as_deref(), Some("web.shop"));
    assert_eq!(
        (wanted.endpoint.ifname.as_str(), wanted.endpoint.interface.as_str()),
        ("eth0", "eth0")
    );

    let capabilities =
        json!({"runtimeConfig": {"ips": ["10.32.0.8/12"], "mac": "02:00:00:00:00:08"}});
    let wanted = added_with(&conf("1.0.0", capabilities), &[("CNI_ARGS", "K8S_POD_NAME=web")]);
    assert_eq!(wanted.address, Some("10.32.0.8/12".parse().unwrap()));
    assert_eq!(wanted.mac, Some(MacAddr::new([2, 0, 0, 0, 0, 8])));
    assert_eq!(wanted.name.as_deref(), Some("web"));

    // In a chain, settings that every plugin gets are meant for the first one.
    let wanted = added_with(&conf("1.0.0", json!({"prevResult": {}})), &[("CNI_ARGS", args)]);
    assert_eq!((wanted.address, wanted.mac), (None, None));
    assert_eq!(wanted.endpoint.interface, "overnode0");
    let wanted = added_with(&conf("1.0.0", json!({})), &[("CNI_ARGS", "K8S_POD_NAME=a b")]);
    assert_eq!(wanted.name, None, "an invalid name is no reason to refuse a container");
    let empty = json!({"runtimeConfig": {"ips": [], "mac": ""}});
    let wanted = added_with(&conf("1.0.0", empty), &[("CNI_ARGS", "IP=;MAC=;")]);
    assert_eq!((wanted.address, wanted.mac), (None, None), "empty values count as absent");
    // Invalid `CNI_ARGS` matter only for `ADD`.
    let input = conf("1.0.0", json!({"prevResult": {}}));
    for command in ["DEL", "CHECK"] {
        assert!(
            task_of(&input, &[("CNI_COMMAND", command), ("CNI_ARGS", "x")]).is_ok(),
            "{command}"
        );
    }
}

fn attached() -> Attached {
    Attached {
        address: "10.40.0.1/12".parse().unwrap(),
        interface: "eth0".into(),
        host_interface: "ov0a280001".into(),
        mtu: 1420,
        mac: Some(MacAddr::new([2, 0, 0, 0, 0, 1])),
    }
}

/// Section 5, ADD Success. Before 1.0.0 an address has a `version`. Since 1.1.0 an interface has an
/// `mtu`.
#[test]
fn results_have_the_form_of_their_version() {
    for version in VERSIONS {
        let input = conf(version, json!({}));
        let (config, wanted) = (config::config(&input).unwrap(), added_with(&input, &[]));
        let result = result::added(version, &config, &wanted, &attached(), None).unwrap();
        assert_eq!(result["cniVersion"], version);
        assert_eq!(result["interfaces"][0]["name"], "ov0a280001");
        assert_eq!(result["interfaces"][0].get("sandbox"), None, "empty if on the host");
        assert_eq!(result["interfaces"][1]["name"], "eth0");
        assert_eq!(
            result["interfaces"][1]["sandbox"], "/run/netns/blue",
            "the value passed via CNI_NETNS"
        );
        assert_eq!(result["interfaces"][1]["mac"], "02:00:00:00:00:01");
        assert_eq!(result["ips"][0]["address"], "10.40.0.1/12");
        assert_eq!(result["ips"][0]["interface"], 1);
        assert_eq!(result["ips"][0].get("version").is_some(), version.starts_with("0."));
        assert_eq!(result["interfaces"][1].get("mtu").is_some(), version == "1.1.0");
    }
}

/// Section 2, `ADD`; section 5, ADD Success.
#[test]
fn the_result_keeps_what_earlier_plugins_added() {
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
    assert_eq!(
        result["interfaces"].as_array().unwrap()[..2],
        previous["interfaces"].as_array().unwrap()[..]
    );
    assert_eq!(result["interfaces"][3]["name"], "overnode0");
    assert_eq!(result["ips"][0], previous["ips"][0]);
    assert_eq!(result["ips"][1]["interface"], 3);
    assert_eq!((&result["routes"], &result["x"]), (&previous["routes"], &previous["x"]));
    assert!(result::has(result.as_object().unwrap(), "overnode0", "10.40.0.1/12"));
    assert!(!result::has(result.as_object().unwrap(), "eth0", "10.40.0.1/12"));
    assert!(!result::has(result.as_object().unwrap(), "overnode0", "10.40.0.2/12"));
}

/// Section 1, well-known keys; section 5, ADD Success.
#[test]
fn the_configurations_dns_replaces_the_nodes() {
    let input = conf("1.0.0", json!({"dns": {"nameservers": ["192.0.2.1"]}}));
    let (config, wanted) = (config::config(&input).unwrap(), added_with(&input, &[]));
    let result = result::added("1.0.0", &config, &wanted, &attached(), None).unwrap();
    assert_eq!(result["dns"], json!({"nameservers": ["192.0.2.1"]}));
}

/// Section 2, `DEL` and `STATUS`; section 5, Error, codes 11 and 51.
#[test]
fn without_a_daemon() {
    let input = conf("1.1.0", json!({"cni.dev/valid-attachments": null, "prevResult": {}}));
    assert_eq!(error(&conf("1.1.0", json!({})), &[]).0, 11, "ADD: try again later");
    assert_eq!(error(&input, &[("CNI_COMMAND", "CHECK")]).0, 11);
    assert_eq!(
        error(&conf("1.1.0", json!({"cni.dev/valid-attachments": []})), &[("CNI_COMMAND", "GC")]).0,
        11
    );
    assert_eq!(error(&input, &[("CNI_COMMAND", "STATUS")]).0, 51, "no keys are renewed either");
    // Best effort: deleting a container that is gone succeeds, however often it is repeated.
    for netns in ["", "/nonexistent/netns", "/etc/passwd"] {
        for previous in [json!({}), json!({"prevResult": null}), json!({"prevResult": {}})] {
            let env = with(ADD, &[("CNI_COMMAND", "DEL"), ("CNI_NETNS", netns)]);
            let (output, code) = run(&conf("1.1.0", previous), &env);
            assert_eq!(
                (output, format!("{code:?}")),
                (None, format!("{:?}", ExitCode::SUCCESS)),
                "{netns}"
            );
        }
    }
}

#[test]
fn addresses_of_a_result() {
    let read = |result: Value| result::addresses(&result).into_iter().flatten().collect::<Vec<_>>();
    let two = json!({
        "ips": [{"address": "10.40.0.1/12"}, {"address": "x"}, 7, {"address": "fd00::1/64"}]
    });
    assert_eq!(read(two), ["10.40.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
    for none in
        [json!(null), json!({}), json!({"ips": []}), json!({"ips": [{"address": 1}]}), json!([])]
    {
        assert_eq!(result::addresses(&none), None, "{none}");
    }
}

#[test]
fn the_plugin_is_recognized_by_its_name() {
    for name in ["overnode-cni", "/opt/cni/bin/overnode-cni"] {
        assert!(is_meant(Some(OsStr::new(name))));
    }
    for name in ["overnode", "/overnode-cni/overnode", ""] {
        assert!(!is_meant(Some(OsStr::new(name))));
    }
    assert!(!is_meant(None));
}
