//! Runs every seed and every former finding through the body of its target, without a fuzzer.

mod bodies;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bodies::TARGETS;

/// Time limit for one input, for an unoptimized build on a busy machine.
const LONGEST: Duration = Duration::from_secs(20);
/// Maximum length of a seed in bytes.
const LONGEST_SEED: usize = 1024;

#[test]
fn every_seed_and_every_regression_passes() {
    for target in TARGETS {
        let mut seeds = 0;
        for folder in ["corpus", "regressions"] {
            for file in files(&folder_of(folder).join(target.name)) {
                let bytes = fs::read(&file).expect("a listed file");
                let started = Instant::now();
                if let Err(panic) = std::panic::catch_unwind(|| (target.body)(&bytes)) {
                    let _ = writeln!(std::io::stderr(), "{} panics", file.display());
                    std::panic::resume_unwind(panic);
                }
                assert!(
                    started.elapsed() < LONGEST,
                    "{} took {:?}",
                    file.display(),
                    started.elapsed()
                );
                seeds += usize::from(folder == "corpus");
            }
        }
        assert!(seeds > 0, "{} has no seeds", target.name);
    }
}

/// Checks that the files contain the current seeds. Writes them first if OVERNODE_WRITE_SEEDS is
/// set.
#[test]
fn the_seed_files_are_current() {
    for target in TARGETS {
        let folder = folder_of("corpus").join(target.name);
        let made: BTreeSet<_> = (target.seeds)().into_iter().collect();
        if std::env::var_os("OVERNODE_WRITE_SEEDS").is_some() {
            fs::create_dir_all(&folder).expect("a folder for seeds");
            for file in files(&folder) {
                fs::remove_file(file).expect("a listed file");
            }
            for (name, bytes) in &made {
                fs::write(folder.join(name), bytes).expect("a file for a seed");
            }
        }
        let kept: BTreeSet<_> = files(&folder)
            .into_iter()
            .map(|file| {
                let name = file.file_name().expect("a listed file").to_string_lossy().into_owned();
                (name, fs::read(&file).expect("a listed file"))
            })
            .collect();
        let made: BTreeSet<_> =
            made.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect();
        for (name, bytes) in &made {
            assert!(bytes.len() <= LONGEST_SEED, "{name} has {} bytes", bytes.len());
        }
        assert!(
            made == kept,
            "the wire format has changed: run this test with OVERNODE_WRITE_SEEDS=1"
        );
    }
}

fn folder_of(what: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(what)
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<_> =
        entries.map(|entry| entry.expect("a folder that can be read").path()).collect();
    files.sort();
    files
}
