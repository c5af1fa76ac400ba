//! Formats the output for human readers.

mod event;
mod grid;
mod sections;
mod units;

use overnode_api::{ExternalPeerStatus, Status};
use serde_json::Value;

pub(crate) use event::event;
pub(crate) use grid::Style;

/// A section of `overnode status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Section {
    /// Shown by `--targets`.
    Targets,
    /// Shown by `--peers`.
    Peers,
    /// Shown by `--connections`.
    Connections,
    /// Shown by `--endpoints`.
    Endpoints,
    /// Shown by `--ipam`.
    Ipam,
    /// Shown by `--dns`.
    Dns,
    /// Shown by `--counters`.
    Counters,
}

impl Section {
    /// All sections, in the order in which they are shown.
    const ALL: [Self; 7] = [
        Self::Targets,
        Self::Peers,
        Self::Connections,
        Self::Endpoints,
        Self::Ipam,
        Self::Dns,
        Self::Counters,
    ];

    /// Returns the fields of the JSON document that belong to the section.
    pub(crate) const fn fields(self) -> &'static [&'static str] {
        match self {
            Self::Targets => &["targets"],
            Self::Peers => &["peers", "external_peers"],
            Self::Connections => &["connections"],
            Self::Endpoints => &["endpoints"],
            Self::Ipam => &["ipam"],
            Self::Dns => &["dns"],
            Self::Counters => &["counters"],
        }
    }

    const fn title(self) -> &'static str {
        match self {
            Self::Targets => "Targets",
            Self::Peers => "Peers",
            Self::Connections => "Connections",
            Self::Endpoints => "Endpoints",
            Self::Ipam => "Addresses",
            Self::Dns => "Names",
            Self::Counters => "Packets",
        }
    }
}

/// Formats the selected sections, or the node and all sections if none is selected.
pub(crate) fn status(status: &Status, named: &[Section], style: Style) -> String {
    if let [section] = named {
        return body(status, *section, true, style);
    }
    let mut text = if named.is_empty() {
        format!("{}\n{}", sections::health(status, style), sections::node(&status.node, style))
    } else {
        String::new()
    };
    for section in Section::ALL {
        if named.is_empty() || named.contains(&section) {
            let gap = if text.is_empty() { "" } else { "\n" };
            let body = body(status, section, !named.is_empty(), style);
            text = format!("{text}{gap}{}\n{body}", section.title());
        }
    }
    text
}

/// Formats WireGuard peers that are not nodes.
pub(crate) fn external_peers(peers: &[ExternalPeerStatus], style: Style) -> String {
    sections::external_peers(peers, style)
}

/// Formats a JSON document with indentation: machine-readable, but still legible.
pub(crate) fn json(document: &Value) -> String {
    format!("{document:#}\n")
}

/// Formats the body of a section. `detailed` is set if the user selected sections. Data that grows
/// faster than the cluster is shown only then.
fn body(status: &Status, section: Section, detailed: bool, style: Style) -> String {
    match section {
        Section::Targets => sections::targets(&status.targets, style),
        Section::Peers => sections::peers(status, detailed, style),
        Section::Connections => sections::connections(&status.connections, style),
        Section::Endpoints => sections::endpoints(&status.endpoints, style),
        Section::Ipam => sections::ipam(&status.ipam, detailed, style),
        Section::Dns => sections::dns(&status.dns, style),
        Section::Counters => sections::counters(&status.counters, style),
    }
}
