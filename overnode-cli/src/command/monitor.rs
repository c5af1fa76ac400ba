//! Implements `overnode monitor`.

use std::io::{self, IsTerminal, Write};

use overnode_api::{EventKind, MonitorEvent, routes};
use tokio::signal::unix::{SignalKind, signal};

use crate::client::{Client, RequestError};
use crate::failure::Failure;
use crate::options::{Context, Monitor};
use crate::render;

/// Prints events until the given time is over, a signal arrives or the reader closes the pipe.
///
/// # Errors
/// Fails if the daemon is not running, refuses or ends, or if standard output cannot be written.
pub(super) async fn run(context: &Context, wanted: &Monitor) -> Result<String, Failure> {
    let no_signal = |error| Failure::failed(format_args!("cannot listen for signals: {error}"));
    let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signal)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(no_signal)?;
    let end = async {
        match wanted.limit {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        ended = watch(context, wanted) => ended?,
        () = end => {}
        _ = interrupt.recv() => {
            if io::stdout().is_terminal() {
                // Start a new line after the `^C` that the terminal shows.
                let _ = writeln!(io::stdout());
            }
        }
        _ = terminate.recv() => {}
    }
    Ok(String::new())
}

/// Prints events. Returns when the reader closes the pipe.
async fn watch(context: &Context, wanted: &Monitor) -> Result<(), Failure> {
    let client = Client::new(context);
    let mut lines = client.lines(routes::MONITOR).await.map_err(|why| client.explain(why))?;
    loop {
        let line = match lines.next().await {
            Ok(Some(line)) => line,
            // A killed daemon breaks the connection.
            Ok(None) | Err(RequestError::Broken(_)) => {
                return Err(Failure::failed(
                    "the daemon has stopped: start it again with `overnode resume`, unless the \
                     node was reset",
                ));
            }
            Err(why) => return Err(client.explain(why)),
        };
        let event: MonitorEvent = serde_json::from_slice(&line).map_err(|error| {
            Failure::failed(format_args!(
                "the daemon's answer cannot be decoded: {error}; it may have another version than \
                 this command ({})",
                env!("CARGO_PKG_VERSION")
            ))
        })?;
        if !is_wanted(wanted, &event.what) {
            continue;
        }
        let text = if wanted.json {
            let mut line = line;
            line.push(b'\n');
            line
        } else {
            render::event(&event, context.color).into_bytes()
        };
        let mut stdout = io::stdout().lock();
        match stdout.write_all(&text).and_then(|()| stdout.flush()) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(Failure::failed(format_args!("standard output: {error}"))),
        }
    }
}

/// Returns whether an event is shown. Both drops and other events are shown unless only one kind is
/// selected. A reason selects drops. Events about the monitor itself are always shown.
fn is_wanted(wanted: &Monitor, what: &EventKind) -> bool {
    let all = !wanted.drops && !wanted.events;
    let drops = wanted.drops || !wanted.reason.is_empty() || all;
    let events = wanted.events || (all && wanted.reason.is_empty());
    let is_asked_for =
        |reason: &String| drops && (wanted.reason.is_empty() || wanted.reason.contains(reason));
    match what {
        EventKind::Watching(_) | EventKind::Missed { .. } => true,
        EventKind::Drop(dropped) => is_asked_for(&dropped.reason),
        EventKind::DropsNotShown { reason, .. } => is_asked_for(reason),
        _ => events,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::options::{Cli, Command};

    #[test]
    fn only_the_selected_events_are_shown() {
        let shown = |line: &str| {
            let cli =
                Cli::try_parse_from(format!("overnode monitor {line}").split_whitespace()).unwrap();
            let Command::Monitor(wanted) = cli.command else { panic!("not `monitor`") };
            let not_shown =
                |reason: &str| EventKind::DropsNotShown { reason: reason.to_owned(), count: 1 };
            let all = [
                not_shown("spoofed"),
                not_shown("no-route"),
                EventKind::Problem { problem: String::new() },
                EventKind::Missed { count: 1 },
            ];
            all.map(|what| is_wanted(&wanted, &what))
        };
        assert_eq!(shown(""), [true, true, true, true]);
        assert_eq!(shown("--drops"), [true, true, false, true]);
        assert_eq!(shown("--events"), [false, false, true, true]);
        assert_eq!(shown("--drops --events"), [true, true, true, true]);
        assert_eq!(shown("--reason spoofed"), [true, false, false, true]);
        assert_eq!(shown("--reason spoofed --reason no-route"), [true, true, false, true]);
        assert_eq!(shown("--reason spoofed --events"), [true, false, true, true]);
    }
}
