//! Tests of `inspect`: `docs/reference/inspect.md` describes everything that it prints, and it
//! prints no secret.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, Map, MapData};
use lab::{Host, Lab, eventually};
use overnode_core::control::key;
use overnode_daemon::store::Store;
use overnode_ebpf::map::Session;
use overnode_types::PublicKey;
use serde_json::Value;

use crate::support::{TIMEOUT, TOKEN, attached, in_lab, launch, peer};

const PRESHARED_KEY: [u8; 32] = *b"a key that must not be shown: 0!";

/// Fields that this node may not have: node 5 chooses its own lender, and there is no engine and no
/// container runtime.
const NOT_HERE: [&str; 6] = [
    "status.endpoints[].image",
    "status.endpoints[].cni",
    "status.ipam.reclaims[].",
    "status.external_peers[].data.route.",
    "allocation.tombstones[].",
    "allocation.lends[].loans[].",
];

/// Returns the fields that the page describes. A section's heading names one or more objects, and
/// its table lists their fields.
fn documented() -> Result<BTreeSet<String>> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/inspect.md");
    let page = std::fs::read_to_string(path).context("docs/reference/inspect.md")?;
    let quoted =
        |text: &str| text.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    let mut places = Vec::new();
    let mut fields = BTreeSet::new();
    for line in page.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            places = quoted(heading);
            if heading == "Top level" {
                places.push(String::new());
            }
        } else if let Some(cell) = line.strip_prefix("| `") {
            let cell = format!("`{}", cell.split(" | ").next().unwrap_or_default());
            for place in &places {
                let dot = if place.is_empty() { "" } else { "." };
                fields.extend(quoted(&cell).iter().map(|field| format!("{place}{dot}{field}")));
            }
        }
    }
    Ok(fields)
}

/// Collects every field of a document, in the form `a.b[].c`.
fn fields(place: &str, value: &Value, found: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(map) => {
            for (name, value) in map {
                let dot = if place.is_empty() { "" } else { "." };
                let field = format!("{place}{dot}{name}");
                fields(&field, value, found);
                found.insert(field, value.clone());
            }
        }
        Value::Array(list) => {
            list.iter().for_each(|value| fields(&format!("{place}[]"), value, found))
        }
        _ => {}
    }
}

/// Returns the session keys in the maps of a host.
fn session_keys(host: &Host) -> Result<Vec<[u8; 32]>> {
    let pin = lab::cleanup::pins_of(&host.state_directory())?.join("maps/SESSIONS");
    let sessions = Array::<_, Session>::try_from(Map::Array(MapData::from_pin(pin)?))?;
    let mut keys = Vec::new();
    for session in sessions.iter() {
        let session = session?;
        for words in [session.tx_key, session.rx_key] {
            let mut key = [0; 32];
            for (bytes, word) in key.chunks_mut(4).zip(words) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
            if key != [0; 32] {
                keys.push(key);
            }
        }
    }
    Ok(keys)
}

/// Returns the forms that 32 bytes may have in JSON.
fn shapes(bytes: &[u8; 32]) -> Vec<String> {
    let base64 = PublicKey(*bytes).to_string();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let numbers = |list: Vec<u32>| list.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let words = bytes
        .chunks(4)
        .map(|word| word.iter().rev().fold(0, |sum, byte| sum << 8 | u32::from(*byte)));
    vec![
        base64.trim_end_matches('=').to_owned(),
        base64.replace('+', "-").replace('/', "_").trim_end_matches('=').to_owned(),
        hex.to_uppercase(),
        hex,
        numbers(bytes.iter().map(|byte| u32::from(*byte)).collect()),
        numbers(words.collect()),
    ]
}

fn shows(text: &str, bytes: &[u8; 32]) -> bool {
    shapes(bytes).iter().any(|shape| text.contains(shape))
}

