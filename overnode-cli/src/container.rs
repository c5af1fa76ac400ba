//! Finds containers by running the engines' own commands, which apply the user's configuration.

use std::process::{Command, Stdio};

use crate::failure::Failure;

/// Commands of the supported engines.
const ENGINES: [&str; 2] = ["docker", "podman"];

/// A container that an engine knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Container {
    /// Full ID.
    pub id: String,
    /// Name.
    pub name: String,
    /// Process ID of its first process; `None` if the container is not running.
    pub pid: Option<u32>,
}

/// One engine's answer about a container.
enum Answer {
    Absent,
    NoSuch(String),
    Found(Container),
}

/// Finds a container by name or ID.
///
/// # Errors
/// Fails if no engine has the container, or if more than one has.
pub(crate) fn find(name: &str) -> Result<Container, Failure> {
    let mut found = Vec::new();
    let mut said = Vec::new();
    for engine in ENGINES {
        match ask(engine, name) {
            Answer::Absent => said.push(format!("{engine} is not installed")),
            Answer::NoSuch(why) => said.push(format!("{engine}: {why}")),
            Answer::Found(container) => found.push(container),
        }
    }
    match found.len() {
        0 => Err(Failure::failed(format_args!(
            "container {name:?} was not found: {}; to attach a network namespace, give netns:NAME, \
             netns:/path or pid:NUMBER",
            said.join(", ")
        ))),
        1 => Ok(found.remove(0)),
        _ => Err(Failure::failed(format_args!(
            "container {name:?} exists in {}: give its ID instead of its name",
            ENGINES.join(" and in ")
        ))),
    }
}

fn ask(engine: &str, name: &str) -> Answer {
    let output = Command::new(engine)
        .args([
            "inspect",
            "--type",
            "container",
            "--format",
            "{{.Id}} {{.State.Pid}} {{.Name}}",
            "--",
            name,
        ])
        .stdin(Stdio::null())
        .output();
    match output {
        Err(_) => Answer::Absent,
        Ok(output) => match parse(&String::from_utf8_lossy(&output.stdout)) {
            Some(container) if output.status.success() => Answer::Found(container),
            Some(_) | None => Answer::NoSuch(reason(&String::from_utf8_lossy(&output.stderr))),
        },
    }
}

fn parse(line: &str) -> Option<Container> {
    let mut fields = line.split_whitespace();
    let (id, pid, name) = (fields.next()?, fields.next()?, fields.next()?);
    // Docker's names begin with a slash.
    let name = name.trim_start_matches('/').to_owned();
    Some(Container { id: id.to_owned(), name, pid: pid.parse().ok().filter(|pid| *pid != 0) })
}

fn reason(stderr: &str) -> String {
    let line =
        stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no error message");
    line.trim_start_matches("Error: ").trim_start_matches("error: ").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_of_both_engines_is_parsed() {
        let docker = Container { id: "abc".into(), name: "web".into(), pid: Some(42) };
        assert_eq!(parse("abc 42 /web\n"), Some(docker.clone()));
        assert_eq!(parse("abc 42 web\n"), Some(docker.clone()));
        assert_eq!(parse("abc 0 /web\n"), Some(Container { pid: None, ..docker }));
        assert_eq!(parse("\n"), None);
    }

    #[test]
    fn the_last_line_of_an_error_is_the_reason() {
        assert_eq!(reason("warning\nError: no such object: x\n\n"), "no such object: x");
        assert_eq!(reason(""), "no error message");
    }
}
