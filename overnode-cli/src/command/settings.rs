//! Implements `overnode set` and `overnode get`.

use overnode_api::{self as api, Settings, routes};

use super::require_root;
use crate::client::Client;
use crate::failure::Failure;
use crate::options::{Context, Get, Set};

/// Changes settings.
///
/// # Errors
/// Fails if a setting or a value is not possible, if the node does not start with them, or if the
/// daemon is not running.
pub(super) async fn set(context: &Context, wanted: Set) -> Result<String, Failure> {
    require_root("set")?;
    let request = api::Set { changes: wanted.changes.into_iter().collect() };
    let Settings { changed, .. } = Client::new(context).post::<routes::Set>(&request).await?;
    Ok(match &changed[..] {
        [] => "nothing to change: the node has these settings\n".to_owned(),
        _ => format!("the node runs with {}\n", changed.join(" ")),
    })
}

/// Returns the settings as text.
///
/// # Errors
/// Fails if there is no such setting, or if the daemon is not running.
pub(super) async fn get(context: &Context, wanted: &Get) -> Result<String, Failure> {
    let Settings { settings, .. } = Client::new(context).get::<routes::Get>().await?;
    let Some(key) = &wanted.key else {
        let line = |it: &api::Setting| {
            let note = if it.is_default { "" } else { "    # not the default" };
            format!("{}={}{note}\n", it.key, it.value)
        };
        return Ok(settings.iter().map(line).collect());
    };
    match settings.iter().find(|it| it.key == *key) {
        Some(found) => Ok(format!("{}\n", found.value)),
        None => {
            let keys: Vec<&str> = settings.iter().map(|it| it.key.as_str()).collect();
            Err(Failure::usage(format_args!(
                "there is no setting {key:?}: the settings are {}",
                keys.join(", ")
            )))
        }
    }
}