/// Sets up node 1 with a neighbor, a borrower, a container, an unreachable target, a peer that it
/// rejects and a WireGuard device. Returns its `inspect` document.
fn busy_node(lab: &Lab) -> Result<Value> {
    let [a, b, c, stranger] = lab.hosts() else { unreachable!() };
    launch(lab, a)?;
    launch(lab, b)?;
    c.overnode(&["launch", "--id", "5", "--token", TOKEN, "host1", "host2"])?.success()?;
    stranger
        .overnode(&["launch", "--id", "9", "--token", "another-password", "host1"])?
        .success()?;
    a.overnode(&["connect", "nowhere.invalid"])?.success()?;
    let file = lab.folder().join("psk");
    std::fs::write(&file, PublicKey(PRESHARED_KEY).to_string())?;
    let device = key::public_key(&key::new_secret()?).to_string();
    let (file, network) = (file.to_string_lossy(), "10.32.100.1/32");
    let words = ["peer", "add", &device, "--allowed-ips", network, "--preshared-key-file", &file];
    a.overnode(&[&words[..], &["--keepalive", "25", "--name", "laptop"]].concat())?.success()?;
    a.overnode(&["dns-add", "printer", "192.0.2.9"])?.success()?;
    let (one, five) = (attached(a, "one")?, attached(c, "five")?);
    one.reach(five.address(), TIMEOUT)?;
    eventually(TIMEOUT, || {
        ensure!(
            peer(a, 2)?.is_some_and(|it| it["data"]["route"].is_object()),
            "no route to node 2 yet"
        );
        let document = a.inspect()?;
        let loans = document["status"]["ipam"]["loans"].as_array().context("no loans")?;
        ensure!(loans.iter().any(|loan| loan["borrower"] == 5), "no loan to node 5 yet: {loans:?}");
        let connections = document["status"]["connections"].as_array().context("no connections")?;
        ensure!(
            connections.iter().any(|it| it["state"] == "failed"),
            "the rejected node has not dialed yet"
        );
        Ok(document)
    })
}

#[test]
fn inspect_prints_what_its_page_describes_and_no_secret() -> Result<()> {
    in_lab(Lab::new("inspect").hosts(4), |lab| {
        let a = lab.host(1);
        let document = busy_node(lab)?;
        let documented = documented()?;
        let mut printed = BTreeMap::new();
        fields("", &document, &mut printed);
        let missing: Vec<_> = printed.keys().filter(|field| !documented.contains(*field)).collect();
        ensure!(missing.is_empty(), "docs/reference/inspect.md does not have {missing:?}");
        // The page describes no other fields, except those that this node does not have.
        let absent: Vec<_> = documented
            .iter()
            .filter(|field| !printed.contains_key(*field))
            .filter(|field| {
                !["via", "message", "seconds_ago"].iter().any(|name| field.ends_with(name))
                    && !NOT_HERE.iter().any(|place| field.starts_with(place))
            })
            .collect();
        ensure!(
            absent.is_empty(),
            "docs/reference/inspect.md has {absent:?}, which is not printed"
        );

        let text = format!("{document}{}", a.status()?);
        let mut secrets = session_keys(a)?;
        ensure!(secrets.len() >= 4, "only {} session keys were found", secrets.len());
        a.kill_daemon()?;
        let store = eventually(TIMEOUT, || Ok(Store::open_existing(&a.state_directory())?))?;
        let identity = store.identity()?.context("no identity")?;
        drop(store);
        let own = key::public_key(&identity.exchange_secret());
        ensure!(
            shows(&text, &own.0),
            "the search does not find the public key, so it would not find a secret"
        );
        secrets.extend([identity.seed.0, identity.cluster_key.0, PRESHARED_KEY]);
        secrets.extend([key::control_key(&identity.cluster_key).0, identity.exchange_secret().0]);
        for record in document["records"].as_array().context("no records")? {
            let other: PublicKey = record["public_key"].as_str().context("no key")?.parse()?;
            secrets.push(key::pair_key(&identity.cluster_key, &own, &other).0);
        }
        for (number, secret) in secrets.iter().enumerate() {
            ensure!(!shows(&text, secret), "secret {number} of {} is shown", secrets.len());
        }
        ensure!(!text.contains(TOKEN), "the token is shown");
        Ok(())
    })
}
