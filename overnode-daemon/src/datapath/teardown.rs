//! Removes everything that a node created in the kernel, with or without a running daemon.

use std::path::Path;

use anyhow::{Context as _, Result};
use tracing::debug;

use super::bpffs::{Pin, Pins, node_name};
use super::endpoint::{detach_all, is_ours};
use super::interfaces::Netlink;
use super::{Datapath, alias_of};
use crate::failpoint;
use overnode_types::InterfaceIndex;

impl Datapath {
    /// Removes the interfaces, filters, programs, maps and pin directories of the node with this
    /// state directory. Needs neither a daemon nor the state directory itself. Continues after
    /// errors and returns all of them.
    ///
    /// A daemon that still holds a [`Datapath`] keeps its maps and programs in memory, unattached,
    /// until it drops it.
    pub async fn tear_down(state_dir: &Path) -> Vec<anyhow::Error> {
        let node = node_name(state_dir);
        let mut errors = Vec::new();
        let pins = match Pins::find(&node) {
            // A directory that another user owns holds nothing of this node.
            Ok(pins) => Some(pins).filter(Pins::are_ours),
            Err(error) => {
                errors.push(error);
                None
            }
        };
        errors.extend(match Netlink::open() {
            Ok(netlink) => remove_from_interfaces(&netlink, &node, pins.as_ref()).await,
            Err(error) => vec![error],
        });
        failpoint::reached("interfaces");
        if let Some(pins) = pins {
            errors
                .extend(pins.remove_everything().context("pinned objects cannot be removed").err());
        }
        errors
    }
}

async fn remove_from_interfaces(
    netlink: &Netlink,
    node: &str,
    pins: Option<&Pins>,
) -> Vec<anyhow::Error> {
    let links = match netlink.links().await {
        Ok(links) => links,
        Err(error) => return vec![error],
    };
    let alias = alias_of(node);
    let mut errors = Vec::new();
    for link in &links {
        if is_ours(link, &alias, node) {
            debug!(interface = link.name, "removing");
            // Deleting one end of a pair also deletes the other.
            errors.extend(netlink.delete(link.index).await.err());
            failpoint::reached("interface");
        } else if let Some(pins) = pins {
            errors.extend(detach_all(link, pins));
            if pins.is_there(&Pin::Qdisc { ifindex: link.index }) {
                errors.extend(remove_qdisc(netlink, link.index).await.err());
            }
        }
    }
    errors
}

/// Removes the clsact qdisc that this node added, unless other filters use it.
async fn remove_qdisc(netlink: &Netlink, ifindex: InterfaceIndex) -> Result<()> {
    if netlink.has_filters(ifindex).await? {
        return Ok(());
    }
    netlink.remove_clsact(ifindex).await
}
