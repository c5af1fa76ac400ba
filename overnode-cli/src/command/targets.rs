//! Implements `overnode connect` and `overnode forget`.

use overnode_api::{self as api, Targets, routes};

use super::{listed, require_root};
use crate::client::Client;
use crate::failure::Failure;
use crate::options::{Connect, Context, Forget};

/// Adds or replaces targets.
///
/// # Errors
/// Fails if the daemon is not running or refuses.
pub(super) async fn connect(context: &Context, wanted: Connect) -> Result<String, Failure> {
    require_root("connect")?;
    let request = api::Connect { hosts: wanted.hosts, replace: wanted.replace };
    Client::new(context).post::<routes::Connect>(&request).await.map(describe)
}

/// Removes targets.
///
/// # Errors
/// Fails if the daemon is not running or refuses.
pub(super) async fn forget(context: &Context, wanted: Forget) -> Result<String, Failure> {
    require_root("forget")?;
    Client::new(context)
        .post::<routes::Forget>(&api::Forget { hosts: wanted.hosts })
        .await
        .map(describe)
}

fn describe(targets: Targets) -> String {
    format!("targets: {}\n", listed(&targets.targets))
}
