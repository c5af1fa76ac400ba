//! Fuzzes the requests of local users and programs: JSON documents, and the names in them.

use std::fmt::Display;
use std::str::FromStr;

use overnode_daemon::api::{
    AddExternalPeer, Attach, Connect, Detach, Forget, Host, Launch, RemoveExternalPeer, Reset,
    Status, Target, Token, check_name,
};
use overnode_types::{NodeId, PublicKey, Secret};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Runs one input. The first byte selects the type of the rest.
pub(crate) fn run(data: &[u8]) {
    let Some((kind, bytes)) = data.split_first() else { return };
    match kind {
        b'a' => document::<Launch>(bytes),
        b'b' => document::<Connect>(bytes),
        b'c' => document::<Forget>(bytes),
        b'd' => document::<Attach>(bytes),
        b'e' => document::<Detach>(bytes),
        b'f' => document::<Reset>(bytes),
        b'g' => document::<AddExternalPeer>(bytes),
        b'h' => document::<RemoveExternalPeer>(bytes),
        b'i' => document::<Status>(bytes),
        b'j' => text::<Host>(bytes),
        b'k' => text::<Target>(bytes),
        b'l' => text::<NodeId>(bytes),
        b'm' => text::<PublicKey>(bytes),
        b'n' => {
            if let Ok(text) = std::str::from_utf8(bytes) {
                let _ = text.parse::<Secret>();
                let fits = !text.trim().is_empty() && text.len() <= Token::MAX;
                assert_eq!(Token::new(text.to_owned()).is_ok(), fits);
                if check_name(text).is_ok() {
                    assert!((1..=128).contains(&text.len()) && text.is_ascii(), "{text:?}");
                }
            }
        }
        _ => {}
    }
}

/// Checks that a document that can be read is written in a form that reads back as the same value.
fn document<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    let Ok(document) = serde_json::from_slice::<T>(bytes) else { return };
    let written = serde_json::to_string(&document).expect("a parsed document can be written");
    let again: T =
        serde_json::from_str(&written).unwrap_or_else(|error| panic!("{written}: {error}"));
    assert_eq!(serde_json::to_string(&again).expect("as before"), written);
}

/// Checks that an accepted value is displayed in a form that parses to the same value, and that no
/// output contains control characters.
fn text<T: FromStr<Err: Display> + Display + PartialEq>(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match text.parse::<T>() {
        Ok(value) => {
            let shown = value.to_string();
            assert!(!shown.chars().any(char::is_control), "{shown:?}");
            assert!(
                shown.parse::<T>().is_ok_and(|again| again == value),
                "{text:?} is displayed as {shown:?}"
            );
        }
        Err(error) => {
            let words = error.to_string();
            assert!(!words.chars().any(char::is_control), "{words:?}");
            assert!(
                words.len() < 2000,
                "an error of {} bytes for an input of {} bytes",
                words.len(),
                text.len()
            );
        }
    }
}

pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let key = PublicKey([7; 32]);
    let secret = Secret([1; 32]);
    let secret = PublicKey(secret.0);
    [
        (
            "launch",
            concat!(
                r#"a{"id":7,"token":"word","hosts":["host2","10.0.0.1","fd00::1"],"#,
                r#""nickname":"a-1","interface":"eth0","#,
                r#""mtu":1400,"discovery":false,"xdp":true,"subnet":"10.32.0.0/12","#,
                r#""range":"10.40.0.0/13","restart":true}"#
            )
            .to_owned(),
        ),
        ("connect", r#"b{"hosts":["a.example.org."],"replace":true}"#.to_owned()),
        ("forget", r#"c{"hosts":["under_score"]}"#.to_owned()),
        (
            "attach",
            concat!(
                r#"d{"target":"web","netns":{"path":"/proc/1/ns/net"},"#,
                r#""address":"10.32.0.5/12","name":"w"}"#
            )
            .to_owned(),
        ),
        ("attach-process", r#"d{"target":"pid:12","netns":{"pid":12}}"#.to_owned()),
        ("detach", r#"e{"target":"netns:/run/netns/a"}"#.to_owned()),
        ("reset", r#"f{"force":true}"#.to_owned()),
        (
            "add-external-peer",
            format!(
                concat!(
                    r#"g{{"public_key":"{}","preshared_key":"{}","endpoint":"[fd00::1]:51820","#,
                    r#""allowed_ips":["10.9.0.0/24","fd01::/64"],"#,
                    r#""persistent_keepalive_seconds":25,"name":"phone"}}"#
                ),
                key, secret
            ),
        ),
        ("remove-external-peer", format!(r#"h{{"public_key":"{key}"}}"#)),
        (
            "status",
            concat!(
                r#"i{"node":{"id":1,"nickname":"a","state":"running"},"targets":[],"#,
                r#""peers":[],"connections":[],"#,
                r#""endpoints":[],"ipam":{},"external_peers":[],"#,
                r#""counters":[{"name":"x","value":1}]}"#
            )
            .to_owned(),
        ),
        ("host", "ja.example.org".to_owned()),
        ("address", "jFD00:0::1".to_owned()),
        ("netns", "knetns:a".to_owned()),
        ("process", "kpid:12".to_owned()),
        ("container", "kweb_1.x".to_owned()),
        ("id", "l4095".to_owned()),
        ("key", format!("m{key}")),
        ("name", "nhost-1.x_y".to_owned()),
    ]
    .map(|(name, text)| (name, text.into_bytes()))
    .into()
}
