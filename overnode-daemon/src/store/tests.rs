use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use super::*;
use overnode_core::attachment::Owner;
use overnode_types::{Network, PublicKey, VerifyingKey};

fn identity() -> Identity {
    Identity {
        id: NodeId::new(3).unwrap(),
        instance: 0x1234_5678_9abc_def0_0fed_cba9_8765_4321,
        seed: Secret(*b"static-secret-static-secret-stat"),
        cluster_key: Secret(*b"cluster-key-cluster-key-cluster-"),
        network: Network::default(),
        nickname: "host3".into(),
        interface: Some("eth1".into()),
        mtu: None,
        discovery: true,
        xdp: false,
        bulk: Default::default(),
        bulk_workers: None,
        dns: true,
        dns_domain: Some("lab.example".into()),
        docker: true,
        incarnation: 1_700_000_000_000,
    }
}

fn attachment(last: u8) -> Attachment {
    Attachment {
        owner: Owner::Netns,
        address: [10, 44, 0, last].into(),
        is_static: false,
        target: format!("netns:box{last}"),
        netns: format!("/run/netns/box{last}"),
        netns_inode: 4_026_532_000,
        name: None,
        host_interface: format!("ov{last:08x}"),
        since: 1_700_000_000,
    }
}

fn external(secret: Option<u8>) -> ExternalPeer {
    ExternalPeer {
        index: PeerIndex(4096),
        name: Some("phone".into()),
        public_key: PublicKey([8; 32]),
        preshared_key: secret.map(|byte| Secret([byte; 32])),
        endpoint: Some("[2001:db8::1]:51820".parse().unwrap()),
        allowed: vec!["10.32.9.9/32".parse().unwrap()],
        keepalive: Some(25),
    }
}

fn record(id: u16) -> overnode_core::gossip::Record {
    overnode_core::gossip::Record {
        id: NodeId::new(id).unwrap(),
        incarnation: 1,
        version: 7,
        left: false,
        nickname: "host".into(),
        public_key: PublicKey([1; 32]),
        addresses: vec!["192.0.2.1:6783".parse().unwrap()],
        links: vec![NodeId::new(9).unwrap()],
        no_direct_path: Vec::new(),
        ranges: vec!["10.40.0.0/15".parse().unwrap()],
        claims: vec!["10.32.0.1".parse().unwrap()],
        names: vec![Named { name: "web".into(), address: "10.32.0.1".parse().unwrap() }],
        verifying_key: VerifyingKey([2; 32]),
        signature: overnode_core::gossip::Signature([3; 64]),
    }
}

