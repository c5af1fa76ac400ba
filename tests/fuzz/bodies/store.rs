//! Fuzzes what is read from disk: arbitrary records, and a database with damaged bytes.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use overnode_core::attachment::{Attachment, EngineEndpoint, Owner};
use overnode_core::gossip::{Record, Signature};
use overnode_daemon::store::{DATABASE, ExternalPeer, Identity, Known, Store, StoreError};
use overnode_types::name::Named;
use overnode_types::text::is_harmless;
use overnode_types::{MacAddr, Network, NodeId, PeerIndex, PublicKey, Secret, VerifyingKey};
use redb::{Database, ReadableDatabase, TableDefinition};

use super::input::{Input, MAX_STEPS};

const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const ATTACHMENTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("attachments");
const ADDRESSES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("addresses");
const PEERS: TableDefinition<'_, u16, &[u8]> = TableDefinition::new("peers");
const EXTERNAL: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("external_peers");
/// Keys of the table `meta`.
const NAMES: [&str; 7] =
    ["identity", "schema", "cursor", "names", "docker_networks", "docker_default", "something"];

/// A database with an entry of each kind. It is made in memory if the system supports that, because
/// a commit waits for the disk.
static WHOLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let place = place();
    let store = Store::open(place.path()).expect("a new store");
    store.set_identity(&identity(), Some(&["host2".to_owned()])).expect("it can be written");
    store.add_attachment(&attachment()).expect("it can be written");
    store.set_external_peer(&external()).expect("it can be written");
    drop(store);
    fs::read(place.path().join(DATABASE)).expect("the database file exists")
});

fn place() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.expect("a directory")
}

/// Runs one input. The first byte selects the type of the rest.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input(data);
    let place = place();
    let file = place.path().join(DATABASE);
    match input.byte() {
        0 => {
            fs::write(&file, &*WHOLE).expect("a file");
            put(&file, &mut input);
            read_and_write_again(place.path());
        }
        1 => {
            let mut bytes = WHOLE.clone();
            damage(&mut bytes, &mut input);
            fs::write(&file, bytes).expect("a file");
            is_as_it_was_or_refused(place.path());
        }
        2 => {
            fs::write(&file, input.0).expect("a file");
            let _ = Store::open(place.path()).map_err(|error| words(&error));
        }
        _ => {}
    }
}

/// Puts values into the tables.
fn put(file: &Path, input: &mut Input<'_>) {
    let database = Database::open(file).expect("a database");
    let change = database.begin_write().expect("a transaction");
    for _ in 0..MAX_STEPS {
        let Some(kind) = input.step() else { break };
        let (key, value) = (input.short(), input.bytes());
        let text = key.to_string();
        let put = || -> Result<(), redb::Error> {
            match kind % 5 {
                0 => {
                    let name = NAMES[usize::from(key) % NAMES.len()];
                    change.open_table(META)?.insert(name, value)?;
                }
                1 => drop(change.open_table(ATTACHMENTS)?.insert(text.as_str(), value)?),
                2 => drop(change.open_table(ADDRESSES)?.insert(text.as_str(), value)?),
                3 => drop(change.open_table(PEERS)?.insert(key, value)?),
                _ => drop(change.open_table(EXTERNAL)?.insert(u32::from(key), value)?),
            }
            Ok(())
        };
        put().expect("a value");
    }
    change.commit().expect("it can be written");
}

/// Checks that values that can be read are written in a form that reads back as the same values,
/// and that errors are safe to display.
fn read_and_write_again(place: &Path) {
    let Ok(store) = Store::open(place).map_err(|error| words(&error)) else { return };
    let mut read = Vec::new();
    if let Ok(Some(identity)) = store.identity().map_err(|error| words(&error)) {
        store.set_identity(&identity, None).expect("it can be written");
        assert_eq!(store.identity().expect("it can still be read"), Some(identity));
    }
    if let Ok(attachments) = store.attachments().map_err(|error| words(&error)) {
        for attachment in &attachments {
            store.update_attachment(attachment).expect("it can be written");
        }
        read = attachments;
    }
    if let Ok(again) = store.attachments() {
        assert!(
            read.iter().all(|attachment| again.contains(attachment)) || read.len() > again.len()
        );
    }
    if let Ok(peers) = store.peers().map_err(|error| words(&error)) {
        store.set_peers(&peers).expect("they can be written");
        let again = store.peers().expect("it can still be read");
        assert!(again.iter().all(|record| peers.contains(record)));
    }
    if let Ok(peers) = store.external_peers().map_err(|error| words(&error)) {
        for peer in &peers {
            store.set_external_peer(peer).expect("it can be written");
        }
        let again = store.external_peers().expect("it can still be read");
        assert!(again.iter().all(|peer| peers.contains(peer)));
    }
    if let Ok(names) = store.names().map_err(|error| words(&error)) {
        store.set_names(&names).expect("they can be written");
        assert_eq!(store.names().expect("it can still be read"), names);
    }
    let _ = store.addresses().map_err(|error| words(&error));
    let _ = store.cursor().map_err(|error| words(&error));
    let _ = store.docker_networks().map_err(|error| words(&error));
    let _ = store.has_default_network().map_err(|error| words(&error));
    store.targets().expect("the targets are undamaged");
}

fn damage(bytes: &mut Vec<u8>, input: &mut Input<'_>) {
    for _ in 0..MAX_STEPS {
        let Some(high) = input.step() else { break };
        let at = (usize::from(high) << 16 | usize::from(input.short())) % bytes.len().max(1);
        match input.byte() {
            0 => bytes.truncate(at),
            change => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= change;
                }
            }
        }
    }
}

