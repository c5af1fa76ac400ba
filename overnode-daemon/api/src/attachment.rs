//! The origin of an attachment.

use serde::{Deserialize, Serialize};

/// The origin of an attachment, which is also responsible for detaching it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// `overnode attach`.
    #[default]
    Netns,
    /// A Docker engine.
    Docker,
    /// A container runtime, through CNI.
    Cni,
    /// `overnode expose`: the endpoint is the host itself.
    Host,
}

/// A container runtime's identifiers for an attachment that it requested through CNI. The
/// attachment's target is the container's ID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CniEndpoint {
    /// The network's name.
    pub network: String,
    /// `CNI_IFNAME`. Together with the container's ID, it identifies an attachment.
    pub ifname: String,
    /// The interface in the container: `ifname`, unless another plugin created an interface with
    /// that name.
    pub interface: String,
}
