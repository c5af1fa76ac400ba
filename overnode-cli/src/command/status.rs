//! Implements `overnode status`.

use overnode_api::routes;
use serde_json::Value;

use crate::client::Client;
use crate::failure::Failure;
use crate::options::{Context, Status};
use crate::render::{self, Section, Style};

/// Returns the selected sections of the status, or all of them if none is selected.
///
/// # Errors
/// Fails if the daemon is not running or refuses.
pub(super) async fn run(context: &Context, wanted: &Status) -> Result<String, Failure> {
    let client = Client::new(context);
    let sections = sections(wanted);
    if !wanted.json {
        let status = client.get::<routes::Status>().await?;
        return Ok(render::status(&status, &sections, Style::of(context)));
    }
    let mut document: Value = client.document::<routes::Status>().await?;
    if let Some(fields) = document.as_object_mut()
        && !sections.is_empty()
    {
        fields.retain(|name, _| {
            sections.iter().any(|section| section.fields().contains(&name.as_str()))
        });
    }
    Ok(render::json(&document))
}

fn sections(wanted: &Status) -> Vec<Section> {
    let named = [
        (wanted.targets, Section::Targets),
        (wanted.peers, Section::Peers),
        (wanted.connections, Section::Connections),
        (wanted.endpoints, Section::Endpoints),
        (wanted.ipam, Section::Ipam),
        (wanted.dns, Section::Dns),
        (wanted.counters, Section::Counters),
    ];
    named.into_iter().filter_map(|(named, section)| named.then_some(section)).collect()
}