fn known(id: u16) -> Known {
    let standing = vec![
        ("10.41.0.0/24".parse().unwrap(), u64::from(id)),
        ("10.32.0.1/32".parse().unwrap(), 9),
    ];
    Known { record: record(id), was_reached: id == 1, standing }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn everything_survives_a_restart() {
    let folder = TempDir::new().unwrap();
    let directory = folder.path().join("a/state");
    let store = Store::open(&directory).unwrap();
    assert_eq!(store.identity().unwrap(), None);
    assert_eq!(store.next_incarnation().unwrap(), None);
    store.set_identity(&identity(), Some(&["host2".into(), "host1".into()])).unwrap();
    store.add_attachment(&attachment(1)).unwrap();
    store.add_attachment(&attachment(20)).unwrap();
    store.add_attachment(&attachment(3)).unwrap();
    let by_hand = Attachment { address: [10, 32, 0, 1].into(), is_static: true, ..attachment(4) };
    store.add_attachment(&by_hand).unwrap();
    store.set_peers(&[known(1), known(4095)]).unwrap();
    store.set_external_peer(&external(Some(5))).unwrap();
    drop(store);

    let store = Store::open_existing(&directory).unwrap();
    assert_eq!(store.identity().unwrap(), Some(identity()));
    assert_eq!(
        store.targets().unwrap(),
        ["host2", "host1"],
        "in the order in which they were added"
    );
    assert_eq!(
        store.attachments().unwrap(),
        [by_hand, attachment(1), attachment(3), attachment(20)]
    );
    assert_eq!(
        store.cursor().unwrap(),
        Some([10, 44, 0, 3].into()),
        "the last one allocated, neither the greatest nor a static one"
    );
    assert_eq!(store.peers().unwrap(), [known(1), known(4095)]);
    assert_eq!(store.external_peers().unwrap(), [external(Some(5))]);
    assert_eq!(store.next_incarnation().unwrap(), Some(identity().incarnation + 1));
    assert_eq!(store.next_incarnation().unwrap(), Some(identity().incarnation + 2));
    assert_eq!(store.targets().unwrap().len(), 2, "an incarnation changes nothing else");

    store.set_targets(&["host9".into()]).unwrap();
    store.remove_peer(NodeId::new(1).unwrap()).unwrap();
    store.set_external_peer(&external(None)).unwrap();
    assert!(store.remove_attachment([10, 44, 0, 20].into()).unwrap());
    assert!(!store.remove_attachment([10, 44, 0, 20].into()).unwrap());
    drop(store);
    let store = Store::open(&directory).unwrap();
    assert_eq!(store.targets().unwrap(), ["host9"]);
    assert_eq!(store.peers().unwrap(), [known(4095)]);
    assert_eq!(store.external_peers().unwrap(), [external(None)]);
    assert!(store.remove_external_peer(PeerIndex(4096)).unwrap());
    assert!(!store.remove_external_peer(PeerIndex(4096)).unwrap());
    assert_eq!(store.attachments().unwrap().len(), 3);
}

#[test]
fn an_address_cannot_be_attached_twice() {
    let folder = TempDir::new().unwrap();
    let store = Store::open(folder.path()).unwrap();
    store.add_attachment(&attachment(1)).unwrap();
    let other = Attachment { target: "netns:other".into(), ..attachment(1) };
    let error = store.add_attachment(&other).unwrap_err();
    assert_eq!(error.to_string(), "10.44.0.1 is already attached; detach it first");
    assert_eq!(store.attachments().unwrap(), [attachment(1)]);
    store.update_attachment(&other).unwrap();
    assert_eq!(store.attachments().unwrap(), [other]);
}

#[test]
fn only_the_owner_can_read_the_state_whatever_the_umask() {
    let folder = TempDir::new().unwrap();
    let directory = folder.path().join("state");
    fs::create_dir(&directory).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(directory.join(LOCK), "").unwrap();
    fs::set_permissions(directory.join(LOCK), fs::Permissions::from_mode(0o666)).unwrap();
    let _store = Store::open(&directory).unwrap();
    assert_eq!(mode(&directory), 0o700);
    assert_eq!(mode(&directory.join(DATABASE)), 0o600);
    assert_eq!(mode(&directory.join(LOCK)), 0o600);
}

/// Needs root to give files to another user.
#[test]
fn a_directory_or_file_of_another_user_is_refused() {
    const OTHER_USER: u32 = 1000;
    let refused = |directory: &Path, what: &str| {
        for attempt in [Store::open(directory).map(drop), Store::wipe(directory)] {
            let why = attempt.unwrap_err();
            assert!(matches!(why, StoreError::Untrusted(_)), "{why}");
            assert!(
                why.to_string().contains(&format!("{what} belongs to user {OTHER_USER}")),
                "{why}"
            );
            assert!(why.to_string().contains("--state-dir"), "{why}");
        }
    };
    let folder = TempDir::new().unwrap();
    // The other user created the directory in advance and waits for files to appear in it.
    let theirs = folder.path().join("theirs");
    fs::create_dir(&theirs).unwrap();
    fs::write(theirs.join(DATABASE), "").unwrap();
    chown(&theirs, Some(OTHER_USER), None).unwrap();
    refused(&theirs, "theirs");
    // The other user left a file in a directory that was once writable for everyone.
    for file in [LOCK, DATABASE] {
        let open = folder.path().join(format!("open {file}"));
        fs::create_dir(&open).unwrap();
        fs::write(open.join(LOCK), "").unwrap();
        fs::write(open.join(file), "theirs").unwrap();
        chown(open.join(file), Some(OTHER_USER), None).unwrap();
        let why = Store::open(&open).unwrap_err().to_string();
        assert!(why.contains(&format!("{file} belongs to user {OTHER_USER}")), "{why}");
        assert_eq!(fs::read(open.join(file)).unwrap(), b"theirs");
    }
}

#[test]
fn secrets_are_neither_printed_nor_stored_as_json() {
    let shown = format!("{:?} {:?}", identity(), external(Some(5)));
    assert!(
        !shown.contains("static-secret") && !shown.contains("[5,") && shown.contains("Secret(..)"),
        "{shown}"
    );
    let folder = TempDir::new().unwrap();
    let store = Store::open(folder.path()).unwrap();
    store.set_external_peer(&external(Some(0x77))).unwrap();
    assert!(bytes_of(folder.path()).windows(32).any(|window| window == [0x77; 32]));
    let peer = encode(&external(Some(0x77)).public());
    assert!(!String::from_utf8(peer).unwrap().contains("preshared"));
}

fn bytes_of(directory: &Path) -> Vec<u8> {
    fs::read(directory.join(DATABASE)).unwrap()
}

#[test]
fn a_second_daemon_is_refused_and_told_which_process_runs() {
    let folder = TempDir::new().unwrap();
    let first = Store::open(folder.path()).unwrap();
    for attempt in [Store::open(folder.path()).map(drop), Store::wipe(folder.path())] {
        let text = attempt.unwrap_err().to_string();
        let expected = format!(
            "another daemon (process {}) uses {}",
            std::process::id(),
            folder.path().display()
        );
        assert!(text.starts_with(&expected), "{text}");
    }
    drop(first);
    Store::open(folder.path()).unwrap();
}

#[test]
fn state_of_another_version_is_refused_and_left_alone() {
    let (older, newer) = ((SCHEMA - 1).to_string(), (SCHEMA + 1).to_string());
    for found in [&*older, &*newer, "\"x\"", "garbage"] {
        let folder = TempDir::new().unwrap();
        let store = Store::open(folder.path()).unwrap();
        store.set_identity(&identity(), None).unwrap();
        store
            .change(|change| {
                Ok(change.open_table(META)?.insert("schema", found.as_bytes()).map(drop)?)
            })
            .unwrap();
        drop(store);
        let error = Store::open(folder.path()).unwrap_err();
        assert!(matches!(error, StoreError::Schema { .. }), "{error}");
        assert!(error.to_string().contains("overnode reset --force"), "{error}");
        let database = Database::open(folder.path().join(DATABASE)).unwrap();
        let table = database.begin_read().unwrap().open_table(META).unwrap();
        assert_eq!(table.get("schema").unwrap().unwrap().value(), found.as_bytes());
        assert!(table.get("identity").unwrap().is_some());
    }
}

#[test]
fn a_file_that_is_not_a_database_is_refused_and_left_alone() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join(DATABASE);
    // The last one has the first bytes of a redb database.
    let cut_off = b"redb\x1a\x0a\xa9\x0d\x0a".to_vec();
    for bytes in
        [b"not a database".repeat(1000), vec![0; 4096], vec![0xff; 100_000], b"x".to_vec(), cut_off]
    {
        fs::write(&path, &bytes).unwrap();
        let error = Store::open(folder.path()).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
    Store::wipe(folder.path()).unwrap();
    assert!(!folder.path().exists());
}

#[test]
fn a_damaged_database_is_an_error_and_never_wrong_data() {
    let folder = TempDir::new().unwrap();
    let store = Store::open(folder.path()).unwrap();
    store.set_identity(&identity(), Some(&["host2".into()])).unwrap();
    drop(store);
    let path = folder.path().join(DATABASE);
    let good = fs::read(&path).unwrap();
    let mut refused = 0;
    for position in (0..good.len()).step_by(good.len() / 150) {
        let mut bad = good.clone();
        bad[position] ^= 0xff;
        bad[position ^ 1] ^= 0x55;
        fs::write(&path, &bad).unwrap();
        match Store::open(folder.path()).and_then(|store| store.identity()) {
            Ok(read) => assert_eq!(read, Some(identity()), "byte {position}"),
            Err(error) => {
                assert!(
                    matches!(error, StoreError::Damaged { .. } | StoreError::Schema { .. }),
                    "{error}"
                );
                refused += 1;
            }
        }
    }
    assert!(refused > 0);
}

#[test]
fn unusable_directories_are_explained() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let text = Store::open(&file).unwrap_err().to_string();
    assert!(text.contains("use a --state-dir that is a directory"), "{text}");
    let text = Store::open(&file.join("below")).unwrap_err().to_string();
    assert!(text.contains("use a --state-dir that is a directory"), "{text}");

    let text = Store::open(folder.path()).unwrap_err().to_string();
    assert!(text.contains("contains other files, but no state of overnode"), "{text}");
    assert_ne!(mode(folder.path()), 0o000);
    assert!(file.exists());

    let text = Store::open_existing(&folder.path().join("none")).unwrap_err().to_string();
    assert!(text.contains("`overnode launch` creates it"), "{text}");
    assert!(!folder.path().join("none").exists());

    let text = Store::open(Path::new("/proc/overnode")).unwrap_err().to_string();
    assert!(text.starts_with("could not create the state directory /proc/overnode: "), "{text}");

    let trap = folder.path().join("trap");
    fs::create_dir(&trap).unwrap();
    symlink(&file, trap.join(LOCK)).unwrap();
    assert!(Store::open(&trap).is_err(), "a link is not followed");
    assert_eq!(fs::read(&file).unwrap(), b"");
}

