//! Implements `overnode attach`, `overnode detach`, `overnode expose` and `overnode hide`.

use overnode_api::{self as api, Attached, Netns, Target, routes};

use super::require_root;
use crate::client::Client;
use crate::container;
use crate::failure::Failure;
use crate::options::{Attach, Context, Detach, Expose};

/// Attaches a network namespace.
///
/// # Errors
/// Fails if the container does not exist or is not running, or the daemon is not running or
/// refuses.
pub(super) async fn attach(context: &Context, wanted: Attach) -> Result<String, Failure> {
    require_root("attach")?;
    let mut request = api::Attach {
        target: wanted.target,
        netns: None,
        address: wanted.ip,
        name: wanted.name,
        cni: None,
    };
    if let Target::Container(name) = &request.target {
        let container = container::find(name)?;
        let Some(pid) = container.pid else {
            return Err(Failure::failed(format_args!(
                "container {name:?} is not running: start it, then attach it"
            )));
        };
        request.netns = Some(Netns::Pid(pid));
        request.name = request
            .name
            .or_else(|| api::check_name(&container.name).is_ok().then_some(container.name));
        request.target = Target::Container(container.id);
    }
    let attached: Attached = Client::new(context).post::<routes::Attach>(&request).await?;
    Ok(format!("{}\n", attached.address))
}

/// Detaches a network namespace.
///
/// # Errors
/// Fails if nothing of that name is attached, or the daemon is not running or refuses.
pub(super) async fn detach(context: &Context, wanted: Detach) -> Result<String, Failure> {
    require_root("detach")?;
    let target = match wanted.target {
        // A container that its engine no longer knows can still be detached by its name or full ID.
        Target::Container(name) => match container::find(&name) {
            Ok(container) => Target::Container(container.id),
            Err(_) => Target::Container(name),
        },
        target @ (Target::Name(_) | Target::Path(_) | Target::Process(_) | Target::Host) => target,
    };
    Client::new(context).post::<routes::Detach>(&api::Detach { target, cni: None }).await?;
    Ok(String::new())
}

/// Gives the host an address in the container network.
///
/// # Errors
/// Fails if the host already has another address, or the daemon is not running or refuses.
pub(super) async fn expose(context: &Context, wanted: Expose) -> Result<String, Failure> {
    require_root("expose")?;
    let request = api::Attach {
        target: Target::Host,
        netns: None,
        address: wanted.ip,
        name: wanted.name,
        cni: None,
    };
    let attached: Attached = Client::new(context).post::<routes::Attach>(&request).await?;
    Ok(format!("{}\n", attached.address))
}

/// Removes the host's address in the container network.
///
/// # Errors
/// Fails if the host has no address, or the daemon is not running or refuses.
pub(super) async fn hide(context: &Context) -> Result<String, Failure> {
    require_root("hide")?;
    Client::new(context)
        .post::<routes::Detach>(&api::Detach { target: Target::Host, cni: None })
        .await?;
    Ok(String::new())
}
