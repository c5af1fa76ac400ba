//! Implements `overnode inspect`.

use overnode_api::routes;

use crate::client::Client;
use crate::failure::Failure;
use crate::options::Context;
use crate::render;

/// Returns everything that the node knows, as JSON.
///
/// # Errors
/// Fails if the daemon is not running or refuses.
pub(super) async fn run(context: &Context) -> Result<String, Failure> {
    Ok(render::json(&Client::new(context).get::<routes::Inspect>().await?))
}
