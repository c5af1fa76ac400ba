//! Tests of the package, built from the development build.

use std::path::Path;
use std::process::Command;

use super::build::Built;
use super::package::{self, Compression};
use super::*;

/// All files that the package installs, except for directories and the man pages of subcommands.
const CONTENT: [&str; 14] = [
    "-rw-r--r-- ./etc/default/overnode",
    "-rwxr-xr-x ./usr/bin/overnode",
    "-rwxr-xr-x ./usr/sbin/overnoded",
    "lrwxrwxrwx ./usr/lib/cni/overnode-cni -> ../../bin/overnode",
    "-rw-r--r-- ./usr/lib/systemd/system/overnode.service",
    "-rw-r--r-- ./usr/share/bash-completion/completions/overnode",
    "-rw-r--r-- ./usr/share/doc/overnode/changelog.gz",
    "-rw-r--r-- ./usr/share/doc/overnode/copyright",
    "-rw-r--r-- ./usr/share/doc/overnode/libraries.gz",
    "-rw-r--r-- ./usr/share/fish/vendor_completions.d/overnode.fish",
    "-rw-r--r-- ./usr/share/man/man1/overnode.1.gz",
    "-rw-r--r-- ./usr/share/man/man1/overnode-launch.1.gz",
    "-rw-r--r-- ./usr/share/man/man8/overnoded.8.gz",
    "-rw-r--r-- ./usr/share/zsh/vendor-completions/_overnode",
];
const SCRIPTS: [&str; 3] = ["postinst", "postrm", "prerm"];

fn workspace() -> Workspace {
    Workspace::find().expect("cargo finds the workspace")
}

/// Returns the development build, with a separate documents directory for the test.
fn built(test: &str) -> Built {
    build::development(&workspace(), scratch(&format!("{test}-documents")))
        .expect("overnode builds")
}

/// Creates a scratch directory. Tests are processes or threads of one process, so each test needs a
/// directory of its own.
fn scratch(name: &str) -> PathBuf {
    let folder =
        workspace().target.join("dist-test").join(format!("{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("the target directory is writable");
    folder
}

/// Removes a scratch directory when dropped, even if the test fails.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn the_package_contains_exactly_the_expected_files() {
    let workspace = workspace();
    let built = built("package");
    let documents = Scratch(built.documents.clone());
    let out = Scratch(scratch("package"));
    let release = Release { version: "1.2.3+4".into(), time: 1_700_000_000 };
    let make = || {
        let made = package::make(&workspace, &built, &release, &out.0, Compression::Fast)
            .expect("the package is built");
        let bytes = std::fs::read(&made.file).expect("the package can be read");
        (made, bytes)
    };
    let (made, first) = make();
    let (_, second) = make();
    assert!(first == second, "the same tree gives the same bytes");

    let listed = output(Command::new("dpkg-deb").arg("-c").arg(&made.file))
        .expect("dpkg-deb reads the package");
    let files: Vec<String> = listed
        .lines()
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            assert_eq!(words[1], "root/root", "{line}");
            assert!(words[3] <= "2023-11-14", "no file is newer than the commit: {line}");
            format!("{} {}", words[0], words[5..].join(" "))
        })
        .collect();
    for file in CONTENT {
        assert!(files.iter().any(|found| found == file), "{file} is missing from {files:#?}");
    }
    for found in files.iter().filter(|found| !found.starts_with('d')) {
        let is_page = found.contains("/man/man1/overnode-");
        assert!(is_page || CONTENT.contains(&found.as_str()), "{found} is not expected");
    }
    assert!(
        files
            .iter()
            .filter(|found| found.starts_with('d'))
            .all(|found| found.starts_with("drwxr-xr-x "))
    );

    let field = |name: &str| {
        output(Command::new("dpkg-deb").arg("-f").arg(&made.file).arg(name))
            .expect("the package has control fields")
            .trim()
            .to_owned()
    };
    assert_eq!(field("Version"), "1.2.3+4");
    assert!(field("Depends").contains("libc6 (>= "), "{}", field("Depends"));
    let control = out.0.join("control");
    output(Command::new("dpkg-deb").arg("-e").arg(&made.file).arg(&control))
        .expect("the package has maintainer scripts");
    let read =
        |name: &str| std::fs::read_to_string(control.join(name)).expect("the control file exists");
    assert_eq!(read("conffiles"), "/etc/default/overnode\n");
    assert!(read("md5sums").contains("  usr/bin/overnode\n"));
    drop(documents);
}