/// Checks that a damaged database is rejected or yields only correct data.
fn is_as_it_was_or_refused(place: &Path) {
    let Ok(store) = Store::open(place).map_err(|error| words(&error)) else { return };
    match store.identity() {
        // If everything is gone, the database is as empty as a new one.
        Ok(found) => assert!(found.is_none_or(|found| found == identity())),
        Err(error) => words(&error),
    }
    match store.attachments() {
        Ok(found) => assert!(found.iter().all(|found| *found == attachment())),
        Err(error) => words(&error),
    }
    match store.peers() {
        Ok(found) => assert!(found.is_empty(), "{found:?}"),
        Err(error) => words(&error),
    }
    match store.external_peers() {
        Ok(found) => assert!(found.iter().all(|found| *found == external())),
        Err(error) => words(&error),
    }
}

/// Checks an error that is displayed in a terminal.
fn words(error: &StoreError) {
    let text = error.to_string();
    assert!(text.len() < 2000, "{} bytes", text.len());
    assert!(text.chars().all(is_harmless), "{text:?}");
    assert!(matches!(error, StoreError::Damaged { .. } | StoreError::Schema { .. }), "{text}");
}

fn identity() -> Identity {
    Identity {
        id: NodeId::new(3).expect("in range"),
        instance: 7,
        seed: Secret([1; 32]),
        cluster_key: Secret([2; 32]),
        network: Network::default(),
        nickname: "host3".into(),
        interface: Some("eth1".into()),
        mtu: Some(1400),
        discovery: true,
        xdp: false,
        bulk: Default::default(),
        bulk_workers: Some(2),
        dns: true,
        dns_domain: Some("lab.example".into()),
        docker: true,
        incarnation: 1_700_000_000_000,
    }
}

fn attachment() -> Attachment {
    Attachment {
        owner: Owner::Docker {
            image: Some("nginx".into()),
            endpoint: Some(EngineEndpoint {
                network: "n1".into(),
                endpoint: "e1".into(),
                mac: MacAddr::new([2, 0, 0, 0, 0, 1]),
                joined: true,
            }),
            aliases: vec!["app".into()],
            is_unhealthy: true,
        },
        address: [10, 44, 0, 1].into(),
        is_static: false,
        target: "0123456789ab".into(),
        netns: "/run/docker/netns/1".into(),
        netns_inode: 4_026_532_000,
        name: Some("web".into()),
        host_interface: "ov0a2c0001".into(),
        since: 1_700_000_000,
    }
}

fn external() -> ExternalPeer {
    ExternalPeer {
        index: PeerIndex(4096),
        name: Some("phone".into()),
        public_key: PublicKey([8; 32]),
        preshared_key: Some(Secret([5; 32])),
        endpoint: Some("[2001:db8::1]:51820".parse().expect("an address")),
        allowed: vec!["10.32.9.9/32".parse().expect("a prefix")],
        keepalive: Some(25),
    }
}

/// Returns another node's record as it is stored.
fn peer() -> Vec<u8> {
    let id = NodeId::new(2).expect("in range");
    let record = Record {
        id,
        incarnation: 1,
        version: 7,
        left: false,
        nickname: "host".into(),
        public_key: PublicKey([1; 32]),
        addresses: vec!["192.0.2.1:6783".parse().expect("an address")],
        links: vec![NodeId::new(9).expect("in range")],
        no_direct_path: Vec::new(),
        ranges: vec!["10.40.0.0/15".parse().expect("a prefix")],
        claims: Vec::new(),
        names: vec![Named { name: "web".into(), address: [10, 32, 0, 1].into() }],
        verifying_key: VerifyingKey([2; 32]),
        signature: Signature([3; 64]),
    };
    let place = place();
    let store = Store::open(place.path()).expect("a new store");
    let standing = vec![("10.41.0.0/28".parse().expect("a prefix"), 3)];
    store.set_peers(&[Known { record, was_reached: true, standing }]).expect("it can be written");
    drop(store);
    let database = Database::open(place.path().join(DATABASE)).expect("a database");
    let read = database.begin_read().expect("a transaction");
    let value = read.open_table(PEERS).expect("a table").get(id.get()).expect("it can be read");
    value.expect("the entry exists").value().to_vec()
}

pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let put_bytes = |kind: u8, key: u16, value: &[u8]| {
        [&[0, kind], &key.to_le_bytes()[..], &Input::framed(value)].concat()
    };
    let put = |kind: u8, key: u16, value: &str| put_bytes(kind, key, value.as_bytes());
    let attachment = serde_json::to_string(&attachment()).expect("plain data always encodes");
    vec![
        ("attachment", put(1, 1, &attachment)),
        ("attachment-that-is-none", put(1, 1, r#"{"address":"ten"}"#)),
        ("peer", put_bytes(3, 2, &peer())),
        ("name", put(0, 3, r#"[{"name":"web","address":"10.40.0.1"}]"#)),
        ("cursor", put(0, 2, r#""10.40.0.7""#)),
        ("schema", put(0, 1, "2")),
        ("networks", put(0, 4, r#"["n1","n2"]"#)),
        ("epoch", put(2, 1, r#"{"Epoch":7}"#)),
        ("damaged", vec![1, 0, 0, 4, 1, 0, 200, 16, 3]),
        ("cut", vec![1, 1, 0, 0, 0]),
        ("file", b"\x02redb\x1a\x0a\xa9\x0d\x0a".to_vec()),
    ]
}