#[test]
fn destroying_the_state_removes_it_and_nothing_else() {
    let folder = TempDir::new().unwrap();
    let directory = folder.path().join("state");
    Store::open(&directory).unwrap().destroy().unwrap();
    assert!(!directory.exists());
    Store::wipe(&directory).unwrap();
    let store = Store::open(&directory).unwrap();
    fs::write(directory.join("notes"), "mine").unwrap();
    store.destroy().unwrap();
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "files of others are kept");
}

/// This test runs itself in a child process and kills it.
#[test]
fn acknowledged_attachments_survive_sigkill() {
    const DIRECTORY_VARIABLE: &str = "OVERNODE_TEST_STORE";
    if let Some(directory) = std::env::var_os(DIRECTORY_VARIABLE) {
        write_until_killed(Path::new(&directory));
    }
    let folder = TempDir::new().unwrap();
    let mut known = 0;
    for round in 0..6 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "store::tests::acknowledged_attachments_survive_sigkill",
                "--exact",
                "--nocapture",
            ])
            .env(DIRECTORY_VARIABLE, folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut answered = known;
        while answered < known + 5 + round {
            let line = lines.next().unwrap().unwrap();
            answered = line.trim_start_matches("answered ").parse().unwrap_or(answered);
        }
        child.kill().unwrap();
        for line in lines.map_while(std::result::Result::ok) {
            answered = line.trim_start_matches("answered ").parse().unwrap_or(answered);
        }
        child.wait().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let kept = store.attachments().unwrap();
        assert!(
            kept.len() == answered || kept.len() == answered + 1,
            "{} kept, {answered} answered",
            kept.len()
        );
        assert_eq!(
            store.cursor().unwrap(),
            kept.last().map(|last| last.address),
            "two tables, one transaction"
        );
        known = kept.len();
    }
    assert!(known >= 45);
}

#[expect(clippy::print_stdout, reason = "the parent reads it")]
fn write_until_killed(directory: &Path) -> ! {
    let store = Store::open(directory).unwrap();
    let mut count = store.attachments().unwrap().len();
    loop {
        count += 1;
        let address = std::net::Ipv4Addr::from_bits(0x0a2c_0000 + count as u32).into();
        store.add_attachment(&Attachment { address, ..attachment(0) }).unwrap();
        println!("answered {count}");
    }
}

/// Until `exec`, a child process has its parent's locks.
#[test]
fn a_store_can_be_reopened_while_child_processes_start() {
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                Command::new("/bin/true").status().unwrap();
            }
        });
        let folder = TempDir::new().unwrap();
        let outcome: Result<()> = (0..150).try_for_each(|_| Store::open(folder.path()).map(drop));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        outcome.unwrap();
    });
}