#[test]
fn the_scripts_are_valid_for_a_plain_shell() {
    for script in SCRIPTS {
        let file = workspace().root.join("dist/debian").join(script);
        output(Command::new("sh").arg("-n").arg(file)).expect(script);
    }
}

#[test]
fn man_pages_render_and_completions_know_every_command() {
    let built = built("pages");
    let documents = Scratch(built.documents.clone());
    let help = output(Command::new(built.programs.join("overnode")).arg("--help"))
        .expect("overnode prints its help");
    let commands: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|command| *command != "help")
        .collect();
    assert!(commands.contains(&"launch") && commands.contains(&"peer"), "{commands:?}");
    let read = |name: &str| std::fs::read_to_string(documents.0.join(name)).expect(name);
    let completions =
        ["overnode.bash", "_overnode", "overnode.fish"].map(|name| (name, read(name)));
    for command in &commands {
        assert!(
            documents.0.join(format!("overnode-{command}.1")).is_file(),
            "{command} has no man page"
        );
        for (name, text) in &completions {
            assert!(text.contains(command), "{name} does not know {command}");
        }
    }
    check_shells(&documents.0);
    let mut pages = 0;
    for entry in std::fs::read_dir(&documents.0).expect("the documents exist") {
        let file = entry.expect("the directory can be listed").path();
        if file.extension().is_some_and(|extension| extension == "1" || extension == "8") {
            let mut man = Command::new("man");
            man.args(["--local-file", "--warnings=w"])
                .arg(&file)
                .env("LC_ALL", "C.UTF-8")
                .env("MANWIDTH", "100");
            let said = man.output().expect("man is installed");
            let text = String::from_utf8_lossy(&said.stdout).into_owned();
            let complaints = String::from_utf8_lossy(&said.stderr).into_owned();
            assert!(
                said.status.success() && complaints.is_empty(),
                "{}: {complaints}",
                file.display()
            );
            for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "SEE ALSO"] {
                assert!(
                    text.lines().any(|line| line == section),
                    "{} has no {section}",
                    file.display()
                );
            }
            pages += 1;
        }
    }
    assert!(
        pages > commands.len(),
        "{pages} pages for {} commands, the program and its daemon",
        commands.len()
    );
}

fn check_shells(folder: &Path) {
    for (shell, file) in
        [("bash", "overnode.bash"), ("zsh", "_overnode"), ("fish", "overnode.fish")]
    {
        output(Command::new(shell).arg("-n").arg(folder.join(file))).expect(shell);
    }
}

#[test]
fn the_unit_is_valid_and_hardened() {
    let unit = workspace().root.join("dist/overnode.service");
    let level = exposure(&workspace()).expect("systemd-analyze rates the unit");
    let number: f32 = level.split(' ').nth(3).and_then(|word| word.parse().ok()).expect(&level);
    assert!(number < 4.0, "{level}");
    // The program itself need not be installed on this machine.
    let verified = Command::new("systemd-analyze").arg("verify").arg("--man=no").arg(unit).output();
    let said = verified.expect("systemd-analyze is installed");
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    let complaints: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("overnode.service") && !line.contains("overnoded"))
        .collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
}

#[test]
fn version_suffixes_follow_debians_rules() {
    assert_eq!(suffix("+2~rc.1"), Ok("+2~rc.1".into()));
    for wrong in ["-1", "+a b", "_", "/"] {
        assert!(suffix(wrong).is_err());
    }
}
