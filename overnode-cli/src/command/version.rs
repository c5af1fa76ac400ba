//! Implements `overnode version`.

use overnode_api::{Version, routes};

use crate::client::{Client, RequestError};
use crate::failure::Failure;
use crate::options::Context;

/// Returns the versions of this command and of the daemon, if it answers.
///
/// # Errors
/// Never fails. The text says if the daemon does not answer.
pub(super) async fn run(context: &Context) -> Result<String, Failure> {
    let client = Client::new(context);
    let daemon = match client.try_get::<routes::Version>().await {
        Ok(version) => describe(&version),
        Err(RequestError::NotRunning) => "not running".to_owned(),
        Err(RequestError::Denied) => "unknown: only root may query it".to_owned(),
        Err(
            why @ (RequestError::Stranger(_) | RequestError::Refused(_) | RequestError::Broken(_)),
        ) => client.explain(why).to_string(),
    };
    Ok(format!("overnode   {}\novernoded  {daemon}\n", env!("CARGO_PKG_VERSION")))
}

fn describe(version: &Version) -> String {
    let mut text = format!("{}, process {}", version.version, version.pid);
    if let Some((oldest, newest)) = version.protocols {
        let protocols =
            if oldest == newest { newest.to_string() } else { format!("{oldest} to {newest}") };
        text = format!("{text}, protocol {protocols}");
    }
    if let Some(kernel) = &version.kernel {
        text = format!("{text}, kernel {kernel}");
    }
    text
}
