//! `overnode inspect`

use crate::client::Client;
use crate::failure::Failure;
use crate::options::Context;
use crate::render;

/// Everything that the node knows.
///
/// # Errors
/// When the daemon does not run or refuses.
pub async fn run(context: &Context) -> Result<String, Failure> {
    Ok(render::json(&Client::new(context).get("/v1/inspect").await?))
}
